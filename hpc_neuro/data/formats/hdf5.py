"""HDF5: one dataset of a file, and Imaris .ims files."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import axes as axis
from hpc_neuro.data.formats.units import um_per
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, check_dtype, check_shape

SUFFIXES = (".h5", ".hdf5", ".hdf", ".ims", ".n5h5")
MAGIC = b"\x89HDF\r\n\x1a\n"


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as an HDF5 file does."""
    return head.startswith(MAGIC)


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """A dataset by name, or the only one with two axes or more; of an .ims file the full resolution, all channels.

    Opened without file locking, so that it works on shared disks and beside other readers.
    """
    file = h5py.File(path, "r", locking=False)
    if dataset is None and "DataSetInfo/Image" in file and "DataSet" in file:
        return _imaris(path, file)
    found = _dataset(path, file, dataset)
    shape = check_shape(path, found.shape)
    if found.is_virtual:
        _check_sources(path, found)
    elif not found.id.get_storage_size():
        raise InputError(f"{path} describes {found.name} {shape} but holds none of its voxels; copy or export it again")
    axes, spacing, notes = _labels(found, shape)
    notes += (f"dataset {found.name}",)
    dtype = check_dtype(path, found.dtype)
    return StoredArray("HDF5", shape, axes, dtype, functools.partial(_part, path, found), spacing, notes=notes)


def _check_sources(path: Path, found: Any) -> None:
    """What a virtual dataset is made of must be there: HDF5 reads a lost source as the fill value, without a word."""
    for source in sorted({(s.file_name, s.dset_name) for s in found.virtual_sources()}):
        name, inside = source
        file = found.file.filename if name == "." else path.parent / name  # an absolute name stays as it is
        try:
            with h5py.File(file, "r", locking=False) as opened:
                there = inside in opened
        except OSError:
            there = False
        if not there:
            raise InputError(
                f"{path} gathers {found.name} from other files, of which {name} with {inside} cannot be opened; "
                "put it there, or copy the volume into one file"
            )


def _part(path: Path, dataset: Any, index: Index) -> Array:
    array: Array = dataset[index]
    return array


def _dataset(path: Path, file: Any, name: str | None) -> Any:
    if name is not None:
        if name not in file or not isinstance(file[name], h5py.Dataset):
            raise InputError(f"{path} has no dataset {name!r}; it has {_listed(_all(file))}")
        return file[name]
    found = _all(file)
    volumes = [d for d in found if d.ndim > 2] or [d for d in found if d.ndim == 2]
    if len(volumes) != 1:
        what = f"{len(volumes)} arrays that could be the image" if volumes else "no array that could be the image"
        links = [n for n in file if isinstance(file.get(n, getlink=True), h5py.ExternalLink)]
        more = f" (and links to other files: {', '.join(links[:6])})" if links else ""
        raise InputError(f"{path} holds {what}: {_listed(volumes or found)}{more}; choose with dataset=NAME")
    return volumes[0]


def _all(file: Any) -> list[Any]:
    found: list[Any] = []
    file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def _listed(datasets: list[Any]) -> str:
    shown = ", ".join(f"{d.name} {d.shape} {d.dtype}" for d in datasets[:6])
    return (shown or "none") + (f" and {len(datasets) - 6} more" if len(datasets) > 6 else "")


def _labels(dataset: Any, shape: tuple[int, ...]) -> tuple[str, tuple[float, ...] | None, tuple[str, ...]]:
    """Axes and voxel size as ilastik (axistags), netCDF-like dimension labels or Fiji (element_size_um) note them."""
    axes = ""
    if "axistags" in dataset.attrs:
        axes = "".join(a["key"].upper() for a in json.loads(_text(dataset.attrs["axistags"]))["axes"])
    elif all(len(d.label) == 1 for d in dataset.dims):
        axes = "".join(d.label.upper() for d in dataset.dims)
    notes: tuple[str, ...] = ()
    if len(axes) != len(shape):
        axes = axis.default_axes(shape)
        if axes == "ZYX":
            notes = ("three axes without names, taken as z y x",)
    size = dataset.attrs.get("element_size_um", dataset.attrs.get("voxel_size_um"))
    if size is None or np.size(size) != 3:
        return axes, None, notes
    by_letter = dict(zip("ZYX", (float(v) for v in np.ravel(size)), strict=True))
    return axes, tuple(by_letter.get(a, math.nan) for a in axes), notes


def _imaris(path: Path, file: Any) -> StoredArray:
    """Imaris: DataSet/ResolutionLevel 0/TimePoint 0/Channel N/Data, padded to whole chunks; sizes are in attributes."""
    info = file["DataSetInfo/Image"].attrs
    level = file["DataSet/ResolutionLevel 0"]
    times = sum(name.startswith("TimePoint ") for name in level)
    channels = sum(name.startswith("Channel ") for name in level["TimePoint 0"])
    parts = [[level[f"TimePoint {t}/Channel {c}"] for c in range(channels)] for t in range(times)]
    first = parts[0][0]
    sizes = [int(_text(first.attrs.get(f"ImageSize{a}", info.get(a, 0)))) for a in "ZYX"]
    shape = check_shape(path, (times, channels, *sizes))
    for row in parts:
        for group in row:
            data = group["Data"]
            if (
                data.ndim != 3
                or any(n < m for n, m in zip(data.shape, sizes, strict=True))
                or data.dtype != first["Data"].dtype
            ):
                raise InputError(
                    f"{path}: {data.name} is {data.shape} {data.dtype}, but the file declares {tuple(sizes)} (z y x); "
                    "it is incomplete, export it again"
                )
    low = [float(_text(info[f"ExtMin{i}"])) for i in (2, 1, 0)]
    high = [float(_text(info[f"ExtMax{i}"])) for i in (2, 1, 0)]
    per = um_per(_text(info.get("Unit", b"um")))
    steps = [(b - a) / n for a, b, n in zip(low, high, sizes, strict=True)]
    spacing = None if per is None else (math.nan, math.nan, *(s * per for s in steps))
    world = np.zeros((3, 6))
    for i, (begin, step) in enumerate(zip(low, steps, strict=True)):  # extents run from voxel face to voxel face
        world[i, 2 + i] = step * (per or 1)
        world[i, 5] = (begin + step / 2) * (per or 1)
    stored = [[group["Data"] for group in row] for row in parts]
    dtype = check_dtype(path, stored[0][0].dtype)
    return StoredArray("Imaris", shape, "TCZYX", dtype, functools.partial(_imaris_part, stored), spacing, world)


def _imaris_part(data: list[list[Any]], index: Index) -> Array:
    t, c, *box = index
    return np.array([[data[i][j][tuple(box)] for j in range(c.start, c.stop)] for i in range(t.start, t.stop)])


def _text(value: Any) -> str:
    """Imaris and others keep text as arrays of single bytes."""
    if isinstance(value, np.ndarray):
        value = value.tobytes() if value.dtype.kind == "S" else "".join(map(str, value.ravel()))
    return value.decode(errors="replace").rstrip("\0 ") if isinstance(value, bytes) else str(value)
