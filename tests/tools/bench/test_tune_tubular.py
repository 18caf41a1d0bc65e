"""The tuner of the tubes times the package's own launches and leaves its table as it was."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
REPO = Path(__file__).resolve().parents[3]

TINY = """
import copy, sys
from hpc_neuro.models.tubular import triton_impl as tubular_triton
from tools.bench import tubular as bench_tubular, tune_tubular
bench_tubular.SMALL = (3, 4, 5)
tune_tubular.TUBES, tune_tubular.WARPS, tune_tubular.STAGES = (16, 32), (2,), (1,)
before = copy.deepcopy(tubular_triton.TILES)
sys.argv = ["tune", "--device", "cpu", "--channels", "4", "--taps", "3", "--repeats", "1"]
code = tune_tubular.main()
assert tubular_triton.TILES == before
sys.exit(code)
"""


def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **env}
    return subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_each_kernel_gets_the_fastest_of_its_choices_and_the_table_can_be_pasted() -> None:
    """By Triton's interpreter, so the times mean nothing here."""
    done = run(TINY, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    lines, table = done.stdout.split("TILES = ")
    assert lines.count("2 of 2 choices fit") == 6
    tiles: dict[object, dict[str, tuple[int, int, int]]] = eval(table, {"torch": __import__("torch")})
    assert [list(row) for row in tiles.values()] == [["conv", "gradient", "weight"]] * 2
    assert {tile for row in tiles.values() for tile in row.values()} <= {(16, 2, 1), (32, 2, 1)}


def test_without_a_gpu_it_says_so() -> None:
    done = run(
        "import sys; sys.argv = ['tune']; from tools.bench import tune_tubular as t; sys.exit(t.main())",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 2
    assert "run this on a GPU machine" in done.stderr
