"""The table of images that were once read wrong in silence, or refused for a wrong reason: each case, what is right.

The columns are: a function that writes the image, the exit code of `hpc-neuro info`, a part of what it prints, and the
values that are right (None where the image is refused).
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numcodecs
import numcodecs.zarr3
import numpy as np
import pytest
import tensorstore as ts
import tifffile
import zarr

from hpc_neuro.cli import main
from hpc_neuro.core.geometry import Box
from hpc_neuro.data.formats import open_volume

IMAGE = (np.arange(5 * 7 * 9).reshape(5, 7, 9) * 199 % 60000 + 1).astype("uint16")
REAL = (IMAGE / 10).astype("float32")

Make = Callable[[Path], Path]
"""Writes an image into a folder and returns its path."""


# --- TIFF ---


def describe_tiff(name: str, edit: Callable[[str], str], **options: Any) -> Make:
    """A TIFF of IMAGE whose description is edited after it was written."""

    def make(folder: Path) -> Path:
        tifffile.imwrite(folder / name, IMAGE, photometric="minisblack", **options)
        with tifffile.TiffFile(folder / name, mode="r+") as tif:
            page = tif.pages.first
            page.tags["ImageDescription"].overwrite(edit(page.description).encode("utf-8"))
        return folder / name

    return make


def imagej(*edits: tuple[str, str], more: str = "") -> Make:
    def edit(text: str) -> str:
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        return text + more

    metadata = {"axes": "ZYX", "unit": "um", "spacing": 2.0}
    return describe_tiff("a.tif", edit, imagej=True, metadata=metadata, resolution=(4, 4))


def ome(old: str, new: str) -> Make:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", (2.0, 0.25, 0.25), strict=True)}
    return describe_tiff("a.ome.tif", edit, ome=True, metadata={"axes": "ZYX", **sizes})


def edit_shape(old: str, new: str) -> Make:
    return describe_tiff("a.tif", lambda text: text.replace(old, new), metadata={"axes": "ZYX"})


def orientation(folder: Path) -> Path:
    tag = [(274, 3, 1, 4, True)]
    tifffile.imwrite(folder / "a.tif", IMAGE, photometric="minisblack", metadata={"axes": "ZYX"}, extratags=tag)
    return folder / "a.tif"


def pages(*images: Any, tags: Sequence[Any] = ()) -> Make:
    """A TIFF of pages without a description."""

    def make(folder: Path) -> Path:
        with tifffile.TiffWriter(folder / "a.tif") as writer:
            for image in images:
                writer.write(image, photometric="minisblack", metadata=None, contiguous=False, extratags=tags)
        return folder / "a.tif"

    return make


def white_page(folder: Path) -> Path:
    """A stack one page of which displays zero as white."""
    path = pages(*IMAGE)(folder)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[3].tags["PhotometricInterpretation"].overwrite(0)
    return path


def gdal(items: str) -> Make:
    return pages(*IMAGE, tags=[(42112, 2, 0, f"<GDALMetadata>{items}</GDALMetadata>", True)])


def named_axes(axes: str) -> Make:
    def make(folder: Path) -> Path:
        tifffile.imwrite(folder / "a.tif", IMAGE, photometric="minisblack", metadata={"axes": axes})
        return folder / "a.tif"

    return make


# --- NRRD and NIfTI ---


def nrrd(
    *lines: str,
    body: bytes | None = None,
    kind: str = "ushort",
    encoding: str = "raw",
    code: str = "utf-8",
    without: str = "none",
) -> Make:
    """An attached header with further lines and without a field, and the voxels as they are or `body`."""

    def make(folder: Path) -> Path:
        fields = [f"type: {kind}", "dimension: 3", "sizes: 9 7 5", "endian: little", f"encoding: {encoding}"]
        fields = [field for field in fields if not field.startswith(f"{without}:")]
        header = "\n".join(["NRRD0005", *fields, *lines]) + "\n\n"
        (folder / "a.nrrd").write_bytes(header.encode(code) + (IMAGE.tobytes() if body is None else body))
        return folder / "a.nrrd"

    return make


def nhdr(data: bytes) -> Make:
    """A detached header beside its raw data."""

    def make(folder: Path) -> Path:
        (folder / "a.raw").write_bytes(data)
        return nrrd("data file: a.raw", body=b"")(folder).rename(folder / "a.nhdr")

    return make


def nifti(form: str = "", at: int = 0, *values: float, name: str = "a.nii", tail: bytes = b"") -> Make:
    """A NIfTI-1 with numbers of its header overwritten."""

    def make(folder: Path) -> Path:
        image = nibabel.Nifti1Image(IMAGE.T.copy(), np.diag([0.25, 0.25, 2.0, 1.0]))
        image.header.set_xyzt_units("micron", "sec")
        nibabel.save(image, folder / "plain.nii")
        data = bytearray((folder / "plain.nii").read_bytes())
        struct.pack_into(f"<{form}", data, at, *values)
        (folder / "plain.nii").unlink()
        (folder / name).write_bytes(bytes(data) + tail)
        return folder / name

    return make


# --- OME-Zarr, zarr, N5, precomputed ---


def write_zarr(path: Path, data: Any, version: int = 2, **options: Any) -> Path:
    array = zarr.create_array(
        path, shape=data.shape, dtype=data.dtype, chunks=(3, 4, 5), zarr_format=version, **options
    )
    array[...] = data
    return path


def write_multiscales(
    folder: Path, edit: Callable[[dict[str, Any]], Any], levels: Sequence[Any] = (IMAGE,), axes: str = "zyx"
) -> Path:
    """An OME-Zarr 0.4 with its metadata edited."""
    path = folder / "a.zarr"
    zarr.open_group(path, mode="w", zarr_format=2)
    for number, level in enumerate(levels):
        chunks = tuple(level.shape)
        array = zarr.create_array(
            path / str(number), shape=level.shape, dtype=level.dtype, chunks=chunks, zarr_format=2
        )
        array[...] = level

    scale = [{"type": "scale", "scale": [1.0] * (len(axes) - 3) + [2.0, 0.25, 0.25]}]
    datasets = [{"path": str(n), "coordinateTransformations": scale} for n in range(len(levels))]
    names = [{"name": a, "type": "space", "unit": "micrometer"} for a in axes]
    attributes = {"multiscales": [{"version": "0.4", "axes": names, "datasets": datasets}]}
    edit(attributes)
    (path / ".zattrs").write_text(json.dumps(attributes))
    return path


def multiscales(edit: Callable[[dict[str, Any]], Any], levels: Sequence[Any] = (IMAGE,), axes: str = "zyx") -> Make:
    return lambda folder: write_multiscales(folder, edit, levels, axes)


def old_axes(attributes: dict[str, Any]) -> None:
    image = attributes["multiscales"][0]
    image.update(version="0.1")
    del image["axes"], image["datasets"][0]["coordinateTransformations"]


def filter_zarr(data: Any, *filters: Any, version: int = 2, **options: Any) -> Make:
    return lambda folder: write_zarr(folder / "a.zarr", data, version, filters=list(filters), **options)


def add_attributes(data: Any, **attributes: Any) -> Make:
    """A zarr array with user attributes."""

    def make(folder: Path) -> Path:
        path = write_zarr(folder / "a.zarr", data)
        (path / ".zattrs").write_text(json.dumps(attributes))
        return path

    return make


def change_description(data: Any, **changes: Any) -> Make:
    """A zarr 2 array whose description was changed after it was written."""

    def make(folder: Path) -> Path:
        path = write_zarr(folder / "a.zarr", data)
        meta = json.loads((path / ".zarray").read_text())
        (path / ".zarray").write_text(json.dumps({**meta, **changes}))
        return path

    return make


def partly_filled(fill: Any) -> Make:
    """A zarr 2 array of which some chunks were not written."""

    def make(folder: Path) -> Path:
        array = zarr.create_array(
            folder / "a.zarr", shape=(5, 7, 9), dtype="u2", chunks=(3, 7, 9), zarr_format=2, fill_value=fill
        )
        array[:3] = IMAGE[:3]
        return folder / "a.zarr"

    return make


def level_elsewhere(folder: Path) -> Path:
    write_zarr(folder / "b", IMAGE)
    return write_multiscales(folder, lambda a: a["multiscales"][0]["datasets"][0].update(path="../b"))


def damaged_checksum(folder: Path) -> Path:
    path = filter_zarr(IMAGE, numcodecs.Fletcher32(), compressors=None)(folder)
    chunk = path / "0.0.0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    return path


def n5(**attributes: Any) -> Make:
    def make(folder: Path) -> Path:
        spec = {
            "driver": "n5",
            "kvstore": {"driver": "file", "path": f"{folder}/a.n5/"},
            "metadata": {"dimensions": IMAGE.shape[::-1], "dataType": "uint16", "compression": {"type": "gzip"}},
        }
        ts.open(spec, create=True).result().write(IMAGE.T).result()
        path = folder / "a.n5" / "attributes.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **attributes}))
        return path.parent

    return make


def write_precomputed(edit: Callable[[dict[str, Any]], Any]) -> Make:
    def make(folder: Path) -> Path:
        scale = {"size": IMAGE.shape[::-1], "encoding": "raw", "chunk_size": [4, 4, 3], "resolution": [250, 250, 2000]}
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": f"{folder}/a/"},
            "multiscale_metadata": {"data_type": "uint16", "num_channels": 1, "type": "image"},
            "scale_metadata": scale,
        }
        ts.open(spec, create=True).result().write(IMAGE.T[..., None]).result()
        info = json.loads((folder / "a" / "info").read_text())
        edit(info)
        (folder / "a" / "info").write_text(json.dumps(info))
        return folder / "a"

    return make


# --- HDF5 and Amira ---


def hdf5(data: Any = IMAGE, name: str = "a.h5", block: int = 0, **attributes: Any) -> Make:
    """An HDF5 file, perhaps behind a block of other content."""

    def make(folder: Path) -> Path:
        with h5py.File(folder / name, "w", userblock_size=block) as file:
            file["image"] = data
            file["image"].attrs.update(attributes)
        return folder / name

    return make


def unknown_filter(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((5, 7, 9))
        properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 2, 2, 630))
        space = h5py.h5s.create_simple(IMAGE.shape)
        data = h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_UINT16, space, properties)
        data.write_direct_chunk((0, 0, 0), IMAGE.tobytes())
    return folder / "a.h5"


def amira(parameters: str = "", kind: str = "ushort", is_text: bool = False) -> Make:
    def make(folder: Path) -> Path:
        first = "# AmiraMesh 3D ASCII 2.0" if is_text else "# AmiraMesh BINARY-LITTLE-ENDIAN 2.1"
        text = (
            f'{first}\n\ndefine Lattice 9 7 5\n\nParameters {{\n    Units {{ Coordinates "µm" }}\n{parameters}'
            '    BoundingBox 0 2 0 1.5 0 8,\n    CoordType "uniform"\n}\n\n'
            f"Lattice {{ {kind} Data }} @1\n\n# Data section follows\n@1\n"
        )
        data = " ".join(map(str, IMAGE.ravel())).encode() if is_text else IMAGE.tobytes()
        (folder / "a.am").write_bytes(text.encode("utf-8") + data + b"\n")
        return folder / "a.am"

    return make


def foreign(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


UM_SIZE = "voxel size: 2 x 0.25 x 0.25 um"
UNKNOWN = "voxel size: the file does not say"
LINE = "\ncf=0\nc0={}\nc1={}\n"

CASES: dict[str, tuple[Make, int, str, Any]] = {
    # TIFF: descriptions that do not fit the pages, and values that ImageJ shows otherwise.
    "ImageJ counts fewer pages": (imagej(("images=5", "images=3"), ("slices=5", "slices=3")), 2, "speaks of 3", None),
    "ImageJ counts more pages": (imagej(("images=5", "images=9"), ("slices=5", "slices=9")), 2, "incomplete", None),
    "ImageJ counts channels": (imagej(("slices=5", "channels=2\nslices=2")), 2, "speaks of 4", None),
    "OME counts fewer pages": (ome('SizeZ="5"', 'SizeZ="4"'), 2, "speaks of 4", None),
    "OME counts one page": (ome('SizeZ="5"', 'SizeZ="1"'), 2, "speaks of 1", None),
    "tifffile counts more pages": (edit_shape("[5, 7, 9]", "[6, 7, 9]"), 2, "speaks of 6", None),
    "ImageJ's signed 16 bit": (imagej(more=LINE.format(-32768, 1)), 0, "plus -32768", IMAGE.astype("float32") - 32768),
    "ImageJ's inversion": (imagej(more=LINE.format(65535, -1)), 0, "times -1", 65535 - IMAGE.astype("float32")),
    "ImageJ's optical density": (imagej(more="\ncf=21\n"), 2, "calibration function 21", None),
    "ImageJ's line without slope": (imagej(more=LINE.format(5, 0)), 2, "calibration function 0", None),
    "decimal comma in spacing": (imagej(("spacing=2.0", "spacing=2,0")), 0, "'2,0', which is no number", IMAGE),
    "UTF-8 taken for latin-1": (imagej(("unit=um", "unit=Âµm")), 0, UM_SIZE, IMAGE),
    "OME without namespace": (
        *(ome('xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"', ""), 0),
        *(UM_SIZE, IMAGE),
    ),
    "broken OME": (ome("</Pixels>", ""), 0, "is not used", IMAGE),
    "OME in pixels": (ome('SizeX="0.25"', 'SizeX="0.25" PhysicalSizeXUnit="pixel"'), 0, UNKNOWN, IMAGE),
    "unit twice": (imagej(("unit=um", "unit=um\nunit=nm")), 2, "states unit twice, as um and nm", None),
    "spacing twice": (imagej(("spacing=2.0", "spacing=2.0\nspacing=3.0")), 2, "states spacing twice", None),
    "the same twice": (imagej(("unit=um", "unit=um\nunit=um")), 0, UM_SIZE, IMAGE),
    "a page of another type": (pages(*IMAGE[:4], IMAGE[4].astype("u1")), 2, "page 4 (7 x 9 uint8", None),
    "a page of another sign": (pages(IMAGE[0], IMAGE[1].astype("i2"), *IMAGE[2:]), 2, "differs from those", None),
    "a page of another size within": (
        *(pages(IMAGE[0], IMAGE[1], IMAGE[2, :5], IMAGE[3], IMAGE[4]), 2),
        *("page 2 (5 x 9 uint16", None),
    ),
    "a white page": (white_page, 2, "page 3 (7 x 9 uint16, MINISWHITE)", None),
    "a thumbnail": (pages(IMAGE[0, :3, :3], *IMAGE), 0, "1 further image of the file (3 x 3) not read", IMAGE),
    "angles": (named_axes("AYX"), 2, "angle 5", None),
    "a sequence": (named_axes("IYX"), 0, "taken as slices", IMAGE),
    "GDAL's scale": (
        *(gdal('<Item sample="0" role="scale">0.5</Item><Item sample="0" role="offset">10</Item>'), 0),
        *("times 0.5 plus 10", IMAGE / 2 + 10),
    ),
    "GDAL's two scales": (
        *(gdal('<Item sample="0" role="scale">0.5</Item><Item sample="1" role="scale">2</Item>'), 2),
        *("no single number", None),
    ),
    "GDAL's notes": (gdal('<Item name="author">me</Item>'), 0, "uint16", IMAGE),
    "GDAL's missing voxels": (
        *(pages(*IMAGE, tags=[(42113, 2, 6, "65535", True)]), 0),
        *("the value 65535 stands for missing voxels", IMAGE),
    ),
    "half precision": (pages(*REAL.astype("f2")), 0, "float16", REAL.astype("f2")),
    "beyond any difference": (pages(*np.where(IMAGE > 9999, 1.7e308, -1.7e308)), 0, "float64", None),
    "meters for micrometers": (
        imagej(("unit=um", "unit=m")),
        0,
        "a voxel of 2e+06 x 250000 x 250000 um is unlikely",
        IMAGE,
    ),
    "inches": (imagej(("unit=um", "unit=inches")), 0, "voxel size: 50800 x 6350 x 6350 um", IMAGE),
    "megameters": (imagej(("unit=um", "unit=Mm")), 0, UNKNOWN, IMAGE),
    "orientation": (orientation, 0, "asks to turn or mirror", IMAGE),
    # NRRD.
    "NRRD in µm": (nrrd("spacings: 0.25 0.25 2", 'units: "µm" "µm" "µm"'), 0, UM_SIZE, IMAGE),
    "NRRD in µm, latin-1": (
        *(nrrd("spacings: 0.25 0.25 2", 'units: "µm" "µm" "µm"', code="latin-1"), 0),
        *(UM_SIZE, IMAGE),
    ),
    "NRRD with a foreign head": (nhdr(b"12345678" + IMAGE.tobytes()), 2, "holds 8 bytes more", None),
    "NRRD sizes with fractions": (nrrd("sizes: 9.5 7 5", without="sizes"), 2, "whole numbers are wanted", None),
    "NRRD of another dimension": (nrrd("dimension: 4", without="dimension"), 2, "dimension '4' and 3 sizes", None),
    "NRRD with a tail": (nrrd(body=IMAGE.tobytes() + b"1"), 2, "holds 1 byte more", None),
    "NRRD whose data are packed": (nhdr(gzip.compress(IMAGE.tobytes())), 2, "write `encoding: gzip`", None),
    "NRRD text beyond its type": (
        *(nrrd(body=" ".join(map(str, IMAGE.ravel())).encode(), kind="uchar", encoding="ascii"), 2),
        *("which uint8 cannot", None),
    ),
    "NRRD text with fractions": (nrrd(body=b"1.5 " * 315, encoding="ascii"), 2, "value 1.5, which", None),
    "NRRD type in capitals": (nrrd(kind="UINT16"), 0, "uint16", IMAGE),
    "NRRD labels twice": (nrrd('labels: "x" "y" "z"', 'labels: "z" "y" "x"'), 2, "the field 'labels' twice", None),
    "NRRD sizes twice in capitals": (nrrd("SIZES: 7 9 5"), 2, "the field 'SIZES' twice", None),
    "NRRD fields of two spellings": (nrrd("line skip: 0", "lineskip: 1"), 2, "the field 'lineskip' twice", None),
    "NRRD repeated label": (nrrd('labels: "x" "x" "z"'), 2, "names the axis x 2 times", None),
    "NRRD label against custom": (nrrd('labels: "z" "y" "foo"'), 2, "foo 5", None),
    "NRRD labels of two axes": (nrrd('labels: "x" "y"'), 2, "2 labels for 3 axes", None),
    "NRRD depth first": (nrrd('labels: "depth" "height" "width"'), 0, "X 5, Y 7, Z 9", IMAGE.transpose(2, 1, 0)),
    "NRRD spacings against directions": (
        *(nrrd("spacings: 1 1 1", "space dimension: 3", "space directions: (2,0,0) (0,2,0) (0,0,2)"), 0),
        *("state different sizes", IMAGE),
    ),
    "NRRD quantized": (nrrd("old min: 0.5", "old max: 77"), 0, "quantized (old min 0.5", IMAGE),
    # NIfTI.
    "voxels inside the header": (nifti("f", 108, 0.0), 2, "vox_offset, which is mostly 352", None),
    "unit of no meaning": (nifti("b", 123, 7), 0, UNKNOWN, IMAGE),
    "bytes behind the voxels": (nifti("h", 46, 4), 0, "126 bytes behind the voxels are not read", IMAGE[:4]),
    "named .gz": (nifti(name="a.nii.gz"), 2, "name it a.nii", None),
    # OME-Zarr and zarr.
    "levels in another order": (multiscales(lambda a: None, (IMAGE[::2], IMAGE)), 2, "dataset=1", None),
    "OME-Zarr 0.1": (multiscales(old_axes, (IMAGE[None, None],), "tczyx"), 0, UNKNOWN, IMAGE),
    "two images": (
        *(multiscales(lambda a: a["multiscales"].append({**a["multiscales"][0], "name": "b"})), 0),
        *("the first of 2 images", IMAGE),
    ),
    "backward scale": (
        *(
            multiscales(
                lambda a: a["multiscales"][0]["datasets"][0]["coordinateTransformations"][0].update(scale=[2, -1, 1])
            ),
            0,
        ),
        *("Y runs backwards", IMAGE),
    ),
    "displayed inverted": (
        multiscales(lambda a: a.update(omero={"channels": [{"inverted": True}]})),
        0,
        "inverted",
        IMAGE,
    ),
    "level elsewhere": (level_elsewhere, 0, "outside the folder of the image", IMAGE),
    "chunks not written": (
        *(partly_filled(65535), 0, "1 of 2 chunks are not stored and read as 65535"),
        np.where(np.arange(5)[:, None, None] < 3, IMAGE, 65535),
    ),
    "chunks without a fill value": (
        *(partly_filled(None), 0, "read as 0, as no fill value is stated"),
        np.where(np.arange(5)[:, None, None] < 3, IMAGE, 0),
    ),
    "chunks beyond the shape": (
        change_description(IMAGE, shape=[2, 2, 2]),
        0,
        "7 chunks beyond the shape",
        IMAGE[:2, :2, :2],
    ),
    "valid range": (add_attributes(IMAGE, valid_max=100), 0, "values outside valid_max 100 stand for missing", IMAGE),
    "no levels": (multiscales(lambda a: a["multiscales"][0].update(datasets=[])), 2, "without a list of levels", None),
    "levels without path": (
        multiscales(lambda a: a["multiscales"][0].update(datasets=["0"])),
        2,
        "list of levels",
        None,
    ),
    "unit that is a number": (
        *(multiscales(lambda a: a["multiscales"][0]["axes"][0].update(unit=5)), 0),
        *(UNKNOWN, IMAGE),
    ),
    "transformations of no list": (
        *(
            multiscales(
                lambda a: a["multiscales"][0]["datasets"][0].update(coordinateTransformations={"type": "scale"})
            ),
            2,
        ),
        *("no list of mappings", None),
    ),
    "scale and offset": (
        *(filter_zarr(REAL, numcodecs.FixedScaleOffset(offset=0, scale=10, dtype="<f4", astype="<u2")), 0),
        *("float32", REAL),
    ),
    "quantized": (filter_zarr(REAL, numcodecs.Quantize(digits=3, dtype="<f4")), 0, "float32", REAL),
    "wider type": (filter_zarr(IMAGE, numcodecs.AsType("<u4", "<u2")), 0, "uint16", IMAGE),
    "wider differences": (filter_zarr(IMAGE, numcodecs.Delta("<u2", "<i4")), 0, "uint16", IMAGE),
    "packed bits": (filter_zarr(IMAGE > 9999, numcodecs.PackBits()), 0, "bool", IMAGE > 9999),
    "checksums": (
        filter_zarr(IMAGE, numcodecs.CRC32(), numcodecs.Adler32(), numcodecs.Fletcher32()),
        0,
        "uint16",
        IMAGE,
    ),
    "damaged checksum": (damaged_checksum, 2, "checksum of a chunk does not fit", None),
    "transposed and lz4": (
        *(
            filter_zarr(
                IMAGE, zarr.codecs.TransposeCodec(order=(1, 2, 0)), version=3, compressors=numcodecs.zarr3.LZ4()
            ),
            0,
        ),
        *("uint16", IMAGE),
    ),
    "missing voxels": (add_attributes(IMAGE, _FillValue=65535), 0, "the value 65535 stands for missing voxels", IMAGE),
    # N5 and precomputed.
    "resolution without a unit": (n5(pixelResolution=[0.25, 0.25, 2]), 0, "without a unit of length", IMAGE),
    "N5 unit that is a number": (
        *(n5(pixelResolution={"unit": 3, "dimensions": [0.25, 0.25, 2]}), 0),
        *("without a unit of length", IMAGE),
    ),
    "two N5 sizes": (
        *(
            n5(pixelResolution={"unit": "um", "dimensions": [1, 1, 1]}, resolution=[2, 2, 2], units=["um"] * 3),
            0,
        ),
        *("state different sizes", IMAGE),
    ),
    "scales in another order": (
        *(
            write_precomputed(
                lambda i: i["scales"].insert(0, {**i["scales"][0], "key": "x", "resolution": [500, 500, 4000]})
            ),
            2,
        ),
        *("choose one with dataset=250_250_2000", None),
    ),
    "segmentation": (write_precomputed(lambda i: i.update(type="segmentation")), 0, "labels, not intensities", IMAGE),
    # HDF5.
    "_Unsigned 1": (hdf5(IMAGE.view("int16"), _Unsigned=1), 0, "read as uint16", IMAGE),
    "_Unsigned false": (hdf5(IMAGE, _Unsigned="false"), 0, "read as int16", IMAGE.view("int16")),
    "_Unsigned maybe": (hdf5(IMAGE.view("int16"), _Unsigned="yes"), 2, "true or false is wanted", None),
    "two factors": (hdf5(IMAGE, scale_factor=[1.0, 2.0]), 2, "one finite number is wanted", None),
    "factor 0": (hdf5(IMAGE, scale_factor=0.0), 2, "makes all values equal", None),
    "factor nan": (hdf5(IMAGE, add_offset=np.nan), 2, "one finite number is wanted", None),
    "white as text": (hdf5(IMAGE, IMAGE_WHITE_IS_ZERO="TRUE"), 0, "displayed as white", 65535 - IMAGE),
    "indexed colors": (hdf5(IMAGE, IMAGE_SUBCLASS=b"IMAGE_INDEXED"), 2, "holds colors", None),
    "gray values": (hdf5(IMAGE, IMAGE_SUBCLASS=b"IMAGE_GRAYSCALE"), 0, "uint16", IMAGE),
    "unknown filter": (unknown_filter, 2, "HDF5 filter 32001", None),
    "user block": (hdf5(block=512), 0, "uint16", IMAGE),
    "MATLAB": (
        *(hdf5(IMAGE.transpose(0, 2, 1), name="a.mat", block=512, MATLAB_class=np.bytes_("uint16")), 0),
        *("Z 5, X 9, Y 7", IMAGE),
    ),
    # Amira.
    "Amira in µm": (amira(), 0, UM_SIZE, IMAGE),
    "Amira, turned": (amira("    TransformationMatrix 2 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1,\n"), 0, UNKNOWN, IMAGE),
    "Amira, shifted": (amira("    TransformationMatrix 1 0 0 0 0 1 0 0 0 0 1 0 5 6 7 1,\n"), 0, UM_SIZE, IMAGE),
    "Amira text beyond its type": (amira(kind="byte", is_text=True), 2, "which uint8 cannot", None),
    # Other formats are named.
    "BigDataViewer's XML": (
        foreign("a.xml", b'<?xml version="1.0"?>\n<SpimData version="0.2">'),
        2,
        "give the .h5",
        None,
    ),
    "Zeiss CZI": (foreign("a.czi", b"ZISRAWFILE" + bytes(500)), 2, "Zeiss CZI", None),
    "DICOM": (foreign("a.dcm", bytes(128) + b"DICM" + bytes(300)), 2, "DICOM", None),
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
        np.testing.assert_allclose(volume[Box.whole(volume.shape)], values, rtol=1e-4, atol=1e-3)
        assert volume.shape == values.shape
