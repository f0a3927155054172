"""Normal forms of what only moves elements: of any chain of reshapes and permutes, of rows, of channels."""
