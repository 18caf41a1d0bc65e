"""Parts that fail or kill their process: tried so often, then left out and listed; all else is done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_neuro.core.schema import InputError
from hpc_neuro.infer import shared_tasks
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.infer.shared_tasks import Failure, Part
from tests.helpers.poisoned_infer import DEATHS, FEWER, PARTS
from tests.helpers.small_volumes import Plain, probability, work_on


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and what was told of each start."""
    out = tmp_path_factory.mktemp("poisoned")
    command = [sys.executable, "-m", "tests.helpers.poisoned_infer", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    starts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["code"] for s in starts] == [
        *[-signal.SIGKILL] * DEATHS,
        0,
        *[*[-signal.SIGKILL] * FEWER, 0] * len(PARTS),
    ], done.stderr
    return out, starts


def test_a_block_that_kills_its_process_is_left_out_after_so_many_deaths(
    poisoned: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Each process that dies there is counted; all other blocks are done, and the last run lists it."""
    out, starts = poisoned
    last = [s for s in starts if s["poison"] == "block"][-1]
    (line,) = last["failures"]
    assert line.startswith("v block (0, 1, 1) at (0, 32, 32): 3 times the process that was at it was killed")
    assert last["done"] == ["0_0_0", "0_0_1", "0_0_2", "0_1_0", "0_1_2"]
    assert [p.name for p in out.glob("begun/v/*")] == ["0_1_1"]
    parked = json.loads((out / "failed/v/0_1_1.json").read_text())
    assert (parked["index"], parked["tries"]) == ([0, 1, 1], 3)
    wanted = np.rint(np.arange(8 * 64 * 96).reshape(8, 64, 96) / 49152 * 255)  # the student gives the image back
    wanted[:, 32:, 32:64] = 0
    np.testing.assert_array_equal(probability(out, "v"), wanted)  # whatever was cut off in the middle


@pytest.mark.parametrize("poison", list(PARTS))
def test_so_is_any_other_part_and_the_other_volume_is_finished(
    poisoned: tuple[Path, list[dict[str, Any]]], poison: str
) -> None:
    out, starts = poisoned
    mine = [s for s in starts if s["poison"] == poison]
    (line,) = mine[-1]["failures"]
    assert line.startswith(f"a, {PARTS[poison]}: 2 times the process that was at it was killed")
    assert "a higher `deaths` tries it again" in line
    assert mine[-1]["done"] == ["b"]
    assert (out / poison / "swc/b.swc").exists()
    assert [p.name for p in out.glob(f"{poison}/begun/a/*")] == [poison]
    assert not list(out.glob(f"{poison}/begun/b/*"))
    assert json.loads((out / poison / f"failed/a/{poison}.json").read_text())["part"] == PARTS[poison]


def _work(model: Path, tmp_path: Path) -> Work:
    return work_on(model, Plain(np.zeros((8, 32, 32), np.float32)), tmp_path, tries=2)


def test_a_part_that_raises_is_tried_again_and_then_listed_with_its_traceback(model: Path, tmp_path: Path) -> None:
    work, tried, sick = _work(model, tmp_path), list[str](), True

    def make(part: Part[str]) -> None:
        tried.append(part.name)
        if part.what == "bad input":
            raise InputError("the root lies outside")
        if part.what in ("ill", "shaky") and sick and (part.what == "ill" or tried.count(part.name) == 1):
            raise OSError("bad sector")

    todo = [Part(0, f"part_{kind}", f"part {kind}", kind) for kind in ("well", "ill", "shaky", "bad input")]
    failures = shared_tasks.made([work], lambda: todo, make, None)
    assert failures == [Failure(0, "a, part ill: bad sector"), Failure(0, "a, part bad input: the root lies outside")]
    assert [tried.count(part.name) for part in todo] == [1, 2, 2, 1]
    assert not list(tmp_path.glob("begun/a/*"))
    kept = json.loads((tmp_path / "failed/a/part_ill.json").read_text())
    assert (kept["part"], kept["tries"]) == ("part ill", 2)
    assert any("in make" in line for line in kept["traceback"])
    assert not work.marks.parked()  # these are the blocks
    sick = False
    assert not shared_tasks.made([work], lambda: todo[1:2], make, None)
    assert not (tmp_path / "failed/a/part_ill.json").exists()


def test_a_full_disk_ends_the_run(model: Path, tmp_path: Path) -> None:
    def make(part: Part[None]) -> None:
        raise OSError(28, "No space left on device")

    work = _work(model, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        shared_tasks.made([work], lambda: [Part(0, "one", "one", None), Part(0, "two", "two", None)], make, None)
    assert not list(tmp_path.glob("begun/a/*"))
