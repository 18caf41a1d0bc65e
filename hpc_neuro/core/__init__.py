"""Vocabulary of the package: configs, geometry, trees, files, run folders, ranks. Imports nothing above it."""
