"""zarr and N5 arrays whose codecs tensorstore does not know, decoded chunk by chunk in Python.

zarr-python writes gzip of level -1, lz4, lzma, zstd with checksums, and filters, in zarr 3 under names such as
`numcodecs.lz4`; N5 has lz4, and before version 2 named its codec in `compressionType`. A chunk is a file:

    zarr: the values in C or Fortran order, filtered, compressed
    N5:   a big-endian header (mode, dimensions, size of the chunk), then the big-endian values, compressed
"""

from __future__ import annotations

import bz2
import functools
import itertools
import lzma
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.decompress import DecodedCache
from hpc_neuro.data.formats.volume import Array, Index

Decode = Callable[[bytes, int], bytes]
"""Undoes one codec: its bytes, and how many should come out. What is longer is cut after one byte more."""

_LZ4_BLOCK = struct.Struct("<8sBiii")
"""Header of a block of lz4-java's stream: magic, method, packed bytes, bytes, checksum."""


def _inflate(data: bytes, size: int) -> bytes:
    """gzip or zlib, by the header of the stream."""
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(data, size + 1)


def _decode_bz2(data: bytes, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _decode_xz(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor().decompress(data, size + 1)


def _decode_lzma(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    kind = int(config.get("format") or lzma.FORMAT_AUTO)
    engine = lzma.LZMADecompressor(kind, filters=config.get("filters") if kind == lzma.FORMAT_RAW else None)
    return engine.decompress(data, size + 1)


def _decode_lz4(data: bytes, size: int) -> bytes:
    """numcodecs' lz4: the size in 4 bytes, then one block."""
    (stated,) = struct.unpack_from("<I", data)
    if stated > size:
        raise ValueError(f"a chunk states {stated} bytes where {size} are expected")
    return bytes(imagecodecs.lz4_decode(data[4:], out=stated))


def _decode_lz4_blocks(data: bytes, size: int) -> bytes:
    """lz4-java's stream, which N5 uses: blocks that are each packed or plain, up to an empty one."""
    parts, at, total = [], 0, 0
    while at < len(data):
        magic, method, packed, count, _ = _LZ4_BLOCK.unpack_from(data, at)
        at += _LZ4_BLOCK.size
        total += count
        if magic != b"LZ4Block" or min(packed, count) < 0 or at + packed > len(data) or total > size:
            raise ValueError("its lz4 stream holds a damaged block")
        if count == 0:
            break

        block = data[at : at + packed]
        is_packed = method & 0xF0 == 0x20
        parts.append(bytes(imagecodecs.lz4_decode(block, out=count)) if is_packed else block)
        at += packed
    return b"".join(parts)


def _decode_zstd(data: bytes, size: int) -> bytes:
    return bytes(imagecodecs.zstd_decode(data, out=size))


def _decode_blosc(data: bytes, size: int) -> bytes:
    return bytes(imagecodecs.blosc_decode(data, out=size))


def _unshuffle(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    """Bytes of all values put together again, from planes of first bytes, second bytes and so on."""
    width = int(config.get("elementsize", 4))
    whole = len(data) // width * width
    return np.frombuffer(data[:whole], np.uint8).reshape(width, -1).T.tobytes() + data[whole:]


def _undo_delta(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    """Values from the first one and the differences that follow it."""
    differences = np.frombuffer(data, config.get("astype") or config["dtype"])
    return np.cumsum(differences, dtype=config["dtype"]).astype(config["dtype"]).tobytes()


def _undo_scale_offset(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    """Values that were stored as (value - offset) * scale, rounded."""
    stored = np.frombuffer(data, config.get("astype") or config["dtype"])
    values: Array = stored / config["scale"] + config["offset"]
    return values.astype(config["dtype"]).tobytes()


def _undo_quantize(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    """Values that were rounded, and perhaps stored in a smaller type."""
    return np.frombuffer(data, config.get("astype") or config["dtype"]).astype(config["dtype"]).tobytes()


def _undo_type(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    return np.frombuffer(data, config["encode_dtype"]).astype(config["decode_dtype"]).tobytes()


def _unpack_bits(config: Mapping[str, Any], data: bytes, size: int) -> bytes:
    """Booleans from bits; the first byte is the number of bits that fill up the last one."""
    bits = np.unpackbits(np.frombuffer(data[1:], np.uint8))
    return bits[: len(bits) - data[0]].tobytes()


def _check_sum(
    compute: Callable[[bytes], int], at_end: bool, config: Mapping[str, Any], data: bytes, size: int
) -> bytes:
    """Data without the checksum of 4 bytes that it is checked against."""
    is_behind = config.get("location", "end" if at_end else "start") == "end"
    stated, body = (data[-4:], data[:-4]) if is_behind else (data[:4], data[4:])
    if struct.unpack("<I", stated)[0] != compute(body):
        raise ValueError("the checksum of a chunk does not fit its values")
    return body


def _fletcher32(data: bytes) -> int:
    """HDF5's checksum: sums of 16-bit words, and of these sums, modulo 65535."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.int64)
    first = int(words.sum()) % 65535
    second = int((words * (np.arange(len(words), 0, -1) % 65535) % 65535).sum()) % 65535
    return second << 16 | first


# Codec -> how it is undone; those of the second table depend on their configuration in the metadata.
_CODECS: dict[str, Decode] = {
    "gzip": _inflate,
    "zlib": _inflate,
    "bz2": _decode_bz2,
    "lz4": _decode_lz4,
    "zstd": _decode_zstd,
    "blosc": _decode_blosc,
}
_CONFIGURED: dict[str, Callable[[Mapping[str, Any], bytes, int], bytes]] = {
    "lzma": _decode_lzma,
    "shuffle": _unshuffle,
    "delta": _undo_delta,
    "fixedscaleoffset": _undo_scale_offset,
    "quantize": _undo_quantize,
    "bitround": lambda config, data, size: data,
    "astype": _undo_type,
    "packbits": _unpack_bits,
    "crc32": functools.partial(_check_sum, zlib.crc32, False),
    "adler32": functools.partial(_check_sum, zlib.adler32, False),
    "fletcher32": functools.partial(_check_sum, _fletcher32, True),
}
_MAX_WIDENING = 8
"""Bytes of a value in the widest type that a filter may store it in."""
_N5_CODECS: dict[str, Decode] = {
    "raw": lambda data, size: data,
    "gzip": _inflate,
    "bzip2": _decode_bz2,
    "xz": _decode_xz,
    "lz4": _decode_lz4_blocks,
    "zstd": _decode_zstd,
}


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of one array: where each lies, and how its bytes become values."""

    folder: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    key: Callable[[Sequence[int]], str]
    """File of the chunk at a place in the grid, below the folder."""
    decode: Callable[[bytes], Array]
    """The values of a chunk's file, at most `chunk` along each axis."""

    def make_reader(self, cache_bytes: int) -> Callable[[Index], Array]:
        """A function that reads parts of the array and keeps decoded chunks up to `cache_bytes`."""
        return functools.partial(_read_part, self, DecodedCache(cache_bytes))

    def read_chunk(self, place: tuple[int, ...]) -> Array:
        """The values of one chunk; an empty array where it has no file and so is the fill value."""
        try:
            data = (self.folder / self.key(place)).read_bytes()
        except FileNotFoundError:
            return np.empty(0, self.dtype)
        return self.decode(data)


def read_zarr2(folder: Path, meta: Mapping[str, Any]) -> ChunkGrid | None:
    """The grid of a zarr 2 array; None for a codec or filter that is not known here either."""
    # Filters are applied in their order, then the compressor.
    stages = [*(meta.get("filters") or []), *([meta["compressor"]] if meta.get("compressor") else [])]
    decoders = _choose_decoders([(str(stage.get("id")), stage) for stage in stages])
    if decoders is None:
        return None

    shape, chunk = tuple(meta["shape"]), tuple(meta["chunks"])
    dtype, order = np.dtype(meta["dtype"]), meta.get("order", "C")
    separator = meta.get("dimension_separator", ".")
    decode = functools.partial(_decode_zarr, decoders, dtype, chunk, order)
    return ChunkGrid(
        folder, shape, chunk, dtype, meta.get("fill_value") or 0, lambda place: separator.join(map(str, place)), decode
    )


def read_zarr3(folder: Path, meta: Mapping[str, Any]) -> ChunkGrid | None:
    """The grid of a zarr 3 array of plain chunks; None for shards and for codecs that are not known here."""
    codecs = [dict(codec) for codec in meta["codecs"]]
    names = [str(codec["name"]).removeprefix("numcodecs.") for codec in codecs]
    is_transposed = names[0] == "transpose"
    stages = [(n, c.get("configuration") or {}) for n, c in zip(names, codecs, strict=True)]
    stages = [stage for stage in stages[is_transposed:] if stage[0] != "bytes"]
    decoders = _choose_decoders(stages)
    if "bytes" not in names or decoders is None:
        return None
    order = tuple(codecs[0]["configuration"]["order"]) if is_transposed else "C"

    # The codec `bytes` turns values into bytes, before all others.
    endian = (codecs[names.index("bytes")].get("configuration") or {}).get("endian", "little")
    dtype = np.dtype(meta["data_type"]).newbyteorder(">" if endian == "big" else "<")
    chunk = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
    encoding = meta.get("chunk_key_encoding", {})
    is_v2_style = encoding.get("name") == "v2"
    separator = encoding.get("configuration", {}).get("separator", "." if is_v2_style else "/")
    prefix = [] if is_v2_style else ["c"]
    decode = functools.partial(_decode_zarr, decoders, dtype, chunk, order)
    return ChunkGrid(
        folder,
        tuple(meta["shape"]),
        chunk,
        dtype,
        meta.get("fill_value") or 0,
        lambda place: separator.join([*prefix, *map(str, place)]),
        decode,
    )


def read_n5(folder: Path, meta: Mapping[str, Any]) -> ChunkGrid | None:
    """The grid of an N5 array of version 1 or 2, dimensions as stored; None for an unknown codec."""
    compression = meta.get("compression", meta.get("compressionType", "raw"))
    codec = str(compression.get("type") if isinstance(compression, Mapping) else compression)
    if codec not in _N5_CODECS:
        return None

    dtype = np.dtype(meta["dataType"]).newbyteorder(">")
    chunk = tuple(int(n) for n in meta["blockSize"])
    decode = functools.partial(_decode_n5, _N5_CODECS[codec], dtype, chunk)
    shape = tuple(int(n) for n in meta["dimensions"])
    return ChunkGrid(folder, shape, chunk, dtype, 0, lambda place: "/".join(map(str, place)), decode)


def _choose_decoders(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Decode] | None:
    """What undoes codecs that were applied in this order, the last one first; None where one is not known."""
    decoders: list[Decode] = []
    for name, config in reversed(stages):
        if name in _CODECS:
            decoders.append(_CODECS[name])
        elif name in _CONFIGURED:
            decoders.append(functools.partial(_CONFIGURED[name], config))
        else:
            return None
    return decoders


def _decode_zarr(
    decoders: Sequence[Decode], dtype: np.dtype[Any], chunk: tuple[int, ...], order: Any, data: bytes
) -> Array:
    """The values of one zarr chunk (`order` C, F or a transposition); chunks at the end of the array are whole."""
    expected = math.prod(chunk) * dtype.itemsize
    # Filters store values in other types, and checksums beside them.
    limit = expected if len(decoders) == 1 else math.prod(chunk) * _MAX_WIDENING + 64
    for decode in decoders:
        data = decode(data, limit)
    if len(data) != expected:
        raise ValueError(f"a chunk holds {len(data)} bytes where {expected} are expected")
    values: Array = np.frombuffer(data, dtype)
    # The codec `transpose` of zarr 3 lists which axis of the array each stored axis is.
    if isinstance(order, tuple):
        return values.reshape([chunk[axis] for axis in order]).transpose(np.argsort(order))
    return values.reshape(chunk, order=order)


def _decode_n5(decode: Decode, dtype: np.dtype[Any], chunk: tuple[int, ...], data: bytes) -> Array:
    """The values of one N5 chunk, dimensions as stored (fastest first); chunks at the end of the array are shorter."""
    mode, size = parse_n5_header(data, chunk)
    count = len(size)
    # Mode 1 states the number of values as well.
    if mode and struct.unpack_from(">I", data, 4 + 4 * count)[0] != math.prod(size):
        raise ValueError(f"a chunk of {size} voxels states another number of values")
    expected = math.prod(size) * dtype.itemsize
    values = np.frombuffer(decode(data[4 + 4 * count + 4 * mode :], expected)[:expected], dtype)
    return values.reshape(size, order="F")


def parse_n5_header(data: bytes, chunk: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Mode and size of an N5 chunk, dimensions as stored. Raises ValueError for one that no array of `chunk` has."""
    mode, count = struct.unpack_from(">HH", data)
    if mode > 1 or count != len(chunk):
        raise ValueError(f"a chunk of mode {mode} and {count} dimensions does not fit the array")
    size = struct.unpack_from(f">{count}I", data, 4)
    if any(n > limit for n, limit in zip(size, chunk, strict=True)):
        raise ValueError(f"a chunk of {size} voxels is larger than the {tuple(chunk)} of the array")
    if 0 in size:
        raise ValueError(f"a chunk of {size} voxels holds no values")
    return mode, size


def require_whole_place(
    path: Path, size: Sequence[int], place: Sequence[int], chunk: Sequence[int], shape: Sequence[int]
) -> None:
    """Raise InputError when a chunk of `size` leaves a part of its place in an array of `shape` without values.

    Chunks at the end of an N5 array hold what lies inside it, or are as large as the others.
    """
    expected = tuple(min(n, total - i * n) for i, n, total in zip(place, chunk, shape, strict=True))
    if any(n < wanted for n, wanted in zip(size, expected, strict=True)):
        raise InputError(
            f"{path} holds a block of {tuple(size)} voxels where the array has {expected}, and the others are unknown; "
            "copy or export the image again"
        )


def _read_part(grid: ChunkGrid, cache: DecodedCache, index: Index) -> Array:
    """One part of the array, from the chunks that it meets."""
    out = np.full([s.stop - s.start for s in index], grid.fill, grid.dtype.newbyteorder("="))
    ranges = [range(s.start // n, -(-s.stop // n)) for s, n in zip(index, grid.chunk, strict=True)]

    for place in itertools.product(*ranges):
        chunk = cache.get(place, functools.partial(grid.read_chunk, place))
        if not chunk.size:
            continue

        require_whole_place(grid.folder / grid.key(place), chunk.shape, place, grid.chunk, grid.shape)
        # The overlap, once in the chunk and once in the part.
        begins = [i * n for i, n in zip(place, grid.chunk, strict=True)]
        starts = [max(s.start, b) for s, b in zip(index, begins, strict=True)]
        stops = [min(s.stop, b + n) for s, b, n in zip(index, begins, chunk.shape, strict=True)]
        source = tuple(slice(a - b, c - b) for a, b, c in zip(starts, begins, stops, strict=True))
        target = tuple(slice(a - s.start, c - s.start) for a, s, c in zip(starts, index, stops, strict=True))
        out[target] = chunk[source]
    return out
