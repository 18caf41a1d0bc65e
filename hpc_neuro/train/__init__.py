"""The verb `train`: store + cache -> 3D student."""

from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.loop import forecast, run

__all__ = ["TrainConfig", "forecast", "run"]
