"""The verb `precompute`: a frozen 2D teacher looks at every slice of every volume, along each axis, once.

Alone, or as `mpiexec -n N hpc-neuro precompute ...`: work is cut into slabs of slices, ranks draw the next slab from
one shared counter, and each slab is one file, so the result does not depend on who made it.
"""

from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import plan
from hpc_neuro.precompute.verb import forecast, run

__all__ = ["PrecomputeConfig", "forecast", "plan", "run"]
