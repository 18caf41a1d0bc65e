"""The profiler writes a trace of its steps, and of no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from hpc_neuro.core.schema import ConfigError, load
from hpc_neuro.train.config import TrackerConfig
from hpc_neuro.train.profiler import StepProfiler

CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profiler.begin_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3) + 1
        profiler.end_step(step)


def read_names(path: Path) -> set[str]:
    with gzip.open(path, "rt") as handle:
        return {event.get("name", "") for event in json.load(handle)["traceEvents"]}


def test_the_steps_of_the_range_are_traced(tmp_path: Path) -> None:
    run_steps(StepProfiler((2, 3), tmp_path, CPU), 1, 5)
    (path,) = tmp_path.iterdir()
    assert path.name == "steps_2_3_rank_0.json.gz"
    names = read_names(path)
    assert {"step 2", "step 3"} <= names
    assert not {"step 1", "step 4"} & names


def test_a_run_that_stops_within_the_range_keeps_what_it_has(tmp_path: Path) -> None:
    profiler = StepProfiler((2, 9), tmp_path, CPU)
    run_steps(profiler, 4, 5)
    profiler.close()
    assert [path.name for path in tmp_path.iterdir()] == ["steps_4_5_rank_0.json.gz"]


def test_without_a_range_nothing_is_written(tmp_path: Path) -> None:
    profiler = StepProfiler(None, tmp_path / "profile", CPU)
    run_steps(profiler, 1, 3)
    profiler.close()
    assert not (tmp_path / "profile").exists()


def test_a_range_begins_before_it_ends() -> None:
    assert load(TrackerConfig, None, ["profile=[2,3]"]).profile == (2, 3)
    with pytest.raises(ConfigError, match="first and a last step"):
        load(TrackerConfig, None, ["profile=[3,2]"])
