"""What a format's reader hands over (StoredArray), and what everyone reads from (Volume): one box at a time, z y x."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import axes as axis

Array = NDArray[Any]
"""A numpy array of any shape and dtype."""

Index = tuple[slice, ...]
"""One slice with start and stop, step 1, per axis of a stored array."""


@dataclass(frozen=True)
class StoredArray:
    """One array of a file with as many axes as the file stores, read by parts."""

    format: str
    shape: tuple[int, ...]
    axes: str
    """One letter per axis, in the order of `shape`: Z Y X, C channel, T time, S colour sample, Q unnamed."""
    dtype: np.dtype[Any]
    read: Callable[[Index], Array]
    """Gives the asked part with as many axes as `shape`; called with an index inside it."""
    spacing: tuple[float, ...] | None = None
    """Micrometres per step along each axis (nan for C, T, S or where unknown)."""
    world: NDArray[np.float64] | None = None
    """[3, len(axes) + 1] micrometres z y x of an index, last column the place of index zero; None: spacing alone."""
    notes: tuple[str, ...] = ()
    """Remarks for people: what was assumed, what the file leaves open."""
    absent: Callable[[], str | None] | None = None
    """Where the format reads what is not stored as a fill value: a sentence on how much that is, for people."""


class Volume:
    """A lazy 3D image: `volume[Box]` reads that box alone. Pickles as its path, opened anew in the other process."""

    def __init__(self, path: Path, source: StoredArray, layout: axis.AxisOrder, reopen: Callable[[], Volume]) -> None:
        self.path = path
        self.format = source.format
        self.axes = layout.axes
        """The stored axes as they are read, one letter each."""
        self.dtype = np.dtype(source.dtype).newbyteorder("=")
        z, y, x = layout.order
        self.shape: Shape = (source.shape[z], source.shape[y], source.shape[x])
        """Voxels along z, y, x."""
        self.channel = layout.channel
        self.voxel_size: VoxelSize | None = _voxel_size(source, layout.order)
        """Micrometres along z, y, x; None where the file does not say."""
        self.affine: NDArray[np.float64] | None = _affine(source, layout.order, self.voxel_size)
        """[4, 4] voxel (z, y, x, 1) -> micrometres (z, y, x, 1); None where the voxel size is unknown."""
        self.notes = (*source.notes, *layout.notes, *_turned(self.axes, self.affine))
        self._source, self._layout, self._reopen = source, layout, reopen

    def __getitem__(self, box: Box) -> Array:
        """The voxels of `box`, [Z, Y, X] in the file's dtype, a fresh array.

        Raises InputError when the box leaves the volume or the file is damaged there.
        """
        if not Box.whole(self.shape).contains(box):
            raise InputError(f"box {box.start} to {box.stop} leaves {self.path}, whose shape is {self.shape} (z y x)")
        if not box.size:
            return np.empty(box.shape, self.dtype)
        index, shape = self._layout.index(box), box.shape
        with translate_errors(self.path, self.format):
            part = self._source.read(index)
            part = part.transpose(self._layout.transposition).reshape(shape)
            return np.array(part, dtype=self.dtype, order="C")

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    def describe(self) -> str:
        """What was read, on a few lines for people."""
        z, y, x = self.shape
        size = files.format_bytes(math.prod(self.shape) * self.dtype.itemsize)
        lines = [f"{self.path}: {self.format}, {z} x {y} x {x} voxels (z y x), {self.dtype}, {size}"]
        stored = ", ".join(f"{name} {count}" for name, count in zip(self.axes, self._source.shape, strict=True))
        lines.append(f"stored axes: {stored}" + (f"; channel {self.channel}" if self.channel is not None else ""))
        if self.voxel_size is None:
            lines.append("voxel size: the file does not say")
        else:
            lines.append("voxel size: " + " x ".join(f"{v:.6g}" for v in self.voxel_size) + " um (z y x)")
        if self.affine is not None and not np.array_equal(self.affine, np.diag([*(self.voxel_size or ()), 1.0])):
            rows = "; ".join(" ".join(f"{v:.6g}" for v in row) for row in self.affine[:3])
            lines.append(f"affine to um (z y x 1): {rows}")
        absent = self._source.absent() if self._source.absent else None
        return "\n".join([*lines, *(f"note: {note}" for note in (*self.notes, *([absent] if absent else [])))])


@contextlib.contextmanager
def translate_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn what a decoder throws at a damaged file into one InputError; our own sentences pass through."""
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: {kind} names a file that is missing: {error.filename or error}") from error
    except Exception as error:  # decoders of a dozen libraries, each with errors of its own
        text = " ".join(str(error).split())[:300] or "no further message"
        raise InputError(
            f"{path} cannot be read as {kind}: {type(error).__name__}: {text}; "
            "the file is damaged or incomplete, copy or export it again"
        ) from error


def require_bytes(path: Path, begin: int, wanted: int, what: str) -> None:
    """InputError unless the file holds `wanted` bytes from `begin` on: nothing is allocated for a header that lies."""
    size = path.stat().st_size
    if begin + wanted > size:
        raise InputError(
            f"{path} is incomplete: {what} needs {begin + wanted} bytes, but the file has {size}; "
            "copy or export it again"
        )


def check_shape(path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as ints; InputError when an axis is empty, negative, or the product is beyond any disk."""
    sizes = tuple(int(n) for n in shape)
    if not sizes or any(n <= 0 for n in sizes):
        raise InputError(f"{path} declares an array of shape {sizes}; every axis must have at least one voxel")
    if math.prod(sizes) > 1 << 56:
        raise InputError(f"{path} declares an array of shape {sizes}, which no disk can hold; its header is damaged")
    return sizes


def check_dtype(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype when it is a plain number; InputError for complex, structured or text arrays."""
    if dtype.kind not in "uifb":
        raise InputError(f"{path} holds {dtype} values; wanted integers or real numbers, one per voxel")
    return dtype


def map_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Callable[[Index], Array]:
    """A reader of parts of a plain C-ordered array that begins at byte `offset` of `path`."""
    require_bytes(path, offset, math.prod(shape) * dtype.itemsize, f"an array of shape {shape}, {dtype}")
    return functools.partial(_take, np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))


def _take(array: Array, index: Index) -> Array:
    return array[index]


def _voxel_size(source: StoredArray, order: tuple[int, int, int]) -> VoxelSize | None:
    if source.spacing is None:
        return None
    z, y, x = (abs(float(source.spacing[i])) for i in order)
    return (z, y, x) if all(math.isfinite(v) and v > 0 for v in (z, y, x)) else None


def _affine(
    source: StoredArray, order: tuple[int, int, int], voxel_size: VoxelSize | None
) -> NDArray[np.float64] | None:
    if voxel_size is None:
        return None
    affine = np.diag([*voxel_size, 1.0])
    if source.world is not None:
        affine[:3] = source.world[:, [*order, -1]]
    return affine


def _turned(axes: str, affine: NDArray[np.float64] | None) -> tuple[str, ...]:
    """A remark where the file places an axis along another one of its world: it is read as stored."""
    if affine is None:
        return ()
    along = "".join("ZYX"[int(i)] for i in np.abs(affine[:3, :3]).argmax(axis=0))
    if along == "ZYX" or len(set(along)) < 3:
        return ()
    turned = axes.translate(str.maketrans("ZYX", along))
    return (f"by its affine matrix, z y x as read run along {' '.join(along.lower())}; axes={turned} turns them so",)
