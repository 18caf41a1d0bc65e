"""The array that a format's reader returns (`StoredArray`), and the image that callers read boxes from (`Volume`)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.axes import AxisOrder
from hpc_neuro.data.intensity import require_finite

Array = NDArray[Any]
"""A numpy array of any shape and dtype."""

Index = tuple[slice, ...]
"""One slice with start and stop, step 1, per axis of a stored array."""

_MAX_SPARSE_BYTES = 64 << 30
"""Arrays up to this size may be stored in as few bytes as they like."""
MAX_SPARSITY = 1_000_000
"""Declared bytes per stored byte of larger arrays, at most."""
_MAX_VOXELS = 1 << 56
"""Most voxels of an array; a header that declares more is damaged, since no disk holds as much."""


NOTE_LABELS = "a segmentation: its values are labels, not intensities"
"""Note on an image that its file calls a segmentation."""
_VALID_KEYS = ("valid_min", "valid_max", "valid_range")
"""Attributes of netCDF that mark all other values as missing."""
_LIKELY_UM = (5e-4, 200.0)
"""[um] Sides of voxels from those of electron microscopes to those of whole-body scanners."""


@dataclass(frozen=True)
class StoredArray:
    """One array of a file, with the axes that the file stores, read by parts."""

    format: str
    shape: tuple[int, ...]
    axes: str
    """One letter per axis, in the order of `shape`: Z Y X, C channel, T time, S color sample, Q unnamed."""
    dtype: np.dtype[Any]
    read: Callable[[Index], Array]
    """Returns one part with as many axes as `shape`; called with an index inside the array."""
    spacing: tuple[float, ...] | None = None
    """Micrometers per step along each axis; nan for C, T, S and where the file does not state it."""
    world: NDArray[np.float64] | None = None
    """[3, len(axes) + 1] index -> micrometers z y x; the last column is the position of index 0. None: spacing only."""
    notes: tuple[str, ...] = ()
    """Remarks for people: what was assumed, what the file leaves open."""
    axis_names: tuple[str, ...] = ()
    """The file's own names of the axes, where they are longer than a letter."""
    absent: Callable[[], str | None] | None = None
    """For formats that read a chunk without a file as the fill value: a sentence on how many chunks that concerns."""


class Volume:
    """A lazy 3D image: `volume[box]` reads only that box.

    It pickles as its path and options and is opened again in the other process.
    """

    def __init__(self, path: Path, array: StoredArray, order: AxisOrder, reopen: Callable[[], Volume]) -> None:
        self.path = path
        self.format = array.format
        self.axes = order.axes
        """The stored axes as they are read, one letter each."""
        self.dtype = np.dtype(array.dtype).newbyteorder("=")

        # Everything public is in the order z y x; the stored order stays inside.
        z, y, x = order.zyx
        self.shape: Shape = (array.shape[z], array.shape[y], array.shape[x])
        """Voxels along z, y, x."""
        self.channel = order.channel

        self.voxel_size: VoxelSize | None = _get_voxel_size(array, order.zyx)
        """Micrometers along z, y, x; None where the file does not state them."""
        self.affine: NDArray[np.float64] | None = _build_affine(array, order.zyx, self.voxel_size)
        """[4, 4] voxel (z, y, x, 1) -> micrometers (z, y, x, 1); None where the voxel size is unknown."""
        self.notes = (*array.notes, *order.notes, *_note_permuted_world(self.axes, self.affine))
        self.notes += _note_unlikely_size(self.voxel_size)

        self._array, self._order, self._reopen = array, order, reopen

    def __getitem__(self, box: Box) -> Array:
        """The voxels of `box`, [Z, Y, X] in the file's dtype, a fresh array.

        Raises InputError when the box leaves the volume, when the file is damaged there, and for a voxel that is NaN or
        infinite: normalized, it would look like background or poison whatever is computed from it.
        """
        voxels = self.read_unchecked(box)
        require_finite(voxels, box, f"{self.path}: ")
        return voxels

    def read_unchecked(self, box: Box) -> Array:
        """The voxels of `box` with NaN and infinity as they are, for programs that count them."""
        if not Box.whole(self.shape).contains(box):
            raise InputError(f"box {box.start} to {box.stop} leaves {self.path}, whose shape is {self.shape} (z y x)")
        if not box.size:
            return np.empty(box.shape, self.dtype)

        # The copy is the caller's own: it may be written to, and it keeps no map of the file alive.
        with translate_errors(self.path, self.format):
            part = self._array.read(self._order.index(box))
            part = part.transpose(self._order.transposition).reshape(box.shape)
            return np.array(part, dtype=self.dtype, order="C")

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    def describe(self) -> str:
        """Shape, type, axes, voxel size and notes, on a few lines for people."""
        # The stored axes are shown as well, since `axes=` names them.
        z, y, x = self.shape
        size = files.format_bytes(math.prod(self.shape) * self.dtype.itemsize)
        stored = ", ".join(f"{name} {count}" for name, count in zip(self.axes, self._array.shape, strict=True))
        channel = "" if self.channel is None else f"; channel {self.channel}"
        lines = [
            f"{self.path}: {self.format}, {z} x {y} x {x} voxels (z y x), {self.dtype}, {size}",
            f"stored axes: {stored}{channel}",
            self._describe_voxel_size(),
        ]

        # An affine that only scales repeats the voxel size.
        if self.affine is not None and not np.array_equal(self.affine, np.diag([*(self.voxel_size or ()), 1.0])):
            rows = "; ".join(" ".join(f"{v:.6g}" for v in row) for row in self.affine[:3])
            lines.append(f"affine to um (z y x 1): {rows}")

        absent = self._array.absent() if self._array.absent else None
        notes = [*self.notes, *([absent] if absent else [])]
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])

    def _describe_voxel_size(self) -> str:
        if self.voxel_size is None:
            return "voxel size: the file does not say; give it in um (z y x) where it is needed"
        return "voxel size: " + " x ".join(f"{v:.6g}" for v in self.voxel_size) + " um (z y x)"


