"""Segmentation losses and tubular distillation. Importing the package does not import torch."""

from hpc_neuro.losses.config import Distill, View
from hpc_neuro.losses.segmentation import ClDice, CrossEntropy, Dice, Focal, Loss, SkeletonRecall, sum_losses

__all__ = [
    "ClDice",
    "CrossEntropy",
    "Dice",
    "Distill",
    "Focal",
    "Loss",
    "SkeletonRecall",
    "View",
    "sum_losses",
]
