"""Sweeps: many trainings of one study, submitted, watched and compared."""
