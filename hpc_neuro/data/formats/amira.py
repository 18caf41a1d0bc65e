"""Amira and Avizo meshes that are one uniform lattice: raw, HxByteRLE, HxZip or text."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import note_missing_unit, um_per
from hpc_neuro.data.formats.decompress import BYTE_RLE, UnpackedArray, decode_runs, raw_chunks, text_values, zlib_stream
from hpc_neuro.data.formats.volume import NOTE_LABELS, StoredArray, check_shape, map_array

SUFFIXES = (".am", ".amira")

_MAX_HEADER = 1 << 20
"""Bytes of the longest header that is read."""
_DTYPES = {"byte": "u1", "short": "i2", "ushort": "u2", "int": "i4", "float": "f4", "double": "f8"}
_FIELD = re.compile(r"Lattice\s*\{\s*(\w+)(?:\[(\d+)\])?\s+(\w+)\s*\}\s*=?\s*@(\d+)(?:\((\w+)(?:,\s*(\d+))?\))?")


@dataclass(frozen=True)
class _Field:
    """One field of the lattice, as its header line declares it."""

    kind: str
    components: int
    name: str
    label: int
    """Number of its data block `@label`."""
    encoding: str | None
    packed: int
    """Bytes of the packed data block."""


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as an Amira mesh does."""
    return head.startswith((b"# AmiraMesh", b"# Avizo"))


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The lattice of an Amira file; `dataset` names one of several fields.

    The voxel size is that of the bounding box (voxel center to voxel center), when the header names its unit.
    """
    # The header is text, up to the first data block.
    with path.open("rb") as handle:
        head = handle.read(_MAX_HEADER)
    end = re.search(rb"\n@\d+\r?\n", head)
    text = head[: end.start() if end else len(head)].decode("latin-1")

    sizes = re.search(r"define\s+Lattice\s+(\d+)\s+(\d+)\s+(\d+)", text)
    fields = _parse_fields(text)
    if not sizes or not fields or not end:
        raise InputError(f"{path} is an Amira file without a 3D lattice; export the image as a uniform lattice or TIFF")
    field = _choose_field(path, fields, dataset)

    # Curvilinear and stacked lattices place each slice or voxel by itself.
    coordinates = re.search(r'CoordType\s+"(\w+)"', text)
    if coordinates and coordinates[1] != "uniform":
        raise InputError(f"{path} has {coordinates[1]} coordinates; a uniform lattice is wanted, resample it in Amira")
    if field.kind not in _DTYPES:
        raise InputError(f"{path} holds {field.kind} values; wanted one of {', '.join(_DTYPES)}")

    # A first line without LITTLE-ENDIAN means big-endian.
    first_line = text.splitlines()[0]
    dtype = np.dtype(("<" if "LITTLE" in first_line else ">") + _DTYPES[field.kind])

    # Sizes are x y z; the components of a vector field are interleaved, so they are the last axis.
    channels = [field.components] if field.components > 1 else []
    shape = check_shape(path, [*(int(sizes[i]) for i in (3, 2, 1)), *channels])
    read = _make_reader(path, field, dtype, shape, is_text="ASCII" in first_line)
    spacing, world, notes = _parse_placement(text, shape)
    # Amira lists the materials of a label field among its parameters.
    if re.search(r"^\s*Materials\s*\{", text, re.MULTILINE) and field.kind == "byte":
        notes = (*notes, NOTE_LABELS)
    axes = "ZYXC"[: len(shape)]
    return StoredArray("Amira", shape, axes, dtype, read, spacing, world, (*notes, f"field {field.name}"))


def _parse_fields(text: str) -> list[_Field]:
    fields = []
    for match in _FIELD.finditer(text):
        kind, components, name, label, encoding, packed = match.groups()
        fields.append(_Field(kind, int(components or 1), name, int(label), encoding, int(packed or 0)))
    return fields


def _choose_field(path: Path, fields: list[_Field], dataset: str | None) -> _Field:
    """The field named `dataset`, or the only one."""
    names = [field.name for field in fields]

    if dataset is None and len(fields) > 1:
        raise InputError(f"{path} holds the fields {', '.join(names)}; choose one with dataset=NAME")
    if dataset is not None and dataset not in names:
        raise InputError(f"{path} has no field {dataset!r}; it has {', '.join(names)}")
    return fields[names.index(dataset) if dataset else 0]


def _find_data(path: Path, label: int) -> int:
    """The first byte of the data block `@label`."""
    mark = re.compile(f"\n@{label}".encode() + rb"\r?\n")
    with path.open("rb") as handle:
        window, before = b"", 0
        while chunk := handle.read(_MAX_HEADER):
            window += chunk
            if match := mark.search(window):
                return before + match.end()

            # Keep enough of the end for a mark that lies across two chunks.
            before += max(0, len(window) - 64)
            window = window[-64:]
    raise InputError(f"{path} has no data block @{label}; it is incomplete, export it again")


def _make_reader(path: Path, field: _Field, dtype: np.dtype[Any], shape: tuple[int, ...], *, is_text: bool) -> Any:
    """A function that reads parts of a field's values."""
    begin, packed = _find_data(path, field.label), field.packed
    if is_text:
        stream: Any = functools.partial(_parse_numbers, path, begin, dtype, math.prod(shape))
        return UnpackedArray(path, dtype, shape, stream)
    if field.encoding is None:
        return map_array(path, dtype, shape, begin)

    # Packed blocks state their length, so a short file is known before it is unpacked.
    if begin + packed > path.stat().st_size:
        raise InputError(
            f"{path} is incomplete: {packed} packed bytes are declared, but the file ends early; copy it again"
        )
    if field.encoding == "HxZip":
        return UnpackedArray(path, dtype, shape, functools.partial(zlib_stream, path, begin, packed))
    if field.encoding == "HxByteRLE" and dtype.itemsize == 1:
        return UnpackedArray(
            path, dtype, shape, lambda: decode_runs(raw_chunks(path, begin, packed), BYTE_RLE, np.dtype("u1"))
        )
    raise InputError(f"{path} is packed as {field.encoding}; wanted raw, HxZip or HxByteRLE: save it again")


