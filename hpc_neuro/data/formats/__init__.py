"""Volumes of every format behind one lazy interface: `open_volume(path)[box]`, z y x.

To add a format, write one file with `matches` and `open_source` and add one row to `READERS`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_neuro.core import files
from hpc_neuro.core.image_names import is_system_file, strip_ending
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import amira, chunked, hdf5, nifti, nrrd, slice_folder, terafly, tiff, vaa3d
from hpc_neuro.data.formats.axes import resolve_axes
from hpc_neuro.data.formats.volume import StoredArray, Volume, translate_errors
from hpc_neuro.data.remote_path import METADATA_FILES, RemotePath, parse_path

__all__ = ["READERS", "Volume", "describe_content", "image_stem", "is_image_folder", "open_volume", "summarize_axes"]


@dataclass(frozen=True)
class Reader:
    """One format: how a path of it is recognized, and the function that opens it."""

    name: str
    matches: Callable[[Path, bytes], bool]
    """Whether a path with these first 512 bytes (none for a folder) is of the format."""
    open: Callable[[Path, str | None], StoredArray]
    """Opens the path; the second argument names one of several arrays."""
    suffixes: tuple[str, ...] = ()
    """File name endings of the format; empty for a format that is a folder."""
    is_remote: bool = False
    """Whether an image of the format may lie in a remote store (see `data/remote_path.py`)."""

    @property
    def is_folder(self) -> bool:
        """Whether the format is a folder."""
        return not self.suffixes


@dataclass(frozen=True)
class ImageSummary:
    """What an image of several channels, colors or time points stores."""

    format: str
    axes: str
    """One letter per axis, in the order of `shape`."""
    shape: tuple[int, ...]
    dtype: str
    channels: int
    """Channels or color samples from which one can be chosen; 0 where that is not enough to read a stack."""


# The first row that matches opens the path. A zarr folder comes before a folder of slices, which may lie inside it.
READERS = (
    Reader("TIFF", tiff.matches, tiff.open_source, tiff.SUFFIXES),
    Reader("HDF5", hdf5.matches, hdf5.open_source, hdf5.SUFFIXES),
    Reader("v3draw", vaa3d.matches_raw, vaa3d.open_raw, vaa3d.RAW_SUFFIXES),
    Reader("v3dpbd", vaa3d.matches_pbd, vaa3d.open_pbd, vaa3d.PBD_SUFFIXES),
    Reader("NRRD", nrrd.matches, nrrd.open_source, nrrd.SUFFIXES),
    Reader("NIfTI", nifti.matches, nifti.open_source, nifti.SUFFIXES),
    Reader("Amira", amira.matches, amira.open_source, amira.SUFFIXES),
    Reader("OME-Zarr or zarr folder", chunked.matches_zarr, chunked.open_zarr, is_remote=True),
    Reader("N5 folder", chunked.matches_n5, chunked.open_n5, is_remote=True),
    Reader("Neuroglancer precomputed folder", chunked.matches_precomputed, chunked.open_precomputed, is_remote=True),
    Reader("TeraFly folder", terafly.matches, terafly.open_source),
    Reader("folder of TIFF slices", slice_folder.matches, slice_folder.open_source),
)

_ARCHIVES = (
    ("gzip", b"\x1f\x8b"),
    ("zip", b"PK\x03\x04"),
    ("bzip2", b"BZh"),
    ("xz", b"\xfd7zXZ"),
    ("7z", b"7z\xbc\xaf"),
)
_OTHERS = (
    ("Zeiss CZI", 0, b"ZISRAWFILE"),
    ("Nikon ND2", 0, b"\xda\xce\xbe\x0a"),
    ("Leica LIF", 0, b"\x70\0\0\0"),
    ("Olympus OIB", 0, b"\xd0\xcf\x11\xe0"),
    ("DICOM", 128, b"DICM"),
    ("MetaImage", 0, b"ObjectType"),
    ("NumPy", 0, b"\x93NUMPY"),
    ("PNG", 0, b"\x89PNG"),
    ("JPEG", 0, b"\xff\xd8\xff"),
)
"""Formats of images that are not read, with the place and the bytes by which they are recognized."""


def open_volume(
    path: Path | str, *, channel: int | None = None, axes: str | None = None, dataset: str | None = None
) -> Volume:
    """Open a 3D image of any known format without reading its voxels.

    `path` is a file, a folder, or the address of an OME-Zarr, zarr, N5 or precomputed image: s3://, gs://, https://.
    `channel` picks one of several. `axes` names the stored axes (letters Z Y X C T in stored order) where the file does
    not, or names them wrongly. `dataset` names the array in a file or folder that holds several.
    Raises InputError for a missing, unknown, truncated or ambiguous file, a 2D image, and several time points.
    """
    path = parse_path(path)
    array = _open_array(path, dataset)

    # A plane is no stack, unless `axes` asks for it as a stack of one slice.
    if axes is not None and len(axes) == len(array.shape) + 1 and axes[:1].upper() == "Z":
        array = _add_z_axis(array)

    # The path is made absolute for processes that are started in another folder.
    order = resolve_axes(path, array.axes, array.shape, axes=axes, channel=channel, names=array.axis_names)
    reopen = functools.partial(open_volume, path.resolve(), channel=channel, axes=axes, dataset=dataset)
    return Volume(path, array, order, reopen)


def summarize_axes(path: Path, *, axes: str | None = None, dataset: str | None = None) -> ImageSummary | None:
    """The stored array of an image that `open_volume` refuses for its channels, colors or time points.

    None where it is refused for anything else, such as an axis without a name. Raises InputError as `open_volume`.
    """
    array = _open_array(path, dataset)
    letters = (axes or array.axes).upper()
    is_open = len(letters) != len(array.shape) or len(set(letters)) < len(letters) or not set(letters) <= set("ZYXCTS")
    counts = {letter: array.shape[letters.index(letter)] for letter in "CTS" if letter in letters and not is_open}
    if not any(count > 1 for count in counts.values()):
        return None
    has_stack = set("ZYX") <= set(letters) and counts.get("T", 1) == 1
    channels = [count for letter, count in counts.items() if letter in "CS" and count > 1]
    return ImageSummary(
        array.format, letters, array.shape, str(array.dtype), channels[0] if has_stack and channels else 0
    )


def _open_array(path: Path, dataset: str | None) -> StoredArray:
    """The array of a path by the reader of its format. Opening reads headers only."""
    reader = _find_reader(path)
    # A damaged header makes a decoder fail in its own way.
    with translate_errors(path, reader.name):
        return reader.open(path, dataset)


def is_image_folder(path: Path) -> bool:
    """Whether the folder is one image of a known format."""
    return _find_folder_reader(path) is not None


def image_stem(path: Path) -> str | None:
    """The stem of a file of a known image format or of a folder that is one image; None for anything else."""
    # Microscopes write .TIF as often as .tif.
    name = path.name.lower()
    if path.is_dir():
        return strip_ending(path) if not is_system_file(path) and is_image_folder(path) else None

    is_image = any(name.endswith(suffix) for reader in READERS for suffix in reader.suffixes)
    return strip_ending(path) if is_image and not is_system_file(path) else None


def describe_content(image: Path) -> str:
    """What changes when an image is written anew: the SHA-256 of a file; of a folder its place, and the names, sizes
    and times of the files that describe its arrays; of one in a remote store its address and their content.

    The chunks of a folder may be millions, so that one replaced in place is not noticed.
    """
    if isinstance(image, RemotePath):
        descriptions = [image / name for name in METADATA_FILES if (image / name).is_file()]
        return f"{image} {hashlib.sha256(b''.join(path.read_bytes() for path in descriptions)).hexdigest()}"
    if image.is_file():
        return files.sha256(image)

    metadata = [path for name in METADATA_FILES for pattern in (name, f"*/{name}") for path in image.glob(pattern)]

    # Sorted, because file systems list folders in orders of their own.
    facts = [(p.relative_to(image).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(metadata)]
    return f"{image.resolve()} {facts}"


def _add_z_axis(array: StoredArray) -> StoredArray:
    """An image without z as a stack of one slice."""
    read, spacing = array.read, array.spacing

    return replace(
        array,
        shape=(1, *array.shape),
        axes=f"Z{array.axes}",
        read=lambda index: read(index[1:])[None],
        spacing=None if spacing is None else (math.nan, *spacing),
        world=None,
    )


def _find_reader(path: Path) -> Reader:
    """The reader for `path`, by its content: names are often wrong. InputError when there is none."""
    if path.is_dir():
        folder_reader = _find_folder_reader(path)
        if folder_reader is not None:
            return folder_reader
        if isinstance(path, RemotePath):
            path.require_access()
            raise InputError(
                f"{path} holds no OME-Zarr, zarr, N5 or precomputed image; give the address of its folder, and copy "
                "images of other formats to a local disk first"
            )

        names = [reader.name for reader in READERS if reader.is_folder]
        wanted = ", ".join(f"{'an' if name.startswith(('OME', 'N5')) else 'a'} {name}" for name in names)
        raise InputError(f"{path} is a folder that holds no image; wanted {wanted}, or give a file in it")

    head = _read_head(path)
    for reader in READERS:
        if not reader.is_folder and reader.matches(path, head):
            return reader
    raise InputError(_explain_unknown(path, head))


def _find_folder_reader(path: Path) -> Reader | None:
    """The reader of a folder; None when it holds no image."""
    readers = [reader for reader in READERS if reader.is_remote or not isinstance(path, RemotePath)]
    return next((reader for reader in readers if reader.is_folder and reader.matches(path, b"")), None)


def _read_head(path: Path) -> bytes:
    """The first 512 bytes of a file that exists, can be opened, and is not empty."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give the path of an image file or folder")
    files.require_regular_file(path, "an image")

    try:
        with path.open("rb") as handle:
            head = handle.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {os.strerror(error.errno or 0)}") from None

    if not head:
        raise InputError(f"{path} is empty (0 bytes); copy or export it again")
    return head


def _explain_unknown(path: Path, head: bytes) -> str:
    """Why no reader takes a file with these first bytes: an archive, a wrong name, or an unknown format."""
    # .nii.gz is the one format that is read from inside an archive, and it has matched before.
    for kind, magic in _ARCHIVES:
        if head.startswith(magic):
            return f"{path} is a {kind} archive; unpack it and give its content"

    for kind, begin, magic in _OTHERS:
        if head[begin:].startswith(magic):
            return f"{path} is a {kind} file, which is not read; export the image as OME-TIFF"
    if b"<SpimData" in head:
        return f"{path} describes images of BigDataViewer; give the .h5 or .n5 beside it, and the voxel size in um"

    # A known suffix with another content is a truncated or misnamed file.
    name = path.name.lower()
    for reader in READERS:
        if not reader.is_folder and name.endswith(reader.suffixes):
            return (
                f"{path} is named as {reader.name}, but does not begin as one (first bytes {head[:8]!r}); "
                "copy or export it again"
            )

    formats = ", ".join(reader.name for reader in READERS if not reader.is_folder)
    return f"{path} is of no known image format (first bytes {head[:8]!r}); known formats: {formats}"
