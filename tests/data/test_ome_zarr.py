"""What is read of an OME-Zarr image while trees are traced."""

from __future__ import annotations

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
        ome_zarr.write_box(array, block.write, rng.integers(1, 255, block.write.shape).astype(np.uint8))
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
