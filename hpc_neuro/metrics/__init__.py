"""How well masks and trees agree with the truth, by named definitions."""
