"""Every format gives the voxels that its own library wrote, whole and by box, with the voxel size the file states."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import nrrd
import numpy as np
import pytest
import tensorstore as ts
import tifffile

from hpc_neuro.data.volume import READERS, open_volume
from hpc_neuro.geometry import Box
from hpc_neuro.schema import InputError

SHAPE = (5, 7, 9)
UM = (1.0, 0.33, 0.25)


def image(dtype: str = "uint16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A field whose every voxel is different, so that a swapped axis or byte shows."""
    return (np.arange(np.prod(shape)).reshape(shape) % 60000 + 1).astype(dtype)


def assert_reads(path: Path, expected: np.ndarray, um: tuple[float, ...] | None = None, **options: object) -> None:
    volume = open_volume(path, **options)
    assert volume.shape == expected.shape
    assert volume.dtype == expected.dtype
    np.testing.assert_array_equal(volume[Box.whole(volume.shape)], expected)
    box = Box((1, 2, 3), tuple(min(n, n - 1) for n in expected.shape))
    part = volume[box]
    np.testing.assert_array_equal(part, expected[box.slices])
    assert part.flags.owndata
    assert part.flags.writeable
    assert (volume.voxel_size is None) if um is None else np.allclose(volume.voxel_size, um, rtol=1e-5)
    assert str(path) in volume.describe()


def tiff(path: Path, data: np.ndarray, **options: object) -> None:
    tifffile.imwrite(path, data, **options)


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
    tiff(tmp_path / "a.tif", image(), **options)
    assert_reads(tmp_path / "a.tif", image(), um)


def test_tiles_and_strips_are_cut_where_a_box_ends(tmp_path: Path) -> None:
    data = image("uint16", (3, 70, 90))
    for options in ({"tile": (16, 32)}, {"rowsperstrip": 9}):
        tiff(tmp_path / "a.tif", data, compression="zlib", photometric="minisblack", **options)
        volume = open_volume(tmp_path / "a.tif")
        rng = np.random.default_rng(0)
        for _ in range(40):
            corners = np.sort(rng.integers(0, np.array([4, 71, 91]), (2, 3)), axis=0)
            box = Box(tuple(corners[0]), tuple(corners[1]))
            np.testing.assert_array_equal(volume[box], data[box.slices])


