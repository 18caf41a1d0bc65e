"""`teacher continue`: a teacher adapts to volumes without labels, the card says to which, bad input is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file, save_file

from hpc_neuro import cli
from hpc_neuro.core import files
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.teacher import adapt
from hpc_neuro.teacher.trainer import Training
from hpc_neuro.teacher.verbs import OBJECTIVES
from tests.helpers.tiny_store import write_store
from tests.helpers.tiny_teachers import make
from tests.teacher.conftest import configure_continuation, write_stack


def test_the_weights_change_and_the_card_names_every_stage(teacher_run: Path, continued_run: Path, stack: Path) -> None:
    before, after = (load_file(out / "teacher.safetensors") for out in (teacher_run, continued_run))
    assert before.keys() == after.keys()
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])

    card = json.loads((continued_run / "teacher.json").read_text())
    first, second = card["stages"]
    assert first == json.loads((teacher_run / "teacher.json").read_text())["stages"][0]
    assert (second["verb"], second["objective"], second["steps"]) == ("continue", "structure", 12)
    assert second["teacher"] == {"name": "trained", "sha256": files.sha256(teacher_run / "teacher.safetensors")}
    assert second["data"] == {
        "volumes": [str(stack)],
        "left_out": [],
        "windows": 36,
        "held_out_windows": 4,
        "about": "not stated",
    }
    assert set(card["probes"]["frozen_features"]["curves"]) == {"pixels", "trained", "before", "random_weights_timm"}
    assert load_teacher(TeacherConfig(model="trained", weights=continued_run)).depth == 2


def test_only_what_predicts_learns_at_first(teacher_run: Path, stack: Path, tmp_path: Path) -> None:
    cfg = configure_continuation(stack, teacher_run, tmp_path / "out", "optim.steps=4", "optim.warmup=0.49")
    seen = []
    step = Training._step

    def look(training: Training, *args: object) -> float:
        loss = step(training, *args)  # type: ignore[arg-type]
        weights = training.network.vit.state_dict()["blocks.0.attn.qkv.weight"]
        seen.append((weights.clone(), training.network.head.weight.clone()))  # type: ignore[union-attr,operator]
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", look)
        assert adapt.run(cfg) == 0
    start = load_file(teacher_run / "teacher.safetensors")["blocks.0.attn.qkv.weight"].float()
    assert torch.equal(seen[1][0], start)
    assert not torch.equal(seen[1][1], seen[0][1])
    assert not torch.equal(seen[3][0], start)


def test_photographs_may_stand_beside_the_slices(teacher_run: Path, stack: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = (f"photos={photos}", "photo_share=0.5", "optim.steps=3", "windows=20", "license=CC0", "about=a fiber")
    assert adapt.run(configure_continuation(stack, teacher_run, out, *keys)) == 0
    card = json.loads((out / "teacher.json").read_text())
    assert card["license"] == "CC0"
    assert card["stages"][1]["data"]["photographs"] == {"count": 10, "held_out": 4, "share": 0.5}
    assert card["stages"][1]["data"]["about"] == "a fiber"
    # Two of the twenty windows are held out, which is too few to probe.
    assert card["probes"] is None


def test_a_store_gives_its_own_brightness_and_is_not_judged_by_what_it_taught(
    teacher_run: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "test"}, (12, 64, 160))
    keys = (f"judge.store={store}", "optim.steps=2", "windows=8")
    out = tmp_path / "out"
    assert adapt.run(configure_continuation(store, teacher_run, out, *keys)) == 0
    card = json.loads((out / "teacher.json").read_text())
    assert card["stages"][1]["data"]["volumes"] == [f"{store}/a"]
    assert list(card["gate"]["volumes"]) == ["b"]

    with pytest.raises(ConfigError, match=r"would be judged on a, which it learns from; name others"):
        adapt.forecast(configure_continuation(store, teacher_run, tmp_path / "c", *keys, "judge.volumes=[a]"))
    with pytest.raises(ConfigError, match=r"none is left to judge it; give another judge\.store"):
        adapt.forecast(configure_continuation(store, teacher_run, tmp_path / "c", *keys, "splits=[train,test]"))
    with pytest.raises(InputError, match=r"holds no volume of the splits val; give others with splits="):
        adapt.forecast(configure_continuation(store, teacher_run, tmp_path / "c", "splits=[val]"))


def test_unusable_volumes_are_left_out_and_listed(
    teacher_run: Path, stack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An image without bright voxels, and one whose slices are too small."""
    dark, small = tmp_path / "dark.tif", write_stack(tmp_path / "small.tif", (12, 28, 80))
    tifffile.imwrite(dark, np.full((12, 64, 64), 7, np.uint8), photometric="minisblack", metadata={"axes": "ZYX"})
    out = tmp_path / "out"
    volumes = [dark, stack, small]
    assert adapt.run(configure_continuation(volumes, teacher_run, out, "optim.steps=2", "windows=12")) == 3
    assert f"left out: {dark}: every voxel is 7" in caplog.text
    assert (
        "its slices are 28 x 80 pixels, want at least 32 x 32; leave it out, or give a smaller task.crop" in caplog.text
    )
    data = json.loads((out / "teacher.json").read_text())["stages"][1]["data"]
    assert data["volumes"] == [str(stack)]
    assert len(data["left_out"]) == 2

    with pytest.raises(InputError, match=r"no volume can be used:\n.*dark\.tif: every voxel is 7"):
        adapt.run(configure_continuation(dark, teacher_run, tmp_path / "none"))
    # What the message advises.
    keys = ("optim.steps=2", "windows=12", "task.crop=24")
    assert adapt.run(configure_continuation([stack, small], teacher_run, tmp_path / "smaller", *keys)) == 0


