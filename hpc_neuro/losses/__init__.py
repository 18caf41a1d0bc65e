"""Segmentation losses and the tubular distillation loss: each is a config that is (or builds) the function."""

from hpc_neuro.losses.distill import Distill, Distiller, TubeSum
from hpc_neuro.losses.segmentation import (
    ClDice,
    CrossEntropy,
    Dice,
    Focal,
    Loss,
    SkeletonRecall,
    soft_skeleton,
    weighted_sum,
)

__all__ = [
    "ClDice",
    "CrossEntropy",
    "Dice",
    "Distill",
    "Distiller",
    "Focal",
    "Loss",
    "SkeletonRecall",
    "TubeSum",
    "soft_skeleton",
    "weighted_sum",
]
