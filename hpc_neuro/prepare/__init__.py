"""Raw volumes and their trees -> the training store: targets, splits, statistics, provenance.

OUT/dataset.json, OUT/ID.h5      see hpc_neuro.data.store
OUT/pictures/ID.png              three projections with the tree over the image, to be looked at
"""

from hpc_neuro.prepare.config import PrepareConfig, SplitConfig
from hpc_neuro.prepare.verb import forecast, run

__all__ = ["PrepareConfig", "SplitConfig", "forecast", "run"]
