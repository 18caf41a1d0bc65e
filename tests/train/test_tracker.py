"""metrics.jsonl is whole after kills and full disks; Weights & Biases never blocks and never ends a run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_neuro import train
from hpc_neuro.train.config import TrackerConfig
from hpc_neuro.train.tracker import MetricsFile, WandbLogger, get_wandb_id
from hpc_neuro.train.validate import draw_panels


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(step: int, **more: float) -> dict:
    return {"step": step, "kind": "train", "loss": 1.0, **more}


def test_rows_are_appended_and_what_is_not_finite_is_null(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write([row(1, distill=math.nan), row(2)])
    metrics.write([row(3, grad_norm=math.inf)])
    assert [r["step"] for r in rows(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert rows(tmp_path / "m.jsonl")[0]["distill"] is None
    assert rows(tmp_path / "m.jsonl")[2]["grad_norm"] is None


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path)
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
    metrics = MetricsFile(path)
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
    first = get_wandb_id(tmp_path)
    assert get_wandb_id(tmp_path) == first
    assert (tmp_path / "wandb_id").read_text().strip() == first


def fake(monkeypatch: pytest.MonkeyPatch, init) -> None:
    """A wandb whose `init` is ours."""
    module = types.SimpleNamespace(
        init=init, Settings=lambda **kw: kw, Image=lambda pixels, caption: (pixels.shape, caption)
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


class Config(dict):
    def update(self, values: dict, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


class Recorder:
    """A run as `wandb.init` gives it, which keeps what it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.logged: list[dict] = []
        self.finished = False
        self.seconds = seconds
        self.config: dict = Config()

    def define_metric(self, *args: str, **kwargs: str) -> None:
        pass

    def log(self, values: dict) -> None:
        time.sleep(self.seconds)
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_rows_arrive_under_their_kind_with_the_run_id_kept(tmp_path, monkeypatch):
    recorder, asked = Recorder(), {}
    fake(monkeypatch, lambda **kw: asked.update(kw) or recorder)
    tracker = WandbLogger(TrackerConfig(), tmp_path, {"a": 1})
    tracker.write([row(1), {"step": 1, "kind": "val", "dice": 0.5, "threshold": None}])
    tracker.close()
    assert recorder.logged == [{"step": 1, "train/loss": 1.0}, {"step": 1, "val/dice": 0.5}]
    assert recorder.finished
    assert (asked["mode"], asked["id"], asked["group"]) == ("offline", get_wandb_id(tmp_path), None)
    assert recorder.config["a"] == 1


def test_a_server_that_does_not_answer_blocks_nothing(tmp_path, monkeypatch, caplog):
    release = threading.Event()
    answered: list[bool] = []
    fake(monkeypatch, lambda **kw: answered.append(release.wait(60)))
    tracker = WandbLogger(TrackerConfig(wandb="online", patience=0.2), tmp_path, {})
    tracker.write([row(s) for s in range(1, 100)])
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert not answered  # init holds its thread for 60 s, and nobody waited for it
    assert "left behind" in caplog.text
    release.set()


def test_trouble_is_said_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(**kw: object) -> None:
        raise RuntimeError("no such entity")

    fake(monkeypatch, refuse)
    with caplog.at_level(logging.WARNING):
        tracker = WandbLogger(TrackerConfig(), tmp_path, {})
        tracker.write([row(1)])
        tracker.close()
        tracker.write([row(2)])
    assert "no such entity" in caplog.text


def test_disabled_starts_nothing(tmp_path, monkeypatch):
    fake(monkeypatch, lambda **kw: pytest.fail("wandb was started"))
    tracker = WandbLogger(TrackerConfig(wandb="disabled"), tmp_path, {})
    tracker.write([row(1)])
    tracker.close()
    assert not (tmp_path / "wandb_id").exists()


