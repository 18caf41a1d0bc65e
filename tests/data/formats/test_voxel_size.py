"""The voxel size is what the file states, axis by axis; what it does not state is unknown and asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import um_per
from hpc_neuro.data.formats import open_volume
from tests.data.formats.test_stores import write_imaris, write_store
from tests.helpers.volume_checks import SHAPE, UM, assert_reads, make_image, write_tiff

AXES = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
CHANNEL = {"name": "c", "type": "channel"}


@pytest.mark.parametrize(
    ("unit", "um"),
    [
        ("Å", 1e-4),
        ("\u212b", 1e-4),
        ("\\u00C5", 1e-4),
        ("\\u00c5", 1e-4),
        ("ångström", 1e-4),
        ("angstroms", 1e-4),
        ("\u00b5m", 1.0),
        ("\u03bcm", 1.0),
        ("\\u00B5m", 1.0),
        ("micrometers", 1.0),
        ("Nanometers", 1e-3),
        ("pixel", None),
        ("", None),
        (None, None),
    ],
)
def test_unit_names(unit: str | None, um: float | None) -> None:
    assert um_per(unit) == um


def write_imagej(path: Path, plane: np.ndarray | None = None, **meta: object) -> None:
    data = make_image() if plane is None else plane
    write_tiff(path, data, imagej=True, resolution=(4, 1 / 0.33), metadata={"unit": "um", **meta})


def test_imagej_axes_have_units_of_their_own(tmp_path: Path) -> None:
    write_imagej(tmp_path / "z.tif", axes="ZYX", spacing=1000.0, zunit="nm")
    assert_reads(tmp_path / "z.tif", make_image(), UM)
    write_imagej(tmp_path / "y.tif", axes="ZYX", spacing=1.0, yunit="mm")
    assert_reads(tmp_path / "y.tif", make_image(), (1.0, 330.0, 0.25))


@pytest.mark.parametrize("axis", ["y", "z"])
def test_imagej_axis_in_pixels_has_no_size(tmp_path: Path, axis: str) -> None:
    write_imagej(tmp_path / "a.tif", axes="ZYX", spacing=1.0, **{f"{axis}unit": "pixel"})
    volume = open_volume(tmp_path / "a.tif")
    assert volume.voxel_size is None
    assert "in the unit 'pixel', which is no length; give the voxel size in um" in volume.describe()
    assert f"no size along {axis.upper()}" in volume.describe()


def test_slices_have_a_unit_for_their_distance(tmp_path: Path) -> None:
    for i, plane in enumerate(make_image()):
        write_imagej(tmp_path / f"{i}.tif", plane, spacing=1000.0, zunit="nm")
    assert_reads(tmp_path, make_image(), UM)
    for i, plane in enumerate(make_image()):
        write_imagej(tmp_path / f"{i}.tif", plane, spacing=1.0, zunit="pixel")
    assert open_volume(tmp_path).voxel_size is None
    assert "no distance between them" in open_volume(tmp_path).describe()


def test_ome_size_that_is_no_number(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", make_image(), ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 0.25})
    raw = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(raw.replace(b'PhysicalSizeX="0.25"', b'PhysicalSizeX="0,25"'))
    volume = open_volume(tmp_path / "a.tif")
    assert volume.voxel_size is None
    assert "PhysicalSizeX is '0,25', which is no number" in volume.describe()


def write_ome_zarr(path: Path, data: np.ndarray, image: dict[str, Any], **ome: object) -> None:
    """An OME-Zarr group of one level `0` with these image metadata, in zarr 3."""
    write_store(path / "0", "zarr3", data)
    attributes = {"ome": {"multiscales": [image], **ome}}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(group))


def scale(*values: object) -> dict[str, Any]:
    return {"type": "scale", "scale": list(values)}


UNKNOWN: dict[str, dict[str, Any]] = {
    "no transformation": {"datasets": [{"path": "0"}]},
    "identity": {"datasets": [{"path": "0", "coordinateTransformations": [{"type": "identity"}]}]},
    "scale in a file": {"datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "path": "s"}]}]},
    "affine": {"datasets": [{"path": "0", "coordinateTransformations": [scale(1, 1, 1), {"type": "affine"}]}]},
    "scale of several levels": {
        "datasets": [{"path": "0"}, {"path": "1"}],
        "coordinateTransformations": [scale(1, 0.33, 0.25)],
    },
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_units_without_a_scale_are_no_voxel_size(tmp_path: Path, kind: str) -> None:
    write_ome_zarr(tmp_path / "a.zarr", make_image(), {"axes": AXES, **UNKNOWN[kind]}, version="0.5")
    assert_reads(tmp_path / "a.zarr", make_image(), None)
    assert "level 0 states no scale; give the voxel size in um" in open_volume(tmp_path / "a.zarr").describe()


def test_scale_of_the_whole_image(tmp_path: Path) -> None:
    image = {"axes": AXES, "datasets": [{"path": "0"}], "coordinateTransformations": [scale(1, 0.33, 0.25)]}
    write_ome_zarr(tmp_path / "a.zarr", make_image(), image, version="0.5")
    assert_reads(tmp_path / "a.zarr", make_image(), UM)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([scale(1, 0.33, 0.25)], r"a scale of 3 numbers for 4 axes \(c, z, y, x\)"),
        ([scale(1, 1, 1, 1), {"type": "translation", "translation": [0, 0]}], "a translation of 2 numbers for 4 axes"),
        ([{"type": "scale", "scale": 2}], "a scale of 2 for 4 axes"),
    ],
)
def test_transformations_of_other_axes_are_refused(
    tmp_path: Path, transforms: list[dict[str, Any]], message: str
) -> None:
    data = make_image("uint16", (1, *SHAPE))
    image = {"axes": [CHANNEL, *AXES], "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
    write_ome_zarr(tmp_path / "a.zarr", data, image, version="0.5")
    with pytest.raises(InputError, match=f"{message}.*open the array .*a.zarr/0 itself"):
        open_volume(tmp_path / "a.zarr")
    assert_reads(tmp_path / "a.zarr" / "0", data[0], None, axes="CZYX")


def test_metadata_of_other_axes_are_refused(tmp_path: Path) -> None:
    transforms = [scale(1, 0.33, 0.25)]
    image = {"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
    write_ome_zarr(tmp_path / "a.zarr", make_image("uint16", (1, *SHAPE)), image, version="0.5")
    with pytest.raises(InputError, match=r"0 has 4 axes \(1, 5, 7, 9\), but its image metadata name 3 \(z, y, x\)"):
        open_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize("version", ["0.6", "0.6.dev1", "0.10", "1.0", None])
def test_later_ome_zarr_is_named(tmp_path: Path, version: str | None) -> None:
    systems = [{"name": "physical", "axes": AXES}]
    image = {"coordinateSystems": systems, "datasets": [{"path": "0", "coordinateTransformations": [scale(4, 3, 2)]}]}
    write_ome_zarr(tmp_path / "a.zarr", make_image(), image, **({"version": version} if version else {}))
    name = (version or "0.6").replace(".", r"\.")
    with pytest.raises(InputError, match=rf"is OME-Zarr {name}, and versions up to 0.5 are read; open .*a.zarr/0"):
        open_volume(tmp_path / "a.zarr")

    # The advice works: the array opens, and its size is asked for.
    assert_reads(tmp_path / "a.zarr" / "0", make_image(), None)
    assert "the image metadata of its group are not used" in open_volume(tmp_path / "a.zarr" / "0").describe()


def test_nrrd_spacings_and_units_of_other_counts(tmp_path: Path) -> None:
    head = "NRRD0004\ntype: ushort\ndimension: 3\nsizes: 9 7 5\nencoding: raw\nendian: little\n"
    lines = 'spacings: 0.25 0.33 1\nunits: "um"\n\n'
    (tmp_path / "a.nrrd").write_bytes((head + lines).encode() + make_image().tobytes())
    volume = open_volume(tmp_path / "a.nrrd")
    assert volume.voxel_size is None
    assert "3 spacings and 1 units for 3 axes; give the voxel size in um" in volume.describe()
    np.testing.assert_array_equal(volume[Box.whole(SHAPE)], make_image())


def test_imaris_extent_without_a_unit(tmp_path: Path) -> None:
    write_imaris(tmp_path / "a.ims", make_image("uint16", (1, *SHAPE)))
    with h5py.File(tmp_path / "a.ims", "a") as file:
        del file["DataSetInfo/Image"].attrs["Unit"]
    assert_reads(tmp_path / "a.ims", make_image("uint16", (1, *SHAPE))[0], None)