@contextlib.contextmanager
def translate_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises for a damaged file into one InputError; InputErrors pass unchanged."""
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: {kind} names a file that is missing: {error.filename or error}") from error
    except Exception as error:
        # A dozen decoder libraries raise a dozen kinds of error for the same cause.
        text = " ".join(str(error).split())[:300] or "no further message"
        raise InputError(
            f"{path} cannot be read as {kind}: {type(error).__name__}: {text}; "
            "the file is damaged or incomplete, copy or export it again"
        ) from error


def check_density(path: Path, shape: Sequence[int], dtype: np.dtype[Any], stored: int) -> None:
    """Raise InputError for an array that declares far more than the `stored` bytes of it could hold.

    No image packs a million to one; a header that says so would keep a program busy for years.
    """
    declared = math.prod(shape) * dtype.itemsize
    if declared > _MAX_SPARSE_BYTES and declared > MAX_SPARSITY * max(stored, 1):
        raise InputError(
            f"{path} declares {files.format_bytes(declared)} of voxels but stores only {files.format_bytes(stored)}; "
            "its header is damaged, or most of it was not copied"
        )


def allocated_bytes(path: Path) -> int:
    """Bytes of a file that the disk really holds: a sparse file has a size without them."""
    status = path.stat()
    # Some network file systems do not count blocks.
    return min(status.st_size, status.st_blocks * 512) if status.st_blocks else status.st_size


def note_outside(path: Path, sources: Iterable[Path]) -> tuple[str, ...]:
    """A note on files outside the image's own folder from which voxels are read."""
    folder = path.resolve().parent
    outside = sorted({str(file.resolve()) for file in sources if not file.resolve().is_relative_to(folder)})
    if not outside:
        return ()
    more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
    return (f"voxels are read from {outside[0]}{more}, outside the folder of the image",)


def require_bytes(path: Path, begin: int, count: int, content: str) -> None:
    """Raise InputError unless the file holds `count` bytes from `begin` on.

    Called before memory is allocated for what a header declares.
    """
    files.require_regular_file(path, "an image")
    size = path.stat().st_size
    if begin + count > size:
        raise InputError(
            f"{path} is incomplete: {content} needs {begin + count} bytes, but the file has {size}; "
            "copy or export it again"
        )


