"""Chunked folders through tensorstore: OME-Zarr 0.4 and 0.5, plain zarr, N5 and Neuroglancer precomputed.

In these formats a chunk without a file is the fill value, so a folder whose chunks have other names than its metadata
says would read as zeros. The files are therefore checked before the array is opened for reading. A remote store
cannot be listed, so some of its chunks are requested instead.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import um_per
from hpc_neuro.data import remote_path
from hpc_neuro.data.formats import chunk_decoder
from hpc_neuro.data.formats.axes import default_axes, letters_of_names
from hpc_neuro.data.formats.volume import (
    MAX_SPARSITY,
    NOTE_LABELS,
    Array,
    Index,
    StoredArray,
    allocated_bytes,
    check_density,
    check_dtype,
    check_shape,
    note_outside,
    reinterpret_array,
)
from hpc_neuro.data.remote_path import RemotePath, make_context

_CACHE_BYTES = 128 << 20
"""Bytes of decoded chunks that are kept: neighboring boxes meet the same chunks."""
_MAX_CHUNK = 1 << 31
"""Bytes of one decoded chunk; no codec in use packs larger ones, so metadata with a larger one are damaged."""
_MAX_JSON = 64 << 20
"""Bytes of the largest description that is read."""
_MAX_LISTED = 6
"""Arrays named in an error."""
_MAX_PROBES = 64
"""Chunks of a remote array that are looked for."""

_MAX_HEADERS = 1 << 16
"""Headers of blocks that are remembered to be right."""

_CODEC_FAULT = re.compile(r"compress|codec|filter")
"""What tensorstore names in an error about a codec."""
_AS_ARRAY = "open the array {} itself, without the image metadata, and give the voxel size in um"
"""Advice where image metadata cannot be used."""

_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_N5_SHARED_KEYS = ("axes", "pixelResolution", "resolution", "units")
"""Attributes of an N5 group that hold for its arrays."""
_METADATA_FILES = {*_ZARR_FILES, ".zmetadata", "attributes.json", "info", "provenance"}


@dataclass(frozen=True)
class _Level:
    """Where an array lies, and how the metadata around it describe it."""

    path: Path
    axes: str = ""
    names: tuple[str, ...] = ()
    """The file's own names of the axes."""
    step: tuple[float, ...] | None = None
    """Micrometers per index along each axis; nan where the axis has no length."""
    begin: tuple[float, ...] | None = None
    """Micrometers of index 0."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Store:
    """An open array, by whichever library."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]
    """What is decoded at a time."""
    file_chunk: tuple[int, ...]
    """What one file holds; larger than a chunk in shards."""
    read: Callable[[Index], Array]
    origin: tuple[int, ...] = ()
    """Index of the first voxel in the store's own coordinates."""


