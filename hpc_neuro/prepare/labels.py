"""Label volumes in the place of a tree: masks of neurites, and sparse labels of some voxels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import stop_signals
from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.formats import Volume, open_volume
from hpc_neuro.data.intensity import iter_slabs
from hpc_neuro.metrics.centerline import skeletonize_mask
from hpc_neuro.prepare.config import LabelKind

_CODES: dict[LabelKind, int] = {"background": 0, "neurite": 1, "unlabelled": UNLABELED}
"""What the store's mask holds."""
_MOST_NAMED = 8
"""Values without a meaning that a message names."""
_HALO: Shape = (8, 16, 16)
"""[voxel] Context with which a box is skeletonized."""


@dataclass(frozen=True)
class LabelVolume:
    """A label volume, read by box."""

    path: Path
    volume: Volume
    key: dict[int, LabelKind]

    def read_mask(self, box: Box) -> NDArray[np.uint8]:
        """[Z, Y, X] 1 on neurite, 255 where unlabelled, 0 on background. Raises InputError for a value without a
        meaning."""
        values = self.volume[box]
        mask = np.full(values.shape, UNLABELED, dtype=np.uint8)
        is_known = np.zeros(values.shape, dtype=bool)
        for value, kind in self.key.items():
            is_value = values == value
            mask[is_value] = _CODES[kind]
            is_known |= is_value

        if not is_known.all():
            unknown = np.unique(values[~is_known])[:_MOST_NAMED].tolist()
            if fractions := [value for value in unknown if not float(value).is_integer()]:
                raise InputError(
                    f"{self.path} holds the value {fractions[0]:g}, and labels are whole numbers; save a mask, such as "
                    "1 where a probability is above 0.5, and 0 elsewhere"
                )
            names = ", ".join(f"{value}: {kind}" for value, kind in self.key.items())
            advice = ", ".join(f"{value:g}: unlabelled" for value in unknown)
            raise InputError(
                f"{self.path} holds the value{'s' * (len(unknown) > 1)} {', '.join(f'{v:g}' for v in unknown)}, and "
                f"only {{{names}}} have a meaning; give every value one, as in  labels='{{{names}, {advice}}}'"
            )
        return mask

    def read_skeleton(self, box: Box) -> NDArray[np.uint8]:
        """[Z, Y, X] 1 on the centerlines of the labelled neurites, 0 elsewhere."""
        around = box.grow(_HALO).clip(Box.whole(self.volume.shape))
        is_neurite = self.read_mask(around) == 1
        if not is_neurite.any():
            return np.zeros(box.shape, dtype=np.uint8)
        return skeletonize_mask(is_neurite)[box.relative_to(around.start).slices].astype(np.uint8)


@dataclass(frozen=True)
class LabelCounts:
    """Voxels of a label volume, and the mean brightness of the image on them."""

    background: int
    neurite: int
    unlabelled: int
    background_brightness: float
    neurite_brightness: float


def open_labels(path: Path, image: Volume, key: dict[int, LabelKind]) -> LabelVolume:
    """Open the label volume of an image. Raises InputError for one of another shape."""
    volume = open_volume(path)
    if volume.shape != image.shape:
        raise InputError(
            f"{path} is {' x '.join(map(str, volume.shape))} voxels and {image.path} "
            f"{' x '.join(map(str, image.shape))} (z y x); labels of the same shape are wanted"
        )
    return LabelVolume(path, volume, key)


def count_labels(labels: LabelVolume, read: Callable[[Box], Array]) -> LabelCounts:
    """Count the labels of a whole volume and compare them with its image. Raises InputError without both kinds."""
    counts, sums = np.zeros(256, dtype=np.int64), np.zeros(256)
    for box in stop_signals.until_stopped(iter_slabs(labels.volume.shape, 8)):
        mask = labels.read_mask(box).ravel()
        counts += np.bincount(mask, minlength=256)
        sums += np.bincount(mask, weights=np.asarray(read(box), dtype=np.float64).ravel(), minlength=256)

    for kind in ("neurite", "background"):
        if not counts[_CODES[kind]]:
            raise InputError(
                f"{labels.path} labels no voxel as {kind}, and a network learns from both; say which values stand for "
                "what with  labels='{VALUE: background, VALUE: neurite, VALUE: unlabelled}'"
            )
    means = sums / np.maximum(counts, 1)
    return LabelCounts(int(counts[0]), int(counts[1]), int(counts[UNLABELED]), float(means[0]), float(means[1]))
