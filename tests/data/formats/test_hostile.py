"""Files that would block, never end or fill the memory, and voxels that come from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.data.formats.test_stores import write_store
from tests.helpers.volume_checks import SHAPE, assert_reads, make_image

pytestmark = pytest.mark.timeout(20)


@pytest.mark.parametrize("name", ["a.tif", "a.h5", "a.v3draw", "a.nrrd", "a.nii.gz", "a.am", "a"])
def test_fifo_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is no regular file"):
        open_volume(tmp_path / name)


def test_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"a.tif is no regular file"):
        open_volume(tmp_path / "a.tif")


def test_fifo_among_slices_is_refused(tmp_path: Path) -> None:
    for i in (1, 3):
        tifffile.imwrite(tmp_path / f"{i}.tif", make_image()[i], photometric="minisblack")
    os.mkfifo(tmp_path / "2.tif")
    volume = open_volume(tmp_path)
    with pytest.raises(InputError, match=r"2.tif is no regular file"):
        volume[Box.whole(volume.shape)]
    os.mkfifo(tmp_path / "0.tif")
    with pytest.raises(InputError, match=r"0.tif is no regular file"):
        open_volume(tmp_path)


NRRD_HEAD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 9 7 5\nencoding: raw\n"


def test_fifo_behind_a_header_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.raw")
    (tmp_path / "a.nhdr").write_text(f"{NRRD_HEAD}data file: a.raw\n\n")
    with pytest.raises(InputError, match=r"keeps its voxels in a.raw"):
        open_volume(tmp_path / "a.nhdr")
    nibabel.save(nibabel.Nifti1Pair(make_image().T, np.eye(4)), tmp_path / "b.img")
    (tmp_path / "b.img").unlink()
    os.mkfifo(tmp_path / "b.img")
    with pytest.raises(InputError, match=r"b.img is no regular file"):
        open_volume(tmp_path / "b.hdr")


def test_fifo_behind_hdf5_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "far")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["linked"] = h5py.ExternalLink("far", "image")
        layout = h5py.VirtualLayout(SHAPE, "uint16")
        layout[:] = h5py.VirtualSource("far", "image", SHAPE)
        file.create_virtual_dataset("gathered", layout)
    for dataset in ("linked", "gathered"):
        with pytest.raises(InputError, match=r"far is no regular file"):
            open_volume(tmp_path / "a.h5", dataset=dataset)


def make_sparse_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("image", (1 << 16,) * 3, "uint8", chunks=(64, 64, 64))
        data[:64, :64, :64] = 1


def make_sparse_contiguous_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("image", (1 << 13, 1 << 14, 1 << 14), "uint8")
        data[0, 0, 0] = 1


def make_sparse_v3draw(path: Path) -> None:
    size = np.array([1 << 14, 1 << 14, 1 << 13, 1], "<i4").tobytes()
    path.write_bytes(b"raw_image_stack_by_hpengL" + (1).to_bytes(2, "little") + size)
    with path.open("r+b") as handle:
        handle.truncate(43 + (1 << 41))


def make_sparse_zarr(path: Path) -> None:
    write_store(path, "zarr3", np.ones((64, 64, 64), "uint8"))
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"shape":[64,64,64]', '"shape":[65536,65536,65536]'))


SPARSE: dict[str, Callable[[Path], None]] = {
    "a.h5": make_sparse_hdf5,
    "b.h5": make_sparse_contiguous_hdf5,
    "a.v3draw": make_sparse_v3draw,
    "a.zarr": make_sparse_zarr,
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_giant_is_refused(tmp_path: Path, name: str) -> None:
    SPARSE[name](tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} declares [\d.]+ TB of voxels but stores only"):
        open_volume(tmp_path / name)


def test_sparse_volume_of_usual_size_opens(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "zarr3", np.ones((8, 8, 8), "uint8"))
    text = (tmp_path / "a.zarr" / "zarr.json").read_text()
    (tmp_path / "a.zarr" / "zarr.json").write_text(text.replace('"shape":[8,8,8]', '"shape":[1000,2000,2000]'))
    assert open_volume(tmp_path / "a.zarr")[Box((0, 0, 0), (2, 2, 2))].sum() == 8


def test_endless_description_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "zarr3", make_image())
    with (tmp_path / "a.zarr" / "zarr.json").open("r+b") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(InputError, match=r"zarr.json is larger than any description of an array"):
        open_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_strip_larger_than_the_cache_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    data = make_image("uint16", (2, 64, 64))
    tifffile.imwrite(tmp_path / "a.tif", data, compression="zlib", rowsperstrip=64, photometric="minisblack")
    volume = open_volume(tmp_path / "a.tif")
    pages = volume._array.read
    pages.cache.limit = limit
    decoded: list[int] = []
    decode = pages._decode_segment
    monkeypatch.setattr(pages, "_decode_segment", lambda *key: decoded.append(key[0]) or decode(*key))
    for y in range(0, 64, 8):
        np.testing.assert_array_equal(volume[Box((1, y, 0), (2, y + 8, 64))], data[1:2, y : y + 8])
    assert decoded == [1]


def test_slices_share_one_cache(tmp_path: Path) -> None:
    data = make_image("uint16", (6, 64, 64))
    for i, plane in enumerate(data):
        tifffile.imwrite(tmp_path / f"{i}.tif", plane, compression="zlib", rowsperstrip=64, photometric="minisblack")
    volume = open_volume(tmp_path)
    for y in (0, 32):
        np.testing.assert_array_equal(volume[Box((0, y, 0), (6, y + 32, 64))], data[:, y : y + 32])
    assert len(volume._array.read.cache.pieces) == 6


@pytest.mark.parametrize(("lines", "message"), [("byte skip: -5", "byte skip -5"), ("line skip: -2", "line skip -2")])
def test_nrrd_skips_that_mean_nothing_are_named(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "a.raw").write_bytes(make_image("uint8").tobytes())
    (tmp_path / "a.nhdr").write_text(f"{NRRD_HEAD}{lines}\ndata file: a.raw\n\n")
    with pytest.raises(InputError, match=f"{message}.*byte skip must be -1 or more"):
        open_volume(tmp_path / "a.nhdr")


def test_voxels_from_elsewhere_are_noted(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "a.raw").write_bytes(make_image("uint8").tobytes())
    for place in ("../a.raw", str(tmp_path / "a.raw")):
        (tmp_path / "own" / "a.nhdr").write_text(f"{NRRD_HEAD}data file: {place}\n\n")
        volume = open_volume(tmp_path / "own" / "a.nhdr")
        assert f"voxels are read from {tmp_path / 'a.raw'}, outside the folder of the image" in volume.describe()
    with h5py.File(tmp_path / "own" / "a.h5", "w") as file:
        file.create_dataset("image", SHAPE, "uint8", external=[(str(tmp_path / "a.raw"), 0, 315)])
    assert "outside the folder of the image" in open_volume(tmp_path / "own" / "a.h5").describe()
    assert_reads(tmp_path / "own" / "a.h5", make_image("uint8"))


def write_ome_in_two_files(folder: Path, other: str) -> Path:
    """The first two slices of an OME-TIFF whose other slices lie in another file; its path."""
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z if z < 2 else z - 2}" PlaneCount="1">'
        f'<UUID FileName="{name}">{name}</UUID></TiffData>'
        for z, name in enumerate(["a.ome.tif"] * 2 + [other] * 3)
    )
    pixels = 'DimensionOrder="XYZCT" Type="uint16" SizeX="9" SizeY="7" SizeZ="5" SizeC="1" SizeT="1"'
    image = make_image()
    for path, slices, uuid in ((folder / "a.ome.tif", image[:2], "a.ome.tif"), (folder / other, image[2:], other)):
        text = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}">'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" {pixels}>{planes}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(path) as writer:
            for number, plane in enumerate(slices):
                description = None if number else text
                writer.write(plane, photometric="minisblack", metadata=None, contiguous=False, description=description)
    return folder / "a.ome.tif"


def test_pages_in_another_file_are_noted_and_checked(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    path = write_ome_in_two_files(tmp_path / "own", "../b.ome.tif")
    assert_reads(path, make_image())
    assert f"voxels are read from {tmp_path / 'b.ome.tif'}, outside" in open_volume(path).describe()

    path = write_ome_in_two_files(tmp_path / "own", "b.ome.tif")
    assert "outside" not in open_volume(path).describe()
    (tmp_path / "own" / "b.ome.tif").unlink()
    os.mkfifo(tmp_path / "own" / "b.ome.tif")
    with pytest.raises(InputError, match=r"b.ome.tif is no regular file"):
        open_volume(path)


def test_apple_doubles_among_tiles_are_ignored(tmp_path: Path) -> None:
    leaf = tmp_path / "RES(7x9x5)" / "000000" / "000000_000000"
    leaf.mkdir(parents=True)
    tifffile.imwrite(leaf / "000000_000000_000000.tif", make_image(), photometric="minisblack")
    for folder, name in ((leaf, "000000_000000_000000.tif"), (leaf.parent, leaf.name), (leaf.parents[1], "000000")):
        (folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    assert_reads(tmp_path, make_image())