@pytest.mark.slow
def test_the_real_thing_writes_offline_files(tmp_path):
    tracker = WandbLogger(TrackerConfig(), tmp_path, {"a": {"b": 1}})
    tracker.write([row(s) for s in range(1, 5)])
    tracker.close()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{get_wandb_id(tmp_path)}/*.wandb"))


def test_a_run_is_known_by_group_code_cache_and_all_its_jobs(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(
        json.dumps({"verb": "train", "config": {}, "jobs": ["Slurm job 7 on n1", "Slurm job 9 on n2"]})
    )
    recorder, asked = Recorder(), {}
    fake(monkeypatch, lambda **kw: asked.update(kw) or recorder)
    cfg = TrackerConfig(group="study", name="study-0003")
    WandbLogger(cfg, tmp_path, {"seed": 1}, {"cache": "abc"}).close()
    assert (asked["group"], asked["name"]) == ("study", "study-0003")
    about = recorder.config["run"]
    assert about["inputs"] == {"cache": "abc"}
    assert about["jobs"] == ["Slurm job 7 on n1", "Slurm job 9 on n2"]
    assert about["code"].startswith("0.")
    assert "torch" in about["versions"]


def test_pictures_of_the_crops_stand_at_their_step(tmp_path, monkeypatch):
    recorder = Recorder()
    fake(monkeypatch, lambda **kw: recorder)
    tracker = WandbLogger(TrackerConfig(pictures=3), tmp_path, {})
    assert tracker.pictures == 3
    tracker.show(40, [np.zeros((5, 7), np.uint8), np.zeros((5, 8), np.uint8)])
    tracker.show(50, [])
    tracker.close()
    assert [r["step"] for r in recorder.logged] == [40]
    assert [recorder.logged[0][f"val/crop_{i}"][0] for i in (0, 1)] == [(5, 7), (5, 8)]
    assert WandbLogger(TrackerConfig(wandb="disabled"), tmp_path, {}).pictures == 0


def test_a_picture_shows_image_truth_and_probability_along_two_axes():
    image, mask = torch.zeros(1, 1, 4, 6, 8), torch.zeros(1, 1, 4, 6, 8, dtype=torch.uint8)
    image[0, 0, 1, 2, 3], mask[0, 0, 1, 2, 4], mask[0, 0, 3, 5, 7] = 1.0, 1, 255
    logits = torch.full((1, 1, 4, 6, 8), -100.0)
    logits[0, 0, 1, 2, 5] = 100.0
    panels = draw_panels(image, mask, logits)
    assert panels.shape == (6 + 2 + 4, 3 * 8 + 2 * 2)
    bright = {tuple(map(int, p)) for p in np.argwhere(panels == 255)}
    columns = [0, 10, 20]
    for column, x in zip(columns, (3, 4, 5), strict=True):
        assert {(2, column + x), (6 + 2 + 1, column + x)} <= bright
    assert panels[5, 10 + 7] == round(0.3 * 255)  # unlabelled
    assert (panels == 255).sum() == 6 + 2 * 24 + 2 * 2 * 12  # six points and the white gaps


def test_a_slow_backend_slows_nothing(tmp_path, monkeypatch, caplog):
    """The slowness is injected: each row takes the backend 50 ms."""
    recorder = Recorder(seconds=0.05)
    fake(monkeypatch, lambda **kw: recorder)
    tracker = WandbLogger(TrackerConfig(patience=0.3), tmp_path, {})
    tracker.write([row(s) for s in range(1000)])
    assert len(recorder.logged) < 1000  # they would take it 50 s
    tracker.close()
    assert len(recorder.logged) < 1000


def test_a_full_disk_under_the_backend_ends_nothing(tmp_path, monkeypatch, caplog):
    """The full disk is injected at the first row."""

    class Full(Recorder):
        def log(self, values: dict) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    fake(monkeypatch, lambda **kw: Full())
    with caplog.at_level(logging.WARNING):
        tracker = WandbLogger(TrackerConfig(), tmp_path, {})
        tracker.write([row(1)])
        tracker.close()
    assert "No space left on device" in caplog.text


ALONE = """
import sys
from pathlib import Path
from hpc_neuro.train.config import TrackerConfig
from hpc_neuro.train.tracker import WandbLogger
tracker = WandbLogger(TrackerConfig(wandb="online", patience=2.0), Path(sys.argv[1]), {"a": 1})
tracker.write([{"step": 1, "kind": "train", "loss": 1.0}])
tracker.close()
"""


@pytest.mark.slow
def test_an_unreachable_server_holds_up_neither_the_run_nor_its_end(tmp_path):
    """The real package, told to be online, with nobody at the server's address: left alone it retries for hours."""
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
    env |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, env=env, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_requeues_of_an_offline_run_are_one_run_in_several_files(tmp_path):
    for step in (1, 2):
        tracker = WandbLogger(TrackerConfig(group="study"), tmp_path, {"a": 1})
        tracker.write([row(step)])
        tracker.show(step, [np.full((9, 12), 40 * step, np.uint8)])
        tracker.close()
        time.sleep(1.1)  # folders are named by the second
    folders = sorted(tmp_path.glob(f"wandb/offline-run-*-{get_wandb_id(tmp_path)}"))
    assert len(folders) == 2
    for folder in folders:
        assert list(folder.glob("*.wandb"))
        assert list(folder.glob("files/media/images/val/crop_0_*.png"))


@pytest.mark.slow
def test_a_training_shows_its_validation_crops(tiny, tmp_path):
    cfg = tiny(tmp_path / "run", "tracker.wandb=offline", "tracker.pictures=2", "tracker.patience=60")
    assert train.run(cfg) == 0
    pictures = sorted((tmp_path / "run").glob("wandb/offline-run-*/files/media/images/val/crop_*.png"))
    assert len(pictures) == 2 * 3  # two crops at steps 0, 3 and 6
    with Image.open(pictures[0]) as picture:
        assert picture.size == (3 * 32 + 2 * 2, 32 + 2 + 16)
