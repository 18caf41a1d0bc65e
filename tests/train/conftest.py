"""A training run small enough for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_neuro.core.schema import load
from hpc_neuro.train import TrainConfig
from tests.helpers.tiny_store import write_store

TINY = [
    "student.depth=1",
    "student.channels=[4,4,8]",
    "crop.size=[16,32,32]",
    "optim.batch=2",
    "optim.steps=6",
    "validate.every=3",
    "validate.crops=2",
    "checkpoint.every=2",
    "tracker.wandb=disabled",
    "tracker.every=2",
    "transfer.rule=scratch",
    "distill=null",
]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two training volumes and one for validation."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    return write_store(folder, {"a": "train", "b": "train", "c": "val"})


@pytest.fixture
def tiny(store: Path) -> Callable[..., TrainConfig]:
    """tiny(out, *overrides) -> TrainConfig."""

    def make(out: Path, *overrides: str) -> TrainConfig:
        return load(TrainConfig, None, [f"store={store}", f"out={out}", *TINY, *overrides])

    return make


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]
