"""Scores are the model's own, and what was unlike for the baseline is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_neuro import evaluate
from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError, load, to_plain
from hpc_neuro.tracing import TraceConfig
from tests.evaluate.conftest import write_predictions


def add_to_entries(folder: Path, **entry: object) -> None:
    """More in the entries of predictions.json, as infer writes it."""
    index = json.loads((folder / "predictions.json").read_text())
    (folder / "predictions.json").write_text(json.dumps({k: {**v, **entry} for k, v in index.items()}))


def test_a_tree_that_was_corrected_by_hand_is_not_scored_as_the_models(store: Path, tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p", store)
    index = json.loads((predictions / "predictions.json").read_text())
    for entry in index.values():
        entry["sha256"] = {"swc_voxel": files.sha256(predictions / entry["swc_voxel"])}
    (predictions / "predictions.json").write_text(json.dumps(index))
    keys = [f"store={store}", f"predictions={predictions}", f"out={tmp_path / 'e'}", "draws=100", "pictures=0"]
    cfg = load(evaluate.EvaluateConfig, None, keys)
    evaluate.forecast(cfg)
    tree = predictions / next(iter(index.values()))["swc_voxel"]
    tree.write_text(tree.read_text() + "# corrected\n")
    with pytest.raises(InputError, match="was changed after `infer` wrote it, .*`hpc-neuro infer verify"):
        evaluate.run(cfg)
    assert not (tmp_path / "e").exists()


def test_what_was_not_alike_for_otsu_is_said_above_the_numbers(store: Path, tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p", store)
    add_to_entries(predictions, roots=[[1.0, 2.0, 3.0]])
    keys = [f"store={store}", f"predictions={predictions}", f"out={tmp_path / 'e'}", "draws=100", "pictures=0"]
    assert evaluate.run(load(evaluate.EvaluateConfig, None, keys)) == 0
    assert "traced from the store&#x27;s root, the model&#x27;s from others or none" in (
        tmp_path / "e" / "report.html"
    ).read_text().replace("'", "&#x27;")


def test_a_random_teacher_is_said_in_log_and_report(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictions = write_predictions(tmp_path / "p", store)
    config = {"model": str(tmp_path / "train"), "store": str(store)}
    (predictions / "run.json").write_text(json.dumps({"verb": "infer", "config": config}))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "run.json").write_text(
        json.dumps({"verb": "train", "config": {"teacher": {"model": "random"}}})
    )
    cfg = evaluate.EvaluateConfig(store=store, predictions=predictions, out=tmp_path / "out", pictures=0, draws=100)
    with caplog.at_level("WARNING", "hpc_neuro"):
        assert evaluate.run(cfg) == 0
    assert "random weights" in caplog.text
    assert "The teacher had random weights" in (cfg.out / "report.html").read_text()


def test_settings_of_the_tracer_that_this_version_does_not_take_are_refused(store: Path, tmp_path: Path) -> None:
    """Obeying the advice leaves a record of the present settings, with which Otsu's mask is traced too."""
    predictions = write_predictions(tmp_path / "p", store)
    files.write_json(predictions / "run.json", {"verb": "infer", "config": {"trace": {"old": 1}}})
    keys = [f"store={store}", f"predictions={predictions}", f"out={tmp_path / 'e'}", "draws=100", "pictures=0"]
    with pytest.raises(InputError, match="does not take .*old.* again, which keeps the probabilities"):
        evaluate.run(load(evaluate.EvaluateConfig, None, keys))

    files.write_json(predictions / "run.json", {"verb": "infer", "config": {"trace": to_plain(TraceConfig())}})
    assert evaluate.run(load(evaluate.EvaluateConfig, None, keys)) == 0
