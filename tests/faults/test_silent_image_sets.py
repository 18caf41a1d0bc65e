"""The table of images whose description and files contradict each other, or leave something out: what is right.

The columns are those of `test_silent_image_errors`.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile

from hpc_neuro.cli import main
from hpc_neuro.core.geometry import Box
from hpc_neuro.data.formats import open_volume
from tests.faults.test_silent_image_errors import (
    IMAGE,
    UM_SIZE,
    UNKNOWN,
    Make,
    amira,
    change_description,
    imagej,
    multiscales,
    n5,
    nhdr,
    nrrd,
)

# --- OME-TIFF: descriptions of one file and of sets of files ---


def describe_image(number: int, planes: Sequence[str], z_um: float = 2.0, kind: str = "uint16") -> str:
    """An `Image` element of the shape of IMAGE with these TiffData elements."""
    sizes = f'SizeX="9" SizeY="7" SizeZ="5" SizeC="1" SizeT="1" PhysicalSizeX="0.25" PhysicalSizeY="0.25" Type="{kind}"'
    pixels = f'<Pixels ID="Pixels:{number}" DimensionOrder="XYZCT" {sizes} PhysicalSizeZ="{z_um}">'
    return f'<Image ID="Image:{number}">{pixels}<Channel ID="Channel:0:0"/>{"".join(planes)}</Pixels></Image>'


def write_ome(path: Path, content: str, data: Any = IMAGE, uuid: str = "") -> Path:
    """Pages whose first one holds the description `content`."""
    name = f' UUID="{uuid}"' if uuid else ""
    text = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"{name}>{content}</OME>'
    with tifffile.TiffWriter(path) as writer:
        for number, page in enumerate(data):
            description = f'<?xml version="1.0"?>{text}' if number == 0 else None
            writer.write(page, photometric="minisblack", metadata=None, description=description, contiguous=False)
    return path


def ome_file(*planes: str, kind: str = "uint16") -> Make:
    return lambda folder: write_ome(folder / "a.ome.tif", describe_image(0, planes, kind=kind))


def identify(z: int) -> str:
    return f"urn:uuid:0000000{z}-0000-0000-0000-000000000000"


def ome_set(change: Callable[[Path], Any] = lambda folder: None, opened: int = 0) -> Make:
    """An image of five files z0.ome.tif to z4.ome.tif, one plane each, that is changed after it was written."""

    def make(folder: Path) -> Path:
        planes = [
            f'<TiffData FirstZ="{z}" IFD="0"><UUID FileName="z{z}.ome.tif">{identify(z)}</UUID></TiffData>'
            for z in range(5)
        ]
        for z in range(5):
            write_ome(folder / f"z{z}.ome.tif", describe_image(0, planes), IMAGE[z : z + 1], identify(z))
        change(folder)
        return folder / f"z{opened}.ome.tif"

    return make


def swap_files(folder: Path) -> None:
    (folder / "z1.ome.tif").rename(folder / "kept")
    (folder / "z2.ome.tif").rename(folder / "z1.ome.tif")
    (folder / "kept").rename(folder / "z2.ome.tif")


def whiten_file(folder: Path) -> None:
    with tifffile.TiffFile(folder / "z2.ome.tif", mode="r+") as tif:
        tif.pages.first.tags["PhotometricInterpretation"].overwrite(0)


def replace_file(data: Any, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: tifffile.imwrite(
        folder / "z2.ome.tif", data, photometric="minisblack", metadata=None, **options
    )


def lost_first_image(folder: Path) -> Path:
    """A file of the second of two images, whose voxel size is another one; the file of the first is not here."""
    places = [
        f'<TiffData IFD="0" PlaneCount="5"><UUID FileName="{name}">{identify(n)}</UUID></TiffData>'
        for n, name in enumerate(("b.ome.tif", "a.ome.tif"))
    ]
    content = describe_image(0, places[:1], z_um=7.0) + describe_image(1, places[1:])
    return write_ome(folder / "a.ome.tif", content, uuid=identify(1))


def companion(folder: Path) -> Path:
    return write_ome(folder / "a.ome.tif", f'<BinaryOnly MetadataFile="a.companion.ome" UUID="{identify(1)}"/>')


def cut_single_page(folder: Path) -> Path:
    """A stack of ImageJ with one page, behind which further slices follow without pages; the last ones are lost."""
    path = folder / "a.tif"
    tifffile.imwrite(path, IMAGE, imagej=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tif:
        begin = tif.pages.first.dataoffsets[0]

    data = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    struct.pack_into("<I", data, at + 2 + 12 * count, 0)
    path.write_bytes(data[: begin + IMAGE.nbytes - 40])
    return path


# --- NIfTI, HDF5, chunked folders ---


def zero_step(code: int = 0, **changes: float) -> Make:
    """A NIfTI whose pixdim states 0 along some axes; `code` is that of both its matrices."""

    def make(folder: Path) -> Path:
        image = nibabel.Nifti1Image(IMAGE.T.copy(), np.diag([0.25, 0.25, 2.0, 1.0]))
        image.header.set_xyzt_units("micron", "sec")
        nibabel.save(image, folder / "a.nii")
        data = bytearray((folder / "a.nii").read_bytes())
        for axis, step in changes.items():
            struct.pack_into("<f", data, 80 + 4 * "xyz".index(axis), step)
        if not code:
            struct.pack_into("<2h", data, 252, 0, 0)
        (folder / "a.nii").write_bytes(data)
        return folder / "a.nii"

    return make


def label_nifti(folder: Path) -> Path:
    image = nibabel.Nifti1Image(IMAGE.T.copy(), np.eye(4))
    image.header.set_intent("label")
    nibabel.save(image, folder / "a.nii")
    return folder / "a.nii"


def half_written_hdf5(fill: int) -> Make:
    def make(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("image", IMAGE.shape, "u2", chunks=(1, 7, 9), fillvalue=fill)[:3] = IMAGE[:3]
        return folder / "a.h5"

    return make


def one_block_n5(begin: bytes, values: bytes) -> Make:
    """An N5 array of one block, which is written by hand."""

    def make(folder: Path) -> Path:
        path = n5()(folder)
        attributes = {
            "dimensions": [9, 7, 5],
            "blockSize": [9, 7, 5],
            "dataType": "uint16",
            "compression": {"type": "raw"},
        }
        (path / "attributes.json").write_text(json.dumps(attributes))
        shutil.rmtree(path / "0")
        (path / "0" / "0").mkdir(parents=True)
        (path / "0" / "0" / "0").write_bytes(begin + values)
        return path

    return make


VALUES = IMAGE.astype(">u2").tobytes()
VARLENGTH = struct.pack(">HH3I", 1, 3, 9, 7, 5)
SCALE = "coordinateTransformations"


def state_scale(*numbers: Any) -> Make:
    return multiscales(lambda a: a["multiscales"][0]["datasets"][0][SCALE][0].update(scale=list(numbers)))


def stale_description(folder: Path) -> Path:
    """Chunks of zarr 2 under a description of zarr 3."""
    path = change_description(IMAGE)(folder)
    meta = {
        **{"zarr_format": 3, "node_type": "array", "shape": [5, 7, 9], "data_type": "uint16", "fill_value": 0},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 4, 5]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    (path / "zarr.json").write_text(json.dumps(meta))
    return path


LABELS = "its values are labels, not intensities"
CASES: dict[str, tuple[Make, int, str, Any]] = {
    # OME-TIFF.
    "planes in reverse": (
        ome_file(*(f'<TiffData FirstZ="{4 - i}" IFD="{i}"/>' for i in range(5))),
        0,
        UM_SIZE,
        IMAGE[::-1],
    ),
    "planes without numbers of pages": (
        *(ome_file(*(f'<TiffData FirstZ="{z}" PlaneCount="1"/>' for z in range(5))), 2),
        *("takes page 0 for 5 planes", None),
    ),
    "one page for two planes": (
        *(ome_file(*(f'<TiffData FirstZ="{z}" IFD="{min(z, 3)}"/>' for z in range(5))), 2),
        *("takes page 3 for 2 planes", None),
    ),
    "another type": (ome_file("<TiffData/>", kind="int16"), 0, "says int16, its pages are uint16", IMAGE),
    "description elsewhere": (companion, 0, "is in a.companion.ome, which is not read", IMAGE),
    "first image elsewhere": (lost_first_image, 0, UNKNOWN, IMAGE),
    "a set": (ome_set(), 0, UM_SIZE, IMAGE),
    "a set by its third file": (ome_set(opened=2), 0, UM_SIZE, IMAGE),
    "a set in two byte orders": (ome_set(replace_file(IMAGE[2], byteorder=">")), 0, UM_SIZE, IMAGE),
    "a set without a file": (
        ome_set(lambda folder: (folder / "z3.ome.tif").unlink()),
        2,
        "z3.ome.tif is of it not beside it",
        None,
    ),
    "files of a set swapped": (ome_set(swap_files), 2, "z1.ome.tif is z2.ome.tif by the identifier", None),
    "a shorter file of a set": (ome_set(replace_file(IMAGE[2, :5])), 2, "another length (5)", None),
    "a file of another type": (ome_set(replace_file(IMAGE[2].astype("u1"))), 2, "another bits per sample (8)", None),
    "a file of another sign": (ome_set(replace_file(IMAGE[2].astype("i2"))), 2, "another sample format (2)", None),
    "a white file of a set": (ome_set(whiten_file), 2, "another photometric interpretation (0)", None),
    "lost slices behind one page": (cut_single_page, 2, "speaks of 5 images, and it holds 1", None),
    "spacing below 0": (imagej(("spacing=2.0", "spacing=-2.0")), 0, UNKNOWN, IMAGE),
    # NIfTI: nibabel takes 1 for 0.
    "steps of 0": (zero_step(x=0, y=0, z=0), 0, UNKNOWN, IMAGE),
    "a step of 0": (zero_step(z=0), 0, "pixdim is 0 x 0.25 x 0.25", IMAGE),
    "steps of 0 beside a matrix": (zero_step(code=1, x=0, y=0, z=0), 0, "pixdim is 0 x 0 x 0", IMAGE),
    "a step below 0": (zero_step(z=-2), 0, UM_SIZE, IMAGE),
    # What was not written.
    "HDF5 half written": (half_written_hdf5(0), 0, "2 of 5 chunks are not stored and read as 0", None),
    "HDF5 half written, filled": (half_written_hdf5(7), 0, "2 of 5 chunks are not stored and read as 7", None),
    # Labels.
    "labels in NIfTI": (label_nifti, 0, LABELS, IMAGE),
    "labels in OME-Zarr": (multiscales(lambda a: a.update({"image-label": {}})), 0, LABELS, IMAGE),
    "labels in NRRD": (nrrd("Segment0_ID:=Segment_1"), 0, LABELS, IMAGE),
    "labels in Amira": (
        amira("    Materials {\n    Exterior {\n    }\n    }\n", kind="byte", is_text=False),
        0,
        LABELS,
        None,
    ),
    # NRRD.
    "hexadecimal": (nrrd(body=IMAGE.tobytes().hex().encode(), encoding="hex"), 0, "uint16", IMAGE),
    "hexadecimal in lines": (nrrd(body=IMAGE.tobytes().hex("\n", 16).encode(), encoding="hex"), 0, "uint16", IMAGE),
    "half a digit": (nrrd(body=IMAGE.tobytes().hex().encode()[:-1], encoding="hex"), 2, "hexadecimal digits", None),
    "text with commas": (nrrd(body=", ".join(map(str, IMAGE.ravel())).encode(), encoding="ascii"), 0, "uint16", IMAGE),
    "a note named as a field": (nrrd("sizes:=1 2 3", "dimension:=9"), 0, "uint16", IMAGE),
    "detached": (nhdr(IMAGE.tobytes()), 0, "uint16", IMAGE),
    # N5 and OME-Zarr.
    "blocks with their length": (one_block_n5(VARLENGTH + struct.pack(">I", 315), VALUES), 0, "uint16", IMAGE),
    "blocks of another length": (
        one_block_n5(VARLENGTH + struct.pack(">I", 305), VALUES),
        2,
        "another number of",
        None,
    ),
    "factors of all levels": (
        n5(resolution=[0.25, 0.25, 2], units=["um"] * 3, downsamplingFactors=[[1, 1, 1], [2, 2, 1]]),
        *(0, "are not 3 numbers each", IMAGE),
    ),
    "two sizes for three axes": (n5(pixelResolution={"unit": "um", "dimensions": [1, 2]}), 0, UNKNOWN, IMAGE),
    "true for a scale": (state_scale(True, 0.25, 0.25), 2, "a scale of [True, 0.25, 0.25]", None),
    "null for a scale": (state_scale(None, 0.25, 0.25), 2, "a scale of [None, 0.25, 0.25]", None),
    "a word for a scale": (state_scale("a", 0.25, 0.25), 2, "a scale of ['a', 0.25, 0.25]", None),
    "texts for a scale": (state_scale("2", "0.25", "0.25"), 0, UM_SIZE, IMAGE),
    "chunks of an earlier version": (stale_description, 2, "copy or export it again", None),
}


@pytest.mark.parametrize("case", CASES)
def test_right_or_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, code, text, values = CASES[case]
    path = make(tmp_path)

    assert main(["info", str(path)]) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err
    assert "Traceback" not in captured.err
    if values is not None:
        volume = open_volume(path)
        np.testing.assert_array_equal(volume[Box.whole(volume.shape)], values)


def test_a_set_lies_beside_the_file_that_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice: with the lost file in its place again, the image opens."""
    (tmp_path / "data").mkdir()
    path = ome_set(lambda folder: (folder / "z3.ome.tif").rename(folder.parent / "z3.ome.tif"))(tmp_path / "data")
    assert main(["info", str(path)]) == 2
    assert "copy the whole image" in capsys.readouterr().err
    (tmp_path / "z3.ome.tif").rename(tmp_path / "data" / "z3.ome.tif")
    assert main(["info", str(path)]) == 0
