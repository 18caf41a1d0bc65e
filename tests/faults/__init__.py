"""Fault drills: kills, signals and lost ranks, run by hand or in short form by the tests."""
