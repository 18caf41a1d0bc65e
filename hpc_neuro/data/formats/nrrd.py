"""NRRD, with its header attached (.nrrd) or beside its data (.nhdr): raw, gzip, bzip2 or text."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.decompress import UnpackedArray, bzip2_stream, gzip_stream, raw_chunks
from hpc_neuro.data.formats.units import um_per
from hpc_neuro.data.formats.volume import StoredArray, check_shape, map_array

SUFFIXES = (".nrrd", ".nhdr")
_MOST_HEADER = 1 << 20
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_CODE = {name: code for code, names in _TYPES.items() for name in names}


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as a NRRD does."""
    return head.startswith(b"NRRD000")


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The array of a NRRD; axes are stored fastest first, so x y z becomes z y x.

    Raises InputError for types and encodings that NRRD does not know, and for data files that are missing or short.
    """
    header, listed, begin = _header(path)
    kind, encoding = str(header.get("type")), str(header.get("encoding")).lower()
    if kind not in _CODE:
        raise InputError(
            f"{path} holds values of type {kind!r}, which is no NRRD number type; convert it to uint8 or uint16"
        )
    if "sizes" not in header:
        raise InputError(f"{path} has a NRRD header without `sizes`; it is damaged")
    dtype = np.dtype(_CODE[kind])
    if dtype.itemsize > 1 and not encoding.startswith(("ascii", "text", "txt")):
        if (order := str(header.get("endian")).lower()) not in ("little", "big"):
            raise InputError(f"{path} does not say its byte order; add `endian: little` (or big) to its NRRD header")
        dtype = dtype.newbyteorder(">" if order == "big" else "<")
    shape = check_shape(path, [int(n) for n in header["sizes"]][::-1])
    named = _field(header, "data file", "datafile")
    lines, skip = int(_field(header, "line skip", "lineskip") or 0), int(_field(header, "byte skip", "byteskip") or 0)
    sources = [(path, begin)] if named is None and not listed else _data_files(path, str(named), listed)
    sources = [(file, _after_lines(file, at, lines)) for file, at in sources]
    if encoding == "raw" and len(sources) == 1:
        file, at = sources[0]
        at = file.stat().st_size - math.prod(shape) * dtype.itemsize if skip == -1 else at + skip
        if at < 0:
            raise InputError(f"{file} is shorter than the array of shape {shape} that {path} declares; copy it again")
        read: Any = map_array(file, dtype, shape, at)
    else:
        each = math.prod(shape) * dtype.itemsize // len(sources)
        parts = functools.partial(_stream, sources, encoding, skip, dtype, each, path)
        read = UnpackedArray(path, dtype, shape, parts)
    axes = _axes(header, len(shape))
    spacing, world, notes = _place(header, len(shape))
    return StoredArray("NRRD", shape, axes, dtype, read, spacing, world, notes)


def _header(path: Path) -> tuple[Mapping[str, Any], list[str], int]:
    """Parsed fields, the files of a `data file: LIST`, and where attached data begins."""
    lines: list[str] = []
    listed: list[str] = []
    in_list = False
    with path.open("rb") as handle:
        while raw := handle.readline(_MOST_HEADER):
            if not raw.strip():
                break
            line = raw.decode("ascii", "replace").rstrip()
            if in_list:
                listed.append(line)
            elif re.match(r"data ?file:\s*LIST", line):
                in_list = True
            else:
                lines.append(line)
            if handle.tell() > _MOST_HEADER:
                raise InputError(f"{path} has a NRRD header without an end; it is damaged")
        begin = handle.tell()
    header: Mapping[str, Any] = nrrd.read_header([f"{line}\n" for line in lines])
    return header, listed, begin


def _field(header: Mapping[str, Any], *names: str) -> Any:
    return next((header[n] for n in names if n in header), None)


def _data_files(path: Path, named: str, listed: list[str]) -> list[tuple[Path, int]]:
    """The data files of a detached header, in order: one, a list, or a numbered series (`slice%03d.raw 1 50 1`)."""
    names = listed or [named]
    if found := re.fullmatch(r"(\S*%[0-9]*d\S*)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)(\s+\d+)?", named):
        first, last, step = (int(found[i]) for i in (2, 3, 4))
        if step == 0 or abs(last - first) // abs(step) > 1_000_000:
            raise InputError(f"{path} names data files {named!r}, a series without an end; its header is damaged")
        names = [found[1] % i for i in range(first, last + (1 if step > 0 else -1), step)]
    files = [path.parent / name for name in names]
    if missing := [f for f in files if not f.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} keeps its voxels in {missing[0].name}{more}, which is not beside it; put it there")
    return [(file, 0) for file in files]


def _after_lines(path: Path, begin: int, lines: int) -> int:
    """Where the data begins behind `lines` lines of text."""
    if not lines:
        return begin
    with path.open("rb") as handle:
        handle.seek(begin)
        for _ in range(lines):
            if not handle.readline(_MOST_HEADER):
                raise InputError(f"{path} ends inside the {lines} lines that its NRRD header says to skip")
        return handle.tell()


def _stream(
    sources: list[tuple[Path, int]], encoding: str, skip: int, dtype: np.dtype[Any], each: int, header: Path
) -> Iterator[bytes]:
    """The bytes of all data files in order, of which every one must hold `each`: what one lacks, another may not give.

    With byte skip -1 the data is what stands last in a raw file.
    """
    if skip < -1 or (skip == -1 and encoding != "raw"):
        raise InputError(f"{header} asks for byte skip {skip}, which only raw data can have (-1); save it anew")
    for file, begin in sources:
        count = 0
        for part in _decoded(file, begin, encoding, skip, dtype, each, header):
            count += len(part)
            yield part
        if count != each and len(sources) > 1:
            raise InputError(
                f"{file} holds {count} bytes of voxels, where {header} wants {each} from each of its {len(sources)} "
                "data files; copy it again"
            )


def _decoded(
    file: Path, begin: int, encoding: str, skip: int, dtype: np.dtype[Any], each: int, header: Path
) -> Iterator[bytes]:
    if encoding == "raw":
        size = file.stat().st_size
        at = max(0, size - each) if skip == -1 else begin + skip
        yield from raw_chunks(file, at, size - at)
    elif encoding in ("gzip", "gz"):
        yield from gzip_stream(file, begin, skip)
    elif encoding in ("bzip2", "bz2"):
        yield from bzip2_stream(file, begin, skip)
    elif encoding in ("ascii", "txt", "text"):
        yield np.array(file.read_bytes()[begin + skip :].split(), dtype=np.float64).astype(dtype).tobytes()
    else:
        raise InputError(f"{header} has the encoding {encoding!r}; wanted raw, gzip, bzip2 or ascii: convert it")


def _axes(header: Mapping[str, Any], count: int) -> str:
    """Letters in stored (slowest first) order, from labels, kinds and space directions."""
    labels = [str(v).strip('"').upper()[:1] for v in header.get("labels") or []]
    if len(labels) == count and len(set(labels)) == count and set(labels) <= set("XYZCT"):
        return "".join(labels)[::-1]
    kinds = [str(v) for v in header.get("kinds") or ["???"] * count]
    directions = header.get("space directions")
    spatial = itertools.cycle("XYZ")
    letters = ""
    for i, kind in enumerate(kinds):
        none = directions is not None and np.isnan(np.asarray(directions, float)[i]).all()
        if kind == "time":
            letters += "T"
        elif none or kind not in ("domain", "space", "???", "none"):
            letters += "C"
        else:
            letters += next(spatial)
    if len(letters) != count or any(letters.count(a) > 1 for a in letters):
        return "YX" if count == 2 else "Q" * count
    return letters[::-1]


def _place(
    header: Mapping[str, Any], count: int
) -> tuple[tuple[float, ...] | None, NDArray[np.float64] | None, tuple[str, ...]]:
    """Micrometres along each stored axis, the world matrix, and a note where a unit is missing."""
    directions = header.get("space directions")
    if directions is None:
        steps = header.get("spacings")
        if steps is None:
            return None, None, ()
        units = [um_per(str(u)) for u in header.get("units") or [""] * count]
        if any(u is None for u, s in zip(units, steps, strict=False) if math.isfinite(s)):
            return None, None, (_unitless(steps),)
        return tuple(float(s) * (u or math.nan) for s, u in zip(steps, units, strict=False))[::-1], None, ()
    matrix = np.asarray(directions, dtype=np.float64)  # [stored axis fastest first, world x y z]
    steps = np.sqrt((matrix**2).sum(axis=1))
    per = [um_per(str(u)) for u in header.get("space units") or []]
    if len(per) != matrix.shape[1] or any(p is None for p in per):
        return None, None, (_unitless(steps),)
    scaled = matrix * np.array(per, dtype=np.float64)
    spacing = tuple(float(v) for v in np.sqrt((scaled**2).sum(axis=1)))[::-1]
    if matrix.shape[1] != 3:
        return spacing, None, ()
    origin = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64) * np.array(per, dtype=np.float64)
    world = np.concatenate([scaled[::-1, ::-1].T, origin[::-1, None]], axis=1)  # rows z y x, columns stored axes
    return spacing, world, ()


def _unitless(steps: Any) -> str:
    shown = " x ".join(f"{float(v):.6g}" for v in np.asarray(steps, float)[::-1])
    return f"steps {shown} (slowest axis first) without a unit; give the voxel size in um"
