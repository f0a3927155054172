"""What `assign_layout` asks: twins of operators in NHWC, predicted seconds, and the least of their sums."""
