"""Axes are never guessed: every way to write a stack of 2, 3 or 4 slices opens or is refused with advice."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.formats.axes import default_axes, resolve_axes

WRITTEN: dict[str, tuple[dict[str, object], str | None]] = {
    # how the stack was written -> None where it must open as slices, else the error message
    "pages": ({"photometric": "minisblack", "metadata": None}, None),
    "pages with a shape": ({"photometric": "minisblack"}, None),
    "ImageJ slices": ({"imagej": True, "metadata": {"axes": "ZYX"}}, None),
    "OME slices": ({"ome": True, "metadata": {"axes": "ZYX"}}, None),
    "ImageJ channels": ({"imagej": True, "metadata": {"axes": "CYX"}}, "2D image; .* axes=ZYX"),
    "ImageJ frames": ({"imagej": True, "metadata": {"axes": "TYX"}}, "2D image; .* axes=ZYX"),
    "OME channels": ({"ome": True, "metadata": {"axes": "CYX"}}, "2D image; .* axes=ZYX"),
    "color planes": ({"photometric": "rgb", "planarconfig": "SEPARATE"}, "color.* axes=ZYX"),
}


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("how", WRITTEN)
def test_short_stacks(tmp_path: Path, how: str, count: int) -> None:
    if how == "color planes" and count not in (3, 4):
        pytest.skip("three or four samples make colors")
    data = np.random.default_rng(0).integers(0, 255, (count, 32, 40)).astype("uint8")
    options, refusal = WRITTEN[how]
    extra = {"extrasamples": ["unassalpha"]} if how == "color planes" and count == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", data, **options, **extra)
    if refusal:
        with pytest.raises(InputError, match=refusal):
            open_volume(tmp_path / "a.tif")
        volume = open_volume(tmp_path / "a.tif", axes="ZYX")
    else:
        volume = open_volume(tmp_path / "a.tif")
    assert volume.shape == data.shape
    np.testing.assert_array_equal(volume[Box.whole(data.shape)], data)


def test_tifffile_writes_three_slices_as_rgb(tmp_path: Path) -> None:
    """A stack of three slices written without a word on photometric becomes RGB in the file."""
    data = np.random.default_rng(0).integers(0, 255, (3, 32, 40)).astype("uint8")
    with pytest.warns(DeprecationWarning, match="RGB"):
        tifffile.imwrite(tmp_path / "a.tif", data)
    with pytest.raises(InputError, match="a stack of 3 slices that a writer took for one.*axes=ZYX"):
        open_volume(tmp_path / "a.tif")
    np.testing.assert_array_equal(open_volume(tmp_path / "a.tif", axes="ZYX")[Box.whole(data.shape)], data)


def test_color_photograph_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((32, 40, 3), "uint8"), photometric="rgb")
    with pytest.raises(InputError, match="2D color image"):
        open_volume(tmp_path / "a.tif")


def test_plane_opens_only_with_axes(tmp_path: Path) -> None:
    data = np.arange(1280, dtype="uint16").reshape(32, 40)
    tifffile.imwrite(tmp_path / "a.tif", data)
    with pytest.raises(InputError, match="a 2D image; a 3D stack is wanted; a folder of slices"):
        open_volume(tmp_path / "a.tif")
    volume = open_volume(tmp_path / "a.tif", axes="ZYX")
    np.testing.assert_array_equal(volume[Box.whole(volume.shape)], data[None])


@pytest.mark.parametrize("axes", ["TZYX", "TZCYX"])
def test_several_time_points_are_refused(tmp_path: Path, axes: str) -> None:
    shape = {"T": 6, "Z": 4, "C": 2, "Y": 8, "X": 8}
    data = np.zeros([shape[a] for a in axes], "uint8")
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": axes})
    with pytest.raises(InputError, match="6 time points"):
        open_volume(tmp_path / "a.tif", channel=0 if "C" in axes else None)


def test_slices_on_the_time_axis_open_with_the_advised_axes(tmp_path: Path) -> None:
    data = np.arange(6 * 64, dtype="uint8").reshape(6, 8, 8) % 251
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(InputError, match="time 6.* axes=ZYX"):
        open_volume(tmp_path / "a.tif")
    np.testing.assert_array_equal(open_volume(tmp_path / "a.tif", axes="ZYX")[Box.whole(data.shape)], data)


def test_four_unnamed_axes_need_axes(tmp_path: Path) -> None:
    data = np.arange(2 * 5 * 6 * 7, dtype="uint16").reshape(2, 5, 6, 7)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack")
    with pytest.raises(InputError, match=r"shape \(2, 5, 6, 7\).*axes=CZYX"):
        open_volume(tmp_path / "a.tif")
    for axes, expected in (("CZYX", data[1]), ("ZCYX", data[:, 1]), ("CXYZ", data[1].T)):
        volume = open_volume(tmp_path / "a.tif", axes=axes, channel=1)
        assert volume.axes == axes
        np.testing.assert_array_equal(volume[Box.whole(volume.shape)], expected)


@pytest.mark.parametrize(
    ("axes", "channel", "message"),
    [
        ("CZYX", None, "2 channels; choose one with channel=0 to 1"),
        ("CZYX", 2, "2 channels; 2 is not one of them"),
        ("ZYX", 0, "does not fit .* give 4 different letters"),
        ("CZYY", 0, "does not fit"),
        ("CZYQ", 0, "does not fit"),
        ("CTYX", 0, "2D image"),
    ],
)
def test_wrong_axes_and_channel_are_refused(tmp_path: Path, axes: str, channel: int | None, message: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 5, 6, 7), "uint8"), photometric="minisblack")
    with pytest.raises(InputError, match=message):
        open_volume(tmp_path / "a.tif", axes=axes, channel=channel)


def test_channel_of_an_image_without_channels(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 6, 7), "uint8"), photometric="minisblack")
    assert open_volume(tmp_path / "a.tif", channel=0).shape == (5, 6, 7)
    with pytest.raises(InputError, match="no channel 1; leave `channel` out"):
        open_volume(tmp_path / "a.tif", channel=1)


def test_default_axes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = np.zeros((40, 30, 3), "uint8")
    with pytest.raises(InputError, match=r"does not name its axes; .*axes=ZYX, YXC or CYX"):
        open_volume(tmp_path / "a.h5")
    assert open_volume(tmp_path / "a.h5", axes="ZYX").shape == (40, 30, 3)
    assert [default_axes(s) for s in ((5, 6), (5, 6, 7), (60, 50, 4), (4, 50, 60), (3, 3, 3))] == [
        "YX",
        "ZYX",
        "QQQ",
        "ZYX",
        "ZYX",
    ]


def test_every_axis_order_becomes_z_y_x() -> None:
    from itertools import permutations

    data = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for axes in permutations(range(4)):
        letters = "".join("CZYX"[i] for i in axes)
        stored = data.transpose(axes)
        order = resolve_axes(Path("a"), letters, stored.shape, axes=None, channel=1)
        box = Box((1, 1, 0), (3, 4, 4))
        part = stored[order.index(box)].transpose(order.transposition).reshape(box.shape)
        np.testing.assert_array_equal(part, data[1][box.slices])
