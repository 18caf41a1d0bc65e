"""Vaa3D's v3draw (mapped, read by parts) and v3dpbd (run-length coded, 8 and 16 bit)."""

from __future__ import annotations

import logging
import math
import struct
from pathlib import Path

import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.decompress import PBD8, PBD16, UnpackedArray, decode_runs, raw_chunks
from hpc_neuro.data.formats.volume import Array, StoredArray, check_shape, map_array

log = logging.getLogger(__name__)

RAW_SUFFIXES = (".v3draw", ".raw", ".vaa3draw")
PBD_SUFFIXES = (".v3dpbd",)

_RAW_MAGIC = b"raw_image_stack_by_hpeng"
_PBD_MAGIC = b"v3d_volume_pkbitdf_encod"
_DTYPES = {1: "u1", 2: "u2", 4: "f4"}
_LONG_HEADER = 43
"""Bytes of a header with sizes of 4 bytes."""
_SHORT_HEADER = 35
"""Bytes of the header of old files, with sizes of 2 bytes."""
_ROUGHNESS_RATIO = 8.0
"""How many times rougher the voxels must be in the stated byte order before the other one is suggested."""


def matches_raw(path: Path, head: bytes) -> bool:
    """Whether the file begins as a v3draw does."""
    return head.startswith(_RAW_MAGIC)


def matches_pbd(path: Path, head: bytes) -> bool:
    """Whether the file begins as a v3dpbd does."""
    return head.startswith(_PBD_MAGIC)


def open_raw(path: Path, dataset: str | None) -> StoredArray:
    """A v3draw: 24 bytes of name, byte order, type, sizes x y z c, then the voxels, x fastest."""
    dtype, shape, begin = _read_raw_header(path)
    shape = check_shape(path, shape)

    # A short file is found when it is mapped; a long one means that the shape is wrong.
    size, expected = path.stat().st_size, begin + math.prod(shape) * dtype.itemsize
    if size > expected:
        raise InputError(
            f"{path} holds {size} bytes, but its header (shape {shape} c z y x, {dtype}) speaks of {expected}; "
            "the header is damaged, export it again"
        )

    # Some writers state big-endian and store little-endian: compare both on a part of the first slices.
    read = map_array(path, dtype, shape, begin)
    sample = read(tuple(slice(0, min(n, limit)) for n, limit in zip(shape, (1, 8, 512, 512), strict=True)))
    return StoredArray("v3draw", shape, "CZYX", dtype, read, notes=_note_byte_order(path, sample))


def open_pbd(path: Path, dataset: str | None) -> StoredArray:
    """A v3dpbd: the header of a v3draw, then one run-length stream, decoded at the first read."""
    dtype, shape = _read_header(path, _LONG_HEADER)
    shape = check_shape(path, shape)
    if dtype.itemsize > 2:
        raise InputError(f"{path} holds {dtype} values in the PBD code, which knows 8 and 16 bits only; it is damaged")

    # The longest run is 128 values from 2 bytes (8 bit) or 33 values from 3 bytes (16 bit).
    packed = path.stat().st_size - _LONG_HEADER
    most_values = packed * 64 if dtype.itemsize == 1 else packed * 11
    if math.prod(shape) > most_values:
        raise InputError(
            f"{path} is incomplete: {packed} coded bytes cannot hold its shape {shape} (c z y x); "
            "copy or export it again"
        )

    # The decoder yields values in the machine's byte order.
    code = PBD8 if dtype.itemsize == 1 else PBD16
    read = UnpackedArray(
        path, dtype.newbyteorder("="), shape, lambda: decode_runs(raw_chunks(path, _LONG_HEADER, packed), code, dtype)
    )
    return StoredArray("v3dpbd", shape, "CZYX", dtype, read)


def _read_raw_header(path: Path) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    """Type, shape c z y x and first byte of the voxels, by the header length that fits the file's size."""
    size = path.stat().st_size
    for begin in (_LONG_HEADER, _SHORT_HEADER):
        dtype, shape = _read_header(path, begin)
        if min(shape) > 0 and begin + math.prod(shape) * dtype.itemsize == size:
            return dtype, shape, begin

    # Neither fits: the error that follows speaks of the usual header.
    dtype, shape = _read_header(path, _LONG_HEADER)
    return dtype, shape, _LONG_HEADER


def _read_header(path: Path, length: int) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    """Type and shape c z y x that a header of `length` bytes states."""
    with path.open("rb") as handle:
        head = handle.read(length)
    if len(head) < length:
        raise InputError(
            f"{path} is incomplete: it ends inside its header ({len(head)} bytes); copy or export it again"
        )

    order = {b"L": "<", b"B": ">"}.get(head[24:25])
    if order is None:
        raise InputError(f"{path} names the byte order {head[24:25]!r}; wanted L or B; its header is damaged")

    # Bytes per voxel, but for 33: 3 bits.
    kind = struct.unpack(order + "h", head[25:27])[0]
    if kind == 33:
        raise InputError(f"{path} is coded with 3 bits per voxel, which loses intensities; save it as v3draw or TIFF")
    if kind not in _DTYPES:
        raise InputError(
            f"{path} names the voxel type {kind}; wanted 1, 2 (integers) or 4 (float); its header is damaged"
        )

    x, y, z, c = struct.unpack(order + ("4i" if length == _LONG_HEADER else "4h"), head[27:length])
    return np.dtype(order + _DTYPES[kind]), (c, z, y, x)


def _note_byte_order(path: Path, sample: Array) -> tuple[str, ...]:
    """A warning when the voxels are far smoother as little-endian; they are read in the header's order."""
    if sample.dtype.itemsize != 2 or sample.dtype.str.startswith("<"):
        return ()

    stated, other = _roughness(sample), _roughness(sample.view(sample.dtype.newbyteorder()))
    if stated <= _ROUGHNESS_RATIO * other:
        return ()

    note = (
        f"the header says big-endian, but the voxels are {stated / max(other, 1e-9):.0f} times smoother as "
        "little-endian; if the picture is noise, write L as byte 25 of the file"
    )
    log.warning("%s: %s", path, note)
    return (note,)


def _roughness(values: Array) -> float:
    """Mean absolute difference of neighbors along x."""
    return float(np.abs(np.diff(values.astype(np.int64))).mean()) if values.shape[-1] > 1 else 0.0
