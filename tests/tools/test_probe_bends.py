"""The distances of bent, straight and permuted tubes of a trained run, and the refusal of runs without tubes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hpc_neuro import train
from hpc_neuro.core.schema import load
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from tests.helpers.tiny_store import write_cache, write_store
from tests.train.conftest import TINY
from tools import probe_bends


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with tubes of three taps that bend."""
    folder = tmp_path_factory.mktemp("bends")
    store = write_store(folder / "store", {"a": "train", "b": "test"})
    cache = write_cache(folder / "cache", store, load_teacher(TeacherConfig(model="random")).identity)
    keys = [*TINY[:-1], "distill={taps: 3, axes: deformable}", f"cache={cache}", "teacher.model=random"]
    keys += ["crop.size=[24,48,48]", "optim.steps=2", "validate.every=9", "validate.crops=1"]
    assert train.run(load(train.TrainConfig, None, [f"store={store}", f"out={folder / 'run'}", *keys])) == 0
    return folder / "run"


def test_the_row_of_a_run(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["probe_bends", str(run), "--batch", "4"])
    assert probe_bends.main() == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["run"] == str(run)
    assert row["tubes"] > 3
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("straight_um", "bent_um", "dealt_um"))
    assert 0 <= row["bend"] <= 1


def test_taps_lie_where_the_offsets_put_them():
    """Two tubes of three taps along x: one straight, one bent by half a token in y at its last tap."""
    offsets = torch.zeros(2, 4)
    offsets[1, 1] = 0.5
    taps = probe_bends.locate_outer_taps(offsets, 2, 1)
    assert taps[0].tolist() == [[0, 0, -1], [0, 0, 1]]
    assert sorted(abs(taps[1] - taps[0]).ravel().tolist()) == [0, 0, 0, 0, 0, 0.5]


def test_a_run_without_tubes_and_a_split_without_tokens_are_refused(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["probe_bends", str(run), "--split", "val"])
    assert probe_bends.main() == 2
    assert "no token of the split 'val'" in capsys.readouterr().err
    text = (run / "config.yaml").read_text().replace("axes: deformable", "axes: straight")
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["probe_bends", str(tmp_path)])
    assert probe_bends.main() == 2
    assert "without tubes that bend" in capsys.readouterr().err
