"""Voxel values: non-finite ones are refused by file and place, and reinterpretations are applied or refused."""

from __future__ import annotations

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