def check_shape(path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as ints; InputError when an axis is empty or negative, or the array is larger than any disk."""
    sizes = tuple(int(n) for n in shape)
    if not sizes or any(n <= 0 for n in sizes):
        raise InputError(f"{path} declares an array of shape {sizes}; every axis must have at least one voxel")
    if math.prod(sizes) > _MAX_VOXELS:
        raise InputError(f"{path} declares an array of shape {sizes}, which no disk can hold; its header is damaged")
    return sizes


def check_dtype(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype when it is a plain number; InputError for complex, structured or text arrays."""
    if dtype.kind not in "uifb":
        raise InputError(f"{path} holds {dtype} values; wanted integers or real numbers, one per voxel")
    return dtype


def map_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Callable[[Index], Array]:
    """A function that reads parts of a plain C-ordered array that begins at byte `offset` of `path`."""
    require_bytes(path, offset, math.prod(shape) * dtype.itemsize, f"an array of shape {shape}, {dtype}")
    check_density(path, shape, dtype, allocated_bytes(path))
    return functools.partial(_take, np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))


def invert_array(path: Path, array: StoredArray, bits: int) -> StoredArray:
    """An array whose zero is displayed as white, with values turned so that bright is high.

    `bits` are those of a sample. Raises InputError for real numbers, whose white is not defined.
    """
    if array.dtype.kind not in "uib":
        raise InputError(
            f"{path} displays zero as white, which says nothing of the values of {array.dtype}; invert the image and "
            "save it with black as zero"
        )
    mask = True if array.dtype.kind == "b" else (1 << bits) - 1 if array.dtype.kind == "u" else -1
    read = functools.partial(_read_inverted, array.read, np.array(mask, array.dtype.newbyteorder("=")))
    note = "zero is displayed as white; the values are inverted"
    return replace(array, read=read, notes=(*array.notes, note))


def _read_inverted(read: Callable[[Index], Array], mask: Array, index: Index) -> Array:
    """max - value for unsigned numbers, -1 - value for signed ones: all bits of a sample flip."""
    return np.bitwise_xor(read(index), mask)


def reinterpret_array(path: Path, array: StoredArray, attributes: Mapping[str, Any]) -> StoredArray:
    """An array with the values that its attributes say are meant: netCDF's packing and HDF5's images.

    `_Unsigned`: integers stand for those of the other sign. `scale_factor` and `add_offset`: value * factor + offset.
    `IMAGE_WHITE_IS_ZERO`: zero is displayed as white. Raises InputError for a value that none of these can have.
    """
    if "_Unsigned" in attributes and array.dtype.kind in "ui":
        kind = "u" if _parse_flag(path, "_Unsigned", attributes["_Unsigned"]) else "i"
        if kind != array.dtype.kind:
            array = read_as_integer(array, kind, "by its attribute _Unsigned")

    slope, offset = (
        _parse_real(path, key, attributes.get(key, v)) for key, v in (("scale_factor", 1), ("add_offset", 0))
    )
    if slope == 0:
        raise InputError(f"{path} has the attribute scale_factor 0, which makes all values equal; correct it")
    if (slope, offset) != (1.0, 0.0):
        array = scale_array(array, slope, offset)

    if _parse_flag(path, "IMAGE_WHITE_IS_ZERO", attributes.get("IMAGE_WHITE_IS_ZERO", 0)):
        array = invert_array(path, array, array.dtype.itemsize * 8)

    # 0 marks what is empty, as does the background.
    missing = [_scalar(attributes[key]) for key in ("_FillValue", "missing_value") if key in attributes]
    is_marked = array.dtype.kind in "ui" and any(str(value) not in ("0", "0.0") for value in missing)
    note = (
        f"the value {missing[0]} stands for missing voxels by its attributes; it is read as it is" if is_marked else ""
    )
    array = replace(array, notes=(*array.notes, note)) if note else array

    subclass = str(_scalar(attributes.get("IMAGE_SUBCLASS", "")))
    if subclass.rstrip("\0") in ("IMAGE_TRUECOLOR", "IMAGE_INDEXED"):
        raise InputError(f"{path} holds colors by its attribute IMAGE_SUBCLASS {subclass}; save it as gray values")
    limits = [f"{key} {_scalar(attributes[key])}" for key in _VALID_KEYS if key in attributes]
    if limits:
        note = (
            f"values outside {', '.join(limits)} stand for missing voxels by its attributes; they are read as they are"
        )
        array = replace(array, notes=(*array.notes, note))
    return array


