"""A tiny student and a tiny store, and what infer makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_neuro import infer
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student, save_student
from tests.helpers.small_volumes import WINDOW, configure
from tests.helpers.tiny_store import write_store


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train folder whose student has random weights, biased so that bright voxels are foreground."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    cfg = StudentConfig(depth=1, patch=(4, 16, 16), stem_channels=(2, 4, 4))
    student = build_student(cfg)
    with torch.no_grad():  # voxels on either side of the threshold, and black on the lower one
        weight, bias = (student.get_parameter(f"decoder.head.linear.{name}") for name in ("weight", "bias"))
        weight *= 50
        dark = student(torch.zeros(1, 1, *WINDOW)).logits.max()
        bias -= dark + 0.5
    extra = {"window": list(WINDOW), "threshold": 0.45}
    save_student(folder / "weights" / "best", cfg, student.state_dict(), extra)
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", {"a": "test", "b": "test"})


@pytest.fixture(scope="session")
def done(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("infer") / "out"
    assert infer.run(configure(model, out, f"store={store}")) == 0
    return out
