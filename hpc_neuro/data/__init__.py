"""Data in: volumes, trees, targets, the training store."""
