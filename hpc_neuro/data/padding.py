"""Padding: voxels that were never imaged, which programs fill with one value when they rotate, register or mask.

Padding is solid and reaches the border of the slices. A background of one value differs: neurites on it are thin, or
noise breaks it up. Padding of the lowest value is found by its value. Any other value occurs in the image as well:
there, padding is what hangs together with the border of a slice, and it is read as darker than the image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.types import Array
from hpc_neuro.data.intensity import iter_slabs

ReadBox = Callable[[Box], Array]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_PLANES = 24
"""[slice] Padding is searched for in so many slices."""
_ITEMSIZE = 8
"""[bytes] What a voxel takes while a slice is searched; the parts of large slices are planned with it."""
_REACH = 2
"""[voxel] Padding is solid: all voxels so near to one inside it are padding."""
_DEPTH = 6
"""[voxel] Most of the padding, and most of the image beside it, lies so deep inside."""
_STEP = 7
"""[voxel] Of the image beside the padding, every so many voxels are looked at."""
_LEAST_SHARE = 0.01
"""Share of the volume that padding fills, at least."""
_LEAST_DEEP_PADDING, _LEAST_DEEP_IMAGE = 0.5, 0.6
"""Shares of padding and of image that lie deep inside, at least. Neurites on a black background are thin."""
_MOST_INSIDE = 0.1
"""Share of the image beside the padding that has its value, at most. A black background with noise has more."""
_MOST_CANDIDATES = 4
"""Values that are tried, besides the lowest one."""
_RIM = (2, 4)
"""[voxel] Image so far from padding is its rim; interpolation mixes what is nearer."""
_USUAL_RANKS = (0.05, 0.95)
"""[quantile of the image] The median of the rim of padding. That of a saturated soma is brighter."""
_LEAST_VALUES = 9
"""Values of the image beside padding that is not the lowest value, at least. A mask has two."""
_CORNER = 8
"""[voxel] Corners of padding reach so far out of its solid part."""
_DARKER = 0.01
"""[brightness range] How far below the image padding is read that is not the lowest value itself."""
_KEPT_PARTS = 64
"""Parts of slices whose padding stays in memory."""


def leave_padding_out(read: ReadBox, shape: Shape, most_voxels: int) -> tuple[ReadBox, float | None]:
    """A reader of the image, and the value that it gives for padding; None for an image without padding.

    The search looks at no more than about `most_voxels`.
    """
    parts = _choose_parts(shape, most_voxels)

    def read_parts() -> Iterator[Floats]:
        return (_read_part(read, part) for part in parts)

    evidence, highest = _Evidence(math.inf), -math.inf
    lengths: dict[float, int] = {}
    for part in read_parts():
        evidence.lower(float(part.min()))
        evidence.add(part)
        _count_runs(part, lengths)
        highest = max(highest, float(part.max()))
    lowest = evidence.value
    if evidence.is_padding() and evidence.has_noise():
        return read, lowest

    lengths.pop(lowest, None)
    for value in sorted(lengths, key=lambda value: (-lengths[value], value))[:_MOST_CANDIDATES]:
        evidence = _Evidence(value)
        for part in read_parts():
            evidence.add(part)
        if evidence.is_padding() and evidence.has_usual_rim():
            dark = float(np.float32(lowest - _DARKER * (highest - lowest)))
            return _PaddedImage(read, shape, value, dark).read_dark, dark
    return read, None


class _Evidence:
    """Whether a value is that of padding: counts over parts of slices."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._solid = self._deep_padding = self._image = self._deep_image = self._inside = self._border = 0
        self._beside: list[Floats] = []
        self._rim: list[Floats] = []

    def lower(self, value: float) -> None:
        """Look for a value that is lower than all so far: what has been counted as padding was image."""
        if value < self.value:
            self.value = value
            self._image += self._solid
            self._deep_image = self._image
            self._solid = self._deep_padding = self._inside = self._border = 0

    def add(self, part: Floats) -> None:
        """Count a part of a slice [Y, X]."""
        has_value = part == self.value
        is_solid = _open(has_value, _REACH)
        is_image = ~is_solid
        self._solid += int(is_solid.sum())
        self._image += int(is_image.sum())
        self._inside += int((has_value & is_image).sum())
        self._deep_padding += int(_erode(is_solid, _DEPTH).sum())
        self._deep_image += int(_erode(is_image, _DEPTH).sum())
        self._border += int(is_solid[[0, -1]].sum() + is_solid[:, [0, -1]].sum())
        self._beside.append(part[is_image][::_STEP])

        near, far = (maximum_filter(is_solid, 2 * reach + 1) for reach in _RIM)
        self._rim.append(part[far & ~near])

    def is_padding(self) -> bool:
        """Whether the value is solid, at the border, and beside an image that is wide and has other values."""
        return (
            self._border > 0
            and self._solid >= _LEAST_SHARE * (self._solid + self._image)
            and self._deep_padding >= _LEAST_DEEP_PADDING * self._solid
            and self._deep_image >= _LEAST_DEEP_IMAGE * self._image > 0
            and self._inside <= _MOST_INSIDE * self._image
        )

    def has_noise(self) -> bool:
        """Whether the image beside the value has noise; without, it is a mask."""
        beside = np.concatenate(self._beside)
        return len(beside) > 0 and bool(np.quantile(beside, 0.25) < np.quantile(beside, 0.75))

    def has_usual_rim(self) -> bool:
        """Whether the image next to the value is as bright as it is elsewhere.

        A soma or a haze that saturates the camera is of one value, too, but fades into the image.
        """
        rim, beside = np.concatenate(self._rim), np.concatenate(self._beside)
        if not len(rim) or len(np.unique(beside)) < _LEAST_VALUES:
            return False
        low, high = np.quantile(beside, _USUAL_RANKS).tolist()
        return bool(low <= np.median(rim) <= high)


