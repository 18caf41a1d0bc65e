"""The verb in one process: what it writes, that it learns, resumes exactly, and refuses what cannot work."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.core import schema
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.dataset import read_crop
from hpc_neuro.data.store import Store
from hpc_neuro.models.student import load_student
from hpc_neuro.train import batches, loop
from tests.helpers.tiny_store import write_store
from tests.train.conftest import rows


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """An uninterrupted run of six steps."""
    from tests.train.conftest import TINY

    out = tmp_path_factory.mktemp("runs") / "whole"
    cfg = schema.load(train.TrainConfig, None, [f"store={store}", f"out={out}", *TINY])
    assert train.run(cfg) == 0
    return out


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(out / "weights/last/model.safetensors") for out in (a, b))
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first)


def same_rows(a: Path, b: Path) -> bool:
    """Equal but for what depends on the clock."""
    clock = {"crops_per_s", "tokens_per_s", "data_wait_share", "memory_bytes", "memory_bytes_by_rank", "eta_s"}
    first, second = ([{k: v for k, v in r.items() if k not in clock} for r in rows(out)] for out in (a, b))
    return first == second and rows(a, "val") == rows(b, "val")


def test_a_run_leaves_what_machines_read(whole):
    assert [r["step"] for r in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows(whole, "val")] == [0, 3, 6]
    assert {r["split"] for r in rows(whole, "val")} == {"val"}
    last = rows(whole)[-1]
    assert last["tokens_per_s"] == pytest.approx(8 * last["crops_per_s"])
    assert last["memory_bytes_by_rank"] == [last["memory_bytes"]]
    assert {
        "loss",
        "dice",
        "cross_entropy",
        "lr",
        "grad_norm",
        "crops_per_s",
        "data_wait_share",
        "eta_s",
    } <= last.keys()
    assert json.loads((whole / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert sorted(p.name for p in (whole / "checkpoints").iterdir())[-2:] == ["step_00000004", "step_00000006"]
    record = json.loads((whole / "run.json").read_text())
    assert record["exit"] == 0
    assert record["summary"]["steps"] == 6
    assert record["summary"]["best_val_dice"] == max(r["dice_best"] for r in rows(whole, "val") if r["step"])
    assert schema.load(train.TrainConfig, whole / "config.yaml").optim.steps == 6


@pytest.mark.parametrize("name", ["best", "last"])
def test_exported_weights_load_in_plain_torch_and_score_as_logged(whole, store, name):
    student, meta = load_student(whole / "weights" / name)
    assert (meta["window"], meta["mirrored"]) == ([16, 32, 32], True)
    assert meta["voxel_sizes"] == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    # The quartiles of a width in voxels, along z and in the plane.
    assert all(1 < low <= middle <= high < 10 for low, middle, high in zip(*meta["neurite_widths"], strict=True))
    logged = {r["step"]: r for r in rows(whole, "val")}[meta["step"]]
    assert (meta["threshold"], meta["val_dice"]) == (logged["threshold"], logged["dice_best"])
    with torch.no_grad():
        logits = student(read_crop(Store(store), "c", Box((0, 0, 0), (16, 32, 32))).image[None]).logits
    assert logits.shape == (1, 1, 16, 32, 32)
    assert torch.isfinite(logits).all()


def test_the_same_command_again_says_complete(whole, tiny, caplog):
    before = (whole / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO):
        assert train.run(tiny(whole)) == 0
    assert "already complete" in caplog.text
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_crash_and_a_signal_end_with_the_same_bits(whole, tiny, tmp_path, monkeypatch):
    """Crash after step 3 (saved: 2), then SIGTERM during step 4, then to the end: weights and rows as uninterrupted."""
    step, out = loop.train_step, tmp_path / "run"

    def crash(state, ready):
        step(state, ready)
        if state.step == 3:
            raise RuntimeError("power cut")

    def terminate(state, ready):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(state, ready)

    monkeypatch.setattr(loop, "train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.run(tiny(out))
    monkeypatch.setattr(loop, "train_step", terminate)
    assert train.run(tiny(out)) == 75
    assert json.loads((out / "run.json").read_text())["exit"] == 75
    assert rows(out)[-1]["step"] == 4
    monkeypatch.setattr(loop, "train_step", step)
    assert train.run(tiny(out)) == 0
    assert same_weights(whole, out)
    assert same_rows(whole, out)


@pytest.mark.slow
def test_reading_processes_that_get_signals_or_are_killed_cost_nothing(whole, tiny, tmp_path, monkeypatch, caplog):
    """One shrugs off SIGTERM and SIGUSR1, and is replaced after SIGKILL: weights and rows as without."""
    step, out = loop.train_step, tmp_path / "run"

    def harm(state, ready):
        step(state, ready)
        for child in multiprocessing.active_children():
            os.kill(child.pid, {1: signal.SIGTERM, 2: signal.SIGUSR1, 3: signal.SIGKILL}.get(state.step, 0))

    monkeypatch.setattr(loop, "train_step", harm)
    monkeypatch.setattr(batches, "AHEAD", 1)
    with caplog.at_level(logging.WARNING):
        assert train.run(tiny(out, "workers=1")) == 0
    assert caplog.text.count("a process that reads crops was killed") == 1
    assert same_weights(whole, out)
    assert same_rows(whole, out)


@pytest.mark.parametrize("deaths", [0, 1, 4, 5])
def test_reading_processes_that_die_in_a_row_are_replaced_but_not_for_ever(tiny, tmp_path, monkeypatch, deaths):
    left = [deaths]

    @contextlib.contextmanager
    def dying(crops, indices, *rest, **keys):
        def read():
            for chunk in indices:
                if chunk == [10, 11] and left[0]:
                    left[0] -= 1
                    raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
                yield chunk

        yield read()

    monkeypatch.setattr(batches, "load_batches", dying)
    cfg, device = tiny(tmp_path / "run"), torch.device("cpu")
    if deaths < 5:
        assert list(batches.read_batches(cfg, None, 2, 4, device)) == [[8, 9], [10, 11]]
    else:
        with pytest.raises(InputError, match="workers=0, or more memory"):
            list(batches.read_batches(cfg, None, 2, 4, device))


def test_no_threshold_is_chosen_on_volumes_that_are_trained_on(tiny, tmp_path):
    folder = tmp_path / "store"
    write_store(folder, {"a": "train", "b": "train"})
    out = tmp_path / "run"
    assert train.run(tiny(out, f"store={folder}", "optim.steps=2")) == 0
    assert {(r["threshold"], r["dice_best"] == r["dice"]) for r in rows(out, "val")} == {(0.5, True)}
    assert load_student(out / "weights/best")[1]["threshold"] == 0.5


def test_steps_may_grow_and_the_run_goes_on(tiny, tmp_path, caplog):
    out = tmp_path / "run"
    assert train.run(tiny(out, "optim.steps=2")) == 0
    with caplog.at_level(logging.INFO):
        assert train.run(tiny(out, "optim.steps=4")) == 0
    assert "resumed after step 2" in caplog.text
    assert [r["step"] for r in rows(out)] == [1, 2, 3, 4]
    assert rows(out)[2]["lr"] == pytest.approx((optim := tiny(out, "optim.steps=4").optim).lr * loop.lr_at(2, optim))


def test_a_run_that_is_beyond_the_steps_asked_for_is_not_cut_short(tiny, tmp_path):
    out = tmp_path / "run"
    assert train.run(tiny(out, "optim.steps=4")) == 0
    with pytest.raises(InputError, match=r"is beyond optim\.steps=3, .* give at least optim\.steps=4"):
        train.run(tiny(out, "optim.steps=3"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages_give_the_losses_of_stage_2(whole, tiny, tmp_path, stage):
    out = tmp_path / "run"
    assert train.run(tiny(out, f"engine.stage={stage}", "optim.steps=6", "ema.window=0")) == 0
    for row, other in zip(rows(out), rows(whole), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    exported = load_file(out / "weights/last/model.safetensors")
    assert all(torch.isfinite(v).all() and v.numel() for v in exported.values())


def test_passes_add_up_to_the_batch(tiny, tmp_path):
    runs = {}
    for micro in (4, 1):
        out = tmp_path / str(micro)
        keys = ["optim.batch=4", f"engine.micro_batch={micro}", "optim.steps=3"]
        assert train.run(tiny(out, *keys)) == 0
        runs[micro] = rows(out)
    for one, four in zip(runs[4], runs[1], strict=True):
        assert one["loss"] == pytest.approx(four["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-2)


def test_it_learns(tiny, tmp_path):
    """From clean stacks, quickly: seeds 0 to 3 reach 0.75, 0.69, 0.80, 0.54."""
    out = tmp_path / "run"
    keys = ["optim.steps=40", "optim.lr=1e-2", "validate.every=40", "checkpoint.every=0"]
    keys += [f"augment.{k}=0" for k in ("uneven", "background", "noise", "specks", "gamma", "contrast", "blur")]
    assert train.run(tiny(out, *keys)) == 0
    first, last = rows(out, "val")
    assert last["dice_best"] > max(0.5, first["dice_best"] + 0.2)


def test_the_forecast_knows_the_parameters_and_the_size_of_a_checkpoint(whole, tiny, tmp_path):
    lines = "\n".join(train.forecast(tiny(tmp_path / "run")))
    parameters = sum(v.numel() for v in load_file(whole / "weights/last/model.safetensors").values())
    assert f"student: {parameters / 1e6:.2f} M parameters" in lines
    assert "6 steps of 2 crops of [16, 32, 32] voxels ([2, 2, 2] tokens)" in lines
    size = sum(p.stat().st_size for p in (whole / "checkpoints/step_00000006").rglob("*") if p.is_file())
    expected_bytes = float(re.search(r"([\d.]+) MB per checkpoint", lines)[1]) * 1e6
    assert expected_bytes == pytest.approx(size, rel=0.05)


def test_a_planned_machine_gets_its_own_table(tiny, tmp_path):
    keys = ["plan.nodes=2", "plan.gpus=4", "plan.memory=0.02", "optim.batch=16", "ema.window=0"]
    lines = "\n".join(train.forecast(tiny(tmp_path / "run", *keys)))
    assert "8 ranks x 2 crops x 1 pass" in lines
    assert "a step: 128 tokens" in lines
    assert "torch.bfloat16" in lines
    assert re.search(r"ZeRO stage 0 .* does not fit\n", lines)
    assert re.search(r"ZeRO stage 3 .* fits\n", lines) or "no stage fits" in lines


def test_validation_on_training_volumes_is_said(tiny, tmp_path, caplog):
    only = write_store(tmp_path / "store", {"a": "train"})
    cfg = tiny(tmp_path / "run", f"store={only}", "optim.steps=1")
    assert any("`val` is empty" in line for line in train.forecast(cfg))
    assert not (tmp_path / "run").exists()
    assert train.run(cfg) == 0
    assert {r["split"] for r in rows(tmp_path / "run", "val")} == {"train"}


def test_steps_are_profiled(tiny, tmp_path):
    assert train.run(tiny(tmp_path / "run", "optim.steps=2", "tracker.profile=[2,2]")) == 0
    assert [path.name for path in (tmp_path / "run/profile").iterdir()] == ["steps_2_2_rank_0.json.gz"]


def test_a_collapsed_model_raises_an_alarm(tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train.run(tiny(tmp_path / "run", "optim.steps=4", "optim.lr=1e-9"))
    assert "ALARM at step 4: next to no foreground" in caplog.text


def test_a_run_that_diverges_stops_and_saves_nothing_bad(tiny, tmp_path, monkeypatch):
    step = loop.train_step

    def poison(state, ready):
        if state.step == 3:
            with torch.no_grad():
                next(state.engine.module.parameters()).fill_(float("nan"))
        step(state, ready)

    monkeypatch.setattr(loop, "train_step", poison)
    with pytest.raises(ConfigError, match=r"step 4: the loss is nan .* optim\.lr"):
        train.run(tiny(tmp_path / "run"))
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step_00000002"]


@pytest.mark.slow
def test_bfloat16_trains(tiny, tmp_path):
    out = tmp_path / "run"
    assert train.run(tiny(out, "engine.dtype=bf16", "optim.steps=2")) == 0
    assert all(v.dtype == torch.float32 for v in load_file(out / "weights/last/model.safetensors").values())
    assert all(r["loss"] < 3 for r in rows(out))


def test_another_config_in_the_same_folder_is_refused(whole, tiny):
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        train.run(tiny(whole, "optim.lr=1e-5"))
    with pytest.raises(ConfigError, match=r"checkpoint\.metric: dice_best -> recall"):
        train.run(tiny(whole, "checkpoint.metric=recall"))


@pytest.mark.parametrize(
    "splits", [{"a": "train", "b": "val", "c": "train"}, {"a": "train", "b": "train", "c": "val", "d": "train"}]
)
def test_other_training_or_validation_volumes_are_another_run(whole, tiny, tmp_path, splits):
    other = write_store(tmp_path / "store", splits)
    with pytest.raises(ConfigError, match="the input split changed"):
        train.run(tiny(whole, f"store={other}"))
    same = write_store(tmp_path / "same", {"a": "train", "b": "train", "c": "val"})
    train.run(tiny(whole, f"store={same}"))
