"""zarr and N5 with codecs that tensorstore lacks: written by zarr-python and numcodecs, or byte by byte."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import numcodecs as zarr3_numcodecs

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.data.formats.test_stores import write_store
from tests.helpers.volume_checks import SHAPE, assert_reads, make_image

RAW_LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 1}]}
ZARR2: dict[str, dict[str, Any]] = {
    "gzip -1": {"compressors": numcodecs.GZip(-1)},
    "zlib -1": {"compressors": numcodecs.Zlib(-1)},
    "lz4": {"compressors": numcodecs.LZ4()},
    "lzma": {"compressors": numcodecs.LZMA()},
    "lzma alone": {"compressors": numcodecs.LZMA(format=lzma.FORMAT_ALONE)},
    "lzma raw": {"compressors": numcodecs.LZMA(**RAW_LZMA)},
    "zstd checksum": {"compressors": numcodecs.Zstd(checksum=True)},
    "shuffle": {"compressors": numcodecs.Zstd(), "filters": [numcodecs.Shuffle(2)]},
    "delta": {"compressors": numcodecs.BZ2(), "filters": [numcodecs.Delta("<u2")]},
    "delta and shuffle": {"compressors": numcodecs.Blosc(), "filters": [numcodecs.Delta("<u2"), numcodecs.Shuffle(2)]},
}
ZARR3 = {
    "lz4": zarr3_numcodecs.LZ4(),
    "lzma": zarr3_numcodecs.LZMA(),
    "zlib": zarr3_numcodecs.Zlib(),
    "bz2": zarr3_numcodecs.BZ2(),
    "zstd": zarr3_numcodecs.Zstd(),
    "blosc": zarr3_numcodecs.Blosc(),
    "gzip": zarr3_numcodecs.GZip(),
}


def write_zarr(path: Path, data: np.ndarray, version: int, **options: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array(
            path, shape=data.shape, chunks=(2, 4, 4), dtype=data.dtype, zarr_format=version, fill_value=7, **options
        )
    array[:] = data


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ZARR2)
def test_zarr2_codecs(tmp_path: Path, kind: str, order: str) -> None:
    write_zarr(tmp_path / "a.zarr", make_image(), 2, order=order, **ZARR2[kind])
    assert_reads(tmp_path / "a.zarr", make_image())


@pytest.mark.parametrize("kind", ZARR3)
def test_zarr3_codecs_of_numcodecs(tmp_path: Path, kind: str) -> None:
    write_zarr(tmp_path / "a.zarr", make_image(), 3, compressors=ZARR3[kind])
    assert_reads(tmp_path / "a.zarr", make_image())


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int32", "float32"])
def test_types_and_byte_orders(tmp_path: Path, dtype: str) -> None:
    data = make_image().astype(dtype)
    write_zarr(tmp_path / "a.zarr", data, 2, compressors=numcodecs.LZ4())
    assert_reads(tmp_path / "a.zarr", data.astype(data.dtype.newbyteorder("=")))


def test_absent_chunk_is_the_fill_value(tmp_path: Path) -> None:
    write_zarr(tmp_path / "a.zarr", make_image(), 2, compressors=numcodecs.LZ4())
    (tmp_path / "a.zarr" / "0.1.0").unlink()
    expected = make_image()
    expected[:2, 4:7, :4] = 7
    assert_reads(tmp_path / "a.zarr", expected)
    assert "1 of 18 chunks are not stored and read as 7" in open_volume(tmp_path / "a.zarr").describe()


def damage_lz4(data: bytes) -> bytes:
    return struct.pack("<I", 1 << 30) + data[4:]


DAMAGE: dict[str, tuple[Any, Callable[[bytes], bytes]]] = {
    "short lz4": (numcodecs.LZ4(), lambda data: data[:-5]),
    "size of lz4": (numcodecs.LZ4(), damage_lz4),
    "short lzma": (numcodecs.LZMA(), lambda data: data[: len(data) // 2]),
    "other gzip": (numcodecs.GZip(-1), lambda data: gzip.compress(b"short")),
    "bomb of gzip": (numcodecs.GZip(-1), lambda data: gzip.compress(bytes(50 << 20))),
    "bomb of lzma": (numcodecs.LZMA(), lambda data: lzma.compress(bytes(50 << 20))),
    "no gzip": (numcodecs.GZip(-1), lambda data: b"hello"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_chunk_is_refused(tmp_path: Path, kind: str) -> None:
    codec, damage = DAMAGE[kind]
    write_zarr(tmp_path / "a.zarr", make_image(), 2, compressors=codec)
    chunk = tmp_path / "a.zarr" / "1.0.0"
    chunk.write_bytes(damage(chunk.read_bytes()))
    volume = open_volume(tmp_path / "a.zarr")
    with pytest.raises(InputError, match="a.zarr cannot be read as zarr"):
        volume[Box.whole(SHAPE)]


def test_unknown_filter_is_refused(tmp_path: Path) -> None:
    write_zarr(tmp_path / "a.zarr", make_image(), 2, filters=[numcodecs.Base64()], compressors=numcodecs.Zstd())
    with pytest.raises(InputError, match="cannot be opened by tensorstore.*filters"):
        open_volume(tmp_path / "a.zarr")


def write_n5(path: Path, **changes: object) -> dict[str, Any]:
    """An N5 array of make_image in raw chunks, with attributes changed; what tensorstore wrote as attributes."""
    chunks = {"blockSize": [4, 4, 2], "compression": {"type": "raw"}}
    write_store(path, "n5", make_image().T.copy(), metadata=chunks)
    attributes = json.loads((path / "attributes.json").read_text())
    described = {key: value for key, value in {**attributes, **changes}.items() if value is not None}
    (path / "attributes.json").write_text(json.dumps(described))
    return attributes


def repack(path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Pack the values of every chunk, behind its header of 16 bytes."""
    for chunk in path.rglob("*"):
        if chunk.is_file() and chunk.name != "attributes.json":
            data = chunk.read_bytes()
            chunk.write_bytes(data[:16] + pack(data[16:]))


def pack_lz4_blocks(data: bytes) -> bytes:
    """lz4-java's stream: one packed and one plain block, then an empty one."""
    half = len(data) // 2
    parts = []
    for block, method in ((data[:half], 0x25), (data[half:], 0x15)):
        packed = bytes(imagecodecs.lz4_encode(block)) if method == 0x25 else block
        parts.append(struct.pack("<8sBiii", b"LZ4Block", method, len(packed), len(block), 0) + packed)
    return b"".join(parts) + struct.pack("<8sBiii", b"LZ4Block", 0x15, 0, 0, 0)


N5_OLD: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lz4": pack_lz4_blocks,
}


@pytest.mark.parametrize("codec", N5_OLD)
def test_n5_before_version_2(tmp_path: Path, codec: str) -> None:
    write_n5(tmp_path / "a.n5", n5="1.5", compression=None, compressionType=codec)
    repack(tmp_path / "a.n5", N5_OLD[codec])
    assert_reads(tmp_path / "a.n5", make_image())


def test_n5_lz4(tmp_path: Path) -> None:
    write_n5(tmp_path / "a.n5", compression={"type": "lz4", "blockSize": 65536})
    repack(tmp_path / "a.n5", pack_lz4_blocks)
    assert_reads(tmp_path / "a.n5", make_image())


def test_n5_of_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    write_n5(tmp_path / "a.n5", compression=None, compressionType="jpeg")
    with pytest.raises(InputError, match="cannot be opened by tensorstore.*compression"):
        open_volume(tmp_path / "a.n5")
