"""The feature cache: area resampling against brute force, sound shards, processes, refusals."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import feature_cache as fc
from hpc_neuro.data.feature_cache import hash_manifest, resample
from hpc_neuro.data.orientation import VIEW_AXES

SHAPE = (12, 32, 40)
TEACHER = {"name": "t", "sha256": "0"}


def build(folder: Path, cell: tuple[float, float] = (8, 8), stride: int = 4, slab: int = 2) -> dict[str, np.ndarray]:
    """A cache of one volume `v`, two layers, three channels, random features; returns them as [S, L, h, w, D]."""
    rng = np.random.default_rng(0)
    whole, records = {}, []
    for view in ("z", "y", "x"):
        across, down, right = VIEW_AXES[view]
        count = -(-SHAPE[across] // stride)
        rows, columns = (int(np.ceil(SHAPE[a] / c)) for a, c in zip((down, right), cell, strict=True))
        whole[view] = rng.normal(size=(count, 2, rows, columns, 3)).astype(np.float16)
        for first in range(0, count, slab):
            n = min(slab, count - first)
            unit = fc.ShardSpec("v", view, first * stride, stride, n, rows, columns, cell)
            writer = fc.ShardWriter(folder / unit.name, unit, 2, 3, "key", tile=32)
            for i in range(n):
                writer.write(slice(i, i + 1), slice(0, rows), slice(0, columns), whole[view][first + i : first + i + 1])
            writer.finish()
            records.append(fc.read_shard_record(folder / unit.name, unit))
    facts = {"teacher": TEACHER, "layers": [0, 1], "views": ["z", "y", "x"], "dim": 3, "volumes": {"v": "digest"}}
    fc.write_manifest(folder, facts, records)
    return whole


def brute_force(
    values: np.ndarray, view: str, cell: tuple[float, float], stride: int, box: Box, patch: int
) -> np.ndarray:
    """Spread every cell over quarter voxels, average them under each target. Only where the box lies inside."""
    across, down, right = VIEW_AXES[view]
    sizes = {across: stride, down: cell[0], right: cell[1]}
    dense = np.moveaxis(values.astype(np.float64), (1, 4), (0, 1))  # [L, D, S, h, w]
    for place, axis in enumerate((across, down, right)):
        cells = (np.arange(SHAPE[axis] * 4) + 0.5) / 4 / sizes[axis]
        dense = dense.take(cells.astype(int), 2 + place)
    dense = np.moveaxis(dense, (2, 3, 4), (2 + across, 2 + down, 2 + right))
    dense = dense[(slice(None), slice(None), *(slice(a * 4, b * 4) for a, b in zip(box.start, box.stop, strict=True)))]
    grid = [n // patch for n in box.shape]
    split = dense.reshape(2, 3, grid[0], patch * 4, grid[1], patch * 4, grid[2], patch * 4)
    return split.mean(axis=(3, 5, 7))


@pytest.mark.parametrize(("cell", "stride"), [((8, 8), 4), ((4, 4), 1), ((2.5, 16), 3), ((8, 8), 16)])
def test_a_crop_is_the_area_average_of_its_cells(tmp_path: Path, cell: tuple[float, float], stride: int) -> None:
    whole = build(tmp_path, cell, stride)
    box = Box((4, 8, 0), (12, 24, 40))
    crop = fc.FeatureCache(tmp_path).read_crop("v", box, (4, 4, 4))
    for view, values in whole.items():
        wanted = brute_force(values, view, cell, stride, box, 4)
        assert crop[view].shape == wanted.shape
        np.testing.assert_allclose(crop[view].float().numpy(), wanted, atol=2e-3)


def test_the_students_own_grid_passes_through_unchanged(tmp_path: Path) -> None:
    whole = build(tmp_path, (4, 4), 4)
    crop = fc.FeatureCache(tmp_path).read_crop("v", Box((4, 8, 16), (12, 16, 32)), (4, 4, 4))["z"]
    wanted = torch.from_numpy(whole["z"][1:3, :, 2:4, 4:8]).permute(1, 4, 0, 2, 3)
    assert torch.equal(crop, wanted)


def test_past_the_end_the_last_cell_goes_on(tmp_path: Path) -> None:
    build(tmp_path, (4, 4), 4)
    crop = fc.FeatureCache(tmp_path).read_crop("v", Box((8, 28, 36), (16, 36, 44)), (4, 4, 4))
    for values in crop.values():
        assert torch.equal(values[..., 1, :, :], values[..., 0, :, :])
        assert torch.equal(values[..., 1, :], values[..., 0, :])
        assert torch.isfinite(values).all()


@settings(max_examples=200)
@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 5), st.floats(0.7, 20), st.integers(1, 40))
def test_weights_are_shares(start: int, tokens: int, patch: int, cell: float, count: int) -> None:
    box = Box((start * patch, 0, 0), ((start + tokens) * patch, 1, 1))
    picked, weights = resample.weigh_cells(box, (patch, 1, 1), 0, cell, count)
    assert 0 <= picked.start < picked.stop <= count
    assert weights.shape == (tokens, picked.stop - picked.start)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(tokens))


def test_statistics_are_those_of_all_tokens(tmp_path: Path) -> None:
    whole = build(tmp_path)
    cache = fc.FeatureCache(tmp_path)
    for view, values in whole.items():
        flat = values.astype(np.float64).transpose(1, 4, 0, 2, 3).reshape(2, 3, -1)
        np.testing.assert_allclose(cache.mean[view], flat.mean(2), atol=1e-6)
        np.testing.assert_allclose(cache.std[view], flat.std(2), atol=1e-6)


def test_off_the_token_grid_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(InputError, match="does not lie on the token grid"):
        fc.FeatureCache(tmp_path).read_crop("v", Box((1, 0, 0), (5, 4, 4)), (4, 4, 4))


def test_a_missing_or_short_shard_and_a_missing_manifest_are_named(tmp_path: Path) -> None:
    build(tmp_path)
    shard = next(tmp_path.glob("v.y.*.h5"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])

    with pytest.raises(InputError, match=shard.name):
        fc.FeatureCache(tmp_path)

    shard.unlink()
    with pytest.raises(InputError, match="lacks 1 of its"):
        fc.FeatureCache(tmp_path)

    (tmp_path / fc.MANIFEST).unlink()
    with pytest.raises(InputError, match="hpc-neuro precompute"):
        fc.FeatureCache(tmp_path)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    build(tmp_path)
    shard = next(tmp_path.glob("v.z.*.h5"))

    assert fc.is_shard_sound(shard)
    content = bytearray(shard.read_bytes())
    place = content.find(build_bytes(tmp_path))
    content[place] ^= 1
    shard.write_bytes(content)

    assert not fc.is_shard_sound(shard)
    assert fc.read_shard_key(tmp_path / "nothing.h5") is None


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_tiles_are_hashed_as_they_come_however_many_slices_at_once(tmp_path: Path, batch: int) -> None:
    unit = fc.ShardSpec("v", "z", 0, 1, 5, 10, 7, (4.0, 4.0))
    values = np.random.default_rng(0).normal(size=(5, 2, 10, 7, 3)).astype(np.float16)
    writer = fc.ShardWriter(tmp_path / "v.h5", unit, 2, 3, "key", tile=4)
    digest = hashlib.sha256()
    for rows, columns in fc.iter_tiles(10, 7, 4):
        for first in range(0, 5, batch):
            slices = slice(first, min(first + batch, 5))
            piece = values[slices, :, rows, columns]
            digest.update(piece.tobytes())
            writer.write(slices, rows, columns, piece)
    writer.finish()

    np.testing.assert_array_equal(
        fc.read_shard_values(tmp_path / "v.h5", (slice(0, 5), slice(0, 10), slice(0, 7))), values
    )
    assert fc.is_shard_sound(tmp_path / "v.h5")
    assert fc.read_shard_record(tmp_path / "v.h5", unit)["sha256"] == digest.hexdigest()


def test_features_out_of_turn_and_a_shard_that_lacks_some_are_errors(tmp_path: Path) -> None:
    unit, values = fc.ShardSpec("v", "z", 0, 1, 2, 4, 8, (4.0, 4.0)), np.zeros((1, 2, 4, 4, 3), np.float16)
    writer = fc.ShardWriter(tmp_path / "v.h5", unit, 2, 3, "key", tile=4)
    writer.write(slice(0, 1), slice(0, 4), slice(0, 4), values)

    with pytest.raises(ValueError, match="is to be finished without"):
        writer.finish()
    with pytest.raises(ValueError, match="were to come"):
        writer.write(slice(1, 2), slice(0, 4), slice(4, 8), values)

    writer.close()
    assert not fc.is_shard_sound(tmp_path / "v.h5")


def build_bytes(folder: Path) -> bytes:
    """Some feature bytes as they stand in the first shard of view z."""
    import h5py

    with h5py.File(next(folder.glob("v.z.*.h5"))) as file:
        return bytes(file["features"][0, 0, 0, 0].tobytes())


def test_another_teacher_volume_view_or_image_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    cache = fc.FeatureCache(tmp_path)
    cache.require_match({"v": "digest"}, TEACHER, ["z"])

    with pytest.raises(fc.CacheMismatch, match="teacher.model=t"):
        cache.require_match({"v": "digest"}, {"name": "other"}, ["z"])
    with pytest.raises(fc.CacheMismatch, match="no features of w"):
        cache.require_match({"w": "digest"}, TEACHER, ["z"])
    with pytest.raises(fc.CacheMismatch, match="other images of v"):
        cache.require_match({"v": "changed"}, TEACHER, ["z"])

    cache.views = ("z",)
    with pytest.raises(fc.CacheMismatch, match="no view x"):
        cache.require_match({"v": "digest"}, TEACHER, ["z", "x"])


def read(cache: fc.FeatureCache) -> float:
    return float(cache.read_crop("v", Box((0, 0, 0), (4, 8, 8)), (4, 8, 8))["x"].float().sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_open_cache_goes_to_other_processes(tmp_path: Path, method: str) -> None:
    build(tmp_path)
    cache = fc.FeatureCache(tmp_path)
    here = read(cache)
    with multiprocessing.get_context(method).Pool(2 if method == "fork" else 1) as pool:  # others import torch anew
        assert pool.map(read, [cache] * 4) == [here] * 4
    assert read(cache) == here


def test_a_repair_by_another_version_does_not_make_another_cache() -> None:
    """What trainings remember of a cache is what decides its features."""
    manifest = {"teacher": {"sha256": "1a"}, "shards": [{"file": "a", "sha256": "2b"}], "store": "/here", "code": "1"}
    same = hash_manifest({**manifest, "store": "/there", "code": "2"})
    assert same == hash_manifest(manifest)
    assert hash_manifest({**manifest, "shards": [{"file": "a", "sha256": "3c"}]}) != same
    assert hash_manifest({**manifest, "teacher": {"sha256": "4d"}}) != same
