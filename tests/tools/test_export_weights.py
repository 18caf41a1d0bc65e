"""Weights from a checkpoint: those that train itself exports, from ranges cut as several ranks cut them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.models.student import load_student
from hpc_neuro.train.checkpoint import folder
from hpc_neuro.train.checkpoint.tensor_files import TensorRange, rank_file, write_ranges
from tests.helpers.tiny_store import write_store
from tests.train.conftest import TINY
from tools.export_weights import export_student


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    store = write_store(folder / "store", {"a": "train", "b": "val"})
    keys = [f"store={store}", f"out={folder / 'run'}", *TINY, "optim.steps=3", "optim.lr=0.01", "ema.window=0.9"]
    assert train.run(load(train.TrainConfig, None, keys)) == 0
    return folder / "run"


def test_the_newest_checkpoint_gives_what_train_exported(run, tmp_path):
    export_student(run, tmp_path / "out")
    first, second = (load_file(d / "model.safetensors") for d in (run / "weights/last", tmp_path / "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    student, meta = load_student(tmp_path / "out")
    expected = load_student(run / "weights/last")[1]
    assert {k: meta[k] for k in expected} == expected
    assert student(torch.rand(1, 1, 16, 32, 32)).logits.shape == (1, 1, 16, 32, 32)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine exists and holds no exported student"):
        export_student(run, tmp_path / "mine")
    export_student(run, tmp_path / "out")


def test_ranges_of_several_ranks_are_put_together_and_what_is_missing_is_said(run, tmp_path):
    newest = folder.find_newest(run / "checkpoints")
    cut = tmp_path / "step_00000003"
    cut.mkdir()
    for name in (folder.MARKER, folder.TRAINING):
        (cut / name).write_bytes((newest / name).read_bytes())
    # Its files are none of those that the marker has the checksums of.
    marker = json.loads((cut / folder.MARKER).read_text())
    (cut / folder.MARKER).write_text(json.dumps({**marker, "files": {}}))
    ranges: tuple[list[TensorRange], list[TensorRange]] = ([], [])
    for key, values in load_file(rank_file(newest, 0)).items():
        kind, start, name = key.split("/", 2)
        at = values.numel() // 3
        ranges[0].append(TensorRange(kind, name, int(start), values[:at]))
        ranges[1].append(TensorRange(kind, name, int(start) + at, values[at:]))
    for rank, rank_ranges in enumerate(ranges):
        write_ranges(rank_file(cut, rank), rank_ranges)
    for plain in (False, True):
        export_student(newest, tmp_path / "whole", plain)
        export_student(cut, tmp_path / "cut", plain)
        first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "cut"))
        assert all(torch.equal(first[k], second[k]) for k in first)
    rank_file(cut, 1).unlink()
    with pytest.raises(InputError, match="lacks"):
        export_student(cut, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    command = [sys.executable, "-m", "tools.export_weights", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "is no complete checkpoint" in done.stderr
