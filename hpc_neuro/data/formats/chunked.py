"""Chunked folders through tensorstore: OME-Zarr 0.4 and 0.5, plain zarr, N5 and local Neuroglancer precomputed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import axes as axis
from hpc_neuro.data.formats import chunk_files
from hpc_neuro.data.formats.units import um_per
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, check_dtype, check_shape

_CACHE_BYTES = 128 << 20  # chunks kept decoded: neighbouring boxes meet the same ones
_MOST_CHUNK = 1 << 31  # bytes of one decoded chunk; no codec in use packs larger ones, so a larger one is a lie


@dataclass(frozen=True)
class _Level:
    """Where an array lies, and what the metadata around it says."""

    path: Path
    axes: str = ""
    step: tuple[float, ...] | None = None  # micrometres per index along each axis, nan where there is none
    begin: tuple[float, ...] | None = None  # micrometres of index zero
    notes: tuple[str, ...] = field(default=())


def matches_zarr(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is a zarr group or array."""
    return any((path / name).is_file() for name in chunk_files.ZARR)


def matches_n5(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is an N5 group or array; the root of a group need not have attributes."""
    return (path / "attributes.json").is_file() or any(path.glob("*/attributes.json"))


def matches_precomputed(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is a Neuroglancer precomputed volume."""
    return (path / "info").is_file()


def open_zarr(path: Path, dataset: str | None) -> StoredArray:
    """An OME-Zarr image at full resolution, or the level or array that `dataset` names inside the group."""
    level = _zarr_level(path, dataset)
    v3 = (level.path / "zarr.json").is_file()
    if not v3 and not (level.path / ".zarray").is_file():
        raise InputError(f"{path} has no zarr array {level.path.name!r}; it is incomplete, copy it again")
    meta = _json(level.path / ("zarr.json" if v3 else ".zarray"))
    store = _open(level.path, "zarr3" if v3 else "zarr")
    names = meta.get("dimension_names") if v3 else _attributes(level.path).get("_ARRAY_DIMENSIONS")
    axes = level.axes or _named(names, store.shape)
    if v3:
        encoding = meta.get("chunk_key_encoding", {})
        plain = encoding.get("name") == "v2"
        between = encoding.get("configuration", {}).get("separator", "." if plain else "/")
    else:
        plain, between = True, meta.get("dimension_separator", ".")
    key = between.join([*([] if plain else "c"), *"0" * len(store.shape)])
    return _source("OME-Zarr" if level.axes else "zarr", level, axes, store, key)


def open_n5(path: Path, dataset: str | None) -> StoredArray:
    """An N5 array (dimensions x y z ...), or its full resolution `s0`, or what `dataset` names."""
    folder = path / dataset if dataset else path
    if dataset is None and "dimensions" not in _optional(path / "attributes.json"):
        found = sorted(p.parent.relative_to(path) for p in path.rglob("attributes.json") if "dimensions" in _json(p))
        folder = path / "s0" if Path("s0") in found else path / found[0] if len(found) == 1 else path
        if folder == path:
            raise InputError(f"{path} holds the N5 arrays {_names(found)}; choose one with dataset=NAME")
    if not (folder / "attributes.json").is_file():
        raise InputError(f"{path} has no N5 array {dataset!r}; give one that has an attributes.json")
    meta = _json(folder / "attributes.json")
    store = _open(folder, "n5")
    count = len(store.shape)
    above = _optional(folder.parent / "attributes.json")
    axes = _named(meta.get("axes", above.get("axes")), store.shape) if "axes" in {**meta, **above} else ""
    axes = axes or {2: "XY", 3: "XYZ"}.get(count, "Q" * count)  # N5 counts dimensions fastest first
    step, notes = _n5_steps(meta, above, count)
    return _source("N5", _Level(folder, axes, step, None, notes), axes, store, "/".join("0" * count))


def open_precomputed(path: Path, dataset: str | None) -> StoredArray:
    """A Neuroglancer precomputed volume at its finest scale, or the scale whose key is `dataset`."""
    info = _json(path / "info")
    scales = info.get("scales")
    if not scales:
        raise InputError(f"{path} holds an info file without scales (meshes or annotations); wanted an image volume")
    keys = [str(s.get("key")) for s in scales]
    if dataset is not None and dataset not in keys:
        raise InputError(f"{path} has no scale {dataset!r}; it has {', '.join(keys)}")
    number = keys.index(dataset) if dataset else 0
    scale = scales[number]
    encoding = str(scale.get("encoding"))
    if "sharding" not in scale and not (path / keys[number]).is_dir():
        raise InputError(f"{path} lacks the folder {keys[number]} of its scale; it is incomplete, copy it again")
    store = _open(path, "neuroglancer_precomputed", scale_index=number)
    step = (*(float(v) / 1000 for v in scale["resolution"]), math.nan)
    origin = store.domain.origin
    begin = (*(o * s for o, s in zip(origin[:3], step[:3], strict=True)), 0.0)
    notes = (f"scale {keys[number]}, {encoding}, voxel offset {tuple(int(o) for o in origin[:3])} (x y z)",)
    level = _Level(path / keys[number], "XYZC", step, begin, notes)
    key = "0.shard" if "sharding" in scale else "0-64_0-64_0-64"
    return _source("Neuroglancer precomputed", level, "XYZC", store, key)


def _source(kind: str, level: _Level, axes: str, store: Any, key: str) -> StoredArray:
    chunk_files.require(level.path, key)
    shape = check_shape(level.path, store.shape)
    dtype = check_dtype(level.path, np.dtype(store.dtype.numpy_dtype))
    if (size := math.prod(store.chunk_layout.read_chunk.shape) * dtype.itemsize) > _MOST_CHUNK:
        raise InputError(f"{level.path} declares chunks of {size} bytes; its description is damaged, copy it again")
    shift = tuple(int(o) for o in store.domain.origin)
    world = None
    if level.step is not None and level.begin is not None and all(a in axes for a in "ZYX"):
        world = np.zeros((3, len(axes) + 1))
        for row, a in enumerate("ZYX"):
            i = axes.index(a)
            world[row, i], world[row, -1] = level.step[i], level.begin[i]
    count = math.prod(-(-n // c) for n, c in zip(shape, store.chunk_layout.write_chunk.shape, strict=True))
    absent = None if "shard" in key else functools.partial(chunk_files.absent, level.path, key, count)
    read = functools.partial(_part, store, shift)
    return StoredArray(kind, shape, axes, dtype, read, level.step, world, level.notes, absent)


def _part(store: Any, shift: tuple[int, ...], index: Index) -> Array:
    """Read one part; an index counts from 0, the store's own domain may begin elsewhere."""
    where = tuple(slice(s.start + o, s.stop + o) for s, o in zip(index, shift, strict=True))
    array: Array = store[where].read().result()
    return array


def _open(path: Path, driver: str, **more: Any) -> Any:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path.resolve()}/"}, **more}
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    try:
        return ts.open(spec, open=True, read=True, context=context).result()
    except ValueError as error:  # the reason, without the specification that tensorstore repeats after it
        reason = str(error).partition(" [tensorstore_spec")[0].rpartition(f"{path.resolve()}/")[2].replace('"', "")
        raise InputError(
            f"{path} cannot be opened by tensorstore: {reason}. If it names a codec or filter, write the array again "
            "with blosc, zstd or gzip; otherwise its description is damaged, copy it again"
        ) from None


def _zarr_level(path: Path, dataset: str | None) -> _Level:
    """The array to open and its OME metadata, from the group's attributes."""
    attributes = _attributes(path)
    ome = attributes.get("ome", attributes)  # 0.5 keeps its metadata under `ome`, 0.4 at the top
    multiscales = ome.get("multiscales")
    if not multiscales:
        return _plain_zarr(path, dataset, ome)
    image = multiscales[0]
    levels = {str(d["path"]): d for d in image["datasets"]}
    name = dataset or next(iter(levels))
    if name not in levels:
        if (path / name).is_dir() and matches_zarr(path / name):  # another image in the group, such as labels/NAME
            return _zarr_level(path / name, None)
        raise InputError(f"{path} has no resolution level {name!r}; it has {', '.join(levels)}")
    axes = [a if isinstance(a, Mapping) else {"name": a} for a in image.get("axes", [])]
    letters = "".join({"channel": "C", "time": "T"}.get(str(a.get("type")), str(a["name"])[:1].upper()) for a in axes)
    scale, shift = np.ones(len(axes)), np.zeros(len(axes))
    for transform in [*levels[name].get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]:
        if "scale" in transform:
            scale, shift = scale * transform["scale"], shift * transform["scale"]
        if "translation" in transform:
            shift = shift + transform["translation"]
    per = [um_per(a.get("unit")) for a in axes]
    notes = (f"level {name} of {len(levels)}",)
    if any(p is None for p, a in zip(per, letters, strict=True) if a in "ZYX"):
        shown = ", ".join(f"{a} {s:.6g}" for a, s in zip(letters, scale, strict=True) if a in "ZYX")
        return _Level(path / name, letters, None, None, (*notes, f"steps {shown} without a unit of length"))
    step = tuple(float(s * (p or math.nan)) for s, p in zip(scale, per, strict=True))
    begin = tuple(float(s * (p or 0.0)) for s, p in zip(shift, per, strict=True))
    return _Level(path / name, letters, step, begin, notes)


def _plain_zarr(path: Path, dataset: str | None, ome: Mapping[str, Any]) -> _Level:
    """A zarr without image metadata: the array itself, the named one, or the only one in the group. An array that the
    image metadata of the group above it lists is that image's level."""
    if dataset is not None:
        if not matches_zarr(path / dataset):
            raise InputError(f"{path} has no zarr array or group {dataset!r}")
        return _zarr_level(path / dataset, None)
    if _is_array(path):
        group = path.resolve().parent
        above = _attributes(group)
        images = above.get("ome", above).get("multiscales") or [{"datasets": []}]
        listed = [str(d["path"]) for d in images[0]["datasets"]]
        return _zarr_level(group, path.name) if path.name in listed else _Level(path)
    inside = sorted({p.parent for name in ("zarr.json", ".zarray", ".zgroup") for p in path.glob(f"*/{name}")})
    inside = [p for p in inside if p.name != "OME"]  # bioformats2raw keeps its XML there
    if len(inside) == 1:
        return _zarr_level(inside[0], None)
    what = "a plate or bioformats2raw collection" if {"plate", "bioformats2raw.layout"} & set(ome) else "a zarr group"
    raise InputError(
        f"{path} is {what} with {len(inside)} members ({_names([p.relative_to(path) for p in inside])}); "
        "choose one with dataset=NAME"
    )


def _is_array(path: Path) -> bool:
    if (path / ".zarray").is_file():
        return True
    return (path / "zarr.json").is_file() and _json(path / "zarr.json").get("node_type") == "array"


def _attributes(path: Path) -> dict[str, Any]:
    if (path / "zarr.json").is_file():
        found = _json(path / "zarr.json").get("attributes", {})
        return found if isinstance(found, dict) else {}
    return _optional(path / ".zattrs")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); the folder is damaged, copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} where JSON keys are wanted; the folder is damaged")
    return value


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _named(names: Any, shape: Sequence[int]) -> str:
    """Axes from names such as z, y, x or time, channel; what no name settles stays open."""
    if not isinstance(names, Sequence) or len(names) != len(shape) or not all(names):
        return axis.default_axes(shape)
    return "".join(str(n)[:1].upper() if str(n)[:1].upper() in "ZYXCT" else "Q" for n in names)


def _n5_steps(meta: Mapping[str, Any], above: Mapping[str, Any], count: int) -> tuple[Any, tuple[str, ...]]:
    """Micrometres along each axis as N5 viewers and Saalfeld's tools note them."""
    pixel = meta.get("pixelResolution", above.get("pixelResolution"))
    if isinstance(pixel, Mapping):
        steps, units = pixel.get("dimensions"), [pixel.get("unit")] * count
    else:
        steps, units = meta.get("resolution", above.get("resolution")), meta.get("units", above.get("units"))
    if not isinstance(steps, Sequence) or len(steps) != count:
        return None, ()
    if not isinstance(units, Sequence) or len(units) != count or any(um_per(u) is None for u in units[:3]):
        return None, (f"steps {list(steps)} without a unit of length; give the voxel size in um",)
    factors = meta.get("downsamplingFactors", [1] * count)  # pixelResolution and resolution speak of s0
    return tuple(float(s) * (um_per(u) or math.nan) * f for s, u, f in zip(steps, units, factors, strict=True)), ()


def _names(found: Sequence[Any]) -> str:
    return ", ".join(str(f) for f in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
