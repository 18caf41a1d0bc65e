"""Every YAML file that is shipped is a usable config of its verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.core import schema
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.models.tensor_names import fit_config
from hpc_neuro.pipeline import VERBS
from hpc_neuro.train.config import TrainConfig
from launch.site import Site

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def config_class(folder: str) -> type:
    """The root config of the files in a folder of configs/."""
    if folder == "cluster":
        return Site
    cls: type = VERBS[folder].load_config_class()
    return cls


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_shipped_config_loads_and_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    cls = config_class(file.relative_to(CONFIGS).parts[0])
    cfg = schema.load(cls, file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(schema.dump(cfg))
    assert schema.load(cls, copy) == cfg


def test_the_student_has_the_form_of_its_teacher() -> None:
    """Else `train` would refuse the config, once its store is there."""
    cfg: TrainConfig = schema.load(TrainConfig, CONFIGS / "train" / "bundled8.yaml")
    assert fit_config(cfg.student, load_teacher(cfg.teacher)) == cfg.student


def test_each_verb_that_needs_a_config_has_one_to_start_from() -> None:
    shipped = {f.relative_to(CONFIGS).parts[0] for f in FILES}
    assert {"prepare", "precompute", "train", "infer", "evaluate"} <= shipped
