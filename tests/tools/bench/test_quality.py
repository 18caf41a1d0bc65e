"""The comparison of networks trains each alike, scores neurons held out, and goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_neuro.data.store import Store
from tests.helpers.tiny_store import write_store
from tools.bench import held_out, quality
from tools.bench.quality import Budget

BUDGET = Budget(crop=(16, 32, 32), batch=2, seconds=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("quality") / "store", {"a": "train", "b": "train", "c": "test"})


def run(store: Path, out: Path, *keys: str) -> int:
    size = ["--crop", "16", "32", "32", "--seconds", "0.2", "--only", "c", "--seeds", "0"]
    return quality.main(["--store", str(store), "--out", str(out), "--device", "cpu", *size, *keys])


@pytest.mark.slow
def test_all_networks_are_scored_and_nothing_is_done_twice(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dynamic_network_architectures")
    assert run(store, tmp_path) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(facts["mean"]) == {"student", "convolutions", "residual_unet", "unetr"}
    assert set(facts["difference"]) == {"student - convolutions", "student - residual_unet", "student - unetr"}
    for metrics in facts["mean"].values():
        assert set(metrics) == set(held_out.METRICS)
        assert all(0 <= interval["mean"] <= 1 for interval in metrics.values())
    assert (tmp_path / "quality.svg").read_text().startswith("<svg")

    monkeypatch.setattr(quality, "train", None)
    assert run(store, tmp_path) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"] == facts["scores"]
    assert run(store, tmp_path, "--batch", "3") == 2
    assert "other settings" in capsys.readouterr().err


def test_all_networks_see_the_same_crops(store: Path) -> None:
    first, again = (quality.iterate_batches(Store(store), ["a", "b"], 0, BUDGET) for _ in range(2))
    other = quality.iterate_batches(Store(store), ["a", "b"], 1, BUDGET)
    for _ in range(2):
        image = next(first).image
        torch.testing.assert_close(image, next(again).image)
        assert not torch.equal(image, next(other).image)


def test_stages_halve_fine_axes_first() -> None:
    strides, kernels = quality.plan_stages((16, 96, 96))
    assert strides[:2] == [[1, 1, 1], [1, 2, 2]]
    assert kernels[0] == [1, 3, 3]
    sizes = np.array((16, 96, 96)) // np.prod(strides, axis=0)
    assert sizes.min() >= 4
    strides, kernels = quality.plan_stages((32, 32, 32))
    assert strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert all(kernel == [3, 3, 3] for kernel in kernels)


def test_the_threshold_is_that_of_the_best_dice() -> None:
    probability = np.array([[[0.1, 0.31, 0.38, 0.9]]], dtype=np.float32)
    mask = np.array([[[0, 0, 1, 255]]], dtype=np.uint8)
    assert held_out.choose_threshold(probability, mask) == pytest.approx(0.35)
    perfect = held_out.score_mask(np.where(mask == 1, 0.9, 0.1).astype(np.float32), mask, 0.5)
    assert perfect["dice"] == perfect["average_precision"] == 1.0


def test_schedules_begin_high_and_end_low() -> None:
    assert quality.compute_polynomial_rate(0.0) == 1.0
    assert quality.compute_polynomial_rate(1.0) == quality.compute_cosine_rate(1.0) == 0.0
    assert quality.compute_cosine_rate(0.1) == pytest.approx(1.0)


def test_faults_are_one_sentence(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, tmp_path, "--only", "nobody") == 2
    assert "the store has no nobody" in capsys.readouterr().err
    small = write_store(tmp_path / "small", {"a": "train", "b": "test"})
    assert run(small, tmp_path, "--only", "a") == 2
    assert "at least 3" in capsys.readouterr().err
