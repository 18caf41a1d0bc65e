"""Validation scores against a direct count, and against ranks that share the crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core import distributed
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.types import Batch
from hpc_neuro.data.crops import CropConfig, draw_validation_boxes
from hpc_neuro.data.dataset import read_volume_points
from hpc_neuro.data.store import Store
from hpc_neuro.train.validate import CropValidator, VolumeValidator, compute_score
from tests.helpers.tiny_store import write_store

CPU = torch.device("cpu")


def histogram(probability: np.ndarray, truth: np.ndarray) -> torch.Tensor:
    bins = (torch.from_numpy(probability).float() * 1000).long()
    return torch.stack([torch.bincount(bins[torch.from_numpy(truth == t)], minlength=1001) for t in (0, 1)])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_scores_equal_a_direct_count(seed, share):
    draw = np.random.default_rng(seed)
    truth = (draw.random(500) < share).astype(np.uint8)
    probability = np.clip(0.4 * truth + draw.normal(0.3, 0.2, 500), 0, 1).astype(np.float32)
    score = compute_score(histogram(probability, truth))

    def dice(threshold: float) -> float:
        seen = (torch.from_numpy(probability) * 1000).long().numpy() >= round(threshold * 1000)
        total = seen.sum() + truth.sum()
        return 2 * (seen & (truth == 1)).sum() / total if total else 1.0

    assert score.dice == pytest.approx(dice(0.5))
    grid = [i / 1000 for i in range(100, 901, 25)]
    assert score.dice_best == pytest.approx(max(dice(t) for t in grid))
    assert score.dice_best == pytest.approx(dice(score.threshold))
    seen = probability >= 0.5
    if seen.any() and truth.any():
        assert score.precision == pytest.approx(truth[seen].mean(), abs=0.02)
        assert score.recall == pytest.approx(seen[truth == 1].mean(), abs=0.02)


def test_nothing_predicted_where_there_is_something_is_a_collapse():
    truth = np.array([1] * 100 + [0] * 900, dtype=np.uint8)
    assert compute_score(histogram(np.zeros(1000, np.float32), truth)).is_collapsed
    assert not compute_score(histogram(truth.astype(np.float32), truth)).is_collapsed
    assert compute_score(histogram(truth.astype(np.float32), truth)).dice == 1.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("data") / "store", {"a": "val", "b": "val"}))


def boxes(store: Store, count: int) -> list:
    return draw_validation_boxes(
        read_volume_points(store, store.ids), CropConfig(size=(16, 32, 32)), (8, 16, 16), count, 0
    )


def test_a_perfect_guess_scores_one_and_unlabelled_voxels_do_not_count(store):
    score = CropValidator(store, boxes(store, 4))(lambda b: torch.where(b.mask == 1, 20.0, -20.0), CPU)
    assert (score.dice, score.precision, score.recall) == (1.0, 1.0, 1.0)
    padded = [("a", b.shift((10, 30, 30))) for _, b in boxes(store, 4)]
    score = CropValidator(store, padded)(lambda b: torch.where(b.mask == 0, -20.0, 20.0), CPU)
    assert score.dice == 1.0


def test_ranks_share_the_crops_and_find_the_same(store, monkeypatch):
    all_boxes = boxes(store, 5)

    def guess(b: Batch) -> torch.Tensor:
        return 8 * b.image - 3

    whole = CropValidator(store, all_boxes)(guess, CPU)
    counts, passes = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        calls: list[int] = []
        kept: list[torch.Tensor] = []
        monkeypatch.setattr("hpc_neuro.train.validate.compute_score", lambda c, kept=kept: kept.append(c))
        CropValidator(store, all_boxes)(lambda b, calls=calls: calls.append(int(b.index)) or guess(b), CPU)
        counts.append(kept[0])
        passes.append(len(calls))
    assert passes == [2, 2, 2]  # a rank that ran fewer would leave the others waiting in ZeRO-3
    assert compute_score(sum(counts)) == whole


def test_every_labelled_voxel_of_a_volume_is_scored_once(store, monkeypatch):
    """Also of one that is smaller than a window along an axis, and on several ranks."""
    for window in ((16, 32, 32), (8, 16, 48), (24, 64, 64)):
        kept: list[torch.Tensor] = []
        monkeypatch.setattr("hpc_neuro.train.validate.compute_score", lambda c, kept=kept: kept.append(c))
        for rank, ranks in ((0, 1), (0, 3), (1, 3), (2, 3)):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
            VolumeValidator(store, store.ids, window)(lambda b: 8 * b.image - 3, CPU)
        masks = [store[i].mask(Box.whole(store[i].shape)) for i in store.ids]
        assert kept[0].sum(-1).tolist() == [[int((mask == truth).sum()) for truth in (0, 1)] for mask in masks]
        by_rank = [counts for counts in kept if counts.ndim == 3]
        assert torch.equal(by_rank[0], sum(by_rank[1:]))


def test_each_volume_is_scored_by_itself_and_the_mean_at_one_threshold(store):
    """Every neurite is found in `a`, none in `b`, and a voxel in ten below 0.5 in both: `b` alone would want them."""

    def guess(batch):
        spread = torch.arange(batch.mask.numel()).view(batch.mask.shape) % 10 == 0
        wrong = torch.where(spread, -0.3, -9.0)
        return torch.where(batch.mask == 1, 1.0, wrong) if guess.volume == "a" else wrong

    scores = {}
    for guess.volume in store.ids:
        scores[guess.volume] = VolumeValidator(store, [guess.volume], (16, 32, 32))(guess, CPU)[0]
    assert (scores["a"].dice, scores["b"].dice) == (1.0, 0.0)
    calls = iter(["a"] * 48 + ["b"] * 48)  # windows

    def both(batch):
        guess.volume = next(calls)
        return guess(batch)

    mean, own = VolumeValidator(store, ["a", "b"], (16, 32, 32))(both, CPU)
    assert own == scores
    assert mean.dice == mean.recall == mean.dice_best == 0.5
    assert own["b"].threshold < 0.45 < mean.threshold
    assert own["b"].dice_best > 0


def test_a_voxel_of_a_volume_is_seen_with_context(store):
    """Only by windows within the volume, and away from their border unless the volume ends there."""
    shape = store["a"].shape
    seen = []

    def watch(b):
        labelled = (b.mask[0, 0] != 255).nonzero()
        seen.append((labelled.min(0).values.tolist(), labelled.max(0).values.tolist()))
        return b.image

    VolumeValidator(store, ["a"], (16, 32, 32))(watch, CPU)
    inner = [low for low, _ in seen if low[1] > 0]
    assert len(seen) == 3 * 4 * 4
    assert all(low[1] >= 8 for low in inner)
    assert all(n > w for n, w in zip(shape, (16, 32, 32), strict=True))


def test_the_folder_of_a_store_may_go_after_the_crops_are_read(tmp_path: Path):
    store = Store(write_store(tmp_path / "store", {"a": "val"}))
    validator = CropValidator(store, boxes(store, 2))
    store.close()
    (tmp_path / "store" / "a.h5").unlink()
    assert 0 <= validator(lambda b: b.image - 0.5, CPU).dice <= 1