class _PaddedImage:
    """An image with padding that is not its lowest value."""

    def __init__(self, read: ReadBox, shape: Shape, value: float, dark: float) -> None:
        """`value` is what the file has for padding, and `dark` what it is read as."""
        self._read = read
        self._value = value
        self._dark = dark
        self._parts = list(iter_slabs((1, shape[1], shape[2]), _ITEMSIZE))
        # Boxes beside each other ask for the same slices.
        self._find = functools.lru_cache(_KEPT_PARTS)(self._find_padding)

    def read_dark(self, box: Box) -> Floats:
        """[Z, Y, X] the image; padding is `dark`."""
        values = np.array(self._read(box), dtype=np.float32)
        for number, z in enumerate(range(box.start[0], box.stop[0])):
            if not (values[number] == self._value).any():
                continue
            plane = Box((z, *box.start[1:]), (z + 1, *box.stop[1:]))
            for part in (part.shift((z, 0, 0)) for part in self._parts):
                common = part.clip(plane)
                if common.size:
                    is_padding = np.unpackbits(self._find(part), axis=1, count=part.shape[2]).astype(bool)
                    inside = is_padding[common.relative_to(part.start).slices[1:]]
                    values[number][common.relative_to(box.start).slices[1:]][inside] = self._dark
        return values

    def _find_padding(self, part: Box) -> NDArray[np.uint8]:
        """[Y, X / 8] the padding in a part of a slice, as bits."""
        has_value = _read_part(self._read, part) == self._value
        labels = cc3d.connected_components(_open(has_value, _REACH), connectivity=8)

        # A saturated neurite is narrow, and a saturated soma seldom reaches the border.
        deep = np.unique(labels[_erode(labels > 0, _DEPTH)])
        at_border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        is_padding = np.isin(labels, np.setdiff1d(np.intersect1d(deep, at_border), [0]))
        near = maximum_filter(is_padding, 2 * _CORNER + 1)
        return np.packbits(has_value & near, axis=1)


def _count_runs(part: Floats, lengths: dict[float, int]) -> None:
    """Add the long runs of one value along the border of a part of a slice to their lengths [voxel] by value."""
    for line in (part[0], part[-1], part[:, 0], part[:, -1]):
        starts = np.flatnonzero(np.diff(line, prepend=np.nan) != 0)
        runs = np.diff(starts, append=len(line))
        for start, run in zip(starts.tolist(), runs.tolist(), strict=True):
            if run > 2 * _DEPTH:
                value = float(line[start])
                lengths[value] = lengths.get(value, 0) + run


def _choose_parts(shape: Shape, most_voxels: int) -> list[Box]:
    """Slices from the first to the last, evenly spaced; large ones in parts, of which a sample is taken."""
    depth, y, x = shape
    planes = sorted({round(z) for z in np.linspace(0, depth - 1, min(depth, _PLANES)).tolist()})
    parts = [box.shift((z, 0, 0)) for z in planes for box in iter_slabs((1, y, x), _ITEMSIZE)]
    return parts[:: max(1, math.ceil(len(planes) * y * x / most_voxels))]


def _read_part(read: ReadBox, part: Box) -> Floats:
    """[Y, X] a part of one slice."""
    return np.asarray(read(part)[0], dtype=np.float32)


def _erode(mask: Bools, reach: int) -> Bools:
    """[Y, X] where all voxels within a square of 2 * reach + 1 are set; beyond the border counts as set."""
    return np.asarray(minimum_filter(mask, 2 * reach + 1, mode="nearest"))


def _open(mask: Bools, reach: int) -> Bools:
    """[Y, X] the squares of 2 * reach + 1 that fit into a mask."""
    return np.asarray(maximum_filter(_erode(mask, reach), 2 * reach + 1, mode="nearest"))
