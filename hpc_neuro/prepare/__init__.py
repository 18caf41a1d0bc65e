"""The verb `prepare`: raw volumes and their trees -> the training store: targets, splits, statistics, provenance.

OUT/dataset.json, OUT/ID.h5      see hpc_neuro.data.store
OUT/pictures/ID.png              three projections with the tree over the image, to be looked at
"""

from __future__ import annotations

from hpc_neuro.prepare.config import PrepareConfig, SplitConfig

__all__ = ["PrepareConfig", "SplitConfig", "forecast", "run"]


def forecast(cfg: PrepareConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    from hpc_neuro.prepare import verb

    return verb.forecast(cfg)


def run(cfg: PrepareConfig) -> int:
    """Write the store, or resume. Returns the exit code."""
    from hpc_neuro.prepare import verb

    return verb.run(cfg)