def test_a_crop_that_does_not_fit_the_teacher_is_refused(teacher_run: Path, stack: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.crop is 36, want a multiple of the patch of 8 pixels"):
        adapt.forecast(configure_continuation(stack, teacher_run, tmp_path / "out", "task.crop=36"))


def test_a_teacher_that_cannot_be_continued_is_refused(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["teacher", "continue", str(stack), f"out={tmp_path / 'out'}", "teacher.model=random"]
    assert cli.main(command) == 2
    assert "cannot be continued: `structure` needs the rotary positions of DINOv3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_in_the_package_is_continued_by_its_own_objective(stack: Path, tmp_path: Path) -> None:
    command = ["teacher", "continue", str(stack), f"out={tmp_path / 'out'}", "teacher.model=bundled8", "side=64"]
    keys = ["task.crop=32", "windows=8", "optim.steps=1", "optim.warmup=0", "optim.batch=2", "threads=1"]
    assert cli.main([*command, *keys]) == 0
    card = json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert [stage["verb"] for stage in card["stages"]] == ["train", "continue"]
    assert card["stages"][0]["steps"] == 2600
    assert card["license"] == "Apache-2.0"
    assert card["arch"] == OBJECTIVES["structure"].arch


def test_another_teacher_does_not_continue_a_run(
    teacher_run: Path, continued_run: Path, stack: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(continued_run, tmp_path / "out")
    other = shutil.copytree(teacher_run, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"teacher\.weights: "):
        adapt.run(configure_continuation(stack, other, out))


def test_a_finished_run_does_nothing(teacher_run: Path, continued_run: Path, stack: Path) -> None:
    before = (continued_run / "teacher.json").read_bytes()
    assert adapt.run(configure_continuation(stack, teacher_run, continued_run)) == 0
    assert (continued_run / "teacher.json").read_bytes() == before


def test_the_forecast_writes_nothing(teacher_run: Path, stack: Path, tmp_path: Path) -> None:
    lines = adapt.forecast(configure_continuation(stack, teacher_run, tmp_path / "out"))
    assert lines[0] == "trained: 2 blocks of 192 channels, patch 8, objective structure"
    assert lines[1] == "1 volume, 40 windows of 64 x 64 pixels from each"
    assert not (tmp_path / "out").exists()


def test_a_published_teacher_keeps_its_normalization(stack: Path, tmp_path: Path) -> None:
    """A DINOv3 of random values: timm's architecture, its own mean and deviation, and a card of ours afterwards."""
    arch = "vit_tiny_patch16_dinov3_qkvb"
    published = make(arch, depth=12)
    save_file(published.backbone.state_dict(), tmp_path / "dinov3.safetensors")
    out = tmp_path / "out"
    command = ["teacher", "continue", str(stack), f"teacher.model={arch}", f"out={out}", "side=64", "windows=8"]
    keys = [f"teacher.weights={tmp_path / 'dinov3.safetensors'}", "task.crop=32", "optim.steps=1", "optim.batch=2"]
    assert cli.main([*command, *keys, "optim.warmup=0", "threads=1"]) == 0

    teacher = load_teacher(TeacherConfig(model="trained", weights=out))
    assert (teacher.patch, teacher.depth) == (16, 12)
    assert (teacher.mean, teacher.std) == (published.mean, published.std) != ((0.5,) * 3, (0.5,) * 3)
    card = json.loads((out / "teacher.json").read_text())
    assert card["stages"][0] == {"verb": "published weights", "teacher": card["stages"][1]["teacher"]}
    assert card["license"] == f"that of {arch}"

    # One step at a rate that has hardly begun changes little.
    image = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(
        teacher.features(image, [11]), published.features(image, [11]), dim=-1
    )
    assert cosine.min() > 0.9
