"""A sweep with trials that train nothing (faults/stand_in_trial.py): the driver and the jobs are the real ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import Point
from launch.executors.local import LocalExecutor
from launch.sweep.driver import SweepDriver

STAND_IN = Path(__file__).resolve().parents[1] / "faults" / "stand_in_trial.py"
STEPS = 12


def make_search(out: Path, **keys: Any) -> SearchConfig:
    tree = {
        "out": out,
        "space": {"lr": {"log": [1e-5, 1e-1]}},
        "sampler": {"kind": "random"},
        "trials": 6,
        "objective": {"key": "val.dice"},
        "concurrent": 2,
        "poll": 0.05,
        **keys,
    }
    return TypeAdapter(SearchConfig).validate_python(tree)


def make_stand_in_command(folder: Path) -> list[str]:
    return [sys.executable, str(STAND_IN), str(folder)]


def make_driver(cfg: SearchConfig, seconds: float = 0.1, **keys: Any) -> SweepDriver:
    """A driver as it starts, also after another one died."""

    def write_trial(folder: Path, number: int, point: Point) -> None:
        tree = {"lr": 1e-3, "steps": STEPS, "every": 2, "seconds": seconds, **keys, **point}
        (folder / "train.yaml").write_text(yaml.safe_dump(tree))

    return SweepDriver(cfg, STEPS, write_trial, LocalExecutor(grace=5), make_stand_in_command)


def step_until(driver: SweepDriver, condition: Callable[[], bool], patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, [(t.number, t.state, t.step) for t in driver.trials.values()]
        driver.step()
        time.sleep(0.05)


def read_events(cfg: SearchConfig) -> dict[str, list[str]]:
    """Trial folder -> what each process that entered it noted."""
    paths = sorted((cfg.out / "trials").glob("*/spans.txt"))
    return {path.parent.name: [line.split()[0] for line in path.read_text().splitlines()] for path in paths}
