"""Tasks that fail or kill their process: tried so often, then left out and listed; all else is done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.task_queue import Task, TaskFailure, do_each, plan_tasks, run_tasks
from hpc_neuro.infer.block_pipeline import VolumeRun
from tests.helpers.journal import list_begun, read_failures
from tests.helpers.poisoned_infer import BLOCK_DEATHS, TASK_DEATHS, TASKS
from tests.helpers.small_volumes import ArrayVolume, open_run, probability


@pytest.fixture(scope="module")
def poisoned_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and what was told of each start."""
    out = tmp_path_factory.mktemp("poisoned")
    command = [sys.executable, "-m", "tests.helpers.poisoned_infer", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    starts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["code"] for s in starts] == [
        *[-signal.SIGKILL] * BLOCK_DEATHS,
        0,
        *[*[-signal.SIGKILL] * TASK_DEATHS, 0] * len(TASKS),
    ], done.stderr
    return out, starts


def test_a_block_that_kills_its_process_is_left_out_after_so_many_deaths(
    poisoned_run: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Each process that dies there is counted; all other blocks are done, and the last run lists it."""
    out, starts = poisoned_run
    last = [s for s in starts if s["poison"] == "block"][-1]
    (line,) = last["failures"]
    assert line.startswith("v block (0, 1, 1) at (0, 32, 32): 3 times the process that was at it was killed")
    assert last["done"] == ["0_0_0", "0_0_1", "0_0_2", "0_1_0", "0_1_2"]
    assert list_begun(out, "v") == ["0_1_1"]
    parked = read_failures(out, "v")["0_1_1"]
    assert (parked["index"], parked["tries"]) == ([0, 1, 1], 3)
    wanted = np.rint(np.arange(8 * 64 * 96).reshape(8, 64, 96) / 49152 * 255)  # the student gives the image back
    wanted[:, 32:, 32:64] = 0
    np.testing.assert_array_equal(probability(out, "v"), wanted)  # whatever was cut off in the middle


@pytest.mark.parametrize("poison", list(TASKS))
def test_so_is_any_other_part_and_the_other_volume_is_finished(
    poisoned_run: tuple[Path, list[dict[str, Any]]], poison: str
) -> None:
    out, starts = poisoned_run
    same_poison = [s for s in starts if s["poison"] == poison]
    (line,) = same_poison[-1]["failures"]
    assert line.startswith(f"a, {TASKS[poison]}: 2 times the process that was at it was killed")
    assert "a higher `deaths` tries it again" in line
    assert same_poison[-1]["done"] == ["b"]
    assert (out / poison / "swc/b.swc").exists()
    assert list_begun(out / poison, "a") == [poison]
    assert not list_begun(out / poison, "b")
    assert read_failures(out / poison, "a")[poison]["part"] == TASKS[poison]


def _open_run(model: Path, tmp_path: Path) -> VolumeRun:
    return open_run(model, ArrayVolume(np.zeros((8, 32, 32), np.float32)), tmp_path, tries=2)


def _run(run: VolumeRun, tasks: list[Task[str]], make: Callable[[Task[str]], None]) -> list[TaskFailure]:
    journals = {"a": run.markers}
    plan = plan_tasks(tasks, journals, run.limits)
    return run_tasks(plan, do_each(make), journals, run.limits, Ranks()).failures


def test_a_task_that_raises_is_tried_again_and_then_listed_with_its_traceback(model: Path, tmp_path: Path) -> None:
    run, tried, is_sick = _open_run(model, tmp_path), list[str](), True

    def make(task: Task[str]) -> None:
        tried.append(task.name)
        if task.payload == "bad input":
            raise InputError("the root lies outside")
        if is_sick and (task.payload == "ill" or (task.payload == "shaky" and tried.count(task.name) == 1)):
            raise OSError("bad sector")

    kinds = ("well", "ill", "shaky", "bad input")
    tasks = [Task(f"part_{kind}", f"part {kind}", kind, "a", {"part": f"part {kind}"}) for kind in kinds]
    failures = _run(run, tasks, make)
    assert [failure.line for failure in failures] == [
        "a, part ill: bad sector",
        "a, part bad input: the root lies outside",
    ]
    assert [tried.count(task.name) for task in tasks] == [1, 2, 2, 1]
    assert not list_begun(tmp_path, "a")
    record = read_failures(tmp_path, "a")["part_ill"]
    assert (record["part"], record["tries"]) == ("part ill", 2)
    assert any("in make" in line for line in record["traceback"])
    # Only blocks count as failed blocks.
    assert not run.markers.read_failed_blocks()
    is_sick = False
    assert not _run(run, tasks[1:2], make)
    assert "part_ill" not in read_failures(tmp_path, "a")


def test_a_full_disk_ends_the_run(model: Path, tmp_path: Path) -> None:
    def make(task: Task[str]) -> None:
        raise OSError(28, "No space left on device")

    run = _open_run(model, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        _run(run, [Task("one", "one", "", "a"), Task("two", "two", "", "a")], make)
    assert not list_begun(tmp_path, "a")
