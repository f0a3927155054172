"""Smaller numbers and fewer of them: calibration, 8 bits, quantisation-aware training, pruning."""
