"""NIfTI-1 and -2 (.nii, .nii.gz, .hdr/.img) by nibabel's header; i j k are x y z unless `axes=` says otherwise."""

from __future__ import annotations

import functools
import gzip
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.decompress import UnpackedArray, gzip_stream
from hpc_neuro.data.formats.units import um_per
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, check_dtype, check_shape, map_array

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")
_UNITS = {"meter": "m", "mm": "mm", "micron": "um"}
_AT, _MAGICS = 344, (b"n+1\0", b"ni1\0")
_MAGIC2 = b"\r\n\x1a\n"


def matches(path: Path, head: bytes) -> bool:
    """Whether the file, unzipped where it is gzip, has NIfTI's magic; the pair's .img is found by its .hdr."""
    if head[:2] == b"\x1f\x8b" and path.name.lower().endswith(".nii.gz"):
        return True
    if (
        head[_AT : _AT + 4] in _MAGICS
        or head[8:12] == _MAGIC2
        or head[4:12] in (b"n+2\0" + _MAGIC2, b"ni2\0" + _MAGIC2)
    ):
        return True
    return path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file()


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The array of a NIfTI file, mapped, or unpacked once when it is gzip.

    Values are those stored; a scale factor other than 1 is applied and gives float32. The unit must be in the header,
    otherwise the voxel size stays unknown.
    """
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            stream.read(1)  # a damaged archive speaks here
    image: Any = nibabel.load(path.with_suffix(".hdr") if path.suffix.lower() == ".img" else path)
    header = image.header
    if not isinstance(header, nibabel.Nifti1Header):  # NIfTI-2's is one too
        raise InputError(f"{path} is ANALYZE 7.5, which names neither unit nor orientation surely; save it as NIfTI")
    shape = check_shape(path, image.shape)
    dtype = check_dtype(path, np.dtype(header.get_data_dtype()))
    data = Path(image.file_map["image"].filename or path)
    begin = int(image.dataobj.offset)  # nibabel blanks the header's own offset and slope
    stored = shape[::-1]  # first axis fastest: the C order of the reversed axes
    if begin < 0:
        raise InputError(f"{path} puts its voxels at byte {begin}; its header is damaged")
    if data.name.lower().endswith(".gz"):
        _check_packed(data, math.prod(shape) * dtype.itemsize)
        read: Any = UnpackedArray(
            data, dtype, stored, functools.partial(_voxels, data, begin, math.prod(shape) * dtype.itemsize)
        )
    else:
        read = map_array(data, dtype, stored, begin)
    slope, inter = float(image.dataobj.slope), float(image.dataobj.inter)
    given = dtype
    if (slope, inter) != (1.0, 0.0):
        given = np.dtype(np.float32)
        read = functools.partial(_scaled, read, slope, inter)
    axes = {2: "XY", 3: "XYZ", 4: "XYZT", 5: "XYZTC"}.get(len(shape), "Q" * len(shape))[::-1]
    per = um_per(_UNITS.get(header.get_xyzt_units()[0], ""))
    zooms = [float(z) for z in header.get_zooms()]
    if per is None:
        shown = " x ".join(f"{z:.6g}" for z in zooms[:3][::-1])
        notes: tuple[str, ...] = (f"steps {shown} (z y x) without a unit; give the voxel size in um",)
        return StoredArray("NIfTI", stored, axes, given, read, notes=notes)
    affine = np.asarray(image.affine, dtype=np.float64) * per  # [world x y z 1, i j k 1]
    steps = np.linalg.norm(affine[:3, :3], axis=0)[: len(zooms)]
    if not np.allclose(steps, np.abs(zooms[:3]) * per, rtol=0.01):
        shown = " and ".join(" x ".join(f"{v:.6g}" for v in both[::-1]) for both in (np.abs(zooms[:3]) * per, steps))
        note = f"pixdim and the affine matrix disagree about the voxel size ({shown} um z y x); give the right one"
        return StoredArray("NIfTI", stored, axes, given, read, notes=(note,))
    spacing = tuple((z * per if i < 3 else math.nan) for i, z in enumerate(zooms))[::-1]
    world = np.zeros((3, len(shape) + 1))
    world[:, -1] = affine[2::-1, 3]
    for i in range(min(3, len(shape))):
        world[:, len(shape) - 1 - i] = affine[2::-1, i]
    return StoredArray("NIfTI", stored, axes, given, read, spacing, world)


def _voxels(path: Path, begin: int, size: int) -> Any:
    """The bytes behind the header, and none of what some writers append."""
    for part in gzip_stream(path, 0, begin):
        yield part[:size]
        size -= min(size, len(part))
        if not size:
            return


def _check_packed(path: Path, wanted: int) -> None:
    packed = path.stat().st_size
    if wanted > packed * 1100 + 4096:  # deflate packs 1032 to 1 at the very most
        raise InputError(
            f"{path} declares {wanted} bytes of voxels, more than {packed} gzip bytes can hold; it is damaged"
        )


def _scaled(read: Any, slope: float, inter: float, index: Index) -> Array:
    values: Array = (read(index).astype(np.float64) * slope + inter).astype(np.float32)
    return values