def matches_zarr(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is a zarr group or array."""
    return any((path / name).is_file() for name in _ZARR_FILES)


def matches_n5(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is an N5 group or array; the root of a group need not have attributes."""
    # A remote store is not listed, so its full resolution is looked for.
    is_described = any((path / name / "attributes.json").is_file() for name in ("", "s0"))
    return is_described or any(path.glob("*/attributes.json"))


def matches_precomputed(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is a Neuroglancer precomputed volume."""
    return (path / "info").is_file()


def open_zarr(path: Path, dataset: str | None) -> StoredArray:
    """An OME-Zarr image at full resolution, or the level or array that `dataset` names inside the group."""
    level = _find_zarr_level(path, dataset)
    is_v3 = (level.path / "zarr.json").is_file()
    if not is_v3 and not (level.path / ".zarray").is_file():
        raise InputError(f"{path} has no zarr array {level.path.name!r}; it is incomplete, copy it again")

    kind = "OME-Zarr" if level.axes else "zarr"
    # The axes: OME metadata first, then names at the array itself (zarr 3, or xarray's for zarr 2).
    meta = _read_json(level.path / ("zarr.json" if is_v3 else ".zarray"))
    if is_v3:
        _check_dimension_names(level.path, meta.get("dimension_names"))
    read_grid = chunk_decoder.read_zarr3 if is_v3 else chunk_decoder.read_zarr2
    store = _open_store(level.path, "zarr3" if is_v3 else "zarr", read_grid, meta)
    names = meta.get("dimension_names") if is_v3 else _read_attributes(level.path).get("_ARRAY_DIMENSIONS")
    axes, axis_names = (level.axes, level.names) if level.axes else _name_axes(names, store.shape)
    key = _first_zarr_chunk(meta, is_v3, len(store.shape))
    level = replace(level, axes=axes, names=axis_names)
    fill = meta.get("fill_value")
    array = _build_array(kind, level, store, key, "0, as no fill value is stated" if fill is None else str(fill))
    return reinterpret_array(path, array, _read_attributes(level.path))


def open_n5(path: Path, dataset: str | None) -> StoredArray:
    """An N5 array (dimensions x y z ...), or its full resolution `s0`, or the one that `dataset` names."""
    folder = path / dataset if dataset else _find_n5_array(path)
    if not (folder / "attributes.json").is_file():
        raise InputError(f"{path} has no N5 array {dataset!r}; give one that has an attributes.json")

    described = _read_json(folder / "attributes.json")
    store = _open_store(folder, "n5", chunk_decoder.read_n5, described)
    store = replace(store, read=functools.partial(_read_n5_blocks, store.read, _BlockSizes(folder, store)))
    # tensorstore refuses blocks that state their number of values, which N5 allows.
    if not isinstance(path, RemotePath) and (grid := chunk_decoder.read_n5(folder, described)):
        store = replace(store, read=functools.partial(_read_n5_part, store.read, grid.make_reader(_CACHE_BYTES)))
    count = len(store.shape)
    # Viewers note axes and resolution at the array or at the group above it.
    above = _read_optional_json(folder.parent / "attributes.json")
    shared = {key: above[key] for key in _N5_SHARED_KEYS if key in above}
    meta = {**shared, **_read_json(folder / "attributes.json")}
    # N5 lists dimensions fastest first.
    axes, names = _name_axes(meta.get("axes"), store.shape)
    if not names:
        axes = {2: "XY", 3: "XYZ"}.get(count, "Q" * count)
    step, notes = _parse_n5_steps(meta, count)
    level = _Level(folder, axes, names, step, None, notes)
    return _build_array("N5", level, store, "/".join("0" * count))


def open_precomputed(path: Path, dataset: str | None) -> StoredArray:
    """A Neuroglancer precomputed volume at its finest scale, or the scale whose key is `dataset`."""
    info = _read_json(path / "info")
    scales = info.get("scales")
    if not scales:
        raise InputError(f"{path} holds an info file without scales (meshes or annotations); wanted an image volume")

    keys = [str(s.get("key")) for s in scales]
    if dataset is not None and dataset not in keys:
        raise InputError(f"{path} has no scale {dataset!r}; it has {', '.join(keys)}")
    number = keys.index(dataset) if dataset else 0
    finest = min(range(len(scales)), key=lambda i: math.prod(scales[i].get("resolution") or [math.inf]))
    if not dataset and finest != 0 and scales[finest].get("resolution") != scales[0].get("resolution"):
        raise InputError(
            f"{path} lists its scales in another order than from fine to coarse ({_list_names(keys)}); choose one with "
            f"dataset={keys[finest]}"
        )
    scale, key = scales[number], keys[number]
    if "sharding" not in scale and not (path / key).is_dir():
        raise InputError(f"{path} lacks the folder {key} of its scale; it is incomplete, copy it again")

    # Levels are stored finest first, and tensorstore opens them by number.
    store = _open_store(path, "neuroglancer_precomputed", scale_index=number)
    # Resolutions are in nanometers, the voxel offset in voxels.
    step = (*(float(v) / 1000 for v in scale["resolution"]), math.nan)
    origin = store.origin[:3]
    begin = (*(o * s for o, s in zip(origin, step[:3], strict=True)), 0.0)
    notes: tuple[str, ...] = (f"scale {key}, {scale.get('encoding')}, voxel offset {origin} (x y z)",)
    notes += note_outside(path / "info", [path / key])
    if info.get("type") == "segmentation":
        notes += (NOTE_LABELS,)
    chunk = "0.shard" if "sharding" in scale else "0-64_0-64_0-64"
    level = _Level(path / key, "XYZC", (), step, begin, notes)
    return _build_array("Neuroglancer precomputed", level, store, chunk)


def _open_store(
    path: Path,
    driver: str,
    read_grid: Callable[[Path, Mapping[str, Any]], chunk_decoder.ChunkGrid | None] | None = None,
    meta: Mapping[str, Any] | None = None,
    **options: Any,
) -> _Store:
    """The array through tensorstore, or through `read_grid` of its metadata where tensorstore lacks the codec.

    Raises InputError for metadata and codecs that neither takes.
    """
    kvstore = path.store_spec() if isinstance(path, RemotePath) else {"driver": "file", "path": f"{path.resolve()}/"}
    # A chunk in memory is not compared with its file at each reading, which would open that again. An image does not
    # change while it is read; `infer` compares its content at the end.
    spec = {"driver": driver, "kvstore": kvstore, "recheck_cached_data": "open", **options}

    try:
        store: Any = ts.open(spec, open=True, read=True, context=make_context(_CACHE_BYTES)).result(remote_path.TIMEOUT)
    except (ValueError, TimeoutError) as error:
        if isinstance(path, RemotePath) and (failure := path.explain(error)):
            raise failure from None
        grid = read_grid(path, meta or {}) if read_grid and _CODEC_FAULT.search(str(error)) else None
        if grid is not None:
            return _Store(grid.shape, grid.dtype, grid.chunk, grid.chunk, grid.make_reader(_CACHE_BYTES))

        # The reason, without the specification that tensorstore repeats after it.
        reason = str(error).partition(" [tensorstore_spec")[0].rpartition(kvstore["path"])[2].replace('"', "")
        raise InputError(
            f"{path} cannot be opened by tensorstore: {reason}. If it names a codec or filter, write the array again "
            "with blosc, zstd or gzip; otherwise its description is damaged, copy it again"
        ) from None

    layout, origin = store.chunk_layout, tuple(int(o) for o in store.domain.origin)
    read = functools.partial(_read_part, path, store, origin)
    dtype = np.dtype(store.dtype.numpy_dtype)
    chunk, file_chunk = (tuple(int(n) for n in part.shape) for part in (layout.read_chunk, layout.write_chunk))
    return _Store(store.shape, dtype, chunk, file_chunk, read, origin)


def _build_array(kind: str, level: _Level, store: _Store, key: str, fill: str = "0") -> StoredArray:
    """The open store as a StoredArray; `key` is the file name of its first chunk, `fill` what absent ones read as."""
    # `infer` writes no file for a block without signal, so that its results may have none at all.
    is_result = any("hpc_neuro" in _read_attributes(group) for group in list(level.path.parents)[:3])
    counts = [-(-n // c) for n, c in zip(store.shape, store.file_chunk, strict=True)]
    if isinstance(level.path, RemotePath):
        _require_remote_chunks(level.path, key, counts)
    elif not is_result:
        _require_chunks(level.path, key)

    # tensorstore allocates a whole chunk before it decodes it, and the process dies when it cannot.
    shape = check_shape(level.path, store.shape)
    dtype = check_dtype(level.path, store.dtype)
    chunk_bytes = math.prod(store.chunk) * dtype.itemsize
    if chunk_bytes > _MAX_CHUNK:
        raise InputError(
            f"{level.path} declares chunks of {chunk_bytes} bytes; its description is damaged, copy it again"
        )

    if not is_result and not isinstance(level.path, RemotePath):
        check_density(level.path, shape, dtype, _count_stored_bytes(level.path, math.prod(shape) * dtype.itemsize))

    # The matrix is known only where both the step and the position of index 0 are.
    world, axes = None, level.axes
    if level.step is not None and level.begin is not None and all(axes.count(a) == 1 for a in "ZYX"):
        world = np.zeros((3, len(axes) + 1))
        for row, letter in enumerate("ZYX"):
            i = axes.index(letter)
            world[row, i], world[row, -1] = level.step[i], level.begin[i]

    # A shard holds many chunks, so the number of files does not tell how many are missing.
    absent = None if "shard" in key else functools.partial(_describe_absent_chunks, level.path, key, counts, fill)
    return StoredArray(kind, shape, axes, dtype, store.read, level.step, world, level.notes, level.names, absent)


def _read_part(path: Path, store: Any, origin: tuple[int, ...], index: Index) -> Array:
    """Read one part; the index counts from 0, the store's own domain may begin elsewhere."""
    shifted = tuple(slice(s.start + o, s.stop + o) for s, o in zip(index, origin, strict=True))
    reading = store[shifted].read()
    if not isinstance(path, RemotePath):
        return np.asarray(reading.result())

    # A request that failed does not mean that the image is damaged.
    try:
        return np.asarray(reading.result(timeout=remote_path.TIMEOUT))
    except (ValueError, TimeoutError) as error:
        raise path.explain(error) or error from None


class _BlockSizes:
    """The sizes that the blocks of an N5 array state in their headers, compared with their places."""

    def __init__(self, folder: Path, store: _Store) -> None:
        self.folder, self.shape, self.chunk = folder, store.shape, store.chunk
        self.require_whole = functools.lru_cache(_MAX_HEADERS)(self._require_whole)

    def _require_whole(self, place: tuple[int, ...]) -> None:
        path = self.folder.joinpath(*map(str, place))
        count = 4 + 4 * len(place)
        try:
            if isinstance(path, RemotePath):
                head = path.read_head(count)
            else:
                with path.open("rb") as file:
                    head = file.read(count)
        except FileNotFoundError:
            # A block without a file is empty.
            return
        _, size = chunk_decoder.parse_n5_header(head, self.chunk)
        chunk_decoder.require_whole_place(path, size, place, self.chunk, self.shape)


def _read_n5_blocks(read: Callable[[Index], Array], sizes: _BlockSizes, index: Index) -> Array:
    """Read one part. tensorstore fills a block that is shorter than its place with zeros, and so cannot be trusted."""
    values = read(index)

    ranges = [range(s.start // n, -(-s.stop // n)) for s, n in zip(index, sizes.chunk, strict=True)]
    for place in itertools.product(*ranges):
        # A block that is short along any axis lacks the last voxel of its overlap with the part. Headers are read
        # only where this voxel is zero.
        last = tuple(min(s.stop, (i + 1) * n) - 1 - s.start for s, i, n in zip(index, place, sizes.chunk, strict=True))
        if not values[last]:
            sizes.require_whole(place)
    return values


def _read_n5_part(read: Callable[[Index], Array], read_varlength: Callable[[Index], Array], index: Index) -> Array:
    try:
        return read(index)
    except ValueError as error:
        if "varlength" not in str(error):
            raise
    return read_varlength(index)


def _find_zarr_level(path: Path, dataset: str | None) -> _Level:
    """The array to open and its OME metadata, from the group's attributes."""
    attributes = _read_attributes(path)
    # OME-Zarr 0.5 keeps its metadata under `ome`, 0.4 at the top.
    ome = attributes.get("ome", attributes)
    multiscales = ome.get("multiscales")
    if not multiscales:
        return _find_plain_zarr(path, dataset, ome)

    # The first dataset of the first image is the full resolution, by the specification.
    image, levels = _parse_multiscales(path, multiscales)
    _check_ome_version(path, ome, image)
    name = dataset or next(iter(levels))
    if name not in levels:
        # Another image in the group, such as labels/NAME.
        if (path / name).is_dir() and matches_zarr(path / name):
            return _find_zarr_level(path / name, None)
        raise InputError(f"{path} has no resolution level {name!r}; it has {', '.join(levels)}")

    if not dataset:
        _check_level_order(path, list(levels))

    # Axes are mappings since 0.4 and plain names in 0.3; a type tells channel and time from space. Up to 0.2 they are
    # fixed, and images of other axes break the specification.
    stated = image.get("axes") or ("tczyx" if len(_read_shape(path / name)) == 5 else [])
    axes = [a if isinstance(a, Mapping) else {"name": a} for a in stated]
    if not axes:
        return _Level(path / name, notes=(f"level {name}, whose axes the image metadata do not name",))
    names = tuple(str(a.get("name")) for a in axes)
    types = [str(a.get("type")) for a in axes]
    letters = "".join(
        {"channel": "C", "time": "T"}.get(t, letters_of_names([n])) for t, n in zip(types, names, strict=True)
    )
    _check_axes_count(path / name, names)
    notes = (
        f"level {name} of {len(levels)}",
        *_note_image_metadata(ome, multiscales),
        *note_outside(path / ".zgroup", [path / name]),
    )
    scale, shift = _combine_transforms(path / name, levels[name], image, names)
    if scale is None:
        note = f"level {name} states no scale; give the voxel size in um"
        return _Level(path / name, letters, names, notes=(*notes, note))

    # A size without a unit of length on all of z y x is no voxel size.
    per = [um_per(a.get("unit")) for a in axes]
    if any(p is None for p, a in zip(per, letters, strict=True) if a in "ZYX"):
        steps = ", ".join(f"{a} {s:.6g}" for a, s in zip(letters, scale, strict=True) if a in "ZYX")
        return _Level(path / name, letters, names, notes=(*notes, f"steps {steps} without a unit of length"))
    step = tuple(float(s * (p or math.nan)) for s, p in zip(scale, per, strict=True))
    begin = tuple(float(s * (p or 0.0)) for s, p in zip(shift, per, strict=True))
    if backward := [a for a, s in zip(letters, step, strict=True) if s < 0]:
        notes += (f"{' '.join(backward)} runs backwards by its scale; it is read as stored",)
    return _Level(path / name, letters, names, step, begin, notes)


def _parse_multiscales(path: Path, multiscales: Any) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]:
    """The first image of a group and its levels by their paths. Raises InputError for metadata of another form."""
    image = multiscales[0] if isinstance(multiscales, list) else None
    image = image if isinstance(image, Mapping) else {}
    datasets = image.get("datasets")
    datasets = datasets if isinstance(datasets, list) else []

    if not datasets or not all(isinstance(d, Mapping) and "path" in d for d in datasets):
        raise InputError(
            f"{path} has image metadata without a list of levels (multiscales[0].datasets[N].path); correct them, or "
            f"{_AS_ARRAY.format(path / 'NAME')}"
        )
    return image, {str(d["path"]): d for d in datasets}


def _check_level_order(path: Path, names: Sequence[str]) -> None:
    """Raise InputError when the first level is not the largest: it would be read for the full resolution."""
    voxels = {name: math.prod(_read_shape(path / name)) for name in names}
    largest = max(names, key=lambda name: voxels[name])
    if voxels[largest] > voxels[names[0]]:
        raise InputError(
            f"{path} lists its levels in another order than from fine to coarse ({_list_names(names)}); choose one "
            f"with dataset={largest}"
        )


def _read_shape(array: Path) -> tuple[int, ...]:
    """The shape that the description of an array states; () where there is none."""
    meta = {**_read_optional_json(array / ".zarray"), **_read_optional_json(array / "zarr.json")}
    shape = meta.get("shape")
    is_shape = isinstance(shape, list) and all(isinstance(n, int) for n in shape)
    return tuple(shape) if is_shape and isinstance(shape, list) else ()


def _note_image_metadata(ome: Mapping[str, Any], multiscales: Sequence[Any]) -> tuple[str, ...]:
    """Notes on what the metadata say of further images and of the display of this one."""
    notes: tuple[str, ...] = ()
    if len(multiscales) > 1:
        names = [str(image.get("name", "without a name")) for image in multiscales if isinstance(image, Mapping)]
        notes += (f"the first of {len(multiscales)} images ({_list_names(names)})",)
    if "image-label" in ome:
        notes += (NOTE_LABELS,)
    omero = ome.get("omero")
    channels = omero.get("channels") if isinstance(omero, Mapping) else None
    if any(isinstance(channel, Mapping) and channel.get("inverted") for channel in channels or []):
        notes += ("channels are displayed inverted by the omero metadata; the values are read as stored",)
    return notes


def _check_ome_version(path: Path, ome: Mapping[str, Any], image: Mapping[str, Any]) -> None:
    """Raise InputError for OME-Zarr 0.6 and later, which describes axes and sizes in another way."""
    version = str(ome.get("version", image.get("version", "")))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    is_new = numbers is not None and (int(numbers[1]), int(numbers[2])) >= (0, 6)
    if not is_new and "coordinateSystems" not in image:
        return

    first = str(image["datasets"][0]["path"])
    raise InputError(
        f"{path} is OME-Zarr {version or '0.6'}, and versions up to 0.5 are read; {_AS_ARRAY.format(path / first)}"
    )


def _check_axes_count(array: Path, names: Sequence[str]) -> None:
    """Raise InputError when the image metadata name more or fewer axes than the array has."""
    shape = _read_shape(array) or names
    if len(shape) != len(names):
        raise InputError(
            f"{array} has {len(shape)} axes {shape}, but its image metadata name {len(names)} "
            f"({', '.join(names)}); correct them, or {_AS_ARRAY.format(array)}"
        )


def _combine_transforms(
    array: Path, level: Mapping[str, Any], image: Mapping[str, Any], names: Sequence[str]
) -> tuple[Any, Any]:
    """Scale and translation along each axis: the transformations of the level, then those of the whole image.

    (None, None) where no scale is stated or where another transformation takes part: then the voxel size is unknown.
    Raises InputError for a scale or translation of another number of axes.
    """
    own, shared = (_list_transforms(array, part.get("coordinateTransformations")) for part in (level, image))
    scale, shift = np.ones(len(names)), np.zeros(len(names))
    for transform in [*own, *shared]:
        kind = transform.get("type")
        if kind == "scale" and "scale" in transform:
            factor = _parse_vector(array, "scale", transform["scale"], names)
            scale, shift = scale * factor, shift * factor
        elif kind == "translation" and "translation" in transform:
            shift = shift + _parse_vector(array, "translation", transform["translation"], names)
        elif kind != "identity":
            return None, None

    # The scale of the whole image is the voxel size of a level without a scale only if it is the only level.
    stated = [*own, *(shared if len(image["datasets"]) == 1 else [])]
    is_stated = any(transform.get("type") == "scale" for transform in stated)
    return (scale, shift) if is_stated else (None, None)


def _list_transforms(array: Path, value: Any) -> list[Mapping[str, Any]]:
    """The transformations of a level or an image. Raises InputError for anything but a list of mappings."""
    transforms = value or []
    if not isinstance(transforms, list) or not all(isinstance(transform, Mapping) for transform in transforms):
        raise InputError(
            f"{array} has coordinateTransformations that are no list of mappings; correct its metadata, or "
            f"{_AS_ARRAY.format(array)}"
        )
    return transforms


def _parse_vector(array: Path, kind: str, values: Any, names: Sequence[str]) -> Any:
    """One finite number per axis. Raises InputError for anything else."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    numbers = [_parse_finite(value) for value in values] if is_list else []
    if len(numbers) == len(names) and None not in numbers:
        return np.array(numbers, dtype=np.float64)

    content = f"{len(values)} numbers" if is_list and len(values) != len(names) else repr(values)[:80]
    raise InputError(
        f"{array} states a {kind} of {content} for {len(names)} axes ({', '.join(names)}); correct its metadata, or "
        f"{_AS_ARRAY.format(array)}"
    )


def _parse_finite(value: Any) -> float | None:
    """A finite number, also as text; None for anything else, such as true."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _find_plain_zarr(path: Path, dataset: str | None, ome: Mapping[str, Any]) -> _Level:
    """A zarr without image metadata: the array itself, the named one, or the only one in the group.

    An array that the image metadata of the group above it lists is that image's level.
    """
    if dataset is not None:
        if not matches_zarr(path / dataset):
            raise InputError(f"{path} has no zarr array or group {dataset!r}")
        return _find_zarr_level(path / dataset, None)

    # Given the folder of a level, the group above it knows axes and voxel size.
    if _is_zarr_array(path):
        group = path.resolve().parent
        above = _read_attributes(group)
        images = above.get("ome", above).get("multiscales") or [{"datasets": []}]
        is_level = path.name in [str(d["path"]) for d in images[0]["datasets"]]
        return _find_level_in_group(group, path) if is_level else _Level(path)

    if isinstance(path, RemotePath):
        raise InputError(
            f"{path} is a zarr group without image metadata, and a remote store is not listed; name its array with "
            "dataset=NAME"
        )

    members = sorted({p.parent for name in ("zarr.json", ".zarray", ".zgroup") for p in path.glob(f"*/{name}")})
    # bioformats2raw keeps its XML in OME.
    members = [p for p in members if p.name != "OME"]
    if len(members) == 1:
        return _find_zarr_level(members[0], None)

    # Several images: the user has to name one.
    is_collection = {"plate", "bioformats2raw.layout"} & set(ome)
    kind = "a plate or bioformats2raw collection" if is_collection else "a zarr group"
    raise InputError(
        f"{path} is {kind} with {len(members)} members ({_list_names([p.relative_to(path) for p in members])}); "
        "choose one with dataset=NAME"
    )


def _find_level_in_group(group: Path, array: Path) -> _Level:
    """A level that was given by its own path. Metadata of the group that cannot be used are left, with a note."""
    try:
        return _find_zarr_level(group, array.name)
    except InputError as error:
        return _Level(array, notes=(f"the image metadata of its group are not used: {error}",))


def _is_zarr_array(path: Path) -> bool:
    if (path / ".zarray").is_file():
        return True
    return (path / "zarr.json").is_file() and _read_json(path / "zarr.json").get("node_type") == "array"


def _check_dimension_names(path: Path, names: Any) -> None:
    """Raise InputError for a repeated name; tensorstore would refuse the array without saying why."""
    words = [name for name in names or [] if name]
    if repeated := [name for name in words if words.count(name) > 1]:
        raise InputError(
            f"{path} names the axis {repeated[0]} {words.count(repeated[0])} times; correct dimension_names in its "
            "zarr.json"
        )


def _first_zarr_chunk(meta: Mapping[str, Any], is_v3: bool, count: int) -> str:
    """The file name of the first chunk, such as c/0/0/0 or 0.0.0."""
    if not is_v3:
        return str(meta.get("dimension_separator", ".")).join("0" * count)

    # zarr 3 has two styles: "default" c/0/0/0 and "v2" 0.0.0, each with either separator.
    encoding = meta.get("chunk_key_encoding", {})
    is_v2_style = encoding.get("name") == "v2"
    separator = encoding.get("configuration", {}).get("separator", "." if is_v2_style else "/")
    return str(separator).join([*([] if is_v2_style else "c"), *"0" * count])


def _find_n5_array(path: Path) -> Path:
    """The folder of the array: `path` itself, its full resolution `s0`, or the only one below it."""
    if "dimensions" in _read_optional_json(path / "attributes.json"):
        return path

    # Exporters of one image write one array or a pyramid s0, s1, ...
    if "dimensions" in _read_optional_json(path / "s0" / "attributes.json"):
        return path / "s0"
    if isinstance(path, RemotePath):
        raise InputError(f"{path} has no array s0, and a remote store is not listed; name its array with dataset=NAME")
    described = [p for p in path.rglob("attributes.json") if "dimensions" in _read_json(p)]
    arrays = sorted(p.parent.relative_to(path) for p in described)
    if len(arrays) == 1:
        return path / arrays[0]
    raise InputError(f"{path} holds the N5 arrays {_list_names(arrays)}; choose one with dataset=NAME")


def _parse_n5_steps(meta: Mapping[str, Any], count: int) -> tuple[Any, tuple[str, ...]]:
    """Micrometers along each axis as N5 viewers and Saalfeld's tools note them."""
    pixel = meta.get("pixelResolution")
    # Two conventions: `resolution` and `units` per axis, or `pixelResolution` with one unit.
    steps, units = meta.get("resolution"), meta.get("units")
    if isinstance(pixel, Mapping):
        own = (steps, units)
        steps, units = pixel.get("dimensions"), [pixel.get("unit")] * count
        if own[0] is not None and (list(own[0]), own[1]) != (steps, units):
            return None, ("resolution and pixelResolution state different sizes; give the voxel size in um",)

    elif isinstance(pixel, Sequence) and len(pixel) == count and steps is None:
        return None, (f"steps {list(pixel)} without a unit of length; give the voxel size in um",)

    if steps is None:
        return None, ()
    factors = meta.get("downsamplingFactors", [1] * count)
    if not all(isinstance(v, Sequence) and len(v) == count for v in (steps, factors)) or any(
        _parse_finite(v) is None for v in (*steps, *factors)
    ):
        return None, (f"steps {steps} and downsampling factors {factors} are not {count} numbers each",)
    if not isinstance(units, Sequence) or len(units) != count or any(um_per(u) is None for u in units[:3]):
        return None, (f"steps {list(steps)} without a unit of length; give the voxel size in um",)

    # pixelResolution and resolution speak of s0.
    sizes = zip(steps, units, factors, strict=True)
    return tuple(float(s) * (um_per(u) or math.nan) * float(f) for s, u, f in sizes), ()


def _name_axes(names: Any, shape: Sequence[int]) -> tuple[str, tuple[str, ...]]:
    """Letters of the axes, and the file's names for them; without any name, what is usual for the shape."""
    if not isinstance(names, Sequence) or len(names) != len(shape) or not any(names):
        return default_axes(shape), ()
    words = tuple("unnamed" if name is None else str(name) for name in names)
    return letters_of_names(words), words


def _require_chunks(folder: Path, key: str) -> None:
    """Raise InputError for an array without a single chunk named like `key`, such as 0.0.0 or 0-64_0-64_0-64."""
    other = None
    for name, is_chunk in _iter_chunk_files(folder, key):
        if is_chunk:
            return
        other = other or name
    if other is None:
        raise InputError(f"{folder} describes an array but holds none of its chunks; copy it again")

    # Files are there under other names: say what would make them chunks.
    advice = "copy or export it again"
    if other.endswith(".gz"):
        advice = f"CloudVolume writes them packed; unpack with:  gunzip -r {folder}"
    elif (folder / ".zarray").is_file() and not (folder / "zarr.json").is_file():
        separator = "/" if "/" in other else "."
        advice = f'write "dimension_separator": "{separator}" into its .zarray'
    raise InputError(f"{folder} holds files such as {other}, but no chunk with a name like {key}; {advice}")


def _require_remote_chunks(folder: RemotePath, key: str, counts: Sequence[int]) -> None:
    """Raise InputError for a remote array of which no chunk can be read, among the first, the last and some between.

    key: the name of the first chunk. counts: chunks along each axis.
    """
    # The chunks of precomputed volumes are named by voxels, and shards hold many.
    words = re.split(r"\d+", key)
    if len(words) != len(counts) + 1:
        return

    # A microscope's image is brightest in the middle, so that one request settles most images.
    places = [[n // 2, 0, n - 1, n // 4, 3 * n // 4] for n in counts]
    names = dict.fromkeys(
        words[0] + "".join(f"{i}{word}" for i, word in zip(place, words[1:], strict=True))
        for place in [*zip(*places, strict=True), *itertools.product(*([*dict.fromkeys(p)] for p in places))]
    )
    probes = list(names)[:_MAX_PROBES]
    if not any((folder / name).has_object() for name in probes):
        raise InputError(
            f"{folder}: none of {len(probes)} chunks that were looked for, such as {probes[0]}, is in the store; its "
            "chunks have other names than its description says, or most of it is empty: copy it and open the copy"
        )


def _count_stored_bytes(folder: Path, declared: int) -> int:
    """Bytes in the files below `folder`, counted until they are plausible for the `declared` ones."""
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            total += allocated_bytes(Path(inside) / name)
            if total * MAX_SPARSITY >= declared:
                return total
    return total


def _describe_absent_chunks(folder: Path, key: str, counts: Sequence[int], fill: str) -> str | None:
    """A sentence on chunks that are not stored, or lie beyond the array; None when all are as they should be.

    counts: chunks along each axis. fill: what absent ones read as.
    """
    if isinstance(folder, RemotePath):
        return f"chunks that the store does not have read as {fill}; a remote store is not listed to count them"

    # The chunks of precomputed volumes are named by voxels.
    is_numbered = len(re.findall(r"\d+", key)) == len(counts)
    inside = beyond = 0
    for name, is_chunk in _iter_chunk_files(folder, key):
        if is_chunk:
            places = re.findall(r"\d+", name) if is_numbered else []
            is_beyond = any(int(place) >= count for place, count in zip(places, counts, strict=False))
            inside, beyond = inside + (not is_beyond), beyond + is_beyond

    total = math.prod(counts)
    sentences = [f"{total - inside} of {total} chunks are not stored and read as {fill}"] if inside < total else []
    if beyond:
        sentences.append(f"{files.format_count(beyond, 'chunk')} beyond the shape that the description states")
    return "; ".join(sentences) or None


def _iter_chunk_files(folder: Path, key: str) -> Iterator[tuple[str, bool]]:
    """Each file below `folder` that is no metadata, and whether it is named like `key` with other numbers."""
    # Digits of the key stand for any index; negative and hexadecimal ones occur in precomputed volumes.
    pattern = re.compile(re.sub(r"\d+", "-?[0-9a-f]+", re.escape(key)))

    for inside, _, names in os.walk(folder):
        below = "" if Path(inside) == folder else f"{Path(inside).relative_to(folder).as_posix()}/"
        for name in names:
            if name not in _METADATA_FILES:
                yield below + name, pattern.fullmatch(below + name) is not None


def _read_attributes(path: Path) -> dict[str, Any]:
    """User attributes of a zarr group or array, of either version."""
    if (path / "zarr.json").is_file():
        attributes = _read_json(path / "zarr.json").get("attributes", {})
        return attributes if isinstance(attributes, dict) else {}
    return _read_optional_json(path / ".zattrs")


def _read_json(path: Path) -> dict[str, Any]:
    if not isinstance(path, RemotePath) and path.stat().st_size > _MAX_JSON:
        raise InputError(f"{path} is larger than any description of an array; the folder is damaged, copy it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); the folder is damaged, copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} where JSON keys are wanted; the folder is damaged")
    return value


def _read_optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _list_names(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(str(name) for name in names[:_MAX_LISTED]) + more
