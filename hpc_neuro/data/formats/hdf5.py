"""HDF5: one dataset of a file, and Imaris .ims files."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import um_per
from hpc_neuro.data.formats.axes import default_axes, letters_of_names
from hpc_neuro.data.formats.volume import (
    Array,
    Index,
    StoredArray,
    allocated_bytes,
    check_density,
    check_dtype,
    check_shape,
    note_outside,
    read_as_integer,
    reinterpret_array,
)

SUFFIXES = (".h5", ".hdf5", ".hdf", ".ims", ".n5h5")
_BIGDATAVIEWER = re.compile(r"/t\d+/s\d+/\d+/cells")
MAGIC = b"\x89HDF\r\n\x1a\n"

_MAX_LISTED = 6
"""Datasets named in an error."""


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as an HDF5 file does, by itself or behind a block of other content as MATLAB's do."""
    return head.startswith(MAGIC) or (path.name.lower().endswith((*SUFFIXES, ".mat")) and bool(h5py.is_hdf5(path)))


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """A dataset by name, or the only one with two axes or more; of an .ims file the full resolution, all channels.

    The file is opened without locking, so that it works on shared disks and beside other readers.
    """
    file = h5py.File(path, "r", locking=False)
    if dataset is None and "DataSetInfo/Image" in file and "DataSet" in file:
        return _open_imaris(path, file)

    # HDF5 reads what is not stored as the fill value, so both kinds of missing data are looked for.
    data = _find_dataset(path, file, dataset)
    shape = check_shape(path, data.shape)
    outside = _list_other_files(path, data)
    for file in outside:
        files.require_regular_file(file, "an image")
    if data.is_virtual:
        _check_virtual_sources(path, data)
    elif not data.id.get_storage_size():
        raise InputError(f"{path} describes {data.name} {shape} but holds none of its voxels; copy or export it again")

    _check_filters(path, data)
    names = _read_axis_names(data)
    axes, spacing, notes = _parse_attributes(data, shape, names)
    if not data.is_virtual and not data.external:
        check_density(path, shape, data.dtype, min(data.id.get_storage_size(), allocated_bytes(path)))
    dtype = check_dtype(path, data.dtype)
    read = functools.partial(_read_part, data)
    notes += (f"dataset {data.name}", *note_outside(path, outside))
    absent = None if data.is_virtual else functools.partial(_describe_absent_chunks, [data])
    array = StoredArray("HDF5", shape, axes, dtype, read, spacing, notes=notes, axis_names=names, absent=absent)
    if _is_legacy_bigdataviewer(path, data):
        array = read_as_integer(array, "u", "as BigDataViewer writes it")
    return reinterpret_array(path, array, data.attrs)


def _check_filters(path: Path, data: Any) -> None:
    """Raise InputError for a dataset that is packed by a filter which this HDF5 library lacks."""
    pipeline = data.id.get_create_plist()
    for number in range(pipeline.get_nfilters()):
        code, _, _, name = pipeline.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            shown = name.decode(errors="replace") or "without a name"
            raise InputError(
                f"{path} packs {data.name} by the HDF5 filter {code} ({shown}), which is not part of HDF5; write it "
                "again with gzip, such as by:  h5repack -f GZIP=4 OLD NEW"
            )


def _describe_absent_chunks(datasets: Sequence[Any]) -> str | None:
    """A sentence on chunks that were never written, which HDF5 reads as the fill value; None where there are none."""
    chunked = [data for data in datasets if data.chunks]
    grids = [[-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True)] for data in chunked]
    total, stored = sum(map(math.prod, grids)), sum(data.id.get_num_chunks() for data in chunked)
    if stored >= total:
        return None
    return f"{total - stored} of {total} chunks are not stored and read as {chunked[0].fillvalue}"


def _read_part(data: Any, index: Index) -> Array:
    array: Array = data[index]
    return array


def _is_legacy_bigdataviewer(path: Path, data: Any) -> bool:
    """Whether a dataset is uint16 that BigDataViewer stored as int16: its HDF5 library knew no unsigned numbers.

    Later versions state the type in an attribute `dataType`. Raises InputError for a type that int16 cannot stand for.
    """
    # The file's own word on the sign comes before what a program usually does.
    if "_Unsigned" in data.attrs:
        return False
    if data.dtype.kind != "i" or data.dtype.itemsize != 2 or not _BIGDATAVIEWER.fullmatch(data.name):
        return False

    # t00000/s00/0/cells: the attribute may be at any of these, or at the setup s00.
    names = data.name.strip("/").split("/")
    holders = ["/".join(names[:n]) or "/" for n in range(len(names) + 1)] + [names[1]]
    stated = [data.file[name].attrs["dataType"] for name in holders if "dataType" in _attributes(data.file, name)]
    kind = _decode_text(stated[0]).strip().lower() if stated else "uint16"
    if kind not in ("uint16", "int16"):
        raise InputError(
            f"{path} states the dataType {kind[:40]!r} for {data.name}, which is stored as {data.dtype}; correct the "
            "attribute, or remove it"
        )
    return kind == "uint16"


