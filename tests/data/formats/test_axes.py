"""Axes are never guessed: every way to write a stack of 2, 3 or 4 slices opens or is refused with advice."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import nrrd
import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.formats.axes import default_axes, resolve_axes
from tests.data.formats.test_stores import write_store

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


def write_named_zarr(path: Path, shape: tuple[int, ...], names: list[str | None]) -> np.ndarray:
    data = np.arange(np.prod(shape)).reshape(shape).astype("uint16")
    write_store(path, "zarr3", data)
    described = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps(described | {"dimension_names": names}))
    return data


@pytest.mark.parametrize(
    ("names", "shape", "advice"),
    [
        (["zoom", "z", "y", "x"], (2, 5, 6, 7), r"zoom 2.*axes=CZYX"),
        (["z", "y", "x", "xyz"], (5, 6, 7, 3), r"xyz 3.*axes=ZYXC"),
        (["component", "z", "y", "x"], (3, 5, 6, 7), r"component 3.*axes=CZYX"),
        (["time_constant", "y", "x"], (5, 6, 7), r"time_constant 5.*axes=ZYX"),
        ([None, "y", "z"], (5, 6, 7), r"unnamed 5.*axes=CYZ"),
        (["z", "z", "y", "x"], (2, 5, 6, 7), r"names the axis z 2 times; correct dimension_names"),
        (["x", "y", "x"], (5, 6, 7), r"names the axis x 2 times; correct dimension_names"),
    ],
)
def test_names_that_are_no_axes_are_refused(
    tmp_path: Path, names: list[str | None], shape: tuple[int, ...], advice: str
) -> None:
    write_named_zarr(tmp_path / "a.zarr", shape, names)
    with pytest.raises(InputError, match=advice):
        open_volume(tmp_path / "a.zarr")


def test_repeated_names_of_an_older_zarr_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "zarr", np.ones((2, 5, 6, 7), "uint8"))
    (tmp_path / "a.zarr" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["z", "z", "y", "x"]}')
    with pytest.raises(InputError, match=r"names the axis z 2 times; say which axes they are, such as axes=CZYX"):
        open_volume(tmp_path / "a.zarr")
    assert open_volume(tmp_path / "a.zarr", axes="CZYX", channel=1).shape == (5, 6, 7)


def test_advice_for_an_axis_without_a_known_name(tmp_path: Path) -> None:
    data = write_named_zarr(tmp_path / "a.zarr", (2, 5, 6, 7), ["zoom", "z", "y", "x"])
    volume = open_volume(tmp_path / "a.zarr", axes="CZYX", channel=1)
    np.testing.assert_array_equal(volume[Box.whole(volume.shape)], data[1])


def test_long_names_of_axes(tmp_path: Path) -> None:
    data = write_named_zarr(tmp_path / "a.zarr", (1, 2, 5, 6, 7), ["time", "channel", "Z", "Y", "X"])
    volume = open_volume(tmp_path / "a.zarr", channel=1)
    np.testing.assert_array_equal(volume[Box.whole(volume.shape)], data[0, 1])


def test_ome_axis_is_known_by_its_type_or_its_whole_name(tmp_path: Path) -> None:
    data = np.arange(2 * 5 * 6 * 7).reshape(2, 5, 6, 7).astype("uint16")
    space = [{"name": a, "type": "space"} for a in "zyx"]
    for first, opens in (({"name": "stain", "type": "channel"}, True), ({"name": "zoom", "type": "space"}, False)):
        path = tmp_path / f"{first['name']}.zarr"
        write_store(path / "0", "zarr3", data)
        image = {"axes": [first, *space], "datasets": [{"path": "0"}]}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": [image]}}}
        (path / "zarr.json").write_text(json.dumps(group))
        if opens:
            assert open_volume(path, channel=1).shape == (5, 6, 7)
        else:
            with pytest.raises(InputError, match=r"zoom 2, z 5, y 6, x 7\) and does not name all of them"):
                open_volume(path)


def test_hdf5_labels_that_are_no_axes_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = np.zeros((4, 5, 6), "uint8")
        for dim, name in zip(file["image"].dims, ("zenith", "y", "x"), strict=True):
            dim.label = name
    with pytest.raises(InputError, match=r"zenith 4, y 5, x 6.*axes=ZYX"):
        open_volume(tmp_path / "a.h5")


def test_n5_axes_that_are_no_axes_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "a.n5", "n5", np.ones((4, 5, 6), "uint8"))
    attributes = json.loads((tmp_path / "a.n5" / "attributes.json").read_text())
    (tmp_path / "a.n5" / "attributes.json").write_text(json.dumps(attributes | {"axes": ["x", "y", "zoom"]}))
    with pytest.raises(InputError, match=r"x 4, y 5, zoom 6.*axes=XYZ"):
        open_volume(tmp_path / "a.n5")


def test_nrrd_labels(tmp_path: Path) -> None:
    """Whole names decide; words that begin like other axes than custom has it leave the order open."""
    data = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype("uint8")
    nrrd.write(str(tmp_path / "a.nrrd"), data.T, {"labels": ["z", "y", "x"]}, index_order="F")
    volume = open_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume[Box.whole(volume.shape)], data.T)
    nrrd.write(str(tmp_path / "b.nrrd"), data.T, {"labels": ["xcoord", "ycoord", "zcoord"]}, index_order="F")
    assert open_volume(tmp_path / "b.nrrd").shape == (5, 6, 7)
    nrrd.write(str(tmp_path / "c.nrrd"), data.T, {"labels": ["zcoord", "ycoord", "xcoord"]}, index_order="F")
    with pytest.raises(InputError, match=r"xcoord 5, ycoord 6, zcoord 7\) and does not name its axes"):
        open_volume(tmp_path / "c.nrrd")
