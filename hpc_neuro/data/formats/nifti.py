"""NIfTI-1 and -2 (.nii, .nii.gz, .hdr/.img) by nibabel's header; i j k are x y z unless `axes=` says otherwise."""

from __future__ import annotations

import functools
import gzip
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import note_missing_unit, um_per
from hpc_neuro.data.formats.decompress import UnpackedArray, gzip_stream
from hpc_neuro.data.formats.volume import (
    NOTE_LABELS,
    StoredArray,
    check_dtype,
    check_shape,
    map_array,
    scale_array,
)

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")

# nibabel prints what it mends in a header; what that means for the voxel size is a note of the volume.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

_UNITS = {"meter": "m", "mm": "mm", "micron": "um"}
_MAGIC1_AT, _MAGIC1 = 344, (b"n+1\0", b"ni1\0")
_MAGIC2 = b"\r\n\x1a\n"
_MAX_DEFLATE = 1100
"""Decompressed bytes per gzip byte; deflate reaches 1032 at the very most."""


def matches(path: Path, head: bytes) -> bool:
    """Whether the file is gzip named .nii.gz, has NIfTI's magic, or is the .img of a .hdr."""
    # The magic of NIfTI-1 stands at byte 344, that of NIfTI-2 at byte 4.
    if head[:2] == b"\x1f\x8b" and path.name.lower().endswith(".nii.gz"):
        return True
    if head[_MAGIC1_AT : _MAGIC1_AT + 4] in _MAGIC1:
        return True
    if head[8:12] == _MAGIC2 or head[4:12] in (b"n+2\0" + _MAGIC2, b"ni2\0" + _MAGIC2):
        return True

    # The voxels of a pair have no magic of their own.
    return path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file()


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The array of a NIfTI file, mapped, or unpacked once when it is gzip.

    Values are those stored; a scale factor other than 1 is applied and gives float32. The voxel size is unknown unless
    the header names its unit.
    """
    image = _load(path)

    # Headers are checked before anything is mapped or unpacked.
    shape = check_shape(path, image.shape)
    dtype = check_dtype(path, np.dtype(image.header.get_data_dtype()))

    # The first axis is fastest: the C order of the reversed axes.
    stored = shape[::-1]
    read = _make_reader(path, image, dtype, stored)

    # NIfTI orders dimensions x y z t, then others; a fifth one holds channels.
    axes = {2: "XY", 3: "XYZ", 4: "XYZT", 5: "XYZTC"}.get(len(shape), "Q" * len(shape))[::-1]
    spacing, world, notes = _parse_placement(image, len(shape))
    notes += _note_further_bytes(path, image, math.prod(stored) * dtype.itemsize)
    if image.header.get_intent()[0] == "label":
        notes += (NOTE_LABELS,)
    array = StoredArray("NIfTI", stored, axes, dtype, read, spacing, world, notes)

    # nibabel blanks the header's own slope, so it is taken from the array proxy.
    slope, inter = float(image.dataobj.slope), float(image.dataobj.inter)
    return array if (slope, inter) == (1.0, 0.0) else scale_array(array, slope, inter)


def _load(path: Path) -> Any:
    """nibabel's image, without its voxels. Raises InputError for ANALYZE, OSError or EOFError for damaged gzip."""
    if path.name.lower().endswith(".gz"):
        with path.open("rb") as handle:
            is_packed = handle.read(2) == b"\x1f\x8b"
        if not is_packed:
            raise InputError(f"{path} is named .gz, but is not packed by gzip; name it {path.name[:-3]}")
        # nibabel hides what is wrong with a damaged archive; gzip says it.
        with gzip.open(path) as stream:
            stream.read(1)

    image: Any = nibabel.load(path.with_suffix(".hdr") if path.suffix.lower() == ".img" else path)
    # The header class of NIfTI-2 is a subclass.
    if not isinstance(image.header, nibabel.Nifti1Header):
        raise InputError(f"{path} is ANALYZE 7.5, which names neither unit nor orientation surely; save it as NIfTI")
    return image


