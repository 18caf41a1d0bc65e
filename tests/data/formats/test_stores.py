"""Formats with a tree inside: HDF5, Imaris, OME-Zarr, N5, Neuroglancer precomputed, TeraFly."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorstore as ts

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.helpers.volume_checks import SHAPE, UM, assert_reads, make_image, write_tiff


def test_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("t0/raw", data=make_image(), chunks=(2, 3, 4), compression="gzip")
        dataset.attrs["element_size_um"] = UM
        file["scalar"] = 3
    assert_reads(tmp_path / "a.h5", make_image(), UM)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["mask"] = make_image("uint8")
    with pytest.raises(InputError, match=r"/mask .* /t0/raw .*dataset=NAME"):
        open_volume(tmp_path / "a.h5")
    assert_reads(tmp_path / "a.h5", make_image("uint8"), dataset="mask")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["far"] = h5py.ExternalLink("a.h5", "mask")
    with pytest.raises(InputError, match=r"links to other files: far\); choose with dataset=NAME"):
        open_volume(tmp_path / "b.h5")
    assert_reads(tmp_path / "b.h5", make_image("uint8"), dataset="far")


def test_hdf5_virtual_dataset(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout(SHAPE, "uint16")
    for z, plane in enumerate(make_image()):
        with h5py.File(tmp_path / f"{z}.h5", "w") as file:
            file["plane"] = plane
        layout[z] = h5py.VirtualSource(f"{z}.h5", "plane", plane.shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("image", layout)
    assert_reads(tmp_path / "a.h5", make_image())
    (tmp_path / "2.h5").unlink()
    with pytest.raises(InputError, match="gathers /image from other files, of which 2.h5 with plane cannot be opened"):
        open_volume(tmp_path / "a.h5")


def test_hdf5_axis_labels(tmp_path: Path) -> None:
    data = make_image("uint8", (9, 7, 5, 2))
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


def write_imaris(path: Path, data: np.ndarray) -> None:
    """`data` is c z y x; chunks are padded as Imaris does."""

    def text(value: object) -> np.ndarray:
        return np.array(list(str(value)), dtype="S1")

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
    data = make_image("uint16", (2, *SHAPE))
    write_imaris(tmp_path / "a.ims", data)
    assert_reads(tmp_path / "a.ims", data[1], UM, channel=1)
    np.testing.assert_allclose(
        open_volume(tmp_path / "a.ims", channel=0).affine[:3, 3], [10.5, 10 + 0.165, 10 + 0.125], rtol=1e-6
    )


def write_store(path: Path, driver: str, data: np.ndarray, **more: object) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, **more}
    array = ts.open(spec, create=True, dtype=data.dtype, shape=data.shape).result()
    array.write(data).result()


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_ome_zarr(tmp_path: Path, driver: str) -> None:
    data = make_image("uint16", (2, *SHAPE))
    write_store(tmp_path / "a.zarr" / "0", driver, data)
    write_store(tmp_path / "a.zarr" / "1", driver, data[:, :, ::2, ::2].copy())
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
    assert_reads(tmp_path / "a.zarr" / "1", data[0, :, ::2, ::2], (1.0, 0.66, 0.5), channel=0)  # by its group's word
    with pytest.raises(InputError, match="no resolution level 'x'; it has 0, 1"):
        open_volume(tmp_path / "a.zarr", dataset="x")


def test_chunks_under_other_names_are_refused(tmp_path: Path) -> None:
    """Nested chunks of a zarr that does not say so, and chunks that CloudVolume packed: both would read as nothing."""
    write_store(tmp_path / "a.zarr", "zarr", make_image(), metadata={"chunks": [2, 7, 9], "dimension_separator": "/"})
    assert_reads(tmp_path / "a.zarr", make_image())
    described = json.loads((tmp_path / "a.zarr" / ".zarray").read_text())
    del described["dimension_separator"]
    (tmp_path / "a.zarr" / ".zarray").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"no chunk with a name like 0.0.0; write \"dimension_separator\": \"/\""):
        open_volume(tmp_path / "a.zarr")
    write_precomputed(tmp_path / "b")
    for chunk in (tmp_path / "b").glob("250_330_1000/*"):
        chunk.rename(f"{chunk}.gz")
    with pytest.raises(InputError, match=r"no chunk with a name like 0-64_0-64_0-64; CloudVolume .* gunzip -r"):
        open_volume(tmp_path / "b")


def test_absent_chunks_are_noted(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "zarr3", make_image(), metadata={"chunk_grid": chunk_grid([2, 7, 9])})
    assert "not stored" not in open_volume(tmp_path / "a.zarr").describe()
    (tmp_path / "a.zarr" / "c" / "1" / "0" / "0").unlink()
    assert "1 of 3 chunks are not stored and read as 0" in open_volume(tmp_path / "a.zarr").describe()


def chunk_grid(chunks: list[int]) -> dict[str, object]:
    return {"name": "regular", "configuration": {"chunk_shape": chunks}}


def test_oversized_chunks_and_unknown_codecs_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "zarr3", make_image())
    described = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    lie = described | {"shape": [1 << 13] * 3, "chunk_grid": chunk_grid([1 << 12] * 3)}
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(lie))
    with pytest.raises(InputError, match="declares chunks of 137438953472 bytes"):
        open_volume(tmp_path / "a.zarr")
    other = described | {"codecs": [{"name": "newest"}]}
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"cannot be opened by tensorstore: .*newest is not registered\. If it names"):
        open_volume(tmp_path / "a.zarr")


def test_bioformats2raw_folder_with_one_image(tmp_path: Path) -> None:
    for name, attributes in (("", {"bioformats2raw.layout": 3}), ("OME", {"series": ["0"]})):
        (tmp_path / "a.zarr" / name).mkdir()
        (tmp_path / "a.zarr" / name / ".zgroup").write_text('{"zarr_format": 2}')
        (tmp_path / "a.zarr" / name / ".zattrs").write_text(json.dumps(attributes))
    write_store(tmp_path / "a.zarr" / "0", "zarr", make_image())
    assert_reads(tmp_path / "a.zarr", make_image())


def test_zarr_with_dimension_names(tmp_path: Path) -> None:
    data = make_image("uint8", (9, 7, 5))
    write_store(tmp_path / "a.zarr", "zarr3", data, metadata={"dimension_names": ["x", "y", "z"]})
    assert_reads(tmp_path / "a.zarr", data.T)


def test_n5(tmp_path: Path) -> None:
    write_store(tmp_path / "a.n5" / "s0", "n5", make_image().T.copy())
    attributes = json.loads((tmp_path / "a.n5" / "s0" / "attributes.json").read_text())
    attributes["pixelResolution"] = {"unit": "um", "dimensions": UM[::-1]}
    (tmp_path / "a.n5" / "s0" / "attributes.json").write_text(json.dumps(attributes))
    (tmp_path / "a.n5" / "attributes.json").write_text('{"n5": "2.0.0"}')
    assert_reads(tmp_path / "a.n5", make_image(), UM)
    assert_reads(tmp_path / "a.n5" / "s0", make_image(), UM)
    (tmp_path / "a.n5" / "attributes.json").unlink()
    assert_reads(tmp_path / "a.n5", make_image(), UM)


def write_precomputed(folder: Path) -> None:
    scale = {"size": SHAPE[::-1], "encoding": "raw", "chunk_size": [4, 4, 4], "resolution": [250, 330, 1000]}
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "multiscale_metadata": {"type": "image", "data_type": "uint16", "num_channels": 1},
        "scale_metadata": {**scale, "voxel_offset": [10, 20, 30]},
    }
    ts.open(spec, create=True).result()[..., 0].write(make_image().T).result()


def test_precomputed(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "a")
    assert_reads(tmp_path / "a", make_image(), UM)
    np.testing.assert_allclose(open_volume(tmp_path / "a").affine[:3, 3], [30, 6.6, 2.5])


def write_terafly(
    folder: Path, data: np.ndarray, cut: tuple[int, int, int], write: Callable[[Path, np.ndarray], None]
) -> None:
    """Tiles Y/Y_X/Y_X_Z.tif named by tenths of a micrometer."""
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
    data = make_image("uint16", (8, 20, 24))
    write_terafly(tmp_path, data, (4, 20, 8), lambda p, a: write_tiff(p, a, photometric="minisblack"))
    write_terafly(tmp_path, data[::2, ::2, ::2], (4, 5, 8), lambda p, a: write_tiff(p, a, photometric="minisblack"))
    volume = open_volume(tmp_path)
    np.testing.assert_array_equal(volume[Box((2, 3, 5), (7, 19, 23))], data[2:7, 3:19, 5:23])
    coarse = open_volume(tmp_path, dataset="RES(10x12x4)")
    np.testing.assert_array_equal(coarse[Box.whole(coarse.shape)], data[::2, ::2, ::2])


def test_terafly_series_of_slices(tmp_path: Path) -> None:
    data = make_image("uint16", (4, 20, 24))
    write_terafly(tmp_path, data, (1, 10, 12), lambda p, a: write_tiff(p, a[0], photometric="minisblack"))
    assert_reads(tmp_path, data, (1.0, 0.33, 0.25))


def test_terafly_by_metadata(tmp_path: Path) -> None:
    data = make_image("uint16", (8, 20, 24))
    data[:, 10:, 12:] = 0
    root = tmp_path / "RES(20x24x8)"
    blocks = b""
    for i in (0, 10):
        for j in (0, 12):
            name = f"{i}/{i}_{j}"
            empty = (i, j) == (10, 12)
            (root / name).mkdir(parents=True)
            if not empty:
                write_tiff(root / name / "a.tif", data[:, i : i + 10, j : j + 12], photometric="minisblack")
            blocks += struct.pack("<5I2i", 10, 12, 8, 1, 1, i, j)
            blocks += struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
            blocks += struct.pack("<H", 0) if empty else struct.pack("<H", 6) + b"a.tif\0"
            blocks += struct.pack("<IiI", 8, 0, 2)
    head = struct.pack("<f3i3f", 2.0, 1, 2, 3, 0.33, 0.25, 1.0)
    head += struct.pack("<6f3I2H", 0.33, 0.25, 1.0, 0.001, 0.002, 0.003, 20, 24, 8, 2, 2)
    (root / "mdata.bin").write_bytes(head + blocks)
    assert_reads(tmp_path, data, UM)
    np.testing.assert_allclose(open_volume(root).affine[:3, 3], [3, 1, 2], rtol=1e-6)


def test_a_chunk_in_memory_is_not_opened_again(tmp_path: Path) -> None:
    """Neighboring blocks meet the same chunks, each of which would be one more question to the file system."""
    shape = (8, 16, 16)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / 'a.zarr'}/"}, "create": True}
    metadata = {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 8, 8]}}}
    values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    ts.open({**spec, "metadata": metadata}, dtype=ts.uint16, shape=shape).result()[...].write(values).result()

    volume = open_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(volume[Box((0, 0, 0), (4, 12, 12))], values[:4, :12, :12])
    for chunk in (tmp_path / "a.zarr" / "c").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    np.testing.assert_array_equal(volume[Box((2, 2, 2), (8, 16, 16))], values[2:, 2:, 2:])


@pytest.mark.parametrize("size", [[-1.0, 1.0, 1.0], [0.5, 0.5], [np.nan, 1.0, 1.0], "1 micron", [np.inf, 1.0, 1.0]])
def test_a_voxel_size_that_is_none_is_said_to_be_none(size: object, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=np.zeros((4, 5, 6), np.uint8)).attrs["element_size_um"] = size
    volume = open_volume(tmp_path / "a.h5")
    assert volume.voxel_size is None
    assert any("which is no voxel size; three numbers above 0 are expected" in note for note in volume.notes)
