"""Validation: foreground Dice and its best threshold, on fixed crops (pooled) and on whole volumes (each by itself).

Also the small pictures of the fixed crops that Weights & Biases shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hpc_neuro.core import distributed
from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.types import Batch
from hpc_neuro.data.dataset import read_crop, stack_samples
from hpc_neuro.data.store import Store

_BINS = 1000
"""Bins of probability; thresholds are multiples of 1 / _BINS."""

_THRESHOLDS = tuple(range(100, 901, 25))
"""[bin] Thresholds tried: 0.1 to 0.9."""

_COLLAPSED_SHARE = 0.02
"""Predicted foreground relative to the true one below which a model counts as collapsed."""

_PANEL_GAP = 2
"""[pixel] Gap between the panels of a picture."""

Predict = Callable[[Batch], Tensor]
"""A batch of one -> logits [1, 1, Z, Y, X]."""


@dataclass(frozen=True)
class ValidationScore:
    """Score of crops pooled over ranks, of a volume, or the mean over volumes; unlabeled voxels do not count."""

    dice: float
    """Of the foreground, at probability 0.5."""
    precision: float
    recall: float
    dice_best: float
    """At `threshold`."""
    threshold: float
    """Best of 0.1, 0.125 ... 0.9."""
    foreground: float
    """Predicted foreground voxels at 0.5 / true ones."""

    def keep_half(self) -> ValidationScore:
        """The same score with 0.5 as its threshold."""
        return replace(self, dice_best=self.dice, threshold=0.5)

    @property
    def is_collapsed(self) -> bool:
        """Whether next to nothing is predicted, which a mean with background would hide."""
        return self.foreground < _COLLAPSED_SHARE


class CropValidator:
    """Scores this rank's share of the fixed crops, which are read once."""

    def __init__(self, store: Store, boxes: Sequence[tuple[str, Box]]) -> None:
        self._count = len(boxes)
        self._crops = [
            stack_samples([read_crop(store, *boxes[index])], [index]) for index in _indices_of_rank(len(boxes))
        ]

    def __call__(self, predict: Predict, device: torch.device) -> ValidationScore:
        """The same score on every rank."""
        counts = _count_voxels([0] * self._count, lambda i: self._crops[i], predict, device)
        return compute_score(counts[0])


class VolumeValidator:
    """Scores whole volumes, cut into windows of the training crop's size that overlap by half; read anew each time.

    A voxel is scored once, by the window in whose middle it lies:

        |--------window--------|
              |---core----|
                    |--------window--------|
                          |---core----|
    """

    def __init__(self, store: Store, ids: Sequence[str], window: Shape) -> None:
        self._store = store
        self._ids = list(ids)
        self._tiles = [(id_, *tile) for id_ in ids for tile in _cut_tiles(store[id_].shape, window)]

    def __call__(self, predict: Predict, device: torch.device) -> tuple[ValidationScore, dict[str, ValidationScore]]:
        """(mean over the volumes, all at one threshold; each volume at its own threshold); the same on every rank."""
        indices = _indices_of_rank(len(self._tiles))
        groups = [self._ids.index(volume) for volume, _, _ in self._tiles]
        counts = _count_voxels(groups, lambda i: self._read_tile(*self._tiles[indices[i]]), predict, device)

        mean = compute_score(counts)
        by_volume = {id_: compute_score(own) for id_, own in zip(self._ids, counts, strict=True)}
        return mean, by_volume

    def _read_tile(self, volume: str, window: Box, core: Box) -> Batch:
        """The window as a batch, unlabeled outside its core."""
        batch = stack_samples([read_crop(self._store, volume, window)], [0])
        z, y, x = (slice(a - s, b - s) for a, b, s in zip(core.start, core.stop, window.start, strict=True))

        # Unlabeled voxels do not count, so every voxel of the volume is scored by one window.
        mask = torch.full_like(batch.mask, UNLABELED)
        mask[:, :, z, y, x] = batch.mask[:, :, z, y, x]
        return replace(batch, mask=mask)


def _cut_tiles(shape: Shape, window: Shape) -> list[tuple[Box, Box]]:
    """(window, core) for every core; windows stay within the volume where it is as large as they are."""
    axes = [_cut_axis(size, length) for size, length in zip(shape, window, strict=True)]

    tiles = []
    for z, y, x in itertools.product(*axes):
        core = Box((z[1], y[1], x[1]), (z[2], y[2], x[2]))
        tiles.append((Box.at((z[0], y[0], x[0]), window), core))
    return tiles


