"""What the drill of training looks for is found: broken checkpoints, lost and repeated steps, other weights."""

from __future__ import annotations

import json
import shutil

import pytest

from hpc_neuro import train
from hpc_neuro.core.schema import load
from hpc_neuro.train.checkpoint import folder
from tests.faults import train_drill
from tests.helpers.tiny_store import write_store
from tests.train.conftest import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill")
    store = write_store(folder / "store", {"a": "train"})
    keys = ["optim.steps=3", "validate.every=9", "validate.crops=1", "tracker.every=1"]
    cfg = load(train.TrainConfig, None, [f"store={store}", f"out={folder / 'run'}", *TINY, *keys])
    assert train.run(cfg) == 0
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_a_whole_run_passes(run, copy):
    assert train_drill.read_newest_step(copy) == 3
    assert train_drill.step_of(copy) == 3
    train_drill.check_steps(copy)
    assert train_drill.distance(run, copy) == 0


def test_a_number_that_is_not_finite_is_found_in_any_checkpoint(copy):
    path = copy / "checkpoints/step_00000002/rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="step_00000002 is broken"):
        train_drill.read_newest_step(copy)


def test_a_step_that_is_done_twice_is_found(copy):
    path = copy / "metrics.jsonl"
    last = train_drill.rows(copy)[-1]
    path.write_text(path.read_text() + json.dumps(last) + "\n" + '{"step": 4, "torn')
    with pytest.raises(SystemExit, match=r"\[1, 2, 3, 3\]"):
        train_drill.check_steps(copy)


def test_a_checkpoint_without_its_marker_does_not_count(copy):
    (copy / "checkpoints/step_00000003" / folder.MARKER).unlink()
    assert train_drill.read_newest_step(copy) == 2
