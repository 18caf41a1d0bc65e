"""Whole volumes at milestones, and what a stop leaves unscored."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest

from hpc_neuro import train
from hpc_neuro.train import loop
from tests.train.conftest import rows


def test_whole_volumes_are_scored_and_kept_at_milestones(tiny, tmp_path, caplog):
    keys = ["optim.steps=4", "checkpoint.every=0", "checkpoint.milestone=2", "checkpoint.keep=1", "validate.every=9"]
    with caplog.at_level(logging.INFO):
        assert train.run(tiny(tmp_path / "run", *keys)) == 0
    scores = rows(tmp_path / "run", "volumes")
    assert [row["step"] for row in scores] == [2, 4]
    assert all(row["volumes"] == 1 and 0 <= row["dice"] <= row["dice_best"] <= 1 for row in scores)
    assert all(row["by_volume"].keys() == {"c"} and row["by_volume"]["c"]["dice"] == row["dice"] for row in scores)
    assert "step 2: 1 whole volume in" in caplog.text
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004"]


def test_what_a_stop_left_unscored_is_scored_by_the_next_start(tiny, tmp_path, monkeypatch):
    """Stopped in step 2, which is a milestone and to be validated; the next start is killed before it has saved."""
    step, out = loop.train_step, tmp_path / "run"
    keys = ["optim.steps=3", "checkpoint.every=0", "checkpoint.milestone=2", "validate.every=2"]

    def terminate(state, ready):
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(state, ready)

    def crash(state, ready):
        raise RuntimeError("power cut")

    def read_score():
        return json.loads((out / "checkpoints/step_00000002/checkpoint.json").read_text())["score"]

    monkeypatch.setattr(loop, "train_step", terminate)
    assert train.run(tiny(out, *keys)) == 75
    assert [row["step"] for kind in ("val", "volumes") for row in rows(out, kind)] == [0]
    assert read_score() is None
    monkeypatch.setattr(loop, "train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.run(tiny(out, *keys))
    scores = [rows(out, kind)[-1] for kind in ("val", "volumes")]
    assert [row["step"] for row in scores] == [2, 2]
    assert read_score() == scores[0]["dice_best"]
    monkeypatch.setattr(loop, "train_step", step)
    assert train.run(tiny(out, *keys)) == 0
    assert [row["step"] for row in rows(out, "val")] == [0, 2, 3]
    assert [row["step"] for row in rows(out, "volumes")] == [2]
    assert rows(out, "val")[1] == scores[0]
