"""Truncated, lying and fuzzed files: one InputError; no crash, hang or zeros, no allocation for a lying header."""

from __future__ import annotations

import gzip
import logging
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import nibabel
import nrrd
import numcodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.data.formats.test_chunk_decoder import repack, write_n5, write_zarr
from tests.data.formats.test_damaged_folders import DATA, SHAPE
from tests.data.formats.test_stores import write_imaris, write_precomputed, write_store


def make_tiff(**options: object) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, DATA, **options)


def make_v3draw(path: Path) -> None:
    path.write_bytes(b"raw_image_stack_by_hpengL" + struct.pack("<h4i", 2, *SHAPE[::-1], 1) + DATA.tobytes())


def make_v3dpbd(path: Path) -> None:
    flat = DATA.ravel()
    coded = b"".join(bytes([len(p) - 1]) + p.tobytes() for p in (flat[i : i + 32] for i in range(0, flat.size, 32)))
    path.write_bytes(b"v3d_volume_pkbitdf_encodL" + struct.pack("<h4i", 2, *SHAPE[::-1], 1) + coded)


def make_nrrd(encoding: str) -> Callable[[Path], None]:
    return lambda path: nrrd.write(str(path), DATA.T, {"encoding": encoding}, index_order="F")


def make_nifti(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(DATA.T, np.eye(4)), path)


def make_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=DATA, chunks=(2, 10, 12), compression="gzip")


def make_amira(path: Path) -> None:
    z, y, x = SHAPE
    head = f"# AmiraMesh BINARY-LITTLE-ENDIAN 2.1\ndefine Lattice {x} {y} {z}\n"
    head += "Parameters { BoundingBox 0 1 0 1 0 1 }\n"
    path.write_bytes(f"{head}Lattice {{ ushort Data }} @1\n\n@1\n".encode() + DATA.tobytes())


