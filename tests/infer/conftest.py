"""A tiny student and a tiny store, and what infer makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_neuro import infer
from hpc_neuro.models.student import StudentConfig, build_student, save_student
from tests.infer.small import WINDOW, configure
from tests.tiny_store import write_store


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train folder whose student has random weights, biased so that bright voxels are foreground."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    cfg = StudentConfig(depth=1, patch=(4, 16, 16))
    student = build_student(cfg)
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