def _cut_axis(size: int, window: int) -> list[tuple[int, int, int]]:
    """(start of the window, start and stop of its core) for every core along an axis of `size` voxels."""
    core = max(window // 2, 1)
    margin = (window - core) // 2

    # At the borders a window is moved inwards and its core is not, so that it lies within the volume.
    last_start = max(size - window, 0)

    return [(min(max(start - margin, 0), last_start), start, min(start + core, size)) for start in range(0, size, core)]


def _indices_of_rank(count: int) -> list[int]:
    """Indices of this rank's items of `count`; a rank without any takes the first, which is then not counted."""
    return list(range(distributed.rank(), count, distributed.world_size())) or [0]


@torch.no_grad()
def _count_voxels(
    groups: Sequence[int], read: Callable[[int], Batch], predict: Predict, device: torch.device
) -> Tensor:
    """[groups, 2, bins + 1] voxels by truth and probability, over all ranks.

    groups: of every item of all ranks, 0, 1 ...; read(i): this rank's i-th item.
    """
    ranks = distributed.world_size()
    own_groups = groups[distributed.rank() :: ranks]

    # Integers are added exactly, so the score does not depend on the number of ranks.
    counts = torch.zeros(max(groups) + 1, 2, _BINS + 1, dtype=torch.int64, device=device)

    # Every rank runs as many passes (ZeRO-3 meets inside each); one with fewer items repeats its last one uncounted.
    passes = -(-len(groups) // ranks)
    for index in range(passes):
        batch = read(min(index, max(len(own_groups) - 1, 0))).to(device)
        probability = predict(batch).float().sigmoid()
        if index < len(own_groups):
            bins = (probability * _BINS).to(torch.int64)
            for truth in (0, 1):
                counts[own_groups[index], truth] += torch.bincount(bins[batch.mask == truth], minlength=_BINS + 1)

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts.cpu()


def compute_score(counts: Tensor) -> ValidationScore:
    """[..., 2, bins + 1] voxels by truth and probability -> score, the mean over the leading axes.

    Nothing true and nothing predicted is a Dice of 1.
    """
    # Voxels of at least this probability.
    above = counts.flip(-1).cumsum(-1).flip(-1).double().view(-1, 2, _BINS + 1)
    false, true = above[:, 0], above[:, 1]  # [volumes, bins + 1]
    total = true[:, :1]  # [volumes, 1]

    dice_by_volume = torch.where(false + true + total > 0, 2 * true / (false + true + total).clamp(min=1), 1.0)
    dice = dice_by_volume.mean(0)  # [bins + 1]

    # Of equal thresholds the one nearest to 0.5.
    half = _BINS // 2
    best = max(_THRESHOLDS, key=lambda i: (float(dice[i]), -abs(i - half)))

    # A volume without any foreground must not divide by zero.
    hits, predicted, actual = true[:, half], (false + true)[:, half], total[:, 0].clamp(min=1)  # [volumes]
    return ValidationScore(
        dice=float(dice[half]),
        precision=float((hits / predicted.clamp(min=1)).mean()),
        recall=float((hits / actual).mean()),
        dice_best=float(dice[best]),
        threshold=best / _BINS,
        foreground=float((predicted / actual).mean()),
    )


# --- Pictures ---


class PictureRecorder:
    """Draws the first crops of one validation while it predicts."""

    def __init__(self, most: int) -> None:
        """most: pictures to draw; 0 costs nothing."""
        self.most = most
        self.pictures: list[NDArray[np.uint8]] = []

    def wrap(self, predict: Predict) -> Predict:
        """A `predict` that draws what it predicts."""

        def predict_and_draw(batch: Batch) -> Tensor:
            logits = predict(batch)
            if len(self.pictures) < self.most:
                self.pictures.append(draw_panels(batch.image, batch.mask, logits))
            return logits

        return predict_and_draw


@torch.no_grad()
def draw_panels(image: Tensor, mask: Tensor, logits: Tensor) -> NDArray[np.uint8]:
    """[1, 1, Z, Y, X] each -> gray picture of maximum projections: columns image, truth, probability.

    Above along z, below along y. Unlabeled voxels are gray in the truth.
    """
    truth = (mask == 1).float() + 0.3 * (mask == UNLABELED).float()
    # The square root lifts faint neurites.
    volumes = (image.float().clamp(0, 1).sqrt(), truth, logits.float().sigmoid())

    columns = []
    for volume in volumes:
        along_z, along_y = volume[0, 0].amax(0), volume[0, 0].amax(1)  # [Y, X], [Z, X]
        gap = torch.ones_like(along_y[:1]).expand(_PANEL_GAP, -1)
        columns.append(torch.cat([along_z, gap, along_y]))

    gap = torch.ones_like(columns[0][:, :1]).expand(-1, _PANEL_GAP)
    picture = torch.cat([columns[0], gap, columns[1], gap, columns[2]], dim=1)

    pixels: NDArray[np.uint8] = (255 * picture).round().to(torch.uint8).cpu().numpy()
    return pixels
