"""Small programs people run by hand, from the repository: `python -m tools.NAME`."""
