"""Checkpoints: how they are saved whole, found again, and read by any number of ranks."""
