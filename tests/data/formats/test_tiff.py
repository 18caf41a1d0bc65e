"""TIFF of every kind, and folders of slices: the voxels that were written, whole and by box, and the voxel size."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import READERS, open_volume
from tests.helpers.volume_checks import SHAPE, UM, assert_reads, make_image, write_tiff

TIFFS: dict[str, tuple[dict[str, object], tuple[float, ...] | None]] = {
    "plain": ({"photometric": "minisblack", "metadata": None}, None),
    "shaped": ({"photometric": "minisblack", "metadata": {"axes": "ZYX"}}, None),
    "imagej": (
        {"imagej": True, "resolution": (4, 1 / 0.33), "metadata": {"axes": "ZYX", "spacing": 1.0, "unit": "um"}},
        UM,
    ),
    "imagej_micron": (
        {"imagej": True, "resolution": (4, 1 / 0.33), "metadata": {"axes": "ZYX", "spacing": 1.0, "unit": "\\u00B5m"}},
        UM,
    ),
    "imagej_nm": (
        {"imagej": True, "resolution": (1 / 250, 1 / 330), "metadata": {"axes": "ZYX", "spacing": 1000, "unit": "nm"}},
        UM,
    ),
    "imagej_pixels": (
        {"imagej": True, "resolution": (4, 4), "metadata": {"axes": "ZYX", "spacing": 1.0, "unit": "pixel"}},
        None,
    ),
    "ome": (
        {
            "ome": True,
            "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.33, "PhysicalSizeZ": 1.0},
        },
        UM,
    ),
    "ome_nm": (
        {
            "ome": True,
            "metadata": {
                "axes": "ZYX",
                **{f"PhysicalSize{a}": s for a, s in (("Z", 1000.0), ("Y", 330.0), ("X", 250.0))},
                **{f"PhysicalSize{a}Unit": "nm" for a in "ZYX"},
            },
        },
        UM,
    ),
    "bigtiff": ({"bigtiff": True, "photometric": "minisblack"}, None),
    "big_endian": ({"byteorder": ">", "photometric": "minisblack"}, None),
    "deflate": ({"compression": "zlib", "photometric": "minisblack"}, None),
    "lzw_predictor": ({"compression": "lzw", "predictor": True, "photometric": "minisblack", "metadata": None}, None),
    "zstd_big_endian": ({"compression": "zstd", "byteorder": ">", "photometric": "minisblack"}, None),
    "packbits": ({"compression": "packbits", "photometric": "minisblack"}, None),
    "strips": ({"compression": "zlib", "rowsperstrip": 2, "photometric": "minisblack"}, None),
    "tiles": ({"tile": (16, 16), "compression": "zlib", "photometric": "minisblack"}, None),
    "tiles_plain": ({"tile": (16, 16), "photometric": "minisblack"}, None),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff(tmp_path: Path, kind: str) -> None:
    options, um = TIFFS[kind]
    write_tiff(tmp_path / "a.tif", make_image(), **options)
    assert_reads(tmp_path / "a.tif", make_image(), um)


def test_boxes_across_tiles_and_strips(tmp_path: Path) -> None:
    data = make_image("uint16", (3, 70, 90))
    for options in ({"tile": (16, 32)}, {"rowsperstrip": 9}):
        write_tiff(tmp_path / "a.tif", data, compression="zlib", photometric="minisblack", **options)
        volume = open_volume(tmp_path / "a.tif")
        rng = np.random.default_rng(0)
        for _ in range(40):
            corners = np.sort(rng.integers(0, np.array([4, 71, 91]), (2, 3)), axis=0)
            box = Box(tuple(corners[0]), tuple(corners[1]))
            np.testing.assert_array_equal(volume[box], data[box.slices])


def test_small_box_decodes_few_segments(tmp_path: Path) -> None:
    write_tiff(
        tmp_path / "a.tif",
        make_image("uint16", (40, 64, 64)),
        tile=(16, 16),
        compression="zlib",
        photometric="minisblack",
    )
    volume = open_volume(tmp_path / "a.tif")
    volume[Box((3, 0, 0), (5, 16, 16))]
    assert len(volume._array.read.cache.pieces) == 2


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32", "float64"])
def test_tiff_keeps_its_type(tmp_path: Path, dtype: str) -> None:
    write_tiff(tmp_path / "a.tif", make_image(dtype), photometric="minisblack", compression="zlib")
    assert_reads(tmp_path / "a.tif", make_image(dtype))


def test_resolution_tags_state_no_z(tmp_path: Path) -> None:
    write_tiff(
        tmp_path / "a.tif",
        make_image(),
        photometric="minisblack",
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )
    volume = open_volume(tmp_path / "a.tif")
    assert volume.voxel_size is None
    assert "Y 0.25 um, X 0.25 um, but no size along Z" in volume.describe()


def test_paper_resolution_is_no_voxel_size(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", make_image(), photometric="minisblack", resolution=(72, 72), resolutionunit="INCH")
    assert "no size" not in open_volume(tmp_path / "a.tif").describe()


def test_channels_of_tiff(tmp_path: Path) -> None:
    data = make_image("uint16", (5, 2, 7, 9))
    write_tiff(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "ZCYX"})
    assert_reads(tmp_path / "a.tif", data[:, 1], channel=1)
    write_tiff(tmp_path / "b.tif", data, compression="zlib", photometric="minisblack", metadata={"axes": "ZCYX"})
    assert_reads(tmp_path / "b.tif", data[:, 1], channel=1)


def test_color_samples_are_channels(tmp_path: Path) -> None:
    data = make_image("uint8", (5, 7, 9, 3))
    for planar in ("CONTIG", "SEPARATE"):
        stored = data if planar == "CONTIG" else np.moveaxis(data, -1, 1)
        write_tiff(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, compression="zlib", metadata={})
        assert_reads(tmp_path / "a.tif", data[..., 2], channel=2, axes="ZYXC" if planar == "CONTIG" else "ZCYX")


def test_stack_appended_slice_by_slice(tmp_path: Path) -> None:
    """`imwrite(append=True)` in a loop makes each slice an array of its own; a stack of colors is slices too."""
    for plane in make_image():
        write_tiff(tmp_path / "a.tif", plane, append=True, photometric="minisblack")
    assert_reads(tmp_path / "a.tif", make_image())
    colors = np.stack([make_image(), make_image() + 1, make_image() + 2], axis=-1)
    write_tiff(tmp_path / "b.tif", colors, photometric="rgb")
    assert_reads(tmp_path / "b.tif", colors[..., 2], channel=2)


def test_slices_in_natural_order(tmp_path: Path) -> None:
    data = make_image("uint16", (12, 7, 9))
    for i, plane in enumerate(data, start=1):
        write_tiff(tmp_path / f"s{i}.tif", plane, photometric="minisblack", compression="zlib")
    (tmp_path / "notes.txt").write_text("not a slice")
    assert_reads(tmp_path, data)


def test_slices_with_voxel_size(tmp_path: Path) -> None:
    for i, plane in enumerate(make_image()):
        write_tiff(
            tmp_path / f"{i}.tif", plane, imagej=True, resolution=(4, 1 / 0.33), metadata={"unit": "um", "spacing": 1.0}
        )
    assert_reads(tmp_path, make_image(), UM)


def test_slices_by_pattern(tmp_path: Path) -> None:
    for c in (0, 1):
        for i, plane in enumerate(make_image() + c):
            write_tiff(tmp_path / f"z{i:02d}_c{c}.tif", plane, photometric="minisblack")
    with pytest.raises(InputError, match="2 numbers differ"):
        open_volume(tmp_path)
    assert_reads(tmp_path, make_image() + 1, dataset="*_c1.tif")


def test_volumes_pickle_and_open_again(tmp_path: Path) -> None:
    data = make_image("uint16", (5, 2, 7, 9))
    write_tiff(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "ZCYX"})
    volume = pickle.loads(pickle.dumps(open_volume(tmp_path / "a.tif", channel=1)))
    np.testing.assert_array_equal(volume[Box.whole(SHAPE)], data[:, 1])


def test_box_outside_is_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", make_image(), photometric="minisblack")
    volume = open_volume(tmp_path / "a.tif")
    with pytest.raises(InputError, match="leaves"):
        volume[Box((0, 0, 0), (5, 7, 10))]
    with pytest.raises(InputError, match="leaves"):
        volume[Box((-1, 0, 0), (5, 7, 9))]
    assert volume[Box((1, 2, 2), (1, 5, 5))].shape == (0, 3, 3)


def test_every_reader_is_in_the_table() -> None:
    files = {reader.name for reader in READERS if not reader.is_folder}
    assert files == {"TIFF", "HDF5", "v3draw", "v3dpbd", "NRRD", "NIfTI", "Amira"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bits per sample", {"dtype": "u1"}),
        ("sample format", {"dtype": "i2"}),
        ("length", {"rows": 5}),
        ("photometric interpretation", {"photometric": "miniswhite"}),
        ("compression", {"compression": "lzw"}),
        ("predictor", {"predictor": True}),
    ],
)
def test_a_page_deep_in_a_stack_that_is_stored_otherwise(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    """tifffile compares few pages of a long stack with the first, and would decode this one as that."""
    image = (np.arange(60 * 7 * 9) % 60000).astype("u2").reshape(60, 7, 9)

    def write(path: Path, change: dict[str, Any]) -> None:
        change = dict(change)
        dtype, rows = change.pop("dtype", "u2"), change.pop("rows", 7)
        common = {"photometric": "minisblack", "compression": "zlib", "metadata": None, "contiguous": False}
        with tifffile.TiffWriter(path) as writer:
            for number, plane in enumerate(image):
                is_odd = number == 30
                writer.write(plane[:rows].astype(dtype) if is_odd else plane, **common | (change if is_odd else {}))

    write(tmp_path / "a.tif", change)
    with pytest.raises(InputError, match=f"page 30 has another {name} .* than page 0 .*save all pages alike"):
        open_volume(tmp_path / "a.tif")
    # The advice, obeyed.
    write(tmp_path / "b.tif", {})
    np.testing.assert_array_equal(open_volume(tmp_path / "b.tif")[Box.whole((60, 7, 9))], image)


@pytest.mark.parametrize("kind", ["imagej", "shaped", "bigtiff"])
def test_a_described_stack_whose_page_says_otherwise(tmp_path: Path, kind: str) -> None:
    image = np.zeros((60, 7, 9), "u2")
    options = {"imagej": kind == "imagej", "bigtiff": kind == "bigtiff"}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="minisblack", metadata={"axes": "ZYX"}, compression="zlib", **options)
    assert open_volume(path).shape == (60, 7, 9)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages.cache, tif.pages.useframes = False, False
        tif.pages.get(30, aspage=True).tags["PhotometricInterpretation"].overwrite(0)
    with pytest.raises(InputError, match=r"page 30 has another photometric interpretation \(0\) than page 0 \(1\)"):
        open_volume(path)