def _parse_flag(path: Path, key: str, value: Any) -> bool:
    """A yes or no as netCDF and HDF5 write it: true, false, 1, 0."""
    text = str(_scalar(value)).strip().lower()
    if text not in ("true", "false", "1", "0"):
        raise InputError(f"{path} has the attribute {key} {text[:40]!r}; true or false is wanted: correct it")
    return text in ("true", "1")


def _parse_real(path: Path, key: str, value: Any) -> float:
    """A finite number that an attribute holds, also as text."""
    try:
        number = float(_scalar(value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{path} has the attribute {key} {str(value)[:40]}; one finite number is wanted: correct it")
    return number


def read_as_integer(array: StoredArray, kind: str, reason: str) -> StoredArray:
    """An array of integers that stand for those of the other sign (`kind` u or i) with the same bits."""
    dtype = np.dtype(f"{kind}{array.dtype.itemsize}")
    note = f"stored as {array.dtype}, read as {dtype} {reason}"
    read = functools.partial(_read_as_type, array.read, dtype)
    return replace(array, dtype=dtype, read=read, notes=(*array.notes, note))


def _read_as_type(read: Callable[[Index], Array], dtype: np.dtype[Any], index: Index) -> Array:
    return read(index).astype(dtype)


def scale_array(array: StoredArray, slope: float, offset: float) -> StoredArray:
    """An array of value * slope + offset, as float32."""
    note = f"stored {array.dtype} times {slope:g} plus {offset:g}, as the file says"
    read = functools.partial(_read_scaled, array.read, slope, offset)
    return replace(array, dtype=np.dtype(np.float32), read=read, notes=(*array.notes, note))


def _read_scaled(read: Callable[[Index], Array], slope: float, offset: float, index: Index) -> Array:
    values: Array = (read(index).astype(np.float64) * slope + offset).astype(np.float32)
    return values


def _scalar(value: Any) -> Any:
    """The one value of an attribute, which may be an array of length 1, in text where it is bytes."""
    value = np.ravel(value)[0] if np.size(value) == 1 else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _take(array: Array, index: Index) -> Array:
    return array[index]


def _get_voxel_size(array: StoredArray, zyx: tuple[int, int, int]) -> VoxelSize | None:
    """Micrometers along z, y, x; None unless all three are finite and above 0."""
    if array.spacing is None:
        return None
    z, y, x = (abs(float(array.spacing[i])) for i in zyx)
    return (z, y, x) if all(math.isfinite(v) and v > 0 for v in (z, y, x)) else None


def _note_unlikely_size(voxel_size: VoxelSize | None) -> tuple[str, ...]:
    """A note on a voxel that no microscope has: its unit may be wrong."""
    if voxel_size is None or all(_LIKELY_UM[0] <= side <= _LIKELY_UM[1] for side in voxel_size):
        return ()
    size = " x ".join(f"{side:.6g}" for side in voxel_size)
    return (f"a voxel of {size} um is unlikely; if its unit is wrong, give voxel_size=z,y,x",)


def _build_affine(
    array: StoredArray, zyx: tuple[int, int, int], voxel_size: VoxelSize | None
) -> NDArray[np.float64] | None:
    """[4, 4] voxel -> micrometers, from the file's own matrix where it has one."""
    if voxel_size is None:
        return None

    # Columns of the file's matrix are stored axes; those of z y x and the origin are taken.
    affine = np.diag([*voxel_size, 1.0])
    if array.world is not None:
        affine[:3] = array.world[:, [*zyx, -1]]
    return affine


def _note_permuted_world(axes: str, affine: NDArray[np.float64] | None) -> tuple[str, ...]:
    """A note where the file's matrix places a stored axis along another world axis; the array is read as stored."""
    if affine is None:
        return ()

    # World axis with the largest component of each stored axis.
    along = "".join("ZYX"[int(i)] for i in np.abs(affine[:3, :3]).argmax(axis=0))
    if along == "ZYX" or len(set(along)) < 3:
        return ()

    letters = axes.translate(str.maketrans("ZYX", along))
    return (f"by its affine matrix, z y x as read run along {' '.join(along.lower())}; axes={letters} turns them so",)