def _parse_numbers(path: Path, begin: int, dtype: np.dtype[Any], count: int) -> Iterator[bytes]:
    """The bytes of a text block; another block that follows it is ignored."""
    with path.open("rb") as handle:
        handle.seek(begin)
        words = handle.read().split(b"\n@")[0].split()

    yield text_values(path, words[:count], dtype)


def _is_transformed(text: str) -> bool:
    """Whether the header turns or scales the lattice after its bounding box; a shift changes no size."""
    match = re.search(r"TransformationMatrix((?:\s+[-+.\deE]+){16})", text)
    # The matrix is listed column by column; its last four numbers are the shift.
    numbers = [float(number) for number in match[1].split()] if match else list(np.eye(4).ravel())
    return not np.allclose(np.reshape(numbers, (4, 4))[:3, :3], np.eye(3), atol=1e-6)


def _parse_placement(text: str, shape: tuple[int, ...]) -> tuple[tuple[float, ...] | None, Any, tuple[str, ...]]:
    """Micrometers along each stored axis, the world matrix, and a note where the unit is missing."""
    box = re.search(r"BoundingBox\s+([-+.\deE\s]+)", text)
    values = [float(v) for v in box[1].split()] if box else []
    if len(values) != 6:
        return None, None, ()

    # The box is xmin xmax ymin ymax zmin zmax, between the centers of the first and the last voxel.
    low, high = values[4::-2], values[5::-2]
    steps = [(b - a) / max(1, n - 1) for a, b, n in zip(low, high, shape, strict=False)]
    unit = re.search(r'Coordinates\s+"([^"]*)"', text)
    per = um_per(unit[1] if unit else None)
    if per is None:
        return None, None, (note_missing_unit(steps, "z y x"),)
    if _is_transformed(text):
        return None, None, ("its TransformationMatrix turns or scales the image; give the voxel size in um",)

    # A component axis has no length.
    spacing = tuple(s * per for s in steps) + (math.nan,) * (len(shape) - 3)
    world = np.zeros((3, len(shape) + 1))
    for i in range(3):
        world[i, i], world[i, -1] = spacing[i], low[i] * per
    return spacing, world, ()
