"""Validation on fixed crops, pooled, and on whole volumes, each by itself: foreground Dice and the threshold that
serves it best.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_neuro.core import distributed
from hpc_neuro.core.constants import UNLABELLED
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.types import Batch
from hpc_neuro.data.dataset import read_crop, stack_samples
from hpc_neuro.data.store import Store

_BINS = 1000  # of probability; thresholds are multiples of 1 / _BINS
_GRID = tuple(range(100, 901, 25))  # thresholds tried, in bins: 0.1 to 0.9
_COLLAPSED = 0.02  # predicted foreground below this share of the true one


@dataclass(frozen=True)
class Score:
    """Of crops pooled over ranks, of a volume, or the mean over volumes; voxels without a label do not count."""

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
        self._crops = [stack_samples([read_crop(store, *boxes[i])], [i]) for i in _mine(len(boxes))]

    def __call__(self, predict: Predict, device: torch.device) -> Score:
        """The same score on every rank."""
        counts = _counted([0] * self._count, lambda i: self._crops[i], predict, device)
        return score(counts[0])


class Volumes:
    """Whole volumes, cut into windows of the training crop's size that overlap by half; read anew each time.

    A voxel is scored once, by the window in whose middle it lies:

        |--------window--------|
              |---core----|
                    |--------window--------|
                          |---core----|
    """

    def __init__(self, store: Store, ids: Sequence[str], window: Shape) -> None:
        self._store, self._ids = store, list(ids)
        self._tiles = [(i, *tile) for i in ids for tile in _tiles(store[i].shape, window)]

    def __call__(self, predict: Predict, device: torch.device) -> tuple[Score, dict[str, Score]]:
        """(mean over the volumes, all at one threshold; each volume at its own); the same on every rank."""
        mine = _mine(len(self._tiles))
        groups = [self._ids.index(volume) for volume, _, _ in self._tiles]
        counts = _counted(groups, lambda i: self._read(*self._tiles[mine[i]]), predict, device)
        return score(counts), {volume: score(own) for volume, own in zip(self._ids, counts, strict=True)}

    def _read(self, volume: str, box: Box, core: Box) -> Batch:
        batch = stack_samples([read_crop(self._store, volume, box)], [0])
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
def _counted(groups: Sequence[int], take: Callable[[int], Batch], predict: Predict, device: torch.device) -> Tensor:
    """[groups, 2, bins + 1] voxels by truth and probability of items that belong to groups 0, 1 ..., over all ranks.

    `take(i)` is this rank's i-th item.
    """
    ranks, count = distributed.world_size(), len(groups)
    mine = groups[distributed.rank() :: ranks]
    counted = len(mine)
    counts = torch.zeros(max(groups) + 1, 2, _BINS + 1, dtype=torch.int64, device=device)
    # Every rank runs as many passes (ZeRO-3 meets inside each); one with fewer items repeats its last uncounted.
    for i in range(-(-count // ranks)):
        batch = take(min(i, max(counted - 1, 0))).to(device)
        probability = predict(batch).float().sigmoid()
        if i < counted:
            bins = (probability * _BINS).to(torch.int64)
            for truth in (0, 1):
                counts[mine[i], truth] += torch.bincount(bins[batch.mask == truth], minlength=_BINS + 1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts.cpu()


def score(counts: Tensor) -> Score:
    """[..., 2, bins + 1] voxels by truth and probability -> Score, the mean over what comes before the last two.

    Nothing true and nothing predicted is a Dice of 1.
    """
    above = counts.flip(-1).cumsum(-1).flip(-1).double().view(-1, 2, _BINS + 1)  # voxels of at least this probability
    false, true = above[:, 0], above[:, 1]  # [volumes, bins + 1]
    total, half = true[:, :1], _BINS // 2  # [volumes, 1]
    every = torch.where(false + true + total > 0, 2 * true / (false + true + total).clamp(min=1), 1.0)
    dice = every.mean(0)  # [bins + 1]
    best = max(_GRID, key=lambda i: (float(dice[i]), -abs(i - half)))
    hit, predicted, wanted = true[:, half], (false + true)[:, half], total[:, 0].clamp(min=1)  # [volumes]
    return Score(
        dice=float(dice[half]),
        precision=float((hit / predicted.clamp(min=1)).mean()),
        recall=float((hit / wanted).mean()),
        dice_best=float(dice[best]),
        threshold=best / _BINS,
        foreground=float((predicted / wanted).mean()),
    )
