"""The verb `history`: what led to a result, link by link, and which links no longer hold."""

from hpc_neuro.history.verb import HELP, main

__all__ = ["HELP", "main"]
