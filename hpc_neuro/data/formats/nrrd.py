"""NRRD, with its header attached (.nrrd) or beside its data (.nhdr): raw, gzip, bzip2, text or hexadecimal."""

from __future__ import annotations

import binascii
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import note_missing_unit, um_per
from hpc_neuro.data.formats.axes import letters_of_names
from hpc_neuro.data.formats.decompress import UnpackedArray, bzip2_stream, gzip_stream, raw_chunks, text_values
from hpc_neuro.data.formats.volume import NOTE_LABELS, StoredArray, check_shape, map_array, note_outside

SUFFIXES = (".nrrd", ".nhdr")

_MAX_HEADER = 1 << 20
"""Bytes of the longest header that is read."""
_MAX_FILES = 1_000_000
"""Data files of one numbered series; a header that names more is damaged."""

_TYPE_NAMES = {
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
_DTYPES = {name: code for code, names in _TYPE_NAMES.items() for name in names}
_TEXT = ("ascii", "txt", "text")

Placement = tuple[tuple[float, ...] | None, NDArray[np.float64] | None, tuple[str, ...]]
"""Micrometers along each stored axis, the world matrix, and notes where a unit is missing."""


@dataclass(frozen=True)
class _Header:
    """The part of a NRRD header that tells where and how the voxels are stored."""

    path: Path
    fields: Mapping[str, Any]
    """Fields as pynrrd parses them."""
    listed: list[str]
    """The file names below `data file: LIST`."""
    end: int
    """The first byte behind the header, where attached data begins."""
    is_segmentation: bool = False
    """Whether 3D Slicer noted segments."""

    @property
    def encoding(self) -> str:
        return str(self.fields.get("encoding")).lower()

    def get(self, *names: str) -> Any:
        """The value of the field under the first of its spellings that is there."""
        return next((self.fields[n] for n in names if n in self.fields), None)

    @property
    def line_skip(self) -> int:
        """Lines of text before the voxels."""
        return int(self.get("line skip", "lineskip") or 0)

    @property
    def byte_skip(self) -> int:
        """Bytes before the voxels, behind the skipped lines; -1: raw voxels are the last bytes of the file."""
        return int(self.get("byte skip", "byteskip") or 0)


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as a NRRD does."""
    return head.startswith(b"NRRD000")


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The array of a NRRD; axes are stored fastest first, so x y z becomes z y x.

    Raises InputError for types and encodings that NRRD does not know, and for data files that are missing or short.
    """
    header = _read_header(path)
    dtype = _parse_dtype(header)
    if "sizes" not in header.fields:
        raise InputError(f"{path} has a NRRD header without `sizes`; it is damaged")
    shape = check_shape(path, [int(n) for n in header.fields["sizes"]][::-1])

    # Voxels stand behind the header, or in the files that it names.
    named = header.get("data file", "datafile")
    sources = [(path, header.end)] if named is None and not header.listed else _find_data_files(header, str(named))
    _check_skips(header)
    sources = [(file, _skip_lines(file, at, header.line_skip)) for file, at in sources]

    # One raw file is mapped; anything else is unpacked once.
    if header.encoding == "raw" and len(sources) == 1:
        file, begin = sources[0]
        read: Any = map_array(file, dtype, shape, _find_raw_begin(header, file, begin, shape, dtype))
    else:
        each = math.prod(shape) * dtype.itemsize // len(sources)
        read = UnpackedArray(path, dtype, shape, functools.partial(_stream_files, header, sources, dtype, each))

    axes = _parse_axes(path, header.fields, len(shape))
    spacing, world, notes = _parse_placement(header.fields, len(shape))
    notes += _note_quantization(header)
    if header.is_segmentation:
        notes += (NOTE_LABELS,)
    notes += note_outside(path, [file for file, _ in sources])
    names = tuple(_parse_labels(header.fields)[::-1])
    return StoredArray("NRRD", shape, axes, dtype, read, spacing, world, notes, axis_names=names)


def _read_header(path: Path) -> _Header:
    """Read a header up to its empty line. Raises InputError for one without an end."""
    lines: list[str] = []
    listed: list[str] = []
    in_list = False
    with path.open("rb") as handle:
        while raw := handle.readline(_MAX_HEADER):
            if not raw.strip():
                break

            # pynrrd does not read the file names below `data file: LIST`, so they are kept apart.
            line = _decode_line(raw)
            if in_list:
                listed.append(line)
            elif re.match(r"data ?file:\s*LIST", line):
                in_list = True
            else:
                lines.append(line)

            if handle.tell() > _MAX_HEADER:
                raise InputError(f"{path} has a NRRD header without an end; it is damaged")
        end = handle.tell()

    # `key:=value` is a note of the writer, whose key may be named like a field.
    fields = [line for line in lines if not line.partition(":")[2].startswith("=")]
    fields = _check_fields(path, fields)
    _check_sizes(path, fields)
    is_segmentation = any(line.startswith("Segment0_") for line in lines)
    return _Header(path, nrrd.read_header([f"{line}\n" for line in fields]), listed, end, is_segmentation)


def _check_fields(path: Path, lines: Sequence[str]) -> list[str]:
    """The lines with names of fields in lower case, as NRRD compares them. Raises InputError for a repeated field."""
    checked, names = [], set[str]()
    for line in lines:
        name, colon, rest = line.partition(":")
        # A line with # is a comment.
        if not colon or line.startswith("#") or line.startswith("NRRD"):
            checked.append(line)
            continue
        # `data file` and `datafile` are one field.
        plain = name.strip().lower().replace(" ", "")
        if plain in names:
            raise InputError(f"{path} states the field {name.strip()!r} twice; correct its NRRD header")
        names.add(plain)
        checked.append(f"{name.strip().lower()}:{rest}")
    return checked


def _check_sizes(path: Path, lines: Sequence[str]) -> None:
    """Raise InputError unless `sizes` lists as many whole numbers as `dimension` says."""
    # pynrrd cuts fractions off, and does not compare the two.
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    texts = {key.strip().lower(): value.strip() for key, value in pairs}
    sizes = texts.get("sizes", "").split()
    if any(not size.lstrip("+-").isdecimal() for size in sizes):
        raise InputError(f"{path} has the sizes {' '.join(sizes)!r}; whole numbers are wanted: correct its header")

    dimension = texts.get("dimension", "")
    if sizes and dimension != str(len(sizes)):
        raise InputError(
            f"{path} has the dimension {dimension!r} and {len(sizes)} sizes; as many sizes are wanted: correct its "
            "header"
        )


def _decode_line(raw: bytes) -> str:
    """A line of a header: ASCII by the format, but for a unit such as µm in UTF-8 or latin-1."""
    try:
        return raw.decode("utf-8").rstrip()
    except UnicodeDecodeError:
        return raw.decode("latin-1").rstrip()


def _parse_dtype(header: _Header) -> np.dtype[Any]:
    """The voxel type in its stored byte order. Raises InputError for an unknown type and a missing byte order."""
    kind = str(header.fields.get("type")).lower()
    if kind not in _DTYPES:
        raise InputError(
            f"{header.path} holds values of type {kind!r}, which is no NRRD number type; convert it to uint8 or uint16"
        )

    # One byte has no order, and neither has text.
    dtype = np.dtype(_DTYPES[kind])
    if dtype.itemsize == 1 or header.encoding.startswith(_TEXT):
        return dtype

    order = str(header.fields.get("endian")).lower()
    if order not in ("little", "big"):
        raise InputError(f"{header.path} does not say its byte order; add `endian: little` (or big) to its NRRD header")
    return dtype.newbyteorder(">" if order == "big" else "<")


def _find_data_files(header: _Header, named: str) -> list[tuple[Path, int]]:
    """The data files of a detached header, in order: one, a list, or a numbered series (`slice%03d.raw 1 50 1`)."""
    path = header.path
    names = header.listed or [named]

    # "slice%03d.raw 1 50 1": a format, the first number, the last number, the step.
    if series := re.fullmatch(r"(\S*%[0-9]*d\S*)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)(\s+\d+)?", named):
        first, last, step = (int(series[i]) for i in (2, 3, 4))
        if step == 0 or abs(last - first) // abs(step) > _MAX_FILES:
            raise InputError(f"{path} names data files {named!r}, a series without an end; its header is damaged")
        names = [series[1] % i for i in range(first, last + (1 if step > 0 else -1), step)]

    # Names are relative to the header.
    files = [path.parent / name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} keeps its voxels in {missing[0].name}{more}, which is not beside it; put it there")
    return [(file, 0) for file in files]


def _check_skips(header: _Header) -> None:
    """Raise InputError for skips that mean nothing: below -1, or -1 for data that is not raw."""
    skip = header.byte_skip
    if skip < -1 or header.line_skip < 0:
        raise InputError(
            f"{header.path} asks for byte skip {skip} and line skip {header.line_skip}; byte skip must be -1 or more, "
            "line skip 0 or more: correct its header"
        )
    if skip == -1 and header.encoding != "raw":
        raise InputError(f"{header.path} asks for byte skip {skip}, which only raw data can have (-1); save it anew")


def _skip_lines(path: Path, begin: int, count: int) -> int:
    """The byte behind `count` lines of text from byte `begin` on."""
    if not count:
        return begin

    with path.open("rb") as handle:
        handle.seek(begin)
        for _ in range(count):
            if not handle.readline(_MAX_HEADER):
                raise InputError(f"{path} ends inside the {count} lines that its NRRD header says to skip")
        return handle.tell()


def _find_raw_begin(header: _Header, file: Path, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The first byte of the voxels in the one raw data file."""
    at, count = begin + header.byte_skip, math.prod(shape) * dtype.itemsize

    # -1 counts from the end: whatever stands before the voxels is a foreign header.
    if header.byte_skip == -1:
        at = file.stat().st_size - count
    if at < 0:
        raise InputError(
            f"{file} is shorter than the array of shape {shape} that {header.path} declares; copy it again"
        )

    _check_raw_size(header, file, at + count)
    return at


def _check_raw_size(header: _Header, file: Path, end: int) -> None:
    """Raise InputError for raw data that is packed, or that goes on behind the last voxel: then it begins elsewhere."""
    with file.open("rb") as handle:
        is_packed = file != header.path and handle.read(2) == b"\x1f\x8b"
    if is_packed:
        raise InputError(f"{file} is packed by gzip; write `encoding: gzip` in place of raw into {header.path}")

    extra = file.stat().st_size - end
    if extra > 0:
        raise InputError(
            f"{file} holds {files.format_count(extra, 'byte')} more than the voxels that {header.path} declares; "
            "correct its sizes or type, or write `byte skip: -1` where the voxels are the last bytes of the file"
        )


def _stream_files(header: _Header, sources: list[tuple[Path, int]], dtype: np.dtype[Any], each: int) -> Iterator[bytes]:
    """The bytes of all data files in order. Each file must hold `each` bytes: a short one would shift all others."""
    for file, begin in sources:
        # The sum over all files may be right although one is short and another long.
        count = 0
        for part in _stream_file(header, file, begin, dtype, each):
            count += len(part)
            yield part
        if count != each and len(sources) > 1:
            raise InputError(
                f"{file} holds {count} bytes of voxels, where {header.path} wants {each} from each of its "
                f"{len(sources)} data files; copy it again"
            )


def _stream_file(header: _Header, file: Path, begin: int, dtype: np.dtype[Any], each: int) -> Iterator[bytes]:
    """The decoded bytes of one data file; with byte skip -1 its last `each` bytes."""
    encoding, skip = header.encoding, header.byte_skip

    if encoding == "raw":
        size = file.stat().st_size
        at = max(0, size - each) if skip == -1 else begin + skip
        yield from raw_chunks(file, at, size - at)
    elif encoding in ("gzip", "gz"):
        yield from gzip_stream(file, begin, skip)
    elif encoding in ("bzip2", "bz2"):
        yield from bzip2_stream(file, begin, skip)
    elif encoding in _TEXT:
        # Teem takes commas between the values as blanks.
        words = file.read_bytes()[begin + skip :].split()
        yield text_values(file, [word.strip(b",") for word in words if word != b","], dtype)
    elif encoding == "hex":
        yield _decode_hex(file, file.read_bytes()[begin + skip :])
    else:
        raise InputError(
            f"{header.path} has the encoding {encoding!r}; wanted raw, gzip, bzip2, hex or ascii: convert it"
        )


def _decode_hex(file: Path, text: bytes) -> bytes:
    """The bytes that pairs of hexadecimal digits stand for. Raises InputError for anything else."""
    try:
        return binascii.unhexlify(b"".join(text.split()))
    except binascii.Error:
        raise InputError(f"{file} holds text that is no hexadecimal digits in pairs; copy or export it again") from None


def _note_quantization(header: _Header) -> tuple[str, ...]:
    """A note on values that stand for those of a range."""
    low, high = header.get("old min", "oldmin"), header.get("old max", "oldmax")
    if low is None and high is None:
        return ()
    return (f"its values were quantized (old min {low}, old max {high}); they are read as stored",)


def _parse_axes(path: Path, fields: Mapping[str, Any], count: int) -> str:
    """Letters in stored (slowest first) order, from labels, else from kinds and space directions.

    Raises InputError for labels of another number.
    """
    # Labels are the writer's own words for the axes. Words that begin like other axes than custom has it are no help,
    # and custom none against them.
    labels = _parse_labels(fields)
    if labels and len(labels) != count:
        raise InputError(f"{path} has {len(labels)} labels for {count} axes; correct its NRRD header")
    letters = letters_of_names(labels)
    if len(letters) == count and "Q" not in letters and len(set(letters)) == count:
        return letters[::-1]
    by_custom = _axes_by_kind(fields, count)
    named = [(letter, custom) for letter, custom in zip(letters, by_custom[::-1], strict=False) if letter != "Q"]
    if len(letters) == count and any(letter != custom for letter, custom in named):
        return letters[::-1]
    initials = "".join(label[:1].upper() for label in labels)
    if sorted(initials) == sorted(by_custom) and initials[::-1] != by_custom:
        return "Q" * count
    return by_custom


def _parse_labels(fields: Mapping[str, Any]) -> list[str]:
    return [str(label).strip().strip('"') for label in fields.get("labels") or []]


def _axes_by_kind(fields: Mapping[str, Any], count: int) -> str:
    """Letters in stored (slowest first) order from kinds and space directions: spatial axes are x, y, z in turn."""
    kinds = [str(v) for v in fields.get("kinds") or ["???"] * count]
    directions = fields.get("space directions")
    spatial = itertools.cycle("XYZ")
    letters = ""
    for i, kind in enumerate(kinds):
        # An axis without a direction in space, such as `none` in `space directions`, holds channels.
        is_nonspatial = directions is not None and np.isnan(np.asarray(directions, float)[i]).all()
        if kind == "time":
            letters += "T"
        elif is_nonspatial or kind not in ("domain", "space", "???", "none"):
            letters += "C"
        else:
            letters += next(spatial)

    # A fourth spatial axis would be x again.
    if len(letters) != count or any(letters.count(a) > 1 for a in letters):
        return "YX" if count == 2 else "Q" * count
    return letters[::-1]


def _parse_placement(fields: Mapping[str, Any], count: int) -> Placement:
    """Step sizes and world matrix in micrometers, from `space directions` or else from `spacings`."""
    directions = fields.get("space directions")
    if directions is None:
        return _parse_spacings(fields, count)

    # [stored axis fastest first, world x y z]
    matrix = np.asarray(directions, dtype=np.float64)
    steps = np.sqrt((matrix**2).sum(axis=1))
    spacings = fields.get("spacings")
    if spacings is not None and not np.allclose(steps, spacings, rtol=0.01, equal_nan=True):
        return None, None, ("spacings and space directions state different sizes; give the voxel size in um",)
    per = [um_per(str(u)) for u in fields.get("space units") or []]
    if len(per) != matrix.shape[1] or any(p is None for p in per):
        return None, None, (note_missing_unit(steps[::-1], "slowest axis first"),)

    um = np.array(per, dtype=np.float64)
    scaled = matrix * um
    spacing = tuple(float(v) for v in np.sqrt((scaled**2).sum(axis=1)))[::-1]
    if matrix.shape[1] != 3:
        return spacing, None, ()

    # Rows z y x, columns in the order of the stored axes, then the origin.
    origin = np.asarray(fields.get("space origin", np.zeros(3)), dtype=np.float64) * um
    world = np.concatenate([scaled[::-1, ::-1].T, origin[::-1, None]], axis=1)
    return spacing, world, ()


def _parse_spacings(fields: Mapping[str, Any], count: int) -> Placement:
    """Step sizes of a header without directions."""
    steps = fields.get("spacings")
    if steps is None:
        return None, None, ()

    # The spacing of a channel or time axis is nan; such an axis needs no unit.
    units = [um_per(str(u)) for u in fields.get("units") or [""] * count]
    if len(units) != count or len(steps) != count:
        note = f"{len(steps)} spacings and {len(units)} units for {count} axes; give the voxel size in um"
        return None, None, (note,)
    if any(u is None for u, s in zip(units, steps, strict=False) if math.isfinite(s)):
        return None, None, (note_missing_unit(np.asarray(steps, float)[::-1], "slowest axis first"),)
    return tuple(float(s) * (u or math.nan) for s, u in zip(steps, units, strict=False))[::-1], None, ()
