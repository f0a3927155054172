"""The dialect and the fx -> fx rewrites, one pass one file; rooms hold what passes ask.

Nothing is re-exported: a pass and its module share a name.
"""
