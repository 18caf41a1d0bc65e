"""Validation on fixed crops: foreground Dice on pooled counts, and the threshold that serves it best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from hpc_neuro import distributed
from hpc_neuro.data.dataset import read, stack
from hpc_neuro.data.store import Store
from hpc_neuro.geometry import Box
from hpc_neuro.schema import config
from hpc_neuro.types import Batch

_BINS = 1000  # of probability; thresholds are multiples of 1 / _BINS
_GRID = tuple(range(100, 901, 25))  # thresholds tried, in bins: 0.1 to 0.9
_COLLAPSED = 0.02  # predicted foreground below this share of the true one


@config
class ValidateConfig:
    """Validation on fixed crops of the `val` split, from step 0 on; crops of `train` when there is no such volume."""

    every: int = Field(default=250, ge=1)
    """[step] How often."""
    crops: int = Field(default=16, ge=1)
    """How many crops over all ranks: half around the centreline, half anywhere."""
    alarm: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps after which a model that predicts next to no foreground raises an alarm."""


@dataclass(frozen=True)
class Score:
    """Pooled over all crops and ranks; voxels without a label do not count."""

    dice: float  # foreground, at probability 0.5
    precision: float
    recall: float
    dice_best: float  # at `threshold`
    threshold: float  # best of 0.1, 0.125 ... 0.9
    foreground: float  # predicted foreground voxels at 0.5 / true ones

    @property
    def collapsed(self) -> bool:
        """Whether next to nothing is predicted, which a mean with background would hide."""
        return self.foreground < _COLLAPSED


class Validator:
    """The crops of this rank, read once."""

    def __init__(self, store: Store, boxes: Sequence[tuple[str, Box]]) -> None:
        ranks, rank = distributed.world_size(), distributed.rank()
        # Every rank runs as many passes (ZeRO-3 meets inside each); one with fewer crops repeats its last uncounted.
        mine = list(range(rank, len(boxes), ranks))
        self._passes = -(-len(boxes) // ranks)
        self._crops = [stack([read(store, *boxes[i])], [i]) for i in mine or [0]]
        self._counted = len(mine)

    @torch.no_grad()
    def __call__(self, predict: Callable[[Batch], Tensor], device: torch.device) -> Score:
        """predict: a batch of one -> logits [1, 1, Z, Y, X]. The same score on every rank."""
        counts = torch.zeros(2, _BINS + 1, dtype=torch.int64, device=device)  # background, neurite by probability
        for i in range(self._passes):
            batch = self._crops[min(i, len(self._crops) - 1)].to(device)
            probability = predict(batch).float().sigmoid()
            if i < self._counted:
                bins = (probability * _BINS).to(torch.int64)
                for truth in (0, 1):
                    counts[truth] += torch.bincount(bins[batch.mask == truth], minlength=_BINS + 1)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        return score(counts.cpu())


def score(counts: Tensor) -> Score:
    """[2, bins + 1] voxels by truth and probability -> Score. Nothing true and nothing predicted is a Dice of 1."""
    above = counts.flip(1).cumsum(1).flip(1).double()  # voxels with at least this probability
    false, true = above[0], above[1]
    total = float(true[0])
    dice = torch.where(false + true + total > 0, 2 * true / (false + true + total).clamp(min=1), 1.0)
    best = max(_GRID, key=lambda i: (float(dice[i]), -abs(i - _BINS // 2)))
    half = _BINS // 2
    predicted = float(false[half] + true[half])
    return Score(
        dice=float(dice[half]),
        precision=float(true[half]) / max(predicted, 1),
        recall=float(true[half]) / max(total, 1),
        dice_best=float(dice[best]),
        threshold=best / _BINS,
        foreground=predicted / max(total, 1),
    )
