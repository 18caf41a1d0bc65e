"""metrics.jsonl is whole after kills and full disks; Weights & Biases never blocks and never ends a run."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from hpc_neuro.train.tracker import Metrics, TrackerConfig, Wandb, run_id


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(step: int, **more: float) -> dict:
    return {"step": step, "kind": "train", "loss": 1.0, **more}


def test_rows_are_appended_and_what_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write([row(1, distill=math.nan), row(2)])
    metrics.write([row(3, grad_norm=math.inf)])
    assert [r["step"] for r in rows(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert rows(tmp_path / "m.jsonl")[0]["distill"] is None
    assert rows(tmp_path / "m.jsonl")[2]["grad_norm"] is None


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = Metrics(path)
    metrics.write([row(s) for s in range(1, 7)])
    with path.open("a") as handle:
        handle.write('{"step": 3, "kin')
    metrics.resume(4)
    metrics.write([row(5)])
    assert [r["step"] for r in rows(path)] == [1, 2, 3, 4, 5]
    metrics.resume(-1)
    assert path.read_text() == ""


def test_a_disk_that_is_full_holds_rows_back(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    metrics = Metrics(path)
    metrics.write([row(1)])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, old[1]))  # 5 more bytes fit, as on a full disk
    try:
        with caplog.at_level(logging.WARNING):
            metrics.write([row(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "1 rows wait" in caplog.text
    assert [r["step"] for r in rows(path)] == [1]
    metrics.write([row(3)])
    assert [r["step"] for r in rows(path)] == [1, 2, 3]


def test_the_run_id_is_kept(tmp_path):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    assert (tmp_path / "wandb_id").read_text().strip() == first


def fake(monkeypatch: pytest.MonkeyPatch, init) -> None:
    """A wandb whose `init` is ours."""
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **kw: kw))


class Recorder:
    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.finished = False

    def define_metric(self, *args: str, **kwargs: str) -> None:
        pass

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_rows_arrive_under_their_kind_with_the_run_id_kept(tmp_path, monkeypatch):
    recorder, asked = Recorder(), {}
    fake(monkeypatch, lambda **kw: asked.update(kw) or recorder)
    tracker = Wandb(TrackerConfig(), tmp_path, {"a": 1})
    tracker.write([row(1), {"step": 1, "kind": "val", "dice": 0.5, "threshold": None}])
    tracker.close()
    assert recorder.logged == [{"step": 1, "train/loss": 1.0}, {"step": 1, "val/dice": 0.5}]
    assert recorder.finished
    assert (asked["mode"], asked["id"], asked["config"]) == ("offline", run_id(tmp_path), {"a": 1})


def test_a_server_that_does_not_answer_blocks_nothing(tmp_path, monkeypatch, caplog):
    release = threading.Event()
    fake(monkeypatch, lambda **kw: release.wait(60))
    tracker = Wandb(TrackerConfig(wandb="online", patience=0.2), tmp_path, {})
    begun = time.monotonic()
    tracker.write([row(s) for s in range(1, 100)])
    assert time.monotonic() - begun < 5  # init would hold it for 60
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert time.monotonic() - begun < 30
    assert "left behind" in caplog.text
    release.set()


def test_trouble_is_said_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(**kw: object) -> None:
        raise RuntimeError("no such entity")

    fake(monkeypatch, refuse)
    with caplog.at_level(logging.WARNING):
        tracker = Wandb(TrackerConfig(), tmp_path, {})
        tracker.write([row(1)])
        tracker.close()
        tracker.write([row(2)])
    assert "no such entity" in caplog.text


def test_disabled_starts_nothing(tmp_path, monkeypatch):
    fake(monkeypatch, lambda **kw: pytest.fail("wandb was started"))
    tracker = Wandb(TrackerConfig(wandb="disabled"), tmp_path, {})
    tracker.write([row(1)])
    tracker.close()
    assert not (tmp_path / "wandb_id").exists()


@pytest.mark.slow
def test_the_real_thing_writes_offline_files(tmp_path):
    tracker = Wandb(TrackerConfig(), tmp_path, {"a": {"b": 1}})
    tracker.write([row(s) for s in range(1, 5)])
    tracker.close()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{run_id(tmp_path)}/*.wandb"))
