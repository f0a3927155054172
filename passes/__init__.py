"""The dialect and the fx -> fx rewrites, one pass one file.

Nothing is re-exported: a pass and its module share a name.
"""
