"""Arrays that are compressed as one stream: general compressors, and the run-length codes of Vaa3D and Amira.

A stream is decompressed once, at the first read, into a nameless scratch file that is then mapped. Memory stays small
whatever the volume's size, and every later box is a plain read. A header that declares too much allocates nothing: the
scratch file grows only as far as the stream really goes.

A run-length code is a chain of operations: a code byte, then its data. A short loop finds where the operations begin
(each code byte tells how far it is to the next one); numpy expands thousands of operations at once.
"""

from __future__ import annotations

import bz2
import collections
import gzip
import math
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.volume import Array, Index

_CHUNK = 1 << 22
"""Bytes decompressed at a time."""

_SPARE_DISK = 1 << 30
"""[bytes] Free space that scratch files leave to others."""
_MAX_CALL = (1 << 31) - (1 << 12)
"""[bytes] The most that Linux reads or writes in one call."""
_RAW_CHUNK = 1 << 16
"""Bytes handed to a run-length decoder at a time; decoding takes about a hundred times as much memory."""

_LITERAL, _DIFFERENCE, _REPEAT, _UNKNOWN = range(4)


class DecodedCache:
    """Keeps the pieces that were decoded last, up to a number of bytes, and always the last one.

    Boxes of one slab meet the same pieces, which may be more than memory keeps: strips of a large page, above all. A
    piece that is decoded a second time is therefore kept in a nameless scratch file, and never decoded again. One that
    is needed once, as in a pass over the volume, takes no disk.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.lock = threading.Lock()
        self.pieces: collections.OrderedDict[Any, Array] = collections.OrderedDict()
        self.known: set[Any] = set()
        """Keys of the pieces that were decoded."""
        self.scratch = ScratchFile()

    def get(self, key: Any, decode: Callable[[], Array]) -> Array:
        """The piece of this key, decoded where it is not kept. One thread decodes at a time."""
        with self.lock:
            if key in self.pieces:
                self.pieces.move_to_end(key)
                return self.pieces[key]

            piece = self.scratch.read(key)
            if piece is None:
                piece = decode()
                if key in self.known:
                    self.scratch.write(key, piece)
                self.known.add(key)

            self.pieces[key] = piece
            self.size += piece.nbytes
            while self.size > self.limit and len(self.pieces) > 1:
                self.size -= self.pieces.popitem(last=False)[1].nbytes
            return piece


class ScratchFile:
    """Arrays in a nameless file in TMPDIR, by key; each process has its own file."""

    file: Any
    places: dict[Any, tuple[int, np.dtype[Any], tuple[int, ...]]]
    """Key -> first byte, type and shape."""

    def __init__(self) -> None:
        self._forget()

    def read(self, key: Any) -> Array | None:
        """The array of this key; None where it was not written."""
        place = self.places.get(key) if self.process == os.getpid() else None
        if place is None:
            return None

        # `pread` leaves the file's position alone, which forked processes share.
        begin, dtype, shape = place
        data = os.pread(self.file.fileno(), math.prod(shape) * dtype.itemsize, begin)
        return np.frombuffer(data, dtype).reshape(shape)

    def write(self, key: Any, array: Array) -> None:
        """Keep an array, unless the disk has little space left: then it is decoded again when it is needed."""
        # A forked process must not write where its parent writes.
        if self.process != os.getpid():
            self._forget()
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < _SPARE_DISK + array.nbytes or array.nbytes > _MAX_CALL:
            return

        try:
            if not self.places:
                self.file = tempfile.TemporaryFile(prefix="hpc_neuro_")  # noqa: SIM115
            data = np.ascontiguousarray(array).tobytes()
            if os.pwrite(self.file.fileno(), data, self.size) != len(data):
                return
        except OSError:
            # The disk filled up after all, or has a quota.
            return
        self.places[key] = (self.size, array.dtype, array.shape)
        self.size += array.nbytes

    def _forget(self) -> None:
        self.process, self.size = os.getpid(), 0
        self.places, self.file = {}, None


class UnpackedArray:
    """Reads parts of an array [shape] of `dtype` (C order) whose bytes `stream` yields in order."""

    def __init__(
        self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], stream: Callable[[], Iterable[bytes | Array]]
    ) -> None:
        self.path, self.dtype, self.shape, self.stream = path, dtype, shape, stream
        self.array: Array | None = None
        self.lock = threading.Lock()

    def __call__(self, index: Index) -> Array:
        # Threads that read at once wait for the one that decompresses.
        with self.lock:
            if self.array is None:
                self.array = self._unpack()
        return self.array[index]

    def _unpack(self) -> Array:
        # Space is checked before the first byte, for the whole array.
        expected = math.prod(self.shape) * self.dtype.itemsize
        folder = Path(tempfile.gettempdir())
        files.require_space(folder, expected, f"unpacking {self.path}")

        with tempfile.TemporaryFile(dir=folder, prefix="hpc_neuro_") as scratch:
            self._write_stream(scratch, expected, folder)
            # The map keeps the nameless file alive.
            return np.memmap(scratch, dtype=self.dtype, mode="r", shape=self.shape)

    def _write_stream(self, scratch: Any, expected: int, folder: Path) -> None:
        """Write the whole stream; InputError unless it holds exactly `expected` bytes."""
        count = 0
        for part in self.stream():
            # A run-length decoder yields arrays, the others bytes.
            data = part.tobytes() if isinstance(part, np.ndarray) else part
            count += len(data)
            if count > expected:
                raise InputError(
                    f"{self.path} is damaged: its stream holds more than the {expected} bytes of its shape "
                    f"{self.shape}; export it again"
                )

            # The disk may fill up although its free space was checked before.
            try:
                scratch.write(data)
            except OSError as error:
                raise InputError(f"{self.path} cannot be unpacked in {folder}: {error.strerror}; set TMPDIR") from error

        if count < expected:
            raise InputError(
                f"{self.path} is incomplete: its stream ends after {count} of the {expected} bytes of its shape "
                f"{self.shape}; copy or export it again"
            )
        scratch.flush()


def text_values(path: Path, words: Sequence[bytes], dtype: np.dtype[Any]) -> bytes:
    """Numbers that are written as text, as bytes of `dtype`. Raises InputError for one that the type cannot hold."""
    # float64 holds every integer below 2^53 exactly.
    numbers = np.array(words, dtype=np.float64)
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        is_bad = ~((numbers >= limits.min) & (numbers <= limits.max) & (numbers == np.floor(numbers)))
        if is_bad.any():
            word = words[int(np.argmax(is_bad))].decode(errors="replace")
            raise InputError(
                f"{path} holds the value {word[:40]}, which {dtype} cannot; state the right type in its header"
            )
    return numbers.astype(dtype).tobytes()


def gzip_stream(path: Path, offset: int, skip: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a gzip stream that begins at `offset`, without the first `skip`."""
    with path.open("rb") as handle:
        handle.seek(offset)
        with gzip.GzipFile(fileobj=handle) as stream:
            yield from _read_after(stream, skip)


