"""Parts of `python -m tools.student.train`: the synthetic domain, its volumes on disk, and the card of the weights."""
