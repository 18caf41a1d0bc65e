"""`teacher train`: timm accepts the result, a stopped or killed run ends with the same bits, bad input is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hpc_neuro import cli
from hpc_neuro.core import files, stop_signals
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.core.stop_signals import Stopped
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher, timm
from hpc_neuro.precompute.config import COPIES, SAMPLES
from hpc_neuro.teacher import train
from hpc_neuro.teacher.config import TeacherOptimConfig, TeacherTrainConfig
from hpc_neuro.teacher.trainer import Training
from tests.helpers.tiny_store import write_store
from tests.teacher.conftest import SMALL, configure

ROOT = Path(__file__).resolve().parents[2]


def read_losses(out: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def have_same_weights(one: Path, two: Path) -> bool:
    first, second = (load_file(out / "teacher.safetensors") for out in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_timm_loads_the_weights_strictly(teacher_run: Path) -> None:
    weights = load_file(teacher_run / "teacher.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    vit = timm().create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0, depth=2, patch_size=8)
    vit.load_state_dict(weights, strict=True)


def test_the_package_takes_the_folder_as_a_teacher(teacher_run: Path) -> None:
    teacher = load_teacher(TeacherConfig(model="trained", weights=teacher_run))
    assert (teacher.patch, teacher.depth, teacher.dim) == (8, 2, 192)
    assert teacher.identity["sha256"] == files.sha256(teacher_run / "teacher.safetensors")
    assert teacher.features(torch.rand(1, 48, 64), [-1 % 2]).shape == (1, 1, 6, 8, 192)


def test_the_card_tells_what_was_done(teacher_run: Path) -> None:
    card = json.loads((teacher_run / "teacher.json").read_text())
    assert card["sha256"] == files.sha256(teacher_run / "teacher.safetensors")
    assert card["license"] == "not stated"
    assert card["gate"] is None
    (stage,) = card["stages"]
    assert (stage["verb"], stage["objective"], stage["steps"], stage["images_seen"]) == ("train", "structure", 12, 48)
    assert stage["data"] == {"photographs": {"count": 10, "held_out": 4, "about": "not stated"}}
    assert [step for step, _ in stage["loss_curve"]] == [2, 4, 6, 8, 10, 12]

    scores = card["probes"]["frozen_features"]
    for task in ("orientation", "edges", "neighbors", "curves"):
        assert set(scores[task]) == {"pixels", "trained", "random_weights", "random_weights_timm"}
    assert [step for step, _ in read_losses(teacher_run)] == [2, 4, 6, 8, 10, 12]
    assert not list(teacher_run.rglob(".*.part"))


def test_a_finished_run_does_nothing_and_goes_on_with_more_steps(
    photos: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(teacher_run, tmp_path / "run")
    before = (out / "teacher.json").read_bytes()
    assert train.run(configure(photos, out)) == 0
    assert (out / "teacher.json").read_bytes() == before

    assert train.run(configure(photos, out, "optim.steps=14")) == 0
    assert json.loads((out / "teacher.json").read_text())["stages"][0]["steps"] == 14


def test_a_stopped_run_ends_with_the_same_bits(
    photos: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two lines of progress, where losses wait for their mean."""
    out, step = tmp_path / "stopped", Training._step
    with stop_signals.StopSignals() as stop:

        def stop_after_five(training: Training, *args: object) -> float:
            stop.reason = "SIGTERM" if training.progress.step == 4 else ""
            return step(training, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Training, "_step", stop_after_five)
        with pytest.raises(Stopped):
            train.run(configure(photos, out))
    monkeypatch.undo()
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] == 5

    assert train.run(configure(photos, out)) == 0
    assert have_same_weights(teacher_run, out)
    assert read_losses(teacher_run) == read_losses(out)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(photos: Path, teacher_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    keys = [f"photos={photos}", f"out={out}", "depth=2", *SMALL]
    command = [sys.executable, "-m", "hpc_neuro", "teacher", "train", *keys, "threads=2"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while child.poll() is None and not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (out / "checkpoint.pt").exists()

    # What a kill inside a save leaves, and inside a line.
    (out / ".checkpoint.pt.00000000.part").write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 99, "loss"')
    assert train.run(configure(photos, out)) == 0
    assert have_same_weights(teacher_run, out)
    assert read_losses(teacher_run) == read_losses(out)
    assert not list(out.rglob(".*.part"))


def test_a_masked_autoencoder_is_taken_by_the_package(photos: Path, tmp_path: Path) -> None:
    assert train.run(configure(photos, tmp_path, "objective=pixels", "optim.steps=4", "patch=16")) == 0
    teacher = load_teacher(TeacherConfig(model="trained", weights=tmp_path))
    assert (teacher.patch, teacher.depth) == (16, 2)
    card = json.loads((tmp_path / "teacher.json").read_text())
    assert card["arch"] == "vit_tiny_patch16_224"
    assert set(card["probes"]["reconstruction"]) == {"trained", "random_weights", "patch_mean"}


def test_other_settings_and_other_photographs_do_not_continue_a_run(
    photos: Path, teacher_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.001 -> 0\.01"):
        train.run(configure(photos, teacher_run, "optim.lr=0.01"))

    changed = shutil.copytree(photos, tmp_path / "photos")
    out = shutil.copytree(teacher_run, tmp_path / "run")
    Image.new("RGB", (70, 70)).save(changed / "new.jpg")
    record = json.loads((out / "run.json").read_text())
    record["config"]["photos"] = str(changed)
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"the input photographs changed since .*; choose another `out`"):
        train.run(configure(changed, out))


def test_a_damaged_checkpoint_is_named_and_its_advice_helps(photos: Path, teacher_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(teacher_run, tmp_path / "run")
    (out / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read .*; remove it to train from the start"):
        train.run(configure(photos, out, "optim.steps=13"))

    (out / "checkpoint.pt").unlink()
    assert train.run(configure(photos, out, "optim.steps=13")) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["task.crop=36"], "task.crop is 36, want a multiple of the patch of 8 pixels"),
        (["patch=14"], "patch: Input should be 8, 16, 28 or 32"),
        (["objective=colors"], "objective: Input should be 'structure' or 'pixels'"),
        (["held=2"], "held: Input should be greater than or equal to 4"),
        (["held=10"], "holds 10 photographs .*, but 10 are held out and at least one is trained on"),
        (["judge.volumes=[a]"], "judge.volumes names volumes of judge.store, which is not given"),
    ],
)
def test_bad_settings_say_what_to_do(
    keys: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["teacher", "train", f"photos={photos}", f"out={out}", *SMALL, *keys]) == 2
    require_match(message, capsys.readouterr().err)
    assert not out.exists()


def require_match(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_a_folder_without_photographs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert cli.main(["teacher", "train", f"photos={tmp_path}", f"out={tmp_path / 'out'}"]) == 2
    assert (
        "holds no photographs, which end in .jpeg, .jpg, .png, .webp; give another photos=" in capsys.readouterr().err
    )
    assert cli.main(["teacher", "train", f"photos={tmp_path / 'none'}", f"out={tmp_path / 'out'}"]) == 2
    assert "is not a folder; give the folder of photographs" in capsys.readouterr().err


def test_an_unreadable_photograph_is_named_and_its_advice_helps(photos: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "5.jpg").write_bytes((copy / "5.jpg").read_bytes()[:50])
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"5\.jpg cannot be read as a picture .*; remove or replace it"):
        train.run(configure(copy, out))
    assert not (out / "cache" / "photographs64.json").exists()

    shutil.copy(photos / "5.jpg", copy / "5.jpg")
    # The record names the photographs by size; the run that failed has none worth keeping.
    shutil.rmtree(out)
    assert train.run(configure(copy, out, "optim.steps=1", "optim.warmup=0")) == 0


def test_the_forecast_writes_nothing(photos: Path, tmp_path: Path) -> None:
    lines = train.forecast(configure(photos, tmp_path / "out"))
    assert lines[0].startswith("10 photographs, 4 of them held out;")
    assert "12 steps of 4 crops of 32 x 32 pixels" in lines[1]
    assert not (tmp_path / "out").exists()


def test_the_rate_follows_progress() -> None:
    optim = TeacherOptimConfig(minutes=10)
    assert optim.progress(0, 300) == 0.5
    assert optim.rate(0.05) == pytest.approx(1e-3)
    assert optim.rate(0.525) == pytest.approx(0.5e-3)
    assert optim.rate(1) == pytest.approx(1e-6)
    assert TeacherOptimConfig(steps=10).progress(5, 1e9) == 0.5
    # A continued teacher waits for its head.
    assert optim.rate_after_head(0.049) == 0
    assert optim.rate_after_head(0.05 + 0.95 * 0.05) == pytest.approx(1e-3)
    assert optim.rate_after_head(1) == pytest.approx(1e-6)


def test_the_defaults_are_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teacher", "continue", "--help"]) == 0
    assert "optim.minutes   float = 30.0" in capsys.readouterr().out
    cfg = load(TeacherTrainConfig, None, ["photos=p", "out=o"])
    assert (cfg.objective, cfg.patch, cfg.depth, cfg.task.count_visible(cfg.patch)) == ("structure", 8, 6, 38)


def test_the_judge_writes_its_figures_into_the_card(photos: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "test"}, (12, 64, 160))
    out = tmp_path / "out"
    assert train.run(configure(photos, out, "optim.steps=2", f"judge.store={store}", "judge.volumes=[b]")) == 0
    gate = json.loads((out / "teacher.json").read_text())["gate"]
    assert (gate["samples"], gate["copies"], list(gate["volumes"])) == (SAMPLES, COPIES, ["b"])
    assert len(gate["volumes"]["b"]["gains"]) == SAMPLES * COPIES

    with pytest.raises(InputError, match=r"has no volume c; name some of a, b"):
        train.forecast(configure(photos, tmp_path / "other", f"judge.store={store}", "judge.volumes=[c]"))


def test_a_volume_that_cannot_be_judged_does_not_cost_the_training(photos: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"a": "train"}, (12, 24, 24))
    keys = ("optim.steps=1", "optim.warmup=0", f"judge.store={store}", "judge.volumes=[a]")
    out = tmp_path / "out"
    assert train.run(configure(photos, out, *keys)) == 3
    assert json.loads((out / "run.json").read_text())["failures"][0].startswith("not judged: volume a is (12, 24, 24)")
    # What judges may change.
    assert train.run(configure(photos, out, *keys[:2])) == 0