MAKERS: dict[str, Callable[[Path], None]] = {
    "plain.tif": make_tiff(photometric="minisblack", metadata=None),
    "shaped.tif": make_tiff(photometric="minisblack"),
    "imagej.tif": make_tiff(imagej=True, metadata={"axes": "ZYX", "spacing": 1.0, "unit": "um"}),
    "ome.tif": make_tiff(ome=True, metadata={"axes": "ZYX"}),
    "deflate.tif": make_tiff(photometric="minisblack", compression="zlib", metadata=None),
    "tiles.tif": make_tiff(photometric="minisblack", compression="lzw", tile=(16, 16), bigtiff=True),
    "a.v3draw": make_v3draw,
    "a.v3dpbd": make_v3dpbd,
    "raw.nrrd": make_nrrd("raw"),
    "gzip.nrrd": make_nrrd("gzip"),
    "bzip2.nrrd": make_nrrd("bzip2"),
    "a.nii": make_nifti,
    "a.nii.gz": make_nifti,
    "a.h5": make_hdf5,
    "a.am": make_amira,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Libraries may grumble about damaged files as they like."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(level)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    for name, make in MAKERS.items():
        make(folder / name)
        volume = open_volume(folder / name)
        np.testing.assert_array_equal(volume[Box.whole(SHAPE)], DATA)
    return {name: (folder / name).read_bytes() for name in MAKERS}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("share", [0.0, 0.003, 0.02, 0.3, 0.6, 0.9, 0.97, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, good: dict[str, bytes], name: str, share: float) -> None:
    whole = good[name]
    tail = len(whole) - 8 if name.endswith((".nrrd", ".gz", ".am", ".v3dpbd", ".v3draw", ".nii")) else len(whole) - 1
    path = tmp_path / name
    path.write_bytes(whole[: min(int(share * len(whole)), tail)])
    try:
        data = open_volume(path)[Box.whole(SHAPE)]
    except InputError as error:
        assert name in str(error)  # noqa: PT017
        return
    # what was cut off was no voxel (a name at the end of a TIFF, say): then not one may be wrong
    np.testing.assert_array_equal(data, DATA)


def read_corner(path: Path) -> None:
    """Open and read at most 4096 voxels, under watch; anything but success or InputError fails."""
    tracemalloc.start()
    try:
        volume = open_volume(path)
        start = tuple(max(0, n // 2 - 8) for n in volume.shape)
        stop = tuple(min(n, a + 16) for n, a in zip(volume.shape, start, strict=True))
        assert volume[Box(start, stop)].shape == tuple(b - a for a, b in zip(start, stop, strict=True))
    except InputError as error:
        assert len(str(error)) < 2000  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 300 << 20, f"{peak >> 20} MB for a file of {path.stat().st_size} bytes"


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_fuzzed_headers(
    tmp_path_factory: pytest.TempPathFactory, good: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    whole = good[name]
    header = len(whole) if name.endswith((".h5", ".gz", ".tif")) else min(400, len(whole))
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(damage(data, whole, header))
    read_corner(path)


def damage(data: st.DataObject, whole: bytes, header: int) -> bytes:
    """A file with some bytes of its first `header` changed, and perhaps cut short."""
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        # near the beginning as a rule: there the header is
        place = data.draw(st.one_of(st.integers(0, min(header, 400) - 1), st.integers(0, header - 1)))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(
            st.one_of(
                st.binary(min_size=width, max_size=width),
                st.sampled_from([b"\xff" * width, b"\0" * width, b"\x7f" + b"\xff" * (width - 1), b"9" * width]),
            )
        )
        damaged[place : place + width] = value[: len(damaged) - place]
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(1, len(damaged))) :]
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["zarr", "zarr3", "n5", "precomputed", "imaris.ims", "lz4.zarr", "old.n5"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_fuzzed_folders(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    """Descriptions and chunks alike; the library behind them ends the process when it cannot have its memory."""
    path = tmp_path_factory.mktemp("fuzz") / kind
    if kind == "precomputed":
        write_precomputed(path)
    elif kind == "imaris.ims":
        write_imaris(path, DATA[None])
    elif kind == "lz4.zarr":
        write_zarr(path, DATA, 2, compressors=numcodecs.LZ4())
    elif kind == "old.n5":
        write_n5(path, compression=None, compressionType="gzip")
        repack(path, gzip.compress)
    else:
        write_store(path, kind, DATA)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    file.write_bytes(damage(data, whole, len(whole)))
    read_corner(path)


def lying(name: str, old: bytes, new: bytes) -> tuple[str, bytes, bytes]:
    return name, old, new


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        lying("a.v3draw", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 2**30, 2**30, 2**30, 1)),
        lying("a.v3draw", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 40000, 40000, 1000, 1)),
        lying("a.v3draw", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 24, 20, 5, 1)),
        lying("a.v3draw", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 24, -20, 6, 1)),
        lying("a.v3dpbd", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 40000, 40000, 1000, 1)),
        lying("a.v3dpbd", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 24, 20, 7, 1)),
        lying("a.v3dpbd", struct.pack("<4i", *SHAPE[::-1], 1), struct.pack("<4i", 24, 20, 5, 1)),
        lying("raw.nrrd", b"sizes: 24 20 6", b"sizes: 24 20 60000"),
        lying("gzip.nrrd", b"sizes: 24 20 6", b"sizes: 24 20 600000"),
        lying("gzip.nrrd", b"sizes: 24 20 6", b"sizes: 24 20 5"),
        lying("bzip2.nrrd", b"sizes: 24 20 6", b"sizes: 99999 99999 99999"),
        lying("a.nii", struct.pack("<4h", 3, *SHAPE[::-1]), struct.pack("<4h", 3, 24, 20000, 6000)),
        lying("a.am", b"Lattice 24 20 6", b"Lattice 24000 20000 6000"),
    ],
)
def test_wrong_sizes_in_headers_are_refused(
    tmp_path: Path, good: dict[str, bytes], name: str, old: bytes, new: bytes
) -> None:
    assert old in good[name]
    path = tmp_path / name
    path.write_bytes(good[name].replace(old, new, 1))
    with pytest.raises(InputError, match=r"incomplete|damaged|needs .* free|no disk can hold|at least one voxel"):
        volume = open_volume(path)
        volume[Box((0, 0, 0), (1, 1, 1))]
    read_corner(path)


def test_oversized_tiff_strip_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", DATA, photometric="minisblack", compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        for page in tif.pages:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                page.tags[tag].overwrite(60000)
    with pytest.raises(InputError, match="claims .* bytes from"):
        open_volume(tmp_path / "a.tif")


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.tif", b"", "is empty"),
        ("a.xyz", b"hello world", "no known image format .*TIFF, HDF5, v3draw"),
        ("b.tif", b"\x89PNG\r\n\x1a\n1234", "is a PNG file, which is not read"),
        ("f.tif", b"hello", "named as TIFF, but does not begin as one"),
        ("c.tif", b"II*\0", "ends inside its TIFF header"),
        ("d.tif", b"II*\0\x08\0\0\0", "leaves the file"),
        ("a.v3draw.gz", b"\x1f\x8b\x08\0", "is a gzip archive; unpack it"),
        ("a.zip", b"PK\x03\x04", "is a zip archive; unpack it"),
        ("e.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "turns back on itself"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            open_volume(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        open_volume(tmp_path / "none.tif")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="a folder that holds no image; wanted an OME-Zarr"):
        open_volume(tmp_path / "folder")


@pytest.mark.parametrize("offset", [0, 4])
def test_strips_in_the_header_of_the_file_are_refused(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA, photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["StripOffsets"].overwrite(offset)
    with pytest.raises(InputError, match=f"page 0 places a strip or tile at byte {offset}, in the header"):
        open_volume(path)


def test_hdf5_dataset_without_voxels_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", shape=(1000, 2000, 3000), dtype="uint16", chunks=(10, 10, 10))
    with pytest.raises(InputError, match="holds none of its voxels"):
        open_volume(tmp_path / "a.h5")
