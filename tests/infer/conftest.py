"""A tiny student and a tiny store, and what infer makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro import infer
from tests.helpers.bright_student import save_bright_student
from tests.helpers.small_volumes import configure
from tests.helpers.tiny_store import write_store


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train folder whose student has random weights, biased so that bright voxels are foreground."""
    folder = tmp_path_factory.mktemp("train")
    save_bright_student(folder / "weights" / "best")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", {"a": "test", "b": "test"})


@pytest.fixture(scope="session")
def finished_run(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("infer") / "out"
    assert infer.run(configure(model, out, f"store={store}")) == 0
    return out
