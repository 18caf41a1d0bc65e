"""Benchmarks: `python -m tools.bench.NAME`. The last line printed is one JSON object."""
