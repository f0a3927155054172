"""Predicted latency, memory and bounds of a model on any device of the database."""