def test_a_small_box_of_a_compressed_tiff_decodes_few_segments(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", image("uint16", (40, 64, 64)), tile=(16, 16), compression="zlib", photometric="minisblack")
    volume = open_volume(tmp_path / "a.tif")
    volume[Box((3, 0, 0), (5, 16, 16))]
    assert len(volume._source.read.kept) == 2


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32", "float64"])
def test_tiff_keeps_its_type(tmp_path: Path, dtype: str) -> None:
    tiff(tmp_path / "a.tif", image(dtype), photometric="minisblack", compression="zlib")
    assert_reads(tmp_path / "a.tif", image(dtype))


def test_tiff_of_resolution_tags_alone(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", image(), photometric="minisblack", resolution=(40000, 40000), resolutionunit="CENTIMETER")
    volume = open_volume(tmp_path / "a.tif")
    assert volume.voxel_size is None
    assert "Y 0.25 um, X 0.25 um, but no size along Z" in volume.describe()


def test_paper_resolution_is_no_voxel_size(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", image(), photometric="minisblack", resolution=(72, 72), resolutionunit="INCH")
    assert "no size" not in open_volume(tmp_path / "a.tif").describe()


def test_channels_of_tiff(tmp_path: Path) -> None:
    data = image("uint16", (5, 2, 7, 9))
    tiff(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "ZCYX"})
    assert_reads(tmp_path / "a.tif", data[:, 1], channel=1)
    tiff(tmp_path / "b.tif", data, compression="zlib", photometric="minisblack", metadata={"axes": "ZCYX"})
    assert_reads(tmp_path / "b.tif", data[:, 1], channel=1)


def test_colour_samples_are_channels(tmp_path: Path) -> None:
    data = image("uint8", (5, 7, 9, 3))
    for planar in ("CONTIG", "SEPARATE"):
        stored = data if planar == "CONTIG" else np.moveaxis(data, -1, 1)
        tiff(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, compression="zlib", metadata={})
        assert_reads(tmp_path / "a.tif", data[..., 2], channel=2, axes="ZYXC" if planar == "CONTIG" else "ZCYX")


def test_slices_in_natural_order(tmp_path: Path) -> None:
    data = image("uint16", (12, 7, 9))
    for i, plane in enumerate(data, start=1):
        tiff(tmp_path / f"s{i}.tif", plane, photometric="minisblack", compression="zlib")
    (tmp_path / "notes.txt").write_text("not a slice")
    assert_reads(tmp_path, data)


def test_slices_with_voxel_size(tmp_path: Path) -> None:
    for i, plane in enumerate(image()):
        tiff(
            tmp_path / f"{i}.tif", plane, imagej=True, resolution=(4, 1 / 0.33), metadata={"unit": "um", "spacing": 1.0}
        )
    assert_reads(tmp_path, image(), UM)


def test_slices_by_pattern(tmp_path: Path) -> None:
    for c in (0, 1):
        for i, plane in enumerate(image() + c):
            tiff(tmp_path / f"z{i:02d}_c{c}.tif", plane, photometric="minisblack")
    with pytest.raises(InputError, match="2 numbers differ"):
        open_volume(tmp_path)
    assert_reads(tmp_path, image() + 1, dataset="*_c1.tif")


def v3draw(path: Path, data: np.ndarray, order: str = "L", short: bool = False) -> None:
    """`data` is c z y x."""
    sign = {"L": "<", "B": ">"}[order]
    head = b"raw_image_stack_by_hpeng" + order.encode() + struct.pack(sign + "h", data.dtype.itemsize)
    head += struct.pack(sign + ("4h" if short else "4i"), *data.shape[::-1])
    path.write_bytes(head + data.astype(data.dtype.newbyteorder(sign)).tobytes())


@pytest.mark.parametrize("order", ["L", "B"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("short", [False, True])
def test_v3draw(tmp_path: Path, order: str, dtype: str, short: bool) -> None:
    data = image(dtype, (2, *SHAPE))
    v3draw(tmp_path / "a.v3draw", data, order, short)
    assert_reads(tmp_path / "a.v3draw", data[1], channel=1)


def test_v3draw_in_the_wrong_byte_order_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    smooth = np.add.outer(np.arange(20), np.arange(30))[None, None].astype("<u2") * 16
    path = tmp_path / "a.v3draw"
    v3draw(path, smooth, "L")
    raw = path.read_bytes()
    head = b"raw_image_stack_by_hpengB" + struct.pack(">h4i", 2, 30, 20, 1, 1)
    path.write_bytes(head + raw[43:])
    assert "smoother as little-endian" in open_volume(path).describe()
    assert "smoother as little-endian" in caplog.text


def pbd(data: np.ndarray, order: str = "L") -> bytes:
    """A plain encoder of the PBD code, to test the decoder: repeats, differences where they fit, literals elsewhere."""
    flat, out, i = data.ravel(), bytearray(), 0
    wide = data.dtype.itemsize == 2
    low, high, most_diff = (-3, 4, 48) if wide else (-1, 2, 95)
    repeat, most_repeat, literal = (222, 33, 32) if wide else (127, 128, 33)
    signed = flat.astype(np.int64)
    word = lambda v: int(v).to_bytes(data.dtype.itemsize, "little" if order == "L" else "big")  # noqa: E731
    while i < len(flat):
        run = 1
        while i + run < len(flat) and run < most_repeat and flat[i + run] == flat[i]:
            run += 1
        steps = 0
        while i > 0 and i + steps < len(flat) and steps < most_diff:
            if not low <= signed[i + steps] - signed[i + steps - 1] <= high:
                break
            steps += 1
        if run > 3:
            out += bytes([repeat + run]) + word(flat[i])
            i += run
        elif steps > 3:
            change = [int(signed[j] - signed[j - 1]) for j in range(i, i + steps)]
            bits = [d if d >= 0 else (4 - d if wide else 3) for d in change]
            out += bytes([(31 if wide else 32) + steps])
            if wide:
                text = "".join(f"{b:03b}" for b in bits)
                text += "0" * (-len(text) % 8)
                out += bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8))
            else:
                bits += [0] * (-len(bits) % 4)
                out += bytes(sum(b << 2 * n for n, b in enumerate(bits[k : k + 4])) for k in range(0, len(bits), 4))
            i += steps
        else:
            count = min(literal, max(1, steps), len(flat) - i)
            out += bytes([count - 1]) + b"".join(word(v) for v in flat[i : i + count])
            i += count
    head = b"v3d_volume_pkbitdf_encod" + order.encode()
    head += struct.pack(("<" if order == "L" else ">") + "h4i", data.dtype.itemsize, *data.shape[::-1])
    return head + bytes(out)


@pytest.mark.parametrize("order", ["L", "B"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_v3dpbd(tmp_path: Path, dtype: str, order: str) -> None:
    rng = np.random.default_rng(1)
    walk = np.cumsum(rng.integers(-4, 5, 2 * 6 * 40 * 50)) % 250
    walk[rng.random(len(walk)) < 0.02] = 7
    data = (walk * (200 if dtype == "uint16" else 1)).reshape(2, 6, 40, 50)
    data[:, 2] = np.sort(walk[:2000]).reshape(40, 50)  # slow slopes and long runs
    data = data.astype(dtype)
    (tmp_path / "a.v3dpbd").write_bytes(pbd(data, order))
    assert_reads(tmp_path / "a.v3dpbd", data[1], channel=1)


NRRDS: dict[str, dict[str, object]] = {
    "raw": {"encoding": "raw"},
    "gzip": {"encoding": "gzip"},
    "bzip2": {"encoding": "bzip2"},
    "ascii": {"encoding": "ASCII"},
    "big_endian": {"encoding": "raw", "endian": "big"},
}


@pytest.mark.parametrize("kind", NRRDS)
@pytest.mark.parametrize("detached", [False, True])
def test_nrrd(tmp_path: Path, kind: str, detached: bool) -> None:
    header = {
        **NRRDS[kind],
        "space dimension": 3,
        "space directions": np.diag(UM[::-1]),
        "space units": ["microns"] * 3,
    }
    data = image()
    path = tmp_path / ("a.nhdr" if detached else "a.nrrd")
    written = data.astype(">u2") if "endian" in NRRDS[kind] else data
    nrrd.write(str(path), written.T, header, detached_header=detached, index_order="F")
    assert_reads(path, data, UM)


def test_nrrd_affine_and_time(tmp_path: Path) -> None:
    header = {
        "space dimension": 3,
        "space directions": [[0.25, 0.1, 0], [0, 0.33, 0], [0, 0, 1]],
        "space origin": [10, 20, 30],
        "space units": ["um"] * 3,
    }
    nrrd.write(str(tmp_path / "a.nrrd"), image().T, header, index_order="F")
    volume = open_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(volume.affine @ [2, 3, 4, 1], [32, 20 + 3 * 0.33 + 4 * 0.1, 10 + 4 * 0.25, 1])
    nrrd.write(str(tmp_path / "t.nrrd"), image("uint8", (4, *SHAPE)).T, {"kinds": ["domain"] * 3 + ["time"]})
    with pytest.raises(InputError, match="4 time points"):
        open_volume(tmp_path / "t.nrrd")


def test_nrrd_in_several_data_files(tmp_path: Path) -> None:
    data = image("uint8")
    text = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 9 7 5\nencoding: raw\n"
    for i, plane in enumerate(data):
        (tmp_path / f"s{i:02d}.raw").write_bytes(b"12" + plane.tobytes())
    listed = "byte skip: 2\ndata file: LIST\n" + "".join(f"s{i:02d}.raw\n" for i in range(5))
    (tmp_path / "list.nhdr").write_text(text + listed)
    assert_reads(tmp_path / "list.nhdr", data)
    (tmp_path / "series.nhdr").write_text(text + "byte skip: 2\ndata file: s%02d.raw 0 4 1\n")
    assert_reads(tmp_path / "series.nhdr", data)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "a2.nii"])
def test_nifti(tmp_path: Path, name: str) -> None:
    kind = {"a.img": nibabel.Nifti1Pair, "a2.nii": nibabel.Nifti2Image}.get(name, nibabel.Nifti1Image)
    affine = np.diag([*UM[::-1], 1.0])
    affine[:3, 3] = 1, 2, 3
    made = kind(image().T, affine)
    made.header.set_xyzt_units("micron")
    nibabel.save(made, tmp_path / name)
    assert_reads(tmp_path / name, image(), UM)
    np.testing.assert_allclose(open_volume(tmp_path / name).affine[:3, 3], [3, 2, 1], rtol=1e-6)
    if name == "a.img":
        assert_reads(tmp_path / "a.hdr", image(), UM)


def test_nifti_in_millimetres_scaled_or_without_unit(tmp_path: Path) -> None:
    made = nibabel.Nifti1Image(image("int16").T, np.diag([0.25e-3, 0.33e-3, 1e-3, 1]))
    made.header.set_xyzt_units("mm")
    made.header.set_slope_inter(2.0, 5.0)
    nibabel.save(made, tmp_path / "a.nii")
    assert_reads(tmp_path / "a.nii", (image("int16") * 2.0 + 5.0).astype("float32"), UM)
    made.header.set_xyzt_units(0)
    nibabel.save(made, tmp_path / "b.nii")
    assert open_volume(tmp_path / "b.nii").voxel_size is None
    assert "without a unit" in open_volume(tmp_path / "b.nii").describe()


def amira(path: Path, data: np.ndarray, body: bytes, field: str, unit: str = '"um"') -> None:
    z, y, x = data.shape
    box = f"0 {0.25 * (x - 1)} 0 {0.33 * (y - 1)} 0 {1.0 * (z - 1)}"
    head = f"# AmiraMesh BINARY-LITTLE-ENDIAN 2.1\n\ndefine Lattice {x} {y} {z}\n\nParameters {{\n"
    head += f'  Units {{ Coordinates {unit} }}\n  BoundingBox {box},\n  CoordType "uniform"\n}}\n\n'
    path.write_bytes(f"{head}Lattice {{ {field}\n\n# Data section follows\n@1\n".encode() + body + b"\n")


def test_amira(tmp_path: Path) -> None:
    import zlib

    data = image("uint8")
    amira(tmp_path / "raw.am", data, data.tobytes(), "byte Data } @1")
    assert_reads(tmp_path / "raw.am", data, UM)
    packed = zlib.compress(data.tobytes())
    amira(tmp_path / "zip.am", data, packed, f"byte Data }} @1(HxZip,{len(packed)})")
    assert_reads(tmp_path / "zip.am", data, UM)
    flat = data.tobytes()
    runs = b"".join(bytes([128 + len(p)]) + p for p in (flat[i : i + 100] for i in range(0, len(flat), 100)))
    amira(tmp_path / "rle.am", data, runs, f"byte Labels }} @1(HxByteRLE,{len(runs)})")
    assert_reads(tmp_path / "rle.am", data, UM)
    wide = image("uint16")
    amira(tmp_path / "wide.am", wide, wide.tobytes(), "ushort Data } @1")
    assert_reads(tmp_path / "wide.am", wide, UM)


def test_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        found = file.create_dataset("t0/raw", data=image(), chunks=(2, 3, 4), compression="gzip")
        found.attrs["element_size_um"] = UM
        file["scalar"] = 3
    assert_reads(tmp_path / "a.h5", image(), UM)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["mask"] = image("uint8")
    with pytest.raises(InputError, match=r"/mask .* /t0/raw .*dataset=NAME"):
        open_volume(tmp_path / "a.h5")
    assert_reads(tmp_path / "a.h5", image("uint8"), dataset="mask")


def test_hdf5_axis_labels(tmp_path: Path) -> None:
    data = image("uint8", (9, 7, 5, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = data
        for dim, name in zip(file["image"].dims, "xyzc", strict=True):
            dim.label = name
    assert_reads(tmp_path / "a.h5", data[..., 1].T, channel=1)
    tags = {"axes": [{"key": k} for k in "xyzc"]}
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["image"] = data
        file["image"].attrs["axistags"] = json.dumps(tags)
    assert_reads(tmp_path / "b.h5", data[..., 0].T, channel=0)


def imaris(path: Path, data: np.ndarray) -> None:
    """`data` is c z y x; chunks are padded as Imaris does."""
    text = lambda value: np.array(list(str(value)), dtype="S1")  # noqa: E731
    with h5py.File(path, "w") as file:
        info = file.create_group("DataSetInfo/Image")
        for a, n, um, i in zip("ZYX", data.shape[1:], UM, (2, 1, 0), strict=True):
            info.attrs[a] = text(n)
            info.attrs[f"ExtMin{i}"], info.attrs[f"ExtMax{i}"] = text(10.0), text(10.0 + n * um)
        info.attrs["Unit"] = text("um")
        for c, channel in enumerate(data):
            group = file.create_group(f"DataSet/ResolutionLevel 0/TimePoint 0/Channel {c}")
            for a, n in zip("ZYX", channel.shape, strict=True):
                group.attrs[f"ImageSize{a}"] = text(n)
            group.create_dataset("Data", data=np.pad(channel, ((0, 3), (0, 9), (0, 7))), chunks=(8, 8, 8))


def test_imaris(tmp_path: Path) -> None:
    data = image("uint16", (2, *SHAPE))
    imaris(tmp_path / "a.ims", data)
    assert_reads(tmp_path / "a.ims", data[1], UM, channel=1)
    np.testing.assert_allclose(
        open_volume(tmp_path / "a.ims", channel=0).affine[:3, 3], [10.5, 10 + 0.165, 10 + 0.125], rtol=1e-6
    )


def store(path: Path, driver: str, data: np.ndarray, **more: object) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, **more}
    made = ts.open(spec, create=True, dtype=data.dtype, shape=data.shape).result()
    made.write(data).result()


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_ome_zarr(tmp_path: Path, driver: str) -> None:
    data = image("uint16", (2, *SHAPE))
    store(tmp_path / "a.zarr" / "0", driver, data)
    store(tmp_path / "a.zarr" / "1", driver, data[:, :, ::2, ::2].copy())
    scale = [1.0, 1.0, 0.33, 0.25]
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    levels = [
        {
            "path": str(i),
            "coordinateTransformations": [
                {"type": "scale", "scale": [s * (1 if k < 2 else 2**i) for k, s in enumerate(scale)]},
                {"type": "translation", "translation": [0.0, 5.0, 6.0, 7.0]},
            ],
        }
        for i in range(2)
    ]
    multiscales = [{"axes": axes, "datasets": levels}]
    if driver == "zarr":
        (tmp_path / "a.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
        (tmp_path / "a.zarr" / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))
    else:
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": multiscales}}}
        (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(group))
    assert_reads(tmp_path / "a.zarr", data[1], UM, channel=1)
    assert_reads(tmp_path / "a.zarr", data[1, :, ::2, ::2], (1.0, 0.66, 0.5), channel=1, dataset="1")
    np.testing.assert_allclose(open_volume(tmp_path / "a.zarr", channel=0).affine[:3, 3], [5, 6, 7])
    assert_reads(tmp_path / "a.zarr" / "0", data[0], axes="CZYX", channel=0)
    with pytest.raises(InputError, match="no resolution level 'x'; it has 0, 1"):
        open_volume(tmp_path / "a.zarr", dataset="x")


def test_zarr_with_dimension_names(tmp_path: Path) -> None:
    data = image("uint8", (9, 7, 5))
    store(tmp_path / "a.zarr", "zarr3", data, metadata={"dimension_names": ["x", "y", "z"]})
    assert_reads(tmp_path / "a.zarr", data.T)


def test_n5(tmp_path: Path) -> None:
    store(tmp_path / "a.n5" / "s0", "n5", image().T.copy())
    attributes = json.loads((tmp_path / "a.n5" / "s0" / "attributes.json").read_text())
    attributes["pixelResolution"] = {"unit": "um", "dimensions": UM[::-1]}
    (tmp_path / "a.n5" / "s0" / "attributes.json").write_text(json.dumps(attributes))
    (tmp_path / "a.n5" / "attributes.json").write_text('{"n5": "2.0.0"}')
    assert_reads(tmp_path / "a.n5", image(), UM)
    assert_reads(tmp_path / "a.n5" / "s0", image(), UM)


def test_precomputed(tmp_path: Path) -> None:
    scale = {"size": SHAPE[::-1], "encoding": "raw", "chunk_size": [4, 4, 4], "resolution": [250, 330, 1000]}
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"},
        "multiscale_metadata": {"type": "image", "data_type": "uint16", "num_channels": 1},
        "scale_metadata": {**scale, "voxel_offset": [10, 20, 30]},
    }
    ts.open(spec, create=True).result()[..., 0].write(image().T).result()
    assert_reads(tmp_path / "a", image(), UM)
    np.testing.assert_allclose(open_volume(tmp_path / "a").affine[:3, 3], [30, 6.6, 2.5])


def terafly(
    folder: Path, data: np.ndarray, cut: tuple[int, int, int], write: Callable[[Path, np.ndarray], None]
) -> None:
    """Tiles Y/Y_X/Y_X_Z.tif named by tenths of a micrometre."""
    z, y, x = data.shape
    root = folder / f"RES({y}x{x}x{z})"
    for i in range(0, y, cut[1]):
        for j in range(0, x, cut[2]):
            for k in range(0, z, cut[0]):
                names = [f"{round(10 * n * um):06d}" for n, um in ((i, UM[1]), (j, UM[2]), (k, UM[0]))]
                leaf = root / names[0] / "_".join(names[:2])
                leaf.mkdir(parents=True, exist_ok=True)
                write(leaf / ("_".join(names) + ".tif"), data[k : k + cut[0], i : i + cut[1], j : j + cut[2]])


def test_terafly_by_names(tmp_path: Path) -> None:
    data = image("uint16", (8, 20, 24))
    terafly(tmp_path, data, (4, 20, 8), lambda p, a: tiff(p, a, photometric="minisblack"))
    terafly(tmp_path, data[::2, ::2, ::2], (4, 5, 8), lambda p, a: tiff(p, a, photometric="minisblack"))
    volume = open_volume(tmp_path)
    np.testing.assert_array_equal(volume[Box((2, 3, 5), (7, 19, 23))], data[2:7, 3:19, 5:23])
    coarse = open_volume(tmp_path, dataset="RES(10x12x4)")
    np.testing.assert_array_equal(coarse[Box.whole(coarse.shape)], data[::2, ::2, ::2])


def test_terafly_series_of_slices(tmp_path: Path) -> None:
    data = image("uint16", (4, 20, 24))
    terafly(tmp_path, data, (1, 10, 12), lambda p, a: tiff(p, a[0], photometric="minisblack"))
    assert_reads(tmp_path, data, (1.0, 0.33, 0.25))


def test_terafly_by_metadata(tmp_path: Path) -> None:
    data = image("uint16", (8, 20, 24))
    data[:, 10:, 12:] = 0
    root = tmp_path / "RES(20x24x8)"
    blocks = b""
    for i in (0, 10):
        for j in (0, 12):
            name = f"{i}/{i}_{j}"
            empty = (i, j) == (10, 12)
            (root / name).mkdir(parents=True)
            if not empty:
                tiff(root / name / "a.tif", data[:, i : i + 10, j : j + 12], photometric="minisblack")
            blocks += struct.pack("<5I2i", 10, 12, 8, 1, 1, i, j)
            blocks += struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
            blocks += struct.pack("<H", 0) if empty else struct.pack("<H", 6) + b"a.tif\0"
            blocks += struct.pack("<IiI", 8, 0, 2)
    head = struct.pack("<f3i3f", 2.0, 1, 2, 3, 0.33, 0.25, 1.0)
    head += struct.pack("<6f3I2H", 0.33, 0.25, 1.0, 0.001, 0.002, 0.003, 20, 24, 8, 2, 2)
    (root / "mdata.bin").write_bytes(head + blocks)
    assert_reads(tmp_path, data, UM)
    np.testing.assert_allclose(open_volume(root).affine[:3, 3], [3, 1, 2], rtol=1e-6)


def test_volumes_pickle_and_open_again(tmp_path: Path) -> None:
    data = image("uint16", (5, 2, 7, 9))
    tiff(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "ZCYX"})
    volume = pickle.loads(pickle.dumps(open_volume(tmp_path / "a.tif", channel=1)))
    np.testing.assert_array_equal(volume[Box.whole(SHAPE)], data[:, 1])


def test_a_box_outside_is_refused_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", image(), photometric="minisblack")
    volume = open_volume(tmp_path / "a.tif")
    with pytest.raises(InputError, match="leaves"):
        volume[Box((0, 0, 0), (5, 7, 10))]
    with pytest.raises(InputError, match="leaves"):
        volume[Box((-1, 0, 0), (5, 7, 9))]
    assert volume[Box((1, 2, 2), (1, 5, 5))].shape == (0, 3, 3)


def test_every_reader_is_in_the_table() -> None:
    assert {r.name for r in READERS} == {"TIFF", "HDF5", "v3draw", "v3dpbd", "NRRD", "NIfTI", "Amira"}


def test_gzip_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(InputError, match="cannot be read as NIfTI"):
        open_volume(tmp_path / "a.nii.gz")