def bzip2_stream(path: Path, offset: int, skip: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a bzip2 stream that begins at `offset`, without the first `skip`."""
    with path.open("rb") as handle:
        handle.seek(offset)
        with bz2.BZ2File(handle) as stream:
            yield from _read_after(stream, skip)


def zlib_stream(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """The decompressed bytes of `size` bytes of zlib data at `offset`."""
    engine = zlib.decompressobj()
    with path.open("rb") as handle:
        handle.seek(offset)
        while size > 0 and (data := handle.read(min(size, _CHUNK))):
            size -= len(data)
            # The limit keeps a bomb from filling memory at once.
            while data:
                yield engine.decompress(data, _CHUNK)
                data = engine.unconsumed_tail

        yield engine.flush()


def raw_chunks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `offset`, by parts; fewer where the file ends."""
    with path.open("rb") as handle:
        handle.seek(offset)
        while size > 0 and (data := handle.read(min(size, _RAW_CHUNK))):
            size -= len(data)
            yield data


def _read_after(stream: BinaryIO | gzip.GzipFile | bz2.BZ2File, skip: int) -> Iterator[bytes]:
    while skip > 0 and (count := len(stream.read(min(skip, _CHUNK)))):
        skip -= count
    while data := stream.read(_CHUNK):
        yield data


@dataclass(frozen=True)
class RunLengthCode:
    """For each of the 256 code bytes: what it does, how many values it yields, its bytes with its data."""

    kind: NDArray[np.int8]
    count: NDArray[np.int64]
    step: tuple[int, ...]
    bits: int
    """Bits per difference; 0 where the format has none."""
    end: bytes
    """What may follow the last operation."""


def _build_code(ranges: tuple[tuple[int, int, int, int], ...], size: int, bits: int, end: bytes = b"") -> RunLengthCode:
    """A code from rows (first code byte, last code byte, kind, values of the first code byte); `size` bytes a value."""
    kinds = np.full(256, _UNKNOWN, np.int8)
    count, step = np.zeros(256, np.int64), np.ones(256, np.int64)

    for first, last, kind, least in ranges:
        codes = np.arange(first, last + 1)
        kinds[codes] = kind
        count[codes] = codes - first + least
        # Bytes after the code byte: values, packed differences, or the one value that repeats.
        data_bytes = {
            _LITERAL: count[codes] * size,
            _DIFFERENCE: -(-count[codes] * bits // 8),
            _REPEAT: np.full(len(codes), size),
        }
        step[codes] = 1 + data_bytes[kind]
    return RunLengthCode(kinds, count, tuple(step.tolist()), bits, end)


PBD8 = _build_code(((0, 32, _LITERAL, 1), (33, 127, _DIFFERENCE, 1), (128, 255, _REPEAT, 1)), 1, 2)
PBD16 = _build_code(((0, 31, _LITERAL, 1), (32, 79, _DIFFERENCE, 1), (223, 255, _REPEAT, 1)), 2, 3)
BYTE_RLE = _build_code(((0, 127, _REPEAT, 0), (128, 255, _LITERAL, 0)), 1, 0, b"\0")


def decode_runs(chunks: Iterable[bytes], code: RunLengthCode, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Values of a run-length stream given in chunks of bytes, as arrays of `dtype` (in the stream's byte order).

    Raises ValueError for a code byte that the format does not have and for a stream that ends inside an operation.
    """
    rest, prior = b"", 0
    for chunk in chunks:
        data = rest + chunk
        begins, end = _find_operations(data, code)
        rest = data[end:]

        if len(begins):
            # One byte more, since a 3-bit difference may look one byte ahead.
            values = _expand(np.frombuffer(data + b"\0", np.uint8), begins, code, dtype, prior)
            prior = int(values[-1]) if len(values) else prior
            yield values

    # What is left is an operation without all its data, or the format's end mark.
    if rest and rest != code.end:
        raise ValueError(f"its run-length stream ends {code.step[rest[0]] - len(rest)} bytes early")


def _find_operations(data: bytes, code: RunLengthCode) -> tuple[NDArray[np.int64], int]:
    """Where the operations begin that lie completely in `data`, and where the first incomplete one begins."""
    # Plain Python on purpose: each operation begins where the one before it ends, so this cannot be vectorized.
    begins: list[int] = []
    step, size, at = code.step, len(data), 0
    while at < size:
        after = at + step[data[at]]
        if after > size:
            break
        begins.append(at)
        at = after

    return np.array(begins, dtype=np.int64), at


def _expand(
    data: NDArray[np.uint8], begins: NDArray[np.int64], code: RunLengthCode, dtype: np.dtype[Any], prior: int
) -> Array:
    """All values of the operations that begin at `begins`; `prior` is the value before the first."""
    kinds = code.kind[data[begins]]
    if (kinds == _UNKNOWN).any():
        bad = int(data[begins[np.argmax(kinds == _UNKNOWN)]])
        raise ValueError(f"its run-length stream holds the code {bad}, which the format does not have")

    # For each value: its operation, and its place among the values of that operation.
    counts = code.count[data[begins]]
    operation = np.repeat(np.arange(len(begins)), counts)
    nth = np.arange(len(operation)) - np.repeat(np.cumsum(counts) - counts, counts)
    first_byte = begins[operation] + 1
    kind = kinds[operation]

    # A repeat reads the same bytes again and again, a literal reads on.
    at = first_byte + np.where(kind == _LITERAL, nth * dtype.itemsize, 0)
    values = data[at].astype(np.int64)
    if dtype.itemsize == 2:
        first, second = values, data[at + 1].astype(np.int64)
        values = first << 8 | second if dtype.str.startswith(">") else second << 8 | first

    # Differences build on the value before them.
    is_difference = kind == _DIFFERENCE
    if code.bits and is_difference.any():
        change = np.zeros(len(values), np.int64)
        change[is_difference] = _read_differences(data, first_byte[is_difference], nth[is_difference], code.bits)
        values = _add_differences(values, change, is_difference, prior)

    # The cast wraps around, as the format's own arithmetic does.
    return values.astype(dtype.newbyteorder("="))


def _add_differences(
    values: NDArray[np.int64], change: NDArray[np.int64], is_difference: NDArray[np.bool_], prior: int
) -> NDArray[np.int64]:
    """Values in which each difference is replaced by the sum of differences since the last plain value, plus that."""
    # value = last plain value + (sum of all differences up to here - sum up to that plain value)
    total = np.cumsum(change)
    last_plain = np.maximum.accumulate(np.where(is_difference, -1, np.arange(len(values))))

    # Before the first plain value counts the one before this part.
    base = np.where(last_plain >= 0, values[last_plain] - total[last_plain], prior)
    return np.where(is_difference, base + total, values)


def _read_differences(
    data: NDArray[np.uint8], first_byte: NDArray[np.int64], nth: NDArray[np.int64], bits: int
) -> NDArray[np.int64]:
    """The `nth` difference of the operations whose data begins at `first_byte`."""
    # 8 bit: four to a byte, lowest bits first; 3 stands for -1.
    if bits == 2:
        pair: NDArray[np.int64] = data[first_byte + nth // 4].astype(np.int64) >> 2 * (nth % 4) & 3
        return np.where(pair == 3, -1, pair)

    # 16 bit: eight to three bytes, highest bits first; 5, 6, 7 stand for -1, -2, -3.
    place = 3 * nth
    low = np.minimum(first_byte + place // 8 + 1, len(data) - 1)
    high_bits = data[first_byte + place // 8].astype(np.int64) << 8
    raw: NDArray[np.int64] = (high_bits | data[low]) >> (13 - place % 8) & 7
    return np.where(raw < 5, raw, 4 - raw)