def _attributes(file: Any, name: str) -> Any:
    return file[name].attrs if name in file else {}


def _find_dataset(path: Path, file: Any, name: str | None) -> Any:
    """The dataset called `name`, or the only one that could be the image."""
    if name is not None:
        link = file.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            files.require_regular_file(path.parent / link.filename, "an image")
        if name not in file or not isinstance(file[name], h5py.Dataset):
            raise InputError(f"{path} has no dataset {name!r}; it has {_describe_datasets(_list_datasets(file))}")
        return file[name]

    # Any array with three axes or more may be the image; planes count only where there is no such array.
    datasets = _list_datasets(file)
    candidates = [d for d in datasets if d.ndim > 2] or [d for d in datasets if d.ndim == 2]
    if len(candidates) == 1:
        return candidates[0]

    count = f"{len(candidates)} arrays" if candidates else "no array"
    # `visititems` does not follow links into other files; their datasets open by name.
    links = [n for n in file if isinstance(file.get(n, getlink=True), h5py.ExternalLink)]
    more = f" (and links to other files: {', '.join(links[:_MAX_LISTED])})" if links else ""
    raise InputError(
        f"{path} holds {count} that could be the image: {_describe_datasets(candidates or datasets)}{more}; "
        "choose with dataset=NAME"
    )


def _list_datasets(file: Any) -> list[Any]:
    # `visit` passes each object once and follows no links, so it cannot run in circles.
    names: list[str] = []
    file.visit(names.append)
    return [file[name] for name in names if isinstance(file[name], h5py.Dataset)]


def _describe_datasets(datasets: list[Any]) -> str:
    shown = ", ".join(f"{d.name} {d.shape} {d.dtype}" for d in datasets[:_MAX_LISTED])
    return (shown or "none") + (f" and {len(datasets) - _MAX_LISTED} more" if len(datasets) > _MAX_LISTED else "")


def _list_other_files(path: Path, data: Any) -> list[Path]:
    """Other files from which HDF5 reads the voxels of a dataset: behind a link, gathered, or raw."""
    names = [s.file_name for s in data.virtual_sources()] if data.is_virtual else []
    names += [name for name, _, _ in data.external or []]
    own = Path(data.file.filename)
    return sorted({own, *(own.parent / name for name in names if name != ".")} - {path})


def _check_virtual_sources(path: Path, data: Any) -> None:
    """Check that the datasets which a virtual one gathers exist: HDF5 silently reads a lost one as the fill value."""
    for name, inside in sorted({(s.file_name, s.dset_name) for s in data.virtual_sources()}):
        # "." is the file itself; joining an absolute name leaves it as it is.
        file = data.file.filename if name == "." else path.parent / name
        try:
            with h5py.File(file, "r", locking=False) as source:
                exists = inside in source
        except OSError:
            exists = False

        if not exists:
            raise InputError(
                f"{path} gathers {data.name} from other files, of which {name} with {inside} cannot be opened; "
                "put it there, or copy the volume into one file"
            )


def _read_axis_names(data: Any) -> tuple[str, ...]:
    """Names of the axes as ilastik (axistags) or dimension labels note them, or as MATLAB has them; else ()."""
    if "axistags" in data.attrs:
        return tuple(str(a["key"]) for a in json.loads(_decode_text(data.attrs["axistags"]))["axes"])
    labels = tuple(str(d.label) for d in data.dims)
    # MATLAB's arrays are y x z, and its files list dimensions in the reverse order.
    is_matlab = "MATLAB_class" in data.attrs and data.ndim == 3
    return labels if any(labels) else ("z", "x", "y") if is_matlab else ()


def _parse_attributes(
    data: Any, shape: tuple[int, ...], names: tuple[str, ...]
) -> tuple[str, tuple[float, ...] | None, tuple[str, ...]]:
    """Letters of the axes, and the voxel size as Fiji (element_size_um) notes it."""
    # Without names, three axes are z y x by custom.
    axes = letters_of_names(names)
    notes: tuple[str, ...] = ()
    if len(axes) != len(shape):
        axes = default_axes(shape)
        if axes == "ZYX":
            notes = ("three axes without names, taken as z y x",)

    # Fiji writes the voxel size z y x, whatever the order of the axes.
    name = next((name for name in ("element_size_um", "voxel_size_um") if name in data.attrs), None)
    if name is None:
        return axes, None, notes
    sizes = _read_three_sizes(data.attrs[name])
    if sizes is None:
        stated = " ".join(str(data.attrs[name])[:60].split())
        return axes, None, (*notes, f"{name} is {stated}, which is no voxel size; three numbers above 0 are expected")
    by_letter = dict(zip("ZYX", sizes, strict=True))
    return axes, tuple(by_letter.get(a, math.nan) for a in axes), notes


