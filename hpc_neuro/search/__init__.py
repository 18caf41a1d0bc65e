"""The verb `search`: a space of train configs, the study over it, and its results. `launch` runs the trials."""

from __future__ import annotations

from hpc_neuro.search.config import SearchConfig

__all__ = ["SearchConfig", "forecast", "run"]


def forecast(cfg: SearchConfig) -> list[str]:
    """Describe what will be tried, in lines."""
    from hpc_neuro.search import verb

    return verb.forecast(cfg)


def run(cfg: SearchConfig) -> int:
    """Write the report of the trials so far. Returns the exit code."""
    from hpc_neuro.search import verb

    return verb.run(cfg)
