"""The verb `train`: store + cache -> 3D student. Importing the package does not import torch."""

from __future__ import annotations

from hpc_neuro.train.config import TrainConfig

__all__ = ["TrainConfig", "forecast", "run"]


def forecast(cfg: TrainConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    from hpc_neuro.train import loop

    return loop.forecast(cfg)


def run(cfg: TrainConfig) -> int:
    """Train, or resume training. Returns the exit code."""
    from hpc_neuro.train import loop

    return loop.run(cfg)
