"""Files from other programs: each opens as what it is, or is refused with the right sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.formats import open_volume

Shape = tuple[int, int, int]

OPENS: dict[str, tuple[Shape, str, tuple[float, float, float] | None]] = {
    # file -> shape z y x, dtype, voxel size in um
    "L1DS1_crop_straight_crop_ch1.nhdr": ((6, 61, 51), "uint8", None),
    "L1DS1_crop_straight_crop_ch1.v3draw": ((6, 61, 51), "uint8", None),
    "OP_3_crop.v3draw": ((30, 100, 160), "uint8", None),
    "OP_3_crop_bigendian_uint16.v3draw": ((30, 100, 160), "uint16", None),
    "OP_3_crop_reencoded.tif": ((30, 100, 160), "uint8", None),
    "OP_3_crop_reencoded.v3dpbd": ((30, 100, 160), "uint8", None),
    "amira_LHMask.Labels.rle.am": ((50, 50, 50), "uint8", None),
    "amira_LHMask.zip.am": ((50, 50, 50), "uint8", None),
    "amira_VerySmallLabelField.am": ((1, 2, 2), "uint8", None),
    "amira_VerySmallLabelField.nrrd": ((1, 2, 2), "uint8", None),
    "nifti_zfirst_reference_volume_lite.nii.gz": ((256, 256, 128), "uint8", None),
    "nrrd_FCWB_2um_mask.nrrd": ((54, 164, 282), "uint8", (2.0, 2.000002145767212, 1.9999995231628418)),
    "nrrd_FruMARCM-F000002_seg001_03-acrop.nrrd": ((82, 150, 124), "uint8", None),
    "nrrd_JFRC2-444_mask.nrrd": ((34, 80, 159), "uint8", (3.988682, 3.981363, 4.006403)),
    "nrrd_LHMask.nrrd": ((50, 50, 50), "uint8", (1.4, 1.4, 1.4)),
    "nrrd_dataforstats.nrrd": ((50, 50, 50), "uint8", (1.4, 1.4, 1.4)),
    "slices_palette_OP_7": ((4, 512, 512), "uint8", None),
    "slices_unpadded_OP_1": ((12, 512, 512), "uint8", None),
    "tiff_imagej_cropped_OP_9.tif": ((92, 77, 86), "uint8", None),
    "tiff_imagej_uint16_test_sample.tif": ((20, 128, 128), "uint16", None),
    "tiff_packbits_Olfactory_OP7_trunc.tif": ((71, 101, 117), "uint8", None),
    "tiff_packbits_uint16_label.tif": ((15, 512, 512), "uint16", None),
}
REFUSED = {
    "L1DS1_crop_straight_crop.v3draw": "2 channels; choose one with channel=0 to 1",
    "L1DS1_crop_straight_crop_slice.v3draw": "2 channels; choose one with channel=0 to 1",
    "corruptfile.tif": "named as TIFF, but does not begin as one",
    "imagej_2d_TreeV.tif": "a 2D image; a 3D stack is wanted",
    "nrrd_LHMask.nhdr": "keeps its voxels in LHMask.nrrd, which is not beside it",
    "nrrd_LHMask_sum.nrrd": "a 2D image; a 3D stack is wanted",
    "nrrd_badenc.nhdr": "keeps its voxels in LHMask.nrrd, which is not beside it",
    "nrrd_badtype.nhdr": "values of type 'int128', which is no NRRD number type",
    "nrrd_datafile_list.nhdr": "keeps its voxels in slice0.raw and 49 more",
    "nrrd_datafile_listslab.nhdr": "keeps its voxels in slab0-9.raw and 4 more",
    "imagej_2d_TreeV.swc": "no known image format",
    "SOURCE.txt": "no known image format",
}


@pytest.fixture(scope="module")
def folder(real_data: Path) -> Path:
    return real_data / "io_formats"


def read_whole(path: Path, **options: object) -> Array:
    volume = open_volume(path, **options)
    return volume[Box.whole(volume.shape)]


def test_the_table_is_complete(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted([*OPENS, *REFUSED])


@pytest.mark.parametrize("name", OPENS)
def test_opens(folder: Path, name: str) -> None:
    shape, dtype, um = OPENS[name]
    volume = open_volume(folder / name)
    assert (volume.shape, str(volume.dtype)) == (shape, dtype)
    assert volume.voxel_size is None if um is None else np.allclose(volume.voxel_size, um, rtol=1e-6)
    data = volume[Box.whole(shape)]
    box = Box(tuple(n // 3 for n in shape), tuple(max(1, 2 * n // 3) for n in shape))
    np.testing.assert_array_equal(volume[box], data[box.slices])
    if name.endswith(".tif"):
        np.testing.assert_array_equal(data, tifffile.imread(folder / name))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        open_volume(folder / name)


def test_the_same_image_in_several_formats(folder: Path, real_data: Path) -> None:
    reference = read_whole(folder / "OP_3_crop_reencoded.tif")
    np.testing.assert_array_equal(reference, read_whole(real_data / "diadem_op" / "OP_3.tif")[20:50, 120:220, 100:260])
    for name in ("OP_3_crop.v3draw", "OP_3_crop_reencoded.v3dpbd"):
        np.testing.assert_array_equal(read_whole(folder / name), reference)
    mask = read_whole(folder / "nrrd_LHMask.nrrd")
    for name in ("amira_LHMask.Labels.rle.am", "amira_LHMask.zip.am"):
        np.testing.assert_array_equal(read_whole(folder / name), mask)
    channels = folder / "L1DS1_crop_straight_crop.v3draw"
    np.testing.assert_array_equal(
        read_whole(channels, channel=0), read_whole(folder / "L1DS1_crop_straight_crop_ch1.nhdr")
    )
    assert not np.array_equal(read_whole(channels, channel=1), read_whole(channels, channel=0))


def test_wrong_byte_order_in_a_real_header_is_noted(folder: Path) -> None:
    """The header says big-endian, the voxels are little-endian: they are read by the header, with a warning."""
    volume = open_volume(folder / "OP_3_crop_bigendian_uint16.v3draw")
    assert "smoother as little-endian" in volume.describe()
    stored = volume[Box.whole(volume.shape)].byteswap()
    np.testing.assert_array_equal(stored, read_whole(folder / "OP_3_crop_reencoded.tif").astype("uint16") * 16)


def test_unpadded_slices_are_in_natural_order(folder: Path) -> None:
    files = [tifffile.imread(folder / "slices_unpadded_OP_1" / f"{i}.tif") for i in range(1, 13)]
    np.testing.assert_array_equal(read_whole(folder / "slices_unpadded_OP_1"), np.stack(files))


def test_nifti_with_z_first_opens_with_axes(folder: Path, real_data: Path) -> None:
    turned = read_whole(folder / "nifti_zfirst_reference_volume_lite.nii.gz", axes="XYZ")
    np.testing.assert_array_equal(turned, read_whole(real_data / "pyneutube_silver" / "reference_volume_lite.tif"))


def test_every_real_stack_opens(real_data: Path) -> None:
    opened = 0
    for path in sorted(real_data.glob("*/*.tif")):
        if path.parent.name in ("io_formats", "bigneuron_mip2d", "holdout.sealed"):
            continue
        volume = open_volume(path)
        page = tifffile.imread(path, key=volume.shape[0] // 2)
        z = volume.shape[0] // 2
        np.testing.assert_array_equal(volume[Box((z, 0, 0), (z + 1, *volume.shape[1:]))][0], page)
        opened += 1
    assert opened >= 30
