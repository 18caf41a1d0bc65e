"""Folders of slices, stacks, chunks and tiles that are damaged or incomplete: one clear error each, never zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume

SHAPE = (6, 20, 24)
DATA = (np.random.default_rng(0).integers(1, 200, SHAPE)).astype("uint16")


def test_inconsistent_slices_are_refused(tmp_path: Path) -> None:
    for i in (1, 2, 3, 5):
        tifffile.imwrite(tmp_path / f"{i}.tif", DATA[0])
    with pytest.raises(InputError, match=r"gap in its slices between 3.tif and 5.tif"):
        open_volume(tmp_path)
    tifffile.imwrite(tmp_path / "4.tif", DATA[0][:10])
    volume = open_volume(tmp_path)
    with pytest.raises(InputError, match=r"4.tif is \(10, 24\) uint16, but the first slice 1.tif is \(20, 24\)"):
        volume[Box((3, 0, 0), (4, 5, 5))]
    tifffile.imwrite(tmp_path / "04.tif", DATA[0])
    with pytest.raises(InputError, match="have the same number"):
        open_volume(tmp_path)
    tifffile.imwrite(tmp_path / "other_1.tif", DATA[0])
    with pytest.raises(InputError, match="different names .*dataset='PATTERN'"):
        open_volume(tmp_path)


def test_folder_of_stacks_is_refused(tmp_path: Path) -> None:
    for i in range(3):
        tifffile.imwrite(tmp_path / f"neuron_{i}.tif", DATA, photometric="minisblack")
    with pytest.raises(InputError, match="folder of 3 stacks"):
        open_volume(tmp_path)


def test_array_without_chunks_is_refused(tmp_path: Path) -> None:
    for driver, fault in (("zarr", "chunk"), ("zarr3", "chunk"), ("n5", "chunk")):
        path = tmp_path / driver
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}}
        ts.open(spec, create=True, dtype=ts.uint16, shape=SHAPE).result()
        with pytest.raises(InputError, match=fault):
            open_volume(path)


@pytest.mark.parametrize("driver", ["zarr", "zarr3", "n5"])
def test_damaged_chunk_or_metadata_is_refused(tmp_path: Path, driver: str) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
    ts.open(spec, create=True, dtype=ts.uint16, shape=SHAPE).result().write(DATA).result()
    metadata = {"zarr": ".zarray", "zarr3": "zarr.json", "n5": "attributes.json"}[driver]
    chunk = next(p for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name != metadata)
    chunk.write_bytes(chunk.read_bytes()[:-5])
    volume = open_volume(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be read as"):
        volume[Box.whole(volume.shape)]
    (tmp_path / "a" / metadata).write_text('{"broken')
    with pytest.raises(InputError, match="not readable JSON"):
        open_volume(tmp_path / "a")


def test_terafly_folder_without_a_tile_is_refused(tmp_path: Path) -> None:
    for y in (0, 100):
        for x in (0, 120):
            leaf = tmp_path / "RES(20x24x6)" / f"{y}" / f"{y}_{x}"
            leaf.mkdir(parents=True)
            part = DATA[:, y // 10 : y // 10 + 10, x // 10 : x // 10 + 12]
            tifffile.imwrite(leaf / f"{y}_{x}_0.tif", part, photometric="minisblack")
    np.testing.assert_array_equal(open_volume(tmp_path)[Box.whole(SHAPE)], DATA)
    tifffile.imwrite(leaf / "100_120_0.tif", DATA[:, :9, :12], photometric="minisblack")
    with pytest.raises(InputError, match=r"100_120_0.tif is .* the tile is damaged"):
        open_volume(tmp_path)[Box.whole(SHAPE)]
    (leaf / "100_120_0.tif").unlink()
    with pytest.raises(InputError, match="lacks the tile"):
        open_volume(tmp_path)
