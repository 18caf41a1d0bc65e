"""Volumes of every format behind one lazy interface: `open_volume(path)[box]`, z y x."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import amira, chunked, hdf5, nifti, nrrd, slice_folder, terafly, tiff, vaa3d
from hpc_neuro.data.formats.axes import layout
from hpc_neuro.data.formats.volume import Source, Volume, reading

__all__ = ["FOLDER_READERS", "READERS", "Volume", "open_volume"]


@dataclass(frozen=True)
class Reader:
    """One format: how a file of it is known, and what opens it."""

    name: str
    suffixes: tuple[str, ...]
    claims: Callable[[Path, bytes], bool]
    """Whether a file with these first 512 bytes is of the format."""
    open: Callable[[Path, str | None], Source]


@dataclass(frozen=True)
class FolderReader:
    """A format that is a folder."""

    name: str
    claims: Callable[[Path], bool]
    open: Callable[[Path, str | None], Source]


READERS = (
    Reader("TIFF", tiff.SUFFIXES, tiff.claims, tiff.open_source),
    Reader("HDF5", hdf5.SUFFIXES, hdf5.claims, hdf5.open_source),
    Reader("v3draw", vaa3d.RAW_SUFFIXES, vaa3d.claims_raw, vaa3d.open_raw),
    Reader("v3dpbd", vaa3d.PBD_SUFFIXES, vaa3d.claims_pbd, vaa3d.open_pbd),
    Reader("NRRD", nrrd.SUFFIXES, nrrd.claims, nrrd.open_source),
    Reader("NIfTI", nifti.SUFFIXES, nifti.claims, nifti.open_source),
    Reader("Amira", amira.SUFFIXES, amira.claims, amira.open_source),
)
FOLDER_READERS = (
    FolderReader("an OME-Zarr or zarr folder", chunked.claims_zarr, chunked.open_zarr),
    FolderReader("an N5 folder", chunked.claims_n5, chunked.open_n5),
    FolderReader("a Neuroglancer precomputed folder", chunked.claims_precomputed, chunked.open_precomputed),
    FolderReader("a TeraFly folder", terafly.claims, terafly.open_source),
    FolderReader("a folder of TIFF slices", slice_folder.claims, slice_folder.open_source),
)


_PACKED = (("gzip", b"\x1f\x8b"), ("zip", b"PK\x03\x04"), ("bzip2", b"BZh"), ("xz", b"\xfd7zXZ"), ("7z", b"7z\xbc\xaf"))


def open_volume(
    path: Path | str, *, channel: int | None = None, axes: str | None = None, dataset: str | None = None
) -> Volume:
    """Open a 3D image of any known format without reading its voxels.

    `channel` picks one of several; `axes` says what the stored axes are (letters Z Y X C T in stored order) where the
    file does not, or says it wrongly; `dataset` names the array in a file or folder that holds several.
    Raises InputError for a missing, unknown, truncated or ambiguous file, a 2D image, and several time points.
    """
    path = Path(path)
    name, opener = _reader(path)
    with reading(path, name):
        source = opener(path, dataset)
    if axes is not None and len(axes) == len(source.shape) + 1 and axes[:1].upper() == "Z":
        source = _one_slice(source)  # asked for in so many letters
    settled = layout(path, source.axes, source.shape, axes=axes, channel=channel)
    reopen = functools.partial(open_volume, path.resolve(), channel=channel, axes=axes, dataset=dataset)
    return Volume(path, source, settled, reopen)


def _one_slice(source: Source) -> Source:
    """An image without z as a stack of one slice."""
    read, spacing = source.read, source.spacing
    return replace(
        source,
        shape=(1, *source.shape),
        axes=f"Z{source.axes}",
        read=lambda index: read(index[1:])[None],
        spacing=None if spacing is None else (math.nan, *spacing),
        world=None,
    )


def _reader(path: Path) -> tuple[str, Callable[[Path, str | None], Source]]:
    """The reader for `path`: by its content first, since names lie; by its name only to say what is wrong."""
    if path.is_dir():
        for folder in FOLDER_READERS:
            if folder.claims(path):
                return folder.name, folder.open
        known = ", ".join(folder.name for folder in FOLDER_READERS)
        raise InputError(f"{path} is a folder that holds no image; wanted {known}, or give a file in it")
    if not path.exists():
        raise InputError(f"{path} does not exist; give the path of an image file or folder")
    try:
        with path.open("rb") as handle:
            head = handle.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {os.strerror(error.errno or 0)}") from None
    if not head:
        raise InputError(f"{path} is empty (0 bytes); copy or export it again")
    for reader in READERS:
        if reader.claims(path, head):
            return reader.name, reader.open
    for kind, magic in _PACKED:
        if head.startswith(magic):
            raise InputError(f"{path} is a {kind} archive; unpack it and give what was in it")
    name = path.name.lower()
    for reader in READERS:
        if name.endswith(reader.suffixes):
            raise InputError(
                f"{path} is named as {reader.name}, but does not begin as one (first bytes {head[:8]!r}); "
                "copy or export it again"
            )
    known = ", ".join(reader.name for reader in READERS)
    raise InputError(f"{path} is of no known image format (first bytes {head[:8]!r}); known are {known}")
