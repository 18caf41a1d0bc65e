"""Reliability of a confidence: counted by hand, and independent of how an edge is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro import evaluate
from hpc_neuro.core.morphology import build_tree
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data import swc
from hpc_neuro.data.store import Store
from hpc_neuro.evaluate import confidence
from hpc_neuro.evaluate.confidence import (
    ConfidenceBin,
    JudgedCable,
    bin_by_confidence,
    compute_calibration_error,
    judge_cable,
)
from hpc_neuro.evaluate.predictions import PredictionFolder
from tests.evaluate.conftest import write_predictions


def test_a_table_by_hand() -> None:
    lengths, confidence = np.array([2.0, 1.0, 3.0, 4.0, 0.0]), np.array([0.95, 1.0, 0.91, 0.2, 0.5])
    bins = bin_by_confidence(JudgedCable(lengths, confidence, np.array([True, False, True, True, True])))
    assert [(b.low, b.high, b.cable) for b in bins] == [(0.2, 0.3, 4.0), (0.9, 1.0, 6.0)]
    assert bins[0].right == 1.0
    assert bins[1].right == pytest.approx(5 / 6)
    assert bins[1].confidence == pytest.approx((2 * 0.95 + 1 + 3 * 0.91) / 6)

    expected = 0.4 * 0.8 + 0.6 * abs(5 / 6 - bins[1].confidence)
    assert compute_calibration_error(bins) == pytest.approx(expected)
    assert compute_calibration_error([]) == 0


def test_cable_is_judged_piece_by_piece_with_the_confidence_of_its_edge() -> None:
    """Half of a long edge lies on gold; an edge of low confidence lies off it."""
    tree = build_tree(np.array([[0, 0, 0], [0, 0, 20], [0, 9, 20], [0, 0, 0], [0, 0, 4]]), np.array([-1, 0, 1, -1, 3]))
    gold = build_tree(np.array([[0, 0, 0], [0, 0, 10]]), np.array([-1, 0]))
    cable = judge_cable(tree, np.array([1.0, 0.9, 0.3, 1.0, 0.7]), gold, 2.0)
    lengths, confidence, is_right = cable.lengths, cable.confidence, cable.is_right
    assert lengths.sum() == pytest.approx(20 + 9 + 4)
    assert lengths[confidence == 0.9].sum() == pytest.approx(20)
    assert lengths[(confidence == 0.9) & is_right].sum() == pytest.approx(12)
    assert not is_right[confidence == 0.3].any()
    assert is_right[confidence == 0.7].all()


def test_a_confidence_that_is_the_chance_of_being_right_is_calibrated() -> None:
    draw = np.random.default_rng(0)
    chance = draw.random(40_000)
    bins = bin_by_confidence(JudgedCable(np.ones(40_000), chance, draw.random(40_000) < chance))
    assert len(bins) == 10
    assert compute_calibration_error(bins) < 0.02

    too_low = bin_by_confidence(JudgedCable(np.ones(40_000), chance**3, draw.random(40_000) < chance))
    assert compute_calibration_error(too_low) > 0.15


def test_the_confidence_is_compared_with_gold(finished_run: Path) -> None:
    """The perfect model is right throughout, and its confidence is lower than that."""
    table = json.loads((finished_run / "metrics.json").read_text())["confidence"]
    assert [(b["low"], b["right"]) for b in table["bins"]] == [(0.7, 1.0)]
    assert table["bins"][0]["cable"] > 10
    assert table["error"] == pytest.approx(1 - table["bins"][0]["confidence"])

    # One bin is no curve.
    page = (finished_run / "report.html").read_text()
    assert "0.7 to 0.8" in page
    assert "Confidence and share that is right" not in page

    two = [ConfidenceBin(low=low, high=low + 0.1, cable=9.0, confidence=low, right=low) for low in (0.7, 0.8)]
    cfg = load(evaluate.EvaluateConfig, None, ["store=a", "predictions=b", "out=c"])
    assert "Confidence and share that is right" in confidence.render_section({"confidence": two}, cfg)


def test_the_confidence_of_flips_is_compared_with_gold(store: Path, tmp_path: Path) -> None:
    folder = write_predictions(tmp_path / "p", store)
    index = json.loads((folder / "predictions.json").read_text())
    cfg = load(evaluate.EvaluateConfig, None, [f"store={store}", f"predictions={folder}", "out=c"])

    def write_confidence(name: str, header: str, row: str, more: int = 0) -> None:
        nodes = len(swc.read(folder / index[name]["swc_voxel"])) + more
        (folder / f"{name}.csv").write_text("\n".join([header, *[row] * nodes]))
        index[name]["confidence"] = f"{name}.csv"
        (folder / "predictions.json").write_text(json.dumps(index))

    def measure() -> dict[str, list[ConfidenceBin]]:
        return confidence.measure_reliability(cfg, Store(store), ("a", "b"), PredictionFolder(folder, ("a", "b"), cfg))

    assert set(measure()) == {"confidence"}

    # Of one volume alone, the flips could not be compared with the others.
    header = "node,confidence,disagreement,mean"
    write_confidence("a", header, "1,0.78,0.25,0.95")
    write_confidence("b", "node,confidence", "1,0.78")
    assert set(measure()) == {"confidence"}

    write_confidence("b", header, "1,0.78,0.25,0.85")
    bins = measure()
    assert [(b.low, b.right) for b in bins["mean"]] == [(0.8, 1.0), (0.9, 1.0)]
    assert [(b.low, b.confidence) for b in bins["agreement"]] == [(0.7, pytest.approx(0.75))]
    assert sum(b.cable for b in bins["mean"]) == pytest.approx(sum(b.cable for b in bins["confidence"]))
    table = confidence.build_json(bins)
    assert set(table) == {"bins", "error", "views"}
    assert table["views"]["agreement"]["error"] == pytest.approx(0.25)
    assert "Mean of all flips" in confidence.render_section(bins, cfg)

    write_confidence("b", header, "1,0.78,0.25,0.85", more=1)
    with pytest.raises(InputError, match="but the tree has"):
        measure()
    write_confidence("b", header, "1,0.78,often,0.85")
    with pytest.raises(InputError, match="cannot be read as confidences"):
        measure()
