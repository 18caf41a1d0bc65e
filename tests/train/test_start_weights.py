"""`train init=`: a student goes on from a trained one."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.models.student import build_student, load_student
from hpc_neuro.train import TrainConfig
from hpc_neuro.train.setup import build_parts
from hpc_neuro.train.train_module import STUDENT
from tests.train.conftest import rows

Tiny = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A finished run of a student without a transformer."""
    from hpc_neuro.core.schema import load
    from tests.train.conftest import TINY

    out = tmp_path_factory.mktemp("runs") / "plain"
    cfg = load(TrainConfig, None, [f"store={store}", f"out={out}", *TINY, "student.transformer=false"])
    assert train.run(cfg) == 0
    return out


def test_a_student_goes_on_from_the_weights_of_a_run_and_its_first_score_is_theirs(
    plain_run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    cfg = tiny(tmp_path / "more", f"init={plain_run}/weights/last", "student.transformer=false")
    assert train.run(cfg) == 0
    first, last = rows(tmp_path / "more", "val")[0], rows(plain_run, "val")[-1]
    assert (first["step"], last["step"]) == (0, 6)
    assert first["dice_best"] == pytest.approx(last["dice_best"], abs=1e-6)
    assert rows(tmp_path / "more")[-1]["step"] == 6


def test_a_new_transformer_does_not_change_what_the_student_predicts(
    plain_run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    parts = build_parts(tiny(tmp_path / "wide", f"init={plain_run}"))
    module = parts.make()
    module.load_state_dict({**module.state_dict(), **parts.values})
    before, _ = load_student(plain_run / "weights" / "best")
    image = torch.rand(1, 1, 16, 32, 32)
    with torch.no_grad():
        assert torch.equal(module.student(image).logits, before(image).logits)
    assert "add nothing to it at first" in "\n".join(parts.start_lines)

    # Weights of the run learn slowly, and the new transformer at the full rate.
    assert parts.lr_scales[f"{STUDENT}decoder.head.weight"] == 0.25
    assert not any(name.startswith(f"{STUDENT}vit.") for name in parts.lr_scales)


def test_the_effect_of_a_new_transformer_can_be_learned(plain_run: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert train.run(tiny(tmp_path / "wide", f"init={plain_run}")) == 0
    weights = load_file(tmp_path / "wide" / "weights" / "last" / "model.safetensors")
    gain = next(value for name, value in weights.items() if name.startswith("token_gain."))
    assert gain.abs().max() > 0


def test_frozen_parts_keep_their_bits(plain_run: Path, tiny: Tiny, tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "head", f"init={plain_run}", "student.transformer=false", "freeze=[encoder]")
    assert train.run(cfg) == 0
    before = load_file(plain_run / "weights" / "best" / "model.safetensors")
    after = load_file(tmp_path / "head" / "weights" / "last" / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_a_student_of_another_form_is_refused_with_the_keys_that_fit(
    plain_run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"student\.channels='\[4,4,8\]'$") as error:
        build_parts(tiny(tmp_path / "other", f"init={plain_run}", "student.channels=[4,4,16]"))

    # The advice is followed.
    keys = [word for word in shlex.split(str(error.value)) if word.startswith("student.")]
    build_parts(tiny(tmp_path / "other", f"init={plain_run}", *keys))


def test_what_cannot_be_is_one_sentence(plain_run: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        build_parts(tiny(tmp_path / "none", f"init={tmp_path}"))
    with pytest.raises(ConfigError, match="give init=bundled or init=RUN"):
        tiny(tmp_path / "none", "freeze=[encoder]")
    with pytest.raises(ConfigError, match="the student has no transformer"):
        build_parts(tiny(tmp_path / "none", f"init={plain_run}", "student.transformer=false", "freeze=[transformer]"))


def test_another_start_is_another_run(plain_run: Path, tiny: Tiny, tmp_path: Path) -> None:
    best = build_parts(tiny(tmp_path / "a", f"init={plain_run}/weights/best", "student.transformer=false"))
    assert best.inputs["init"] == train_digest(plain_run / "weights" / "best")
    assert "init" not in build_parts(tiny(tmp_path / "a")).inputs


def train_digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder."""
    from hpc_neuro.core import files

    return files.sha256(folder / "model.safetensors")


def test_every_parameter_of_a_student_belongs_to_a_part() -> None:
    from hpc_neuro.models.config import StudentConfig
    from hpc_neuro.train.start_weights import PARTS

    names = build_student(StudentConfig(depth=1)).state_dict()
    prefixes = tuple(prefix for part in PARTS.values() for prefix in part)
    assert [name for name in names if not name.startswith(prefixes)] == []
