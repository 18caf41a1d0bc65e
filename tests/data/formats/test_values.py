"""Voxel values: non-finite ones are refused by file and place, and reinterpretations are applied or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import nrrd
import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.data.formats.test_stores import write_store
from tests.helpers.volume_checks import make_image

Writer = Callable[[Path, np.ndarray], None]


def write_hdf5(path: Path, data: np.ndarray, **attributes: object) -> None:
    with h5py.File(path, "w") as file:
        file["image"] = data
        file["image"].attrs.update(attributes)


FLOAT_WRITERS: dict[str, Writer] = {
    "a.tif": lambda path, data: tifffile.imwrite(path, data, photometric="minisblack"),
    "zlib.tif": lambda path, data: tifffile.imwrite(path, data, photometric="minisblack", compression="zlib"),
    "a.h5": write_hdf5,
    "a.nrrd": lambda path, data: nrrd.write(str(path), data.T, {"encoding": "gzip"}, index_order="F"),
    "a.nii": lambda path, data: nibabel.save(nibabel.Nifti1Image(data.T, np.eye(4)), path),
    "a.zarr": lambda path, data: write_store(path, "zarr3", data),
    "a.n5": lambda path, data: write_store(path, "n5", data.T.copy()),
}


@pytest.mark.parametrize("name", FLOAT_WRITERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_refused_by_file_and_place(tmp_path: Path, name: str, value: float) -> None:
    data = make_image("float32")
    data[3, 4, 5] = value
    FLOAT_WRITERS[name](tmp_path / name, data)
    volume = open_volume(tmp_path / name)

    box = Box((2, 3, 4), (5, 7, 9))
    with pytest.raises(InputError, match=rf"{name}: voxel z=3 y=4 x=5 is NaN or infinite"):
        volume[box]
    np.testing.assert_array_equal(volume.read_unchecked(box), data[box.slices])
    np.testing.assert_array_equal(volume[Box((0, 0, 0), (3, 7, 9))], data[:3])


def read_whole(path: Path, **options: object) -> np.ndarray:
    volume = open_volume(path, **options)
    data = volume[Box.whole(volume.shape)]
    assert data.dtype == volume.dtype
    return data


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_white_is_zero_is_inverted(tmp_path: Path, dtype: str, options: dict[str, object]) -> None:
    data = make_image(dtype)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="miniswhite", **options)
    expected = np.iinfo(dtype).max - data if dtype.startswith("u") else -1 - data
    np.testing.assert_array_equal(read_whole(tmp_path / "a.tif"), expected)
    assert "zero is displayed as white; the values are inverted" in open_volume(tmp_path / "a.tif").describe()


def test_white_is_zero_of_single_bits_and_slices(tmp_path: Path) -> None:
    data = make_image("uint8") % 2 == 1
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="miniswhite")
    np.testing.assert_array_equal(read_whole(tmp_path / "a.tif"), ~data)
    (tmp_path / "slices").mkdir()
    for i, plane in enumerate(make_image()):
        tifffile.imwrite(tmp_path / "slices" / f"{i}.tif", plane, photometric="miniswhite")
    np.testing.assert_array_equal(read_whole(tmp_path / "slices"), 65535 - make_image())


def test_white_is_zero_of_real_numbers_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", make_image("float32"), photometric="miniswhite")
    with pytest.raises(InputError, match=r"a.tif displays zero as white.* invert the image and save it with black"):
        open_volume(tmp_path / "a.tif")


@pytest.mark.parametrize("photometric", ["CIELAB", "SEPARATED", "CFA", "YCBCR"])
def test_samples_that_are_no_intensities_are_refused(tmp_path: Path, photometric: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", make_image("uint8"), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        for page in tif.pages:
            page.tags["PhotometricInterpretation"].overwrite(int(tifffile.PHOTOMETRIC[photometric]))
    with pytest.raises(InputError, match=f"stores its samples as {photometric}, which are no intensities"):
        open_volume(tmp_path / "a.tif")


def write_bigdataviewer(path: Path, data: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["t00000/s00/0/cells"] = data.astype("int16")
        file["s00/resolutions"] = np.ones((1, 3))
        file["s00/subdivisions"] = np.full((1, 3), 16)


def test_bigdataviewer_keeps_uint16_as_int16(tmp_path: Path) -> None:
    data = make_image() + 40000
    write_bigdataviewer(tmp_path / "a.h5", data)
    np.testing.assert_array_equal(read_whole(tmp_path / "a.h5"), data)
    assert "read as uint16 as BigDataViewer writes it" in open_volume(tmp_path / "a.h5").describe()


@pytest.mark.parametrize("place", ["t00000/s00/0/cells", "t00000/s00/0", "t00000/s00", "s00", "/"])
@pytest.mark.parametrize("stated", ["int16", "uint16"])
def test_bigdataviewer_that_states_its_type(tmp_path: Path, place: str, stated: str) -> None:
    data = make_image() + 40000
    write_bigdataviewer(tmp_path / "a.h5", data)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file[place].attrs["dataType"] = stated
    np.testing.assert_array_equal(read_whole(tmp_path / "a.h5"), data.astype(stated))


@pytest.mark.parametrize("stated", ["uint8", "color", 7])
def test_bigdataviewer_that_states_another_type_is_refused(tmp_path: Path, stated: object) -> None:
    write_bigdataviewer(tmp_path / "a.h5", np.full((4, 5, 6), 40000, "u2").view("i2"))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["t00000/s00/0/cells"].attrs["dataType"] = stated
    with pytest.raises(InputError, match="states the dataType .* which is stored as int16"):
        open_volume(tmp_path / "a.h5")


def test_bigdataviewer_with_attributes_of_netcdf(tmp_path: Path) -> None:
    values = np.full((4, 5, 6), 40000, "u2")
    for attributes, expected in (
        ({"dataType": "UINT16"}, values),
        ({"scale_factor": 0.5}, values * 0.5),
        ({"_Unsigned": "false"}, values.view("i2")),
        ({"_Unsigned": "true"}, values),
    ):
        write_bigdataviewer(tmp_path / "a.h5", values.view("i2"))
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            file["t00000/s00/0/cells"].attrs.update(attributes)
        np.testing.assert_array_equal(read_whole(tmp_path / "a.h5"), expected)


def test_int16_of_other_names_stays_signed(tmp_path: Path) -> None:
    data = make_image("int16") - 100
    write_hdf5(tmp_path / "a.h5", data)
    np.testing.assert_array_equal(read_whole(tmp_path / "a.h5"), data)


ATTRIBUTES: dict[str, tuple[dict[str, object], str, Callable[[np.ndarray], np.ndarray]]] = {
    "unsigned": ({"_Unsigned": "true"}, "int16", lambda data: data.view("uint16")),
    "packed": ({"scale_factor": 0.5, "add_offset": 10.0}, "int16", lambda data: (data * 0.5 + 10).astype("float32")),
    "unsigned and packed": (
        {"_Unsigned": "true", "scale_factor": 2.0},
        "int8",
        lambda data: (data.view("uint8") * 2.0).astype("float32"),
    ),
    "white is zero": ({"IMAGE_WHITE_IS_ZERO": 1}, "uint16", lambda data: 65535 - data),
    "black is zero": ({"IMAGE_WHITE_IS_ZERO": 0}, "uint16", lambda data: data),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_that_reinterpret_values(tmp_path: Path, kind: str) -> None:
    attributes, dtype, convert = ATTRIBUTES[kind]
    data = make_image("uint16").astype(dtype) - 20
    write_hdf5(tmp_path / "a.h5", data, **attributes)
    np.testing.assert_array_equal(read_whole(tmp_path / "a.h5"), convert(data))
    write_store(tmp_path / "a.zarr", "zarr", data)
    (tmp_path / "a.zarr" / ".zattrs").write_text(json.dumps(attributes))
    np.testing.assert_array_equal(read_whole(tmp_path / "a.zarr"), convert(data))
