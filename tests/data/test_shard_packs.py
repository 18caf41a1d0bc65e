"""Packs of shards give the bytes of the shards, and are opened once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box, tile_volume
from hpc_neuro.data import ome_zarr, shard_packs
from hpc_neuro.data.shard_packs import PackReader

SHAPE, SHARD = (20, 70, 290), (8, 32, 32)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of which every third shard has no file."""
    folder = tmp_path / "v"
    ome_zarr.create(folder, "p", SHAPE, (1.0, 1.0, 1.0), SHARD, (8, 16, 16), "mask", {})
    writer, rng = ome_zarr.ShardWriter(folder), np.random.default_rng(0)
    for number, block in enumerate(tile_volume(SHAPE, SHARD)):
        if number % 3:
            writer.write(block.write, rng.integers(1, 255, block.write.shape).astype(np.uint8))
    return folder


@pytest.fixture
def packs(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shard_packs, "PACK", (2, 2, 4))
    folder = tmp_path / "packs"
    for pack, shards in shard_packs.group_shards(ome_zarr.list_shards(image)).items():
        shard_packs.write_pack(folder / shard_packs.name_pack(pack), image, shards)
    return folder


def test_a_pack_gives_the_files_of_its_shards(image: Path, packs: Path) -> None:
    with PackReader(packs) as reader:
        for block in tile_volume(SHAPE, SHARD):
            path = image / ome_zarr.shard_path(block.index)
            assert reader.read(block.index) == (path.read_bytes() if path.exists() else None)


@pytest.mark.parametrize("open_packs", [64, 2])
def test_boxes_are_read_from_packs_that_are_opened_once(
    image: Path, packs: Path, monkeypatch: pytest.MonkeyPatch, open_packs: int
) -> None:
    monkeypatch.setattr(shard_packs, "_OPEN_PACKS", open_packs)
    array, written = ome_zarr.open_level(image), {ome_zarr.shard_path(index) for index in ome_zarr.list_shards(image)}
    opened = list[Path]()
    open_path = Path.open

    def count(path: Path, *args: object, **more: object) -> object:
        opened.append(path)
        return open_path(path, *args, **more)

    with PackReader(packs) as packs_reader:
        read = ome_zarr.ShardReader(image, 1, written, packs_reader.read)
        monkeypatch.setattr(Path, "open", count)
        rng = np.random.default_rng(0)
        for _ in range(40):
            start = [int(rng.integers(0, n - 1)) for n in SHAPE]
            stop = [int(rng.integers(a + 1, n + 1)) for a, n in zip(start, SHAPE, strict=True)]
            box = Box(tuple(start), tuple(stop))
            np.testing.assert_array_equal(read(box), ome_zarr.read_box(array, box))
    if open_packs == 64:
        assert len(opened) == len(set(opened)) == len([*packs.iterdir()])
    assert {path.parent for path in opened} == {packs}


def test_a_pack_that_was_cut_off_is_refused(packs: Path) -> None:
    path = sorted(packs.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1])
    with PackReader(packs) as reader, pytest.raises(OSError, match=r"pack_0_0_0.bin ends after \d+ bytes; remove it"):
        for block in tile_volume(SHAPE, SHARD):
            if shard_packs.find_pack(block.index) == (0, 0, 0):
                reader.read(block.index)
