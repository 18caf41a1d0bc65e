"""Sending offline runs. There is no server here: a stand-in for the `wandb` command notes what it is called with."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hpc_neuro.train.config import TrackerConfig
from hpc_neuro.train.tracker import WandbLogger, get_wandb_id
from tools import sync_wandb


def make(folder: Path, *names: str) -> None:
    for name in names:
        run = folder / "wandb" / name
        run.mkdir(parents=True)
        (run / f"run-{name.rpartition('-')[2]}.wandb").write_text("rows")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `wandb` that notes its words, marks files as sent as the real one does, and fails for the run `bad`."""
    script = tmp_path / "bin" / "wandb"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *-bad*) echo "no network" >&2; exit 1;; esac\n'
        'for last in "$@"; do for f in "$last"/*.wandb; do [ -e "$f" ] && : > "$f.synced"; done; done\nexit 0\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return tmp_path / "calls"


def test_the_files_of_a_run_go_together_and_in_order_and_only_once(tmp_path, calls, capsys):
    study = tmp_path / "study"
    make(study / "trials/0000/train", "offline-run-20260102_000000-aaa", "offline-run-20260101_000000-aaa")
    make(study / "trials/0001/train", "offline-run-20260101_000000-bbb", "run-20260103_000000-bbb")
    assert sync_wandb.main([str(study), "--entity", "lab"]) == 0
    lines = calls.read_text().splitlines()
    assert len(lines) == 2
    first = lines[0].split()
    assert first[:4] == ["sync", "--include-online", "--entity", "lab"]
    assert [Path(p).name[-19:] for p in first[4:]] == ["20260101_000000-aaa", "20260102_000000-aaa"]
    assert [Path(p).name for p in lines[1].split()[4:]] == [
        "offline-run-20260101_000000-bbb",
        "run-20260103_000000-bbb",
    ]
    assert "2 runs sent, 0 not" in capsys.readouterr().out
    assert sync_wandb.main([str(study)]) == 0
    assert len(calls.read_text().splitlines()) == 2, "what is sent is not sent again"
    time.sleep(0.02)
    grown = study / "trials/0001/train/wandb/offline-run-20260101_000000-bbb/run-bbb.wandb"
    grown.write_text("more rows")
    os.utime(grown, (time.time() + 5, time.time() + 5))
    assert list(sync_wandb.find_runs(study)) == ["bbb"], "one that grew since is"


def test_a_run_that_cannot_be_sent_is_named_and_the_others_go(tmp_path, calls, capsys):
    make(tmp_path / "a", "offline-run-20260101_000000-bad")
    make(tmp_path / "b", "offline-run-20260101_000000-good")
    assert sync_wandb.main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "bad: not sent: no network" in output
    assert "good: sent, 1 file" in output


def test_a_dry_run_sends_nothing_and_an_empty_folder_is_named(tmp_path, calls, capsys):
    make(tmp_path / "a", "offline-run-20260101_000000-xyz")
    assert sync_wandb.main([str(tmp_path / "a"), "--dry-run"]) == 0
    assert "xyz: 1 file" in capsys.readouterr().out
    assert not calls.exists()
    (tmp_path / "none").mkdir()
    assert sync_wandb.main([str(tmp_path / "none")]) == 2
    assert "holds no Weights & Biases runs" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_tracker_writes_is_found(tmp_path):
    tracker = WandbLogger(TrackerConfig(), tmp_path / "train", {})
    tracker.write([{"step": 1, "kind": "train", "loss": 1.0}])
    tracker.close()
    assert list(sync_wandb.find_runs(tmp_path)) == [get_wandb_id(tmp_path / "train")]
