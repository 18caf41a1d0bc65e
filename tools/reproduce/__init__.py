"""The reproduction kit: the comparisons of two papers on their data, for people who have the data."""
