"""The intensity range of a volume, streamed, and the one normalization that everything uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape, tile_volume
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array

ReadBox = Callable[[Box], Array]
"""Reads one box of a volume as [Z, Y, X] in its own dtype."""

_PASS_BYTES = 64 << 20
"""Bytes that a streamed pass holds at a time, about."""
_BACKGROUND = 0.01
"""The lower end of the range: the 1st percentile of all voxels."""
_NEURITES = 0.005
"""Share of the brightest voxels taken for neurites; they are rarely more of a stack."""
_SATURATION = 0.95
"""The upper end of the range: this quantile of the neurites; what is brighter is soma and saturation."""
_BINS = 1 << 16
"""Values of half a 32-bit key."""


def iter_slabs(shape: Shape, itemsize: int, depth: int = 1) -> Iterator[Box]:
    """Tile a volume for one streamed pass: whole z slices where they fit in about 64 MiB, else parts of slices.

    `depth`: slabs begin at multiples of this many slices. Files are laid out by slice, so each is read once.
    """
    z, y, x = shape
    deep = max(1, _PASS_BYTES // max(1, y * x * itemsize * depth)) * depth

    # Where `depth` slices are too large, they are cut along y, then along x, at multiples of 64.
    rows = min(y, max(64, _PASS_BYTES // max(1, x * itemsize * depth) // 64 * 64))
    columns = min(x, max(64, _PASS_BYTES // max(1, rows * itemsize * depth) // 64 * 64))
    for block in tile_volume(shape, (min(z, deep), rows, columns)):
        yield block.write


@dataclass(frozen=True)
class Histogram:
    """Exact order statistics of a volume in bounded memory (a two-level radix histogram of ordered 32-bit keys)."""

    dtype: np.dtype[np.generic]
    upper: NDArray[np.int64]
    """[65536] voxels by the upper half of their key; for 8 and 16 bit by the whole key."""
    lower: dict[int, NDArray[np.int64]]
    """Upper half -> [65536] voxels by the lower half; empty for 8 and 16 bit, and until `_refine` fills it."""

    @property
    def count(self) -> int:
        """Number of voxels."""
        return int(self.upper.sum())

    def percentile_rank(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """Percentile rank in [0, 1] of each value: the share of darker voxels plus half the share of equal ones.

        Exact for 8 and 16 bit; for others a bin is 1/128 of the value wide, enough for ranks.
        """
        total = np.concatenate([[0], np.cumsum(self.upper)])
        upper = (_to_keys(np.asarray(values)) >> (0 if _is_narrow(self.dtype) else 16)).astype(np.int64)
        ranks: NDArray[np.float64] = (total[upper] + total[upper + 1]) / (2 * self.count)
        return ranks


def compute_histogram(read: ReadBox, shape: Shape) -> Histogram:
    """One streamed pass over a volume. Raises InputError for NaN or infinite voxels."""
    upper = np.zeros(_BINS, dtype=np.int64)
    dtype = read(Box((0, 0, 0), (1, 1, 1))).dtype

    for box in iter_slabs(shape, dtype.itemsize):
        block = read(box)
        require_finite(block, box)
        keys = _to_keys(block)
        upper += np.bincount((keys if _is_narrow(dtype) else keys >> 16).ravel(), minlength=_BINS)
    return Histogram(dtype, upper, {})


def compute_intensity_range(read: ReadBox, shape: Shape, counts: Histogram | None = None) -> tuple[float, float]:
    """(low, high) that `normalize` maps to 0 and 1; streamed, memory does not grow with the volume.

    low is the 1st percentile of all voxels; high is the 95th percentile of those of the brightest 0.5 % that exceed the
    minimum, so that an image whose background is 99.9 % zeros still has its neurites near 1. Both are voxel values
    (order statistics), exact for integers to 32 bit and float32; 64-bit values are rounded to float32 first.
    Raises InputError for an image that is constant, almost constant, or holds NaN.
    """
    counts = counts or compute_histogram(read, shape)
    total = counts.count
    darkest = int(np.flatnonzero(counts.upper)[0])
    brighter = total - int(counts.upper[darkest])

    # The darkest bin of a wide type may hold several values.
    if not _is_narrow(counts.dtype):
        counts = _refine(counts, read, shape, [0])
        brighter = total - int(counts.lower[darkest][np.flatnonzero(counts.lower[darkest])[0]])
    if brighter == 0:
        value = _value_at(counts, 0)
        raise InputError(f"every voxel is {value:g}, an image with contrast is wanted; check the file and its channel")

    # Both ends are the values at certain ranks, darkest first.
    neurites = min(brighter, max(1, round(_NEURITES * total)))
    ranks = [math.floor(_BACKGROUND * (total - 1)), total - 1 - math.floor((1 - _SATURATION) * (neurites - 1))]
    if not _is_narrow(counts.dtype):
        counts = _refine(counts, read, shape, ranks)
    low, high = (_value_at(counts, rank) for rank in ranks)

    if not high > low:
        raise InputError(
            f"all but a few voxels are {low:g} and the rest darker, a bright neuron on a dark background is wanted; "
            "invert the image or check its channel"
        )
    return low, high


def open_array(image: Array, name: str = "the image") -> ReadBox:
    """A function that reads boxes of an array [Z, Y, X]. It raises InputError for voxels that are NaN or infinite.

    name: of the image, for messages. Raises InputError for an array that is no volume of numbers.
    """
    if image.ndim != 3 or not all(image.shape):
        raise InputError(
            f"{name} has the shape {image.shape}; a stack of three axes z, y, x is expected, each with at least one "
            "voxel: drop other axes"
        )
    if image.dtype.kind not in "uifb":
        raise InputError(f"{name} holds {image.dtype} values; integers or real numbers are expected, one per voxel")

    def read(box: Box) -> Array:
        voxels: Array = image[box.slices]
        require_finite(voxels, box, f"{name}: ")
        return voxels

    return read


_MAX_BRIGHTNESS = 1e30
"""Largest intensity, of either sign: images are computed with as float32, which ends at 3e38."""


def require_finite(voxels: Array, box: Box, prefix: str = "") -> None:
    """Raise InputError that names the first NaN or infinite voxel of an array read from `box`, and for huge ones."""
    if voxels.dtype.kind != "f":
        return
    if np.isfinite(voxels).all():
        largest = float(np.abs(voxels).max(initial=0.0))
        if largest > _MAX_BRIGHTNESS:
            raise InputError(
                f"{prefix}a voxel is {largest:g}, and intensities up to {_MAX_BRIGHTNESS:g} are computed with; scale "
                "the image"
            )
        return

    # Positions are those in the volume, not in the box.
    z, y, x = (int(axis[0]) + start for axis, start in zip(np.nonzero(~np.isfinite(voxels)), box.start, strict=True))
    raise InputError(
        f"{prefix}voxel z={z} y={y} x={x} is NaN or infinite, finite intensities are wanted; "
        "replace such voxels (e.g. by the background's value)"
    )


def limit_brightness(read: ReadBox, limits: tuple[float, float] | None) -> ReadBox:
    """Reads what `read` reads, as float32 between `limits`; None: as it is."""
    if limits is None:
        return read
    low, high = limits
    return lambda box: np.clip(np.asarray(read(box), dtype=np.float32), low, high)


def normalize(array: Array, low: float, high: float) -> NDArray[np.float32]:
    """clip((array - low) / (high - low), 0, 1) as float32, any shape.

    Raises InputError for a range that is empty or infinite as float32: everything would become NaN or 0.
    """
    with np.errstate(over="ignore"):
        width = np.float32(high - low)
    if not (0 < width < np.inf and np.isfinite(np.float32(low))):
        raise InputError(
            f"the intensity range {low:g} to {high:g} is empty or beyond float32; rescale the image, or give a range"
        )

    scaled = (np.asarray(array, dtype=np.float32) - np.float32(low)) / width
    return cast(NDArray[np.float32], np.clip(scaled, 0, 1, out=scaled))


def _is_narrow(dtype: np.dtype[np.generic]) -> bool:
    """Whether one half of the key holds all values of the type."""
    return dtype.kind in "bui" and dtype.itemsize <= 2


def _to_keys(block: Array) -> NDArray[np.uint32]:
    """Unsigned keys in the order of the values: IEEE floats sort as integers once the negative ones are mirrored."""
    if block.dtype.kind in "bu" and block.dtype.itemsize <= 4:
        return block.astype(np.uint32)
    if block.dtype.kind == "i" and block.dtype.itemsize <= 4:
        shift = 1 << (8 * block.dtype.itemsize - 1)
        return (block.astype(np.int64) + shift).astype(np.uint32)

    # Adding 0 turns -0 into 0.
    bits = (block.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32)


def _from_key(key: int, dtype: np.dtype[np.generic]) -> float:
    """The value whose key this is."""
    if dtype.kind in "bu" and dtype.itemsize <= 4:
        return float(key)
    if dtype.kind == "i" and dtype.itemsize <= 4:
        return float(key - (1 << (8 * dtype.itemsize - 1)))

    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _refine(counts: Histogram, read: ReadBox, shape: Shape, ranks: list[int]) -> Histogram:
    """A second pass that resolves the bins in which `ranks` fall down to single values."""
    ends = np.cumsum(counts.upper)
    bins = {int(np.searchsorted(ends, rank, side="right")) for rank in ranks} - set(counts.lower)
    if not bins:
        return counts

    lower = {bin_: np.zeros(_BINS, dtype=np.int64) for bin_ in bins}
    for box in iter_slabs(shape, counts.dtype.itemsize):
        keys = _to_keys(read(box)).ravel()
        for bin_, bin_counts in lower.items():
            bin_counts += np.bincount(keys[keys >> 16 == bin_] & (_BINS - 1), minlength=_BINS)
    return Histogram(counts.dtype, counts.upper, counts.lower | lower)


def _value_at(counts: Histogram, rank: int) -> float:
    """The value of the voxel at `rank` in ascending order."""
    ends = np.cumsum(counts.upper)
    upper = int(np.searchsorted(ends, rank, side="right"))
    if _is_narrow(counts.dtype):
        return _from_key(upper, counts.dtype)

    # The rank inside the bin picks the lower half of the key.
    rank_in_bin = rank - (int(ends[upper - 1]) if upper else 0)
    lower = int(np.searchsorted(np.cumsum(counts.lower[upper]), rank_in_bin, side="right"))
    return _from_key((upper << 16) | lower, counts.dtype)
