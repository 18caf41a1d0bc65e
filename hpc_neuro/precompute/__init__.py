"""The verb `precompute`: a frozen 2D teacher computes features of every slice of every volume, along each axis, once.

It runs alone or as `mpiexec -n N hpc-neuro precompute ...`. The work is cut into slabs of slices. Ranks draw the next
slab from one shared counter and each slab is one file, so the result does not depend on the number of ranks.
Importing the package does not import torch.
"""

from __future__ import annotations

from hpc_neuro.precompute.config import PrecomputeConfig

__all__ = ["PrecomputeConfig", "forecast", "run"]


def forecast(cfg: PrecomputeConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    from hpc_neuro.precompute import verb

    return verb.forecast(cfg)


def run(cfg: PrecomputeConfig) -> int:
    """Compute the features, or resume. Returns the exit code."""
    from hpc_neuro.precompute import verb

    return verb.run(cfg)
