"""Identities that `simplify` applies, in tables: what equals what, and why exactly."""
