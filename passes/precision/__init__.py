"""What passes of precision ask: the forms of every operator, how 8 and 4 bits are stored, the least predicted cost."""
