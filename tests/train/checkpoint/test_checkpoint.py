"""Checkpoints are complete or absent: kills at any moment, full disks, what is kept."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.train import loop
from hpc_neuro.train.checkpoint import saver
from hpc_neuro.train.checkpoint.folder import Marker, find_newest, read_marker
from hpc_neuro.train.checkpoint.saver import Saver
from hpc_neuro.train.config import CheckpointConfig
from tests.train.conftest import TINY, rows

CFG = CheckpointConfig(keep=2)


def marker(step: int, score: float | None = None) -> Marker:
    return Marker(step=step, world_size=1, stage=2, dtype="torch.float32", score=score)


def write(part: Path) -> None:
    (part / "training.json").write_text("{}")
    (part / "rank_00000.safetensors").write_text("whole")


def refuse(part: Path) -> None:
    (part / "rank_00000.safetensors").write_text("half")
    raise OSError("no space left on device")


def save(folder: Path, marker: Marker, write, cfg: CheckpointConfig) -> bool:
    writer = Saver(folder, cfg)
    writer.begin(marker, write)
    return writer.complete()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, dice in ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, 0.4)):
        assert save(tmp_path, marker(step, dice), write, CFG)
    assert names(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]
    assert find_newest(tmp_path) == tmp_path / "step_00000006"
    assert read_marker(tmp_path / "step_00000002").score == 0.9


def test_milestones_stay_for_good(tmp_path):
    for step in range(1, 8):
        assert save(tmp_path, marker(step), write, CheckpointConfig(keep=1, milestone=3))
    assert names(tmp_path) == ["step_00000003", "step_00000006", "step_00000007"]


def test_a_failed_save_leaves_the_last_good_one_and_says_so(tmp_path, caplog):
    assert save(tmp_path, marker(1), write, CFG)
    with caplog.at_level(logging.WARNING):
        assert not save(tmp_path, marker(2), refuse, CFG)
    assert names(tmp_path) == ["step_00000001"]
    assert "no space left" in caplog.text
    assert "step_00000001 is the last good one" in caplog.text


def test_it_is_absent_while_it_is_written_and_the_next_one_waits(tmp_path, caplog):
    """The caller goes on meanwhile; what a thread fails to write is said when the next save begins."""
    go, writer = threading.Event(), Saver(tmp_path, CFG)

    def slow(part: Path) -> None:
        assert go.wait(60)
        write(part)

    writer.begin(marker(1), slow)
    assert not writer.is_idle
    assert find_newest(tmp_path) is None
    threading.Timer(0.05, go.set).start()
    writer.begin(marker(2), refuse)
    assert find_newest(tmp_path) == tmp_path / "step_00000001"
    with caplog.at_level(logging.WARNING):
        writer.begin(marker(3), write)
    assert "the checkpoint of step 2 could not be written (no space left" in caplog.text
    assert writer.complete()
    assert names(tmp_path) == ["step_00000001", "step_00000003"]
    writer.close()


def test_what_a_run_does_meanwhile_is_not_in_the_checkpoint(tiny, tmp_path, monkeypatch):
    """Saved in the background or not, the files of a step hold the same numbers."""
    stepped, train_step, write_ranges = threading.Event(), loop.train_step, saver.write_ranges
    late = []

    def step(state, ready):
        train_step(state, ready)
        if state.step == 3:
            stepped.set()

    def wait_for_step_3(path, ranges):
        late.append(stepped.wait(60))
        write_ranges(path, ranges)

    snapshots = []
    for name, keys in (("front", ["checkpoint.background=false"]), ("back", [])):
        if name == "back":
            monkeypatch.setattr(loop, "train_step", step)
            monkeypatch.setattr(saver, "write_ranges", wait_for_step_3)
        assert train.run(tiny(tmp_path / name, *keys, "optim.steps=4", "checkpoint.keep=3")) == 0
        snapshots.append(load_file(tmp_path / name / "checkpoints/step_00000002/rank_00000.safetensors"))
    assert late == [True, True]  # of steps 2 and 4
    assert snapshots[0].keys() == snapshots[1].keys()
    assert all(torch.equal(snapshots[0][k], snapshots[1][k]) for k in snapshots[0])


def test_a_folder_without_its_marker_is_no_checkpoint(tmp_path):
    save(tmp_path, marker(1), write, CFG)
    (tmp_path / "step_00000009").mkdir(parents=True)
    assert find_newest(tmp_path) == tmp_path / "step_00000001"
    assert find_newest(tmp_path / "nowhere") is None


def test_the_rest_of_a_killed_save_is_written_over(tmp_path):
    (tmp_path / ".step_00000001.00000000.part").mkdir(parents=True)
    (tmp_path / ".step_00000001.00000000.part" / "rank_00007.safetensors").write_text("old")
    assert save(tmp_path, marker(1), write, CFG)
    assert names(tmp_path / "step_00000001") == ["checkpoint.json", "rank_00000.safetensors", "training.json"]
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bits(tiny, store, tmp_path):
    """SIGKILL while every step is saved, then to the end in this process."""
    keys = ["optim.steps=10", "checkpoint.every=1", "tracker.every=1"]
    assert train.run(tiny(tmp_path / "whole", *keys)) == 0
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hpc_neuro", "train", f"store={store}", f"out={out}", *TINY, *keys]
    job = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while find_newest(out / "checkpoints") is None or len(rows(out)) < 3:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    saved = find_newest(out / "checkpoints")
    assert saved is not None
    assert 1 <= read_marker(saved).step < 10
    assert train.run(tiny(out, *keys)) == 0
    first, second = (load_file(d / "weights/last/model.safetensors") for d in (tmp_path / "whole", out))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [r["step"] for r in rows(out)] == list(range(1, 11))
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in rows(tmp_path / "whole")]
    assert not list((out / "checkpoints").glob(".*"))


def test_a_full_disk_stops_saving_but_not_training(tiny, tmp_path, caplog):
    if os.geteuid() != 0:
        pytest.skip("mounting a tiny tmpfs needs root")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    try:
        keys = ["optim.steps=6", "checkpoint.every=2", "checkpoint.keep=3"]  # one checkpoint fits, two do not
        with caplog.at_level(logging.WARNING):
            assert train.run(tiny(tmp_path / "run", *keys)) == 0
        assert names(folder) == ["step_00000002"]
        assert "the checkpoint of step 4 could not be written" in caplog.text
        assert "step_00000002 is the last good one" in caplog.text
        assert json.loads((tmp_path / "run" / "run.json").read_text())["exit"] == 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)
