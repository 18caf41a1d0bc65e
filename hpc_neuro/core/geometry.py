"""Boxes, voxel sizes and tilings. Arrays are z y x, lengths micrometers; the first voxel's center is the origin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import SupportsInt

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
"""Voxels along z, y, x."""
VoxelSize = tuple[float, float, float]
"""Micrometers per voxel along z, y, x."""
Point = tuple[float, float, float]
"""A place in a volume, z y x; in voxels unless it says otherwise."""


@dataclass(frozen=True, order=True)
class Box:
    """A half-open box of voxels, z y x: it contains p if start <= p < stop."""

    start: Shape
    stop: Shape

    def __post_init__(self) -> None:
        # A frozen dataclass allows no plain assignment.
        object.__setattr__(self, "start", _triple(self.start))
        object.__setattr__(self, "stop", _triple(self.stop))

        (z, y, x), (z_stop, y_stop, x_stop) = self.start, self.stop
        if z_stop < z or y_stop < y or x_stop < x:
            raise ValueError(f"a box stops before it starts: {self.start} to {self.stop}")

    @classmethod
    def at(cls, start: Shape, shape: Shape) -> Box:
        """The box of `shape` voxels that starts at `start`."""
        return cls(start, _triple(a + n for a, n in zip(start, shape, strict=True)))

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box of a whole array."""
        return cls((0, 0, 0), shape)

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""
        return _triple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of this box in an array."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def grow(self, halo: Shape) -> Box:
        """The box with `halo` more voxels on both sides of each axis; it may extend beyond the volume."""
        return Box(
            _triple(a - h for a, h in zip(self.start, halo, strict=True)),
            _triple(b + h for b, h in zip(self.stop, halo, strict=True)),
        )

    def clip(self, other: Box) -> Box:
        """The part of this box inside `other`; of size zero when they do not overlap."""
        # Boxes that do not overlap give a box of size zero on the near face of `other`.
        start = _triple(min(max(a, oa), ob) for a, oa, ob in zip(self.start, other.start, other.stop, strict=True))
        stop = _triple(max(min(b, ob), s) for b, ob, s in zip(self.stop, other.stop, start, strict=True))
        return Box(start, stop)

    def shift(self, by: Shape) -> Box:
        """The box moved by `by` voxels."""
        return Box.at(_triple(a + d for a, d in zip(self.start, by, strict=True)), self.shape)

    def relative_to(self, origin: Shape) -> Box:
        """The same box in the coordinates of an array that starts at `origin`."""
        return self.shift(_triple(-o for o in origin))

    def contains(self, other: Box) -> bool:
        """Whether all of `other` is inside."""
        return all(
            a <= oa and ob <= b for a, b, oa, ob in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )


@dataclass(frozen=True)
class Block:
    """One tile of a volume."""

    index: Shape
    """Position in the grid of blocks."""
    write: Box
    """The voxels that belong to this block alone."""
    read: Box
    """`write` and the context around it, inside the volume."""


def tile_volume(shape: Shape, write: Shape, halo: Shape = (0, 0, 0)) -> Iterator[Block]:
    """Tile `shape` with write boxes; each is read with `halo` voxels of context, clipped at the border.

        |hhh|wwwwwwwwwwww|hhh|
                     |hhh|wwwwwwwwwwww|hhh|      write boxes touch, read boxes overlap

    Blocks come in z y x order. The last one of an axis may be shorter.
    """
    # The last block of an axis is clipped to the volume, and so is every halo.
    whole = Box.whole(shape)
    counts = [math.ceil(n / w) for n, w in zip(shape, write, strict=True)]

    for index in itertools.product(*(range(n) for n in counts)):
        start = _triple(i * w for i, w in zip(index, write, strict=True))
        box = Box.at(start, write).clip(whole)
        yield Block(_triple(index), box, box.grow(halo).clip(whole))


def fine_voxel(voxel_size: VoxelSize) -> float:
    """Micrometers per fine voxel, the unit of every radius and distance that is given in voxels.

    The fine voxel is the middle one of the three edges. An SWC radius is one number, so no unit is right along all
    axes of anisotropic voxels. Microscopes sample two axes alike, whichever axis is the coarse or the fine one, and the
    middle edge is the one of these two. The fine voxel of the inverse voxel size is the inverse of the fine voxel.
    """
    return float(sorted(voxel_size)[1])


def zyx_from_xyz(points: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N, 3] x y z -> [N, 3] z y x, and back: the order is its own inverse."""
    # A copy in memory order: a reversed view is slow in every later operation.
    return np.ascontiguousarray(np.asarray(points, dtype=np.float64)[:, ::-1])


def to_um(voxels: NDArray[np.floating], voxel_size: VoxelSize) -> NDArray[np.float64]:
    """[N, 3] voxel coordinates (z y x) -> micrometers."""
    um: NDArray[np.float64] = np.asarray(voxels, dtype=np.float64) * np.asarray(voxel_size)
    return um


def to_voxels(um: NDArray[np.floating], voxel_size: VoxelSize) -> NDArray[np.float64]:
    """[N, 3] micrometers (z y x) -> voxel coordinates."""
    voxels: NDArray[np.float64] = np.asarray(um, dtype=np.float64) / np.asarray(voxel_size)
    return voxels


def _triple(values: Iterable[SupportsInt]) -> Shape:
    """Three Python integers; other sequences and numpy integers would not compare or serialize the same."""
    z, y, x = values
    return int(z), int(y), int(x)
