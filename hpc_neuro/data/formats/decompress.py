"""Arrays compressed as one stream: unpacked once, at the first read, into a nameless scratch file, then mapped.

Memory stays small whatever the volume's size, every later box is a plain read, and no byte is allocated for a header
that lies: the scratch file grows only as far as the stream really goes.
"""

from __future__ import annotations

import bz2
import gzip
import math
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.volume import Array, Index

_CHUNK = 1 << 22


class UnpackedArray:
    """Reads parts of an array [shape] of `dtype` (C order) whose bytes `stream` gives in order."""

    def __init__(
        self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], stream: Callable[[], Iterable[bytes | Array]]
    ) -> None:
        self.path, self.dtype, self.shape, self.stream = path, dtype, shape, stream
        self.array: Array | None = None
        self.lock = threading.Lock()

    def __call__(self, index: Index) -> Array:
        with self.lock:
            if self.array is None:
                self.array = self._unpack()
        return self.array[index]

    def _unpack(self) -> Array:
        wanted = math.prod(self.shape) * self.dtype.itemsize
        folder = Path(tempfile.gettempdir())
        files.require_space(folder, wanted, f"unpacking {self.path}")
        with tempfile.TemporaryFile(dir=folder, prefix="hpc_neuro_") as scratch:
            done = 0
            for part in self.stream():
                data = part.tobytes() if isinstance(part, np.ndarray) else part
                done += len(data)
                if done > wanted:
                    raise InputError(
                        f"{self.path} is damaged: its stream holds more than the {wanted} bytes of its shape "
                        f"{self.shape}; export it again"
                    )
                try:
                    scratch.write(data)
                except OSError as error:
                    raise InputError(
                        f"{self.path} cannot be unpacked in {folder}: {error.strerror}; set TMPDIR"
                    ) from error
            if done < wanted:
                raise InputError(
                    f"{self.path} is incomplete: its stream ends after {done} of the {wanted} bytes of its shape "
                    f"{self.shape}; copy or export it again"
                )
            scratch.flush()
            return np.memmap(scratch, dtype=self.dtype, mode="r", shape=self.shape)  # keeps the file alive


def gzip_stream(path: Path, offset: int, skip: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a gzip stream that begins at `offset`, without the first `skip`."""
    with path.open("rb") as handle:
        handle.seek(offset)
        with gzip.GzipFile(fileobj=handle) as stream:
            yield from _chunks(stream, skip)


def bzip2_stream(path: Path, offset: int, skip: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a bzip2 stream that begins at `offset`, without the first `skip`."""
    with path.open("rb") as handle:
        handle.seek(offset)
        with bz2.BZ2File(handle) as stream:
            yield from _chunks(stream, skip)


def zlib_stream(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """The decompressed bytes of `size` bytes of zlib data at `offset`."""
    engine = zlib.decompressobj()
    with path.open("rb") as handle:
        handle.seek(offset)
        while size > 0 and (data := handle.read(min(size, _CHUNK))):
            size -= len(data)
            while data:
                yield engine.decompress(data, _CHUNK)
                data = engine.unconsumed_tail
        yield engine.flush()


def raw_chunks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `offset`, by parts; fewer where the file ends."""
    with path.open("rb") as handle:
        handle.seek(offset)
        while size > 0 and (data := handle.read(min(size, 1 << 16))):
            size -= len(data)
            yield data


def _chunks(stream: BinaryIO | gzip.GzipFile | bz2.BZ2File, skip: int) -> Iterator[bytes]:
    while skip > 0 and (gone := len(stream.read(min(skip, _CHUNK)))):
        skip -= gone
    while data := stream.read(_CHUNK):
        yield data
