"""Trainings with and without a teacher are paired by neuron and seed, and go on where they were."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import Store
from hpc_neuro.metrics.statistics import sign_flip_test
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher, make_untrained_copy
from hpc_neuro.teacher.card import write_copy
from tests.helpers.tiny_store import write_store
from tools.bench import transfer

SMALL = ("--crop", "8", "32", "32", "--patch", "8", "16", "16", "--steps", "2", "--seeds", "0", "--only", "a")
TEACHER = ("--teacher", "teacher.model=bundled")


def run(study: str, store: Path, out: Path, *keys: str) -> int:
    return transfer.main([study, "--store", str(store), "--out", str(out), *TEACHER, *SMALL, *keys])


@pytest.mark.slow
def test_every_arm_is_trained_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "store", dict.fromkeys(("a", "b", "c"), "train"))
    arms = ["average", "shuffled", "convolutions"]
    assert run("controls", store, tmp_path / "out", "--arms", *arms) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(facts["mean"]) == ["average, 1", "shuffled, 1", "convolutions, 1"]
    assert set(facts["difference"]["dice"]) == {"average, 1 - shuffled, 1", "average, 1 - convolutions, 1"}
    rows = list(csv.DictReader((tmp_path / "out" / "controls.csv").open()))
    assert [(row["arm"], row["neuron"]) for row in rows] == [(arm, "a") for arm in arms]
    assert not list((tmp_path / "out" / "runs").iterdir())

    # The neuron that chooses the threshold and the one that is held out are not trained on.
    fold = Store(tmp_path / "out" / "stores" / "a_1_0")
    assert (fold.split("val"), fold.split("train"), fold.split("test")) == (("b",), ("c",), ("a",))

    # Done trainings are read; a training of other settings is refused.
    monkeypatch.setattr(transfer, "train", None)
    assert run("controls", store, tmp_path / "out", "--arms", *arms) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["mean"] == facts["mean"]
    assert run("controls", store, tmp_path / "out", "--arms", *arms, "--batch", "3") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_the_untrained_copy_are_distilled_as_a_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", dict.fromkeys(("a", "b", "c"), "train"))
    assert run("distillation", store, tmp_path / "out", "--arms", "distilled", "distilled_untrained") == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["mean"]) == [
        "distilled, 1", "distilled_untrained, 1",
    ]  # fmt: skip
    manifests = [
        json.loads((tmp_path / "out" / f"cache_{source}" / "manifest.json").read_text())["teacher"]["sha256"]
        for source in ("teacher", "untrained")
    ]
    assert manifests[0] != manifests[1]


def test_a_failed_training_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", dict.fromkeys(("a", "b", "c"), "train"))
    assert run("controls", store, tmp_path / "out", "--crop", "8", "24", "24") == 2
    error = capsys.readouterr().err
    assert "hpc-neuro train" in error
    assert "multiple of student.patch" in error


def test_neurons_are_drawn_alike_for_all_arms_and_never_the_held_out_ones() -> None:
    trials = transfer.plan_trials(["a", "b", "c", "d"], [], ["x", "y"], [1, 2], [0, 1])
    assert len(trials) == 2 * 4 * 2 * 2
    assert all(not {trial.held_out, trial.validated} & set(trial.trained) for trial in trials)
    for first, second in zip(trials[::2], trials[1::2], strict=True):
        assert (first.held_out, first.trained, first.seed) == (second.held_out, second.trained, second.seed)


@pytest.mark.parametrize(("only", "numbers", "says"), [(["z"], [1], "no z"), ([], [3], "at most 2")])
def test_what_the_store_lacks_is_refused(only: list[str], numbers: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        transfer.plan_trials(["a", "b", "c", "d"], only, ["x"], numbers, [0])


def test_differences_are_paired_by_neuron_and_seed() -> None:
    scores = {"x, 1": {"a": [0.5, 0.7], "b": [0.6, 0.6]}, "y, 1": {"a": [0.4, 0.6], "b": [0.5, 0.3]}}
    row = transfer.compare_arms([("y, 1", "x, 1")], scores)["x, 1 - y, 1"]
    assert row["mean"] == pytest.approx((0.1 + 0.1 + 0.1 + 0.3) / 4)
    assert row["p"] == row["p_holm"] == sign_flip_test(np.array([[0.1, 0.1], [0.1, 0.3]]))


def test_a_written_copy_is_read_as_a_trained_teacher(tmp_path: Path) -> None:
    copy = make_untrained_copy(load_teacher(TeacherConfig()))
    write_copy(tmp_path, copy)
    again = load_teacher(TeacherConfig(model="trained", weights=tmp_path))
    assert (again.patch, again.depth, again.mean, again.std) == (copy.patch, copy.depth, copy.mean, copy.std)
    for name, tensor in copy.backbone.state_dict().items():
        torch.testing.assert_close(again.backbone.state_dict()[name], tensor.half().float())