def _make_reader(path: Path, image: Any, dtype: np.dtype[Any], stored: tuple[int, ...]) -> Any:
    """A function that reads parts of the stored values."""
    data = Path(image.file_map["image"].filename or path)
    # nibabel blanks the header's own offset, so it is taken from the array proxy.
    begin = int(image.dataobj.offset)
    # In a single file the header takes 348 or 540 bytes and four more; readers that take 0 for 352 guess.
    least = image.header.template_dtype.itemsize + 4 if image.header.is_single else 0
    if begin < least:
        raise InputError(
            f"{path} puts its voxels at byte {begin}, before the end of its header at byte {least}; correct its "
            f"vox_offset, which is mostly {least}"
        )

    # A plain file is mapped; gzip allows no access in between.
    if not data.name.lower().endswith(".gz"):
        return map_array(data, dtype, stored, begin)
    size = math.prod(stored) * dtype.itemsize
    _check_packed_size(data, size)
    return UnpackedArray(data, dtype, stored, functools.partial(_stream_voxels, data, begin, size))


def _note_further_bytes(path: Path, image: Any, size: int) -> tuple[str, ...]:
    """A note on bytes behind the voxels of a plain file: its dimensions may be too small."""
    data = Path(image.file_map["image"].filename or path)
    extra = 0 if data.name.lower().endswith(".gz") else data.stat().st_size - int(image.dataobj.offset) - size
    return (f"{files.format_count(extra, 'byte')} behind the voxels are not read",) if extra > 0 else ()


def _stream_voxels(path: Path, begin: int, size: int) -> Iterator[bytes]:
    """The `size` bytes behind the header, without what some writers append."""
    for part in gzip_stream(path, 0, begin):
        yield part[:size]
        size -= min(size, len(part))
        if not size:
            return


def _check_packed_size(path: Path, size: int) -> None:
    """Raise InputError when the gzip file is too small for `size` bytes of voxels."""
    files.require_regular_file(path, "an image")
    packed = path.stat().st_size
    if size > packed * _MAX_DEFLATE + 4096:
        raise InputError(
            f"{path} declares {size} bytes of voxels, more than {packed} gzip bytes can hold; it is damaged"
        )


def _read_pixdim(image: Any) -> list[float]:
    """The step along each axis as it stands in the file: nibabel takes 1 for 0."""
    holder = image.file_map["header" if "header" in image.file_map else "image"]
    with holder.get_prepare_fileobj("rb") as handle:
        header = type(image.header).from_fileobj(handle, check=False)
    return [float(step) for step in header["pixdim"][1:]]


def _parse_placement(image: Any, count: int) -> tuple[tuple[float, ...] | None, Any, tuple[str, ...]]:
    """Micrometers along each stored axis, the world matrix, and notes where the header leaves the size open."""
    try:
        unit = image.header.get_xyzt_units()[0]
    except KeyError:
        # A code that the format does not have.
        unit = ""
    per = um_per(_UNITS.get(unit))
    zooms = [float(z) for z in image.header.get_zooms()]
    if 0 in (stated := _read_pixdim(image)[: min(3, count)]):
        numbers = " x ".join(f"{step:.6g}" for step in stated[::-1])
        return None, None, (f"pixdim is {numbers} (z y x), and a size of 0 is none; give the voxel size in um",)
    if per is None:
        return None, None, (note_missing_unit(zooms[:3][::-1], "z y x"),)

    # The size is stated twice, in pixdim and in the matrix [world x y z 1, i j k 1]; both must agree.
    affine = np.asarray(image.affine, dtype=np.float64) * per
    steps = np.linalg.norm(affine[:3, :3], axis=0)[: len(zooms)]
    pixdim = np.abs(zooms[:3]) * per
    if not np.allclose(steps, pixdim, rtol=0.01):
        sizes = " and ".join(" x ".join(f"{v:.6g}" for v in size[::-1]) for size in (pixdim, steps))
        note = f"pixdim and the affine matrix disagree about the voxel size ({sizes} um z y x); give the right one"
        return None, None, (note,)

    # Both go from i j k and x y z to the reversed order of the stored axes and of the world.
    spacing = tuple((z * per if i < 3 else math.nan) for i, z in enumerate(zooms))[::-1]
    world = np.zeros((3, count + 1))
    world[:, -1] = affine[2::-1, 3]
    for i in range(min(3, count)):
        world[:, count - 1 - i] = affine[2::-1, i]
    return spacing, world, ()
