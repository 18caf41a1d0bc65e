"""The verb `precompute`: a frozen 2D teacher computes features of every slice of every volume, along each axis, once.

It runs alone or as `mpiexec -n N hpc-neuro precompute ...`. The work is cut into slabs of slices. Ranks draw the next
slab from one shared counter and each slab is one file, so the result does not depend on the number of ranks.
"""

from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import plan_shards
from hpc_neuro.precompute.verb import forecast, run

__all__ = ["PrecomputeConfig", "forecast", "plan_shards", "run"]
