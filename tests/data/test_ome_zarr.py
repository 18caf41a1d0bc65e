"""What is read of an OME-Zarr image while trees are traced."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box, tile_volume
from hpc_neuro.data import ome_zarr


def test_a_very_long_volume_has_a_pyramid() -> None:
    levels = ome_zarr.plan_levels((2, 4, 100_000), (1.0, 0.25, 0.25))
    assert levels[-1].shape == (1, 1, 196)


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("keep_bytes", [1 << 20, 1])
def test_a_reader_of_shards_gives_what_the_array_gives_and_opens_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_listed: bool, keep_bytes: int
) -> None:
    shape, shard = (20, 70, 90), (16, 32, 32)
    ome_zarr.create(tmp_path / "v", "p", shape, (1.0, 1.0, 1.0), shard, (8, 16, 16), "mask", {})
    array = ome_zarr.open_level(tmp_path / "v")
    rng = np.random.default_rng(0)
    written = set()
    for block in list(tile_volume(shape, shard))[::2]:
        array[block.write.slices].write(rng.integers(1, 255, block.write.shape).astype(np.uint8)).result()
        written.add(ome_zarr.shard_path(block.index))

    opened = list[str]()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    read = ome_zarr.ShardReader(tmp_path / "v", keep_bytes, written if is_listed else None)
    opened.clear()
    for _ in range(40):
        start = [int(rng.integers(0, n - 1)) for n in shape]
        stop = [int(rng.integers(a + 1, n + 1)) for a, n in zip(start, shape, strict=True)]
        box = Box(tuple(start), tuple(stop))
        np.testing.assert_array_equal(read(box), ome_zarr.read_box(array, box))
    if keep_bytes > 1:
        assert len(opened) <= (len(written) if is_listed else len(list(tile_volume(shape, shard))))


def test_a_writer_of_shards_leaves_the_bytes_that_tensorstore_writes(tmp_path: Path) -> None:
    shape, shard = (20, 70, 90), (16, 32, 32)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        ome_zarr.create(tmp_path / name, "p", shape, (1.0, 1.0, 1.0), shard, (8, 16, 16), "mask", {})
    array, writer = ome_zarr.open_level(tmp_path / "a", 0, "mask"), ome_zarr.ShardWriter(tmp_path / "b", 0, "mask")
    for block in tile_volume(shape, shard):
        values = rng.integers(0, 2, block.write.shape).astype(np.uint8)
        array[block.write.slices].write(values).result()
        digest, size = writer.write(block.write, values)
        content = (tmp_path / "b" / ome_zarr.shard_path(block.index, label="mask")).read_bytes()
        assert (digest, size) == (hashlib.sha256(content).hexdigest(), len(content))

    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")) for name in ("a", "b")]
    assert files[0] == files[1]
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
        for f in files[0]
        if (tmp_path / "a" / f).is_file()
    )


def test_a_shard_that_reads_back_other_than_it_was_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ome_zarr.create(tmp_path / "v", "p", (8, 32, 32), (1.0, 1.0, 1.0), (8, 32, 32), (8, 32, 32), "mask", {})
    writer = ome_zarr.ShardWriter(tmp_path / "v")
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"what a failing disk gives back")
    with pytest.raises(OSError, match="reads back other than it was written"):
        writer.write(Box((0, 0, 0), (8, 32, 32)), np.ones((8, 32, 32), np.uint8))