def _read_three_sizes(value: Any) -> list[float] | None:
    """Three positive numbers; None for anything else."""
    try:
        sizes = [float(number) for number in np.ravel(value)]
    except (TypeError, ValueError):
        return None
    return sizes if len(sizes) == 3 and all(math.isfinite(size) and size > 0 for size in sizes) else None


def _open_imaris(path: Path, file: Any) -> StoredArray:
    """Imaris: DataSet/ResolutionLevel 0/TimePoint 0/Channel N/Data, padded to whole chunks; sizes are in attributes."""
    # groups[t][c] is one channel of one time point.
    info = file["DataSetInfo/Image"].attrs
    level = file["DataSet/ResolutionLevel 0"]
    times = sum(name.startswith("TimePoint ") for name in level)
    channels = sum(name.startswith("Channel ") for name in level["TimePoint 0"])
    groups = [[level[f"TimePoint {t}/Channel {c}"] for c in range(channels)] for t in range(times)]

    # Arrays are padded to whole chunks; the true size is in the attributes of the channel, or of the image.
    first = groups[0][0]
    sizes = [int(_decode_text(first.attrs.get(f"ImageSize{a}", info.get(a, 0)))) for a in "ZYX"]
    shape = check_shape(path, (times, channels, *sizes))
    stored = [[group["Data"] for group in row] for row in groups]
    for data in (data for row in stored for data in row):
        _check_imaris_data(path, data, sizes, stored[0][0].dtype)

    spacing, world = _parse_imaris_extent(info, sizes)
    dtype = check_dtype(path, stored[0][0].dtype)
    stored_bytes = sum(data.id.get_storage_size() for row in stored for data in row)
    check_density(path, shape, dtype, min(stored_bytes, allocated_bytes(path)))
    read = functools.partial(_read_imaris_part, stored)
    notes = () if spacing is not None else ("an extent without a unit of length; give the voxel size in um",)
    absent = functools.partial(_describe_absent_chunks, [data for row in stored for data in row])
    return StoredArray("Imaris", shape, "TCZYX", dtype, read, spacing, world, notes, absent=absent)


def _check_imaris_data(path: Path, data: Any, sizes: list[int], dtype: np.dtype[Any]) -> None:
    """Raise InputError unless one channel holds at least the declared voxels, in the type of the first channel."""
    is_short = data.ndim != 3 or any(n < m for n, m in zip(data.shape, sizes, strict=True))
    if is_short or data.dtype != dtype:
        raise InputError(
            f"{path}: {data.name} is {data.shape} {data.dtype}, but the file declares {tuple(sizes)} (z y x); "
            "it is incomplete, export it again"
        )


def _parse_imaris_extent(info: Any, sizes: list[int]) -> tuple[tuple[float, ...] | None, Any]:
    """Micrometers along t c z y x, and the world matrix. Extents run from voxel face to voxel face."""
    low = [float(_decode_text(info[f"ExtMin{i}"])) for i in (2, 1, 0)]
    high = [float(_decode_text(info[f"ExtMax{i}"])) for i in (2, 1, 0)]
    steps = [(b - a) / n for a, b, n in zip(low, high, sizes, strict=True)]

    # Without its unit, the extent is no size.
    per = um_per(_decode_text(info.get("Unit", b"")))
    spacing = None if per is None else (math.nan, math.nan, *(s * per for s in steps))
    world = np.zeros((3, 6))
    for i, (begin, step) in enumerate(zip(low, steps, strict=True)):
        world[i, 2 + i] = step * (per or 1)
        world[i, 5] = (begin + step / 2) * (per or 1)
    return spacing, world


def _read_imaris_part(data: list[list[Any]], index: Index) -> Array:
    t, c, *box = index
    return np.array([[data[i][j][tuple(box)] for j in range(c.start, c.stop)] for i in range(t.start, t.stop)])


def _decode_text(value: Any) -> str:
    """The text of an attribute; Imaris and others keep it as an array of single bytes."""
    if isinstance(value, np.ndarray):
        value = value.tobytes() if value.dtype.kind == "S" else "".join(map(str, value.ravel()))
    return value.decode(errors="replace").rstrip("\0 ") if isinstance(value, bytes) else str(value)
