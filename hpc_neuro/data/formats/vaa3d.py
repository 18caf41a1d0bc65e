"""Vaa3D's v3draw (map_array, read by parts) and v3dpbd (run-length coded, 8 and 16 bit)."""

from __future__ import annotations

import logging
import math
import struct
from pathlib import Path

import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.decompress import UnpackedArray, raw_chunks
from hpc_neuro.data.formats.run_length import PBD8, PBD16, decode_runs
from hpc_neuro.data.formats.volume import Array, StoredArray, check_shape, map_array

log = logging.getLogger(__name__)
RAW_SUFFIXES, PBD_SUFFIXES = (".v3draw", ".raw", ".vaa3draw"), (".v3dpbd",)
_RAW, _PBD = b"raw_image_stack_by_hpeng", b"v3d_volume_pkbitdf_encod"
_TYPES = {1: "u1", 2: "u2", 4: "f4"}
_ROUGHER = 8.0
_LONG, _SHORT = 43, 35  # header bytes with sizes of 4 and (old files) of 2 bytes


def matches_raw(path: Path, head: bytes) -> bool:
    """Whether the file begins as a v3draw does."""
    return head.startswith(_RAW)


def matches_pbd(path: Path, head: bytes) -> bool:
    """Whether the file begins as a v3dpbd does."""
    return head.startswith(_PBD)


def open_raw(path: Path, dataset: str | None) -> StoredArray:
    """A v3draw: 24 bytes of name, byte order, type, sizes x y z c, then the voxels, x fastest."""
    size = path.stat().st_size
    for begin in (_LONG, _SHORT):
        dtype, shape = _header(path, begin)
        if min(shape) > 0 and begin + math.prod(shape) * dtype.itemsize == size:
            break
    else:
        dtype, shape = _header(path, _LONG)
        begin = _LONG
    shape = check_shape(path, shape)
    wanted = begin + math.prod(shape) * dtype.itemsize
    if size > wanted:
        raise InputError(
            f"{path} holds {size} bytes, but its header (shape {shape} c z y x, {dtype}) speaks of {wanted}; "
            "the header is damaged, export it again"
        )
    read = map_array(path, dtype, shape, begin)
    notes = _swapped(path, read(tuple(slice(0, min(n, most)) for n, most in zip(shape, (1, 8, 512, 512), strict=True))))
    return StoredArray("v3draw", shape, "CZYX", dtype, read, notes=notes)


def open_pbd(path: Path, dataset: str | None) -> StoredArray:
    """A v3dpbd: the header of a v3draw, then one run-length stream, unpacked at the first read."""
    dtype, shape = _header(path, _LONG)
    shape = check_shape(path, shape)
    if dtype.itemsize > 2:
        raise InputError(f"{path} holds {dtype} values in the PBD code, which knows 8 and 16 bits only; it is damaged")
    code = PBD8 if dtype.itemsize == 1 else PBD16
    packed = path.stat().st_size - _LONG
    most = packed * 64 if dtype.itemsize == 1 else packed * 11  # the longest run: 128 from 2 bytes, 33 from 3
    if math.prod(shape) > most:
        raise InputError(
            f"{path} is incomplete: {packed} coded bytes cannot hold its shape {shape} (c z y x); "
            "copy or export it again"
        )
    stream = UnpackedArray(
        path, dtype.newbyteorder("="), shape, lambda: decode_runs(raw_chunks(path, _LONG, packed), code, dtype)
    )
    return StoredArray("v3dpbd", shape, "CZYX", dtype, stream)


def _swapped(path: Path, part: Array) -> tuple[str, ...]:
    """A warning when the voxels are far smoother in the byte order that the header denies; they are read as it says."""
    if part.dtype.itemsize != 2 or part.dtype.str.startswith("<"):
        return ()
    other = part.view(part.dtype.newbyteorder())
    here, there = (float(np.abs(np.diff(a.astype(np.int64))).mean()) if a.shape[-1] > 1 else 0.0 for a in (part, other))
    if here <= _ROUGHER * there:
        return ()
    note = (
        f"the header says big-endian, but the voxels are {here / max(there, 1e-9):.0f} times smoother as "
        "little-endian; if the picture is noise, write L as byte 25 of the file"
    )
    log.warning("%s: %s", path, note)
    return (note,)


def _header(path: Path, length: int) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    with path.open("rb") as handle:
        head = handle.read(length)
    if len(head) < length:
        raise InputError(
            f"{path} is incomplete: it ends inside its header ({len(head)} bytes); copy or export it again"
        )
    order = {b"L": "<", b"B": ">"}.get(head[24:25])
    if order is None:
        raise InputError(f"{path} names the byte order {head[24:25]!r}; wanted L or B; its header is damaged")
    kind = struct.unpack(order + "h", head[25:27])[0]
    if kind == 33:
        raise InputError(f"{path} is coded with 3 bits per voxel, which loses intensities; save it as v3draw or TIFF")
    if kind not in _TYPES:
        raise InputError(
            f"{path} names the voxel type {kind}; wanted 1, 2 (integers) or 4 (float); its header is damaged"
        )
    x, y, z, c = struct.unpack(order + ("4i" if length == _LONG else "4h"), head[27:length])
    return np.dtype(order + _TYPES[kind]), (c, z, y, x)
