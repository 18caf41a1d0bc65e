"""Validation on fixed crops and on whole volumes: foreground Dice on pooled counts, and the threshold that serves it
best.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from hpc_neuro import distributed
from hpc_neuro.data.dataset import UNLABELLED, read, stack
from hpc_neuro.data.store import Store
from hpc_neuro.geometry import Box, Shape
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
    volumes: bool = True
    """At milestones (checkpoint.milestone) also score the whole volumes of the `val` split, all ranks together."""
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


Predict = Callable[[Batch], Tensor]
"""A batch of one -> logits [1, 1, Z, Y, X]."""


class Validator:
    """The crops of this rank, read once."""

    def __init__(self, store: Store, boxes: Sequence[tuple[str, Box]]) -> None:
        self._count = len(boxes)
        self._crops = [stack([read(store, *boxes[i])], [i]) for i in _mine(len(boxes))]

    def __call__(self, predict: Predict, device: torch.device) -> Score:
        """The same score on every rank."""
        return _pooled(self._count, lambda i: self._crops[i], predict, device)


class Volumes:
    """Whole volumes, cut into windows of the training crop's size that overlap by half; read anew each time.

    A voxel is scored once, by the window in whose middle it lies:

        |--------window--------|
              |---core----|
                    |--------window--------|
                          |---core----|
    """

    def __init__(self, store: Store, ids: Sequence[str], window: Shape) -> None:
        self._store = store
        self._tiles = [(i, *tile) for i in ids for tile in _tiles(store[i].shape, window)]

    def __call__(self, predict: Predict, device: torch.device) -> Score:
        """The same score on every rank."""
        mine = _mine(len(self._tiles))
        return _pooled(len(self._tiles), lambda i: self._read(*self._tiles[mine[i]]), predict, device)

    def _read(self, volume: str, box: Box, core: Box) -> Batch:
        batch = stack([read(self._store, volume, box)], [0])
        z, y, x = (slice(a - s, b - s) for a, b, s in zip(core.start, core.stop, box.start, strict=True))
        mask = torch.full_like(batch.mask, UNLABELLED)
        mask[:, :, z, y, x] = batch.mask[:, :, z, y, x]
        return replace(batch, mask=mask)


def _tiles(shape: Shape, window: Shape) -> list[tuple[Box, Box]]:
    """(window, core) for every core; windows stay within the volume where it is as large as they are."""
    axes = []
    for size, wide in zip(shape, window, strict=True):
        core = max(wide // 2, 1)
        starts = range(0, size, core)
        axes.append(
            [(min(max(s - (wide - core) // 2, 0), max(size - wide, 0)), s, min(s + core, size)) for s in starts]
        )
    found = []
    for z, y, x in itertools.product(*axes):
        core_box = Box((z[1], y[1], x[1]), (z[2], y[2], x[2]))
        found.append((Box.at((z[0], y[0], x[0]), window), core_box))
    return found


def _mine(count: int) -> list[int]:
    """Which of so many items are this rank's; one that is left without takes the first, uncounted."""
    return list(range(distributed.rank(), count, distributed.world_size())) or [0]


@torch.no_grad()
def _pooled(count: int, take: Callable[[int], Batch], predict: Predict, device: torch.device) -> Score:
    """Score of `count` items over all ranks; `take(i)` is this rank's i-th."""
    ranks, rank = distributed.world_size(), distributed.rank()
    counted = len(range(rank, count, ranks))
    counts = torch.zeros(2, _BINS + 1, dtype=torch.int64, device=device)  # background, neurite by probability
    # Every rank runs as many passes (ZeRO-3 meets inside each); one with fewer items repeats its last uncounted.
    for i in range(-(-count // ranks)):
        batch = take(min(i, max(counted - 1, 0))).to(device)
        probability = predict(batch).float().sigmoid()
        if i < counted:
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
