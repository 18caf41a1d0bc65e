"""The trees of a volume of many super-blocks: on one rank or two, at once or after a stop, those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import infer
from hpc_neuro.data import swc
from hpc_neuro.infer import super_blocks
from hpc_neuro.infer.model import Predictor
from tests.helpers.small_volumes import KEYS, configure

WHOLE = ["trees=true", "trace.signal_gap=0", "trace.gap=0"]
IN_PARTS = [*WHOLE, "trace.block=[16,16,32]", "trace.super_block=[1,1,2]"]


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    """An image of two neurites, one of them with a branch, through three super-blocks."""
    image = np.zeros((16, 32, 192), dtype=np.uint8)
    image[6:11, 6:11, 4:188] = image[6:11, 22:27, 4:188] = 255
    image[6:11, 6:16, 90:95] = 255
    tifffile.imwrite(tmp_path / "cells.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    return f"inputs=[{{image: {tmp_path / 'cells.tif'}, voxel_size: [1, 1, 1]}}]"


@pytest.fixture
def right_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "predict", lambda self, image, seen=None: image)


def read_trees(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("swc/**/*.swc")}


@pytest.mark.usefixtures("right_student")
def test_the_trees_are_those_of_one_process(model: Path, inputs: str, tmp_path: Path) -> None:
    assert infer.run(configure(model, tmp_path / "whole", inputs, *WHOLE)) == 0
    assert infer.run(configure(model, tmp_path / "parts", inputs, *IN_PARTS)) == 0
    whole, parts = (swc.read(tmp_path / name / "swc/cells.voxel.swc") for name in ("whole", "parts"))
    assert len(whole.roots) == len(parts.roots) == 2
    np.testing.assert_allclose(parts.points, whole.points, atol=1.0)
    assert not (tmp_path / "parts" / "strands").exists()


@pytest.mark.usefixtures("right_student")
@pytest.mark.parametrize(("step", "calls"), [("trace_lines", 2), ("group", 0), ("finish", 0), ("collect", 0)])
def test_a_step_that_is_done_is_not_done_again(
    model: Path, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, calls: int
) -> None:
    assert infer.run(configure(model, tmp_path / "quiet", inputs, *IN_PARTS)) == 0
    cfg = configure(model, tmp_path / "o", inputs, *IN_PARTS)
    take, taken = getattr(super_blocks, step), []

    def take_or_stop(*args: object) -> object:
        if len(taken) == calls:
            raise KeyboardInterrupt
        taken.append(args)
        return take(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(super_blocks, step, take_or_stop)
        infer.run(cfg)

    # What comes before the step that was interrupted is on the disk.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "o/strands").glob("**/*.npz")}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **more: None)
        assert infer.run(cfg) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert read_trees(tmp_path / "o") == read_trees(tmp_path / "quiet")


@pytest.mark.mpi
def test_two_ranks_make_the_trees_of_one(model: Path, inputs: str, tmp_path: Path) -> None:
    keys = [inputs, *IN_PARTS, "trace.threshold=0.3"]
    assert infer.run(configure(model, tmp_path / "one", *keys)) == 0
    start = [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", sys.executable, "-m", "hpc_neuro", "infer"]
    ended = subprocess.run(
        [*start, f"model={model}", f"out={tmp_path / 'two'}", *KEYS, *keys],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert read_trees(tmp_path / "one")
    assert read_trees(tmp_path / "two") == read_trees(tmp_path / "one")
