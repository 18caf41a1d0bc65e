"""Amira and Avizo meshes that are one uniform lattice: raw, HxByteRLE, HxZip or text."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.decompress import UnpackedArray, raw_chunks, zlib_stream
from hpc_neuro.data.formats.run_length import BYTE_RLE, decode_runs
from hpc_neuro.data.formats.units import um_per
from hpc_neuro.data.formats.volume import StoredArray, check_shape, map_array

SUFFIXES = (".am", ".amira")
_MOST_HEADER = 1 << 20
_TYPES = {"byte": "u1", "short": "i2", "ushort": "u2", "int": "i4", "float": "f4", "double": "f8"}
_FIELD = re.compile(r"Lattice\s*\{\s*(\w+)(?:\[(\d+)\])?\s+(\w+)\s*\}\s*=?\s*@(\d+)(?:\((\w+)(?:,\s*(\d+))?\))?")


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as an Amira mesh does."""
    return head.startswith((b"# AmiraMesh", b"# Avizo"))


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The lattice of an Amira file; `dataset` names one of several fields.

    The voxel size is that of the bounding box (voxel centre to voxel centre), when the header names its unit.
    """
    with path.open("rb") as handle:
        head = handle.read(_MOST_HEADER)
    end = re.search(rb"\n@\d+\r?\n", head)
    text = head[: end.start() if end else len(head)].decode("latin-1")
    sizes = re.search(r"define\s+Lattice\s+(\d+)\s+(\d+)\s+(\d+)", text)
    fields = [f.groups() for f in _FIELD.finditer(text)]
    if not sizes or not fields or not end:
        raise InputError(f"{path} is an Amira file without a 3D lattice; export the image as a uniform lattice or TIFF")
    kind, components, name, label, encoding, packed = _chosen(path, fields, dataset)
    coordinates = re.search(r'CoordType\s+"(\w+)"', text)
    if coordinates and coordinates[1] != "uniform":
        raise InputError(f"{path} has {coordinates[1]} coordinates; a uniform lattice is wanted, resample it in Amira")
    if kind not in _TYPES:
        raise InputError(f"{path} holds {kind} values; wanted one of {', '.join(_TYPES)}")
    first = text.splitlines()[0]
    dtype = np.dtype(("<" if "LITTLE" in first else ">") + _TYPES[kind])
    shape = [int(sizes[i]) for i in (3, 2, 1)] + ([int(components)] if components and int(components) > 1 else [])
    checked = check_shape(path, shape)
    begin = _data(path, int(label))
    read = _reader(path, dtype, checked, begin, encoding, int(packed or 0), "ASCII" in first)
    axes = "ZYXC"[: len(checked)]
    spacing, world, notes = _place(text, checked)
    return StoredArray("Amira", checked, axes, dtype, read, spacing, world, (*notes, f"field {name}"))


def _chosen(path: Path, fields: list[Any], dataset: str | None) -> Any:
    names = [f[2] for f in fields]
    if dataset is None and len(fields) > 1:
        raise InputError(f"{path} holds the fields {', '.join(names)}; choose one with dataset=NAME")
    if dataset is not None and dataset not in names:
        raise InputError(f"{path} has no field {dataset!r}; it has {', '.join(names)}")
    return fields[names.index(dataset) if dataset else 0]


def _data(path: Path, label: int) -> int:
    """Where the data of field `@label` begins."""
    mark = f"\n@{label}".encode()
    with path.open("rb") as handle:
        seen, before = b"", 0
        while chunk := handle.read(_MOST_HEADER):
            seen += chunk
            if found := re.search(mark + rb"\r?\n", seen):
                return before + found.end()
            before += max(0, len(seen) - 64)
            seen = seen[-64:]
    raise InputError(f"{path} has no data block @{label}; it is incomplete, export it again")


def _reader(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], begin: int, encoding: str | None, packed: int, text: bool
) -> Any:
    if text:
        return UnpackedArray(path, dtype, shape, functools.partial(_numbers, path, begin, dtype, math.prod(shape)))
    if encoding is None:
        return map_array(path, dtype, shape, begin)
    if begin + packed > path.stat().st_size:
        raise InputError(
            f"{path} is incomplete: {packed} packed bytes are declared, but the file ends early; copy it again"
        )
    if encoding == "HxZip":
        return UnpackedArray(path, dtype, shape, functools.partial(zlib_stream, path, begin, packed))
    if encoding == "HxByteRLE" and dtype.itemsize == 1:
        return UnpackedArray(
            path, dtype, shape, lambda: decode_runs(raw_chunks(path, begin, packed), BYTE_RLE, np.dtype("u1"))
        )
    raise InputError(f"{path} is packed as {encoding}; wanted raw, HxZip or HxByteRLE: save it again")


def _numbers(path: Path, begin: int, dtype: np.dtype[Any], count: int) -> Iterable[bytes]:
    """A text block; what follows it (another block) is left."""
    with path.open("rb") as handle:
        handle.seek(begin)
        words = handle.read().split(b"\n@")[0].split()
    yield np.array(words[:count], dtype=np.float64).astype(dtype).tobytes()


def _place(text: str, shape: tuple[int, ...]) -> tuple[tuple[float, ...] | None, Any, tuple[str, ...]]:
    box = re.search(r"BoundingBox\s+([-+.\deE\s]+)", text)
    values = [float(v) for v in box[1].split()] if box else []
    if len(values) != 6:
        return None, None, ()
    low, high = values[4::-2], values[5::-2]  # z y x
    steps = [(b - a) / max(1, n - 1) for a, b, n in zip(low, high, shape, strict=False)]
    unit = re.search(r'Coordinates\s+"([^"]*)"', text)
    per = um_per(unit[1] if unit else None)
    if per is None:
        shown = " x ".join(f"{v:.6g}" for v in steps)
        return None, None, (f"steps {shown} (z y x) without a unit; give the voxel size in um",)
    spacing = tuple(s * per for s in steps) + (math.nan,) * (len(shape) - 3)
    world = np.zeros((3, len(shape) + 1))
    for i in range(3):
        world[i, i], world[i, -1] = spacing[i], low[i] * per
    return spacing, world, ()
