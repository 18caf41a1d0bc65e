"""Teachers that a card describes: those in the package, and one's own from `hpc-neuro teacher`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpc_neuro.core.schema import InputError
from hpc_neuro.models import teacher as module
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import Teacher, load_teacher
from tests.helpers.tiny_teachers import write_trained

ARCH = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def random_teacher() -> Teacher:
    return load_teacher(TeacherConfig(model="random"))


def _write_assets(folder: Path, random_teacher: Teacher, **changes: object) -> None:
    path = folder / f"{module.BUNDLED['bundled']}.safetensors"
    save_file({k: v.half() for k, v in random_teacher.backbone.state_dict().items()}, path)
    card = {
        "arch": ARCH,
        "patch": 16,
        "file": path.name,
        "recipe": {"depth": 12},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "input": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 224},
        **changes,
    }
    path.with_suffix(".json").write_text(json.dumps(card))


def test_the_bundled_teacher_is_its_cards(
    random_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    _write_assets(tmp_path, random_teacher)
    teacher = load_teacher(TeacherConfig())
    assert (teacher.identity["name"], teacher.random) == ("bundled", False)
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert next(teacher.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match="cd" * 32):
        load_teacher(TeacherConfig(sha256="cd" * 32))
    _write_assets(tmp_path, random_teacher, sha256="ef" * 32)
    with pytest.raises(InputError, match="ef" * 32):
        load_teacher(TeacherConfig())


def test_a_missing_bundled_teacher_says_what_to_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    with pytest.raises(InputError, match=r"teacher\.model=random or a timm name"):
        load_teacher(TeacherConfig())


@pytest.mark.parametrize(("model", "patch", "depth"), [("bundled", 16, 12), ("bundled8", 8, 6)])
def test_the_shipped_teachers_load(model: str, patch: int, depth: int) -> None:
    teacher = load_teacher(TeacherConfig(model=model))
    assert (teacher.identity["name"], teacher.patch, teacher.dim, teacher.depth) == (model, patch, 192, depth)
    maps = teacher.features(torch.rand(1, 64, 48), [teacher.depth - 1])
    assert maps.shape == (1, 1, 64 // teacher.patch, 48 // teacher.patch, teacher.dim)
    assert torch.isfinite(maps).all()
    card = json.loads((module.ASSETS / f"{module.BUNDLED[model]}.json").read_text())
    curves = card["probes"]["frozen_features"]["curves"]
    assert max(curves["trained"].values()) > max(curves["random_weights"].values()) + 0.1
    assert (module.ASSETS / card["file"]).stat().st_size < 12e6


def test_a_teacher_of_ones_own_is_its_cards(tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(model="trained", weights=write_trained(tmp_path / "t")))
    assert (teacher.identity["name"], teacher.patch, teacher.depth, teacher.dim) == ("trained", 8, 2, 192)
    assert (teacher.mean, teacher.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert teacher.features(torch.rand(1, 24, 16), [1]).shape == (1, 1, 3, 2, 192)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe": None}, "no card of `hpc-neuro teacher`"),
        ({"patch": "eight"}, "no card of `hpc-neuro teacher`"),
        ({"patch": 0}, "no card of `hpc-neuro teacher`"),
        ({"patch": -8}, "no card of `hpc-neuro teacher`"),
        ({"patch": 10**6}, "no card of `hpc-neuro teacher`"),
        ({"recipe": {"depth": 10**9}}, "no card of `hpc-neuro teacher`"),
        ({"recipe": {"depth": 0}}, "no card of `hpc-neuro teacher`"),
        ({"input": {"size": 64, "mean": [0.5] * 3, "std": [0.0, 1.0, 1.0]}}, "no card of `hpc-neuro teacher`"),
        ({"input": {"size": 64, "mean": [0.5], "std": [0.5]}}, "no card of `hpc-neuro teacher`"),
        ({"input": {"size": 10**9, "mean": [0.5] * 3, "std": [0.5] * 3}}, "no card of `hpc-neuro teacher`"),
        ({"sha256": "ab" * 32}, "has sha256"),
        ({"file": "gone"}, "does not exist"),
        ({"recipe": {"depth": 3}}, "missing blocks.2"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_teacher(TeacherConfig(model="trained", weights=write_trained(tmp_path / "t", **change)))


def test_a_folder_without_a_card_and_a_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, write_trained(tmp_path / "t") / "teacher.safetensors"):
        with pytest.raises(
            InputError, match=r"give the folder that `hpc-neuro teacher train` or `teacher continue` wrote"
        ):
            load_teacher(TeacherConfig(model="trained", weights=path))


def test_weights_of_another_patch_size_are_refused_not_resampled(tmp_path: Path) -> None:
    folder = write_trained(tmp_path / "t")
    with pytest.raises(InputError, match=r"patches of 8 x 8 pixels, but vit_tiny_patch16_224 has 16 x 16; .*trained"):
        load_teacher(TeacherConfig(model=ARCH, weights=folder / "teacher.safetensors"))
    with pytest.raises(InputError, match="holds the teacher trained"):
        load_teacher(TeacherConfig(model=ARCH, weights=folder))
