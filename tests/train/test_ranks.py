"""Two real ranks: the losses of one process, exact resume, agreement on a signal that only one of them got."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.schema import ConfigError
from tests.train.conftest import rows

HERE = Path(__file__).resolve().parent
KEYS = ["augment.warp=0", "optim.batch=4"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(store, tmp_path_factory):
    """The folder of all runs that ranks.py does."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "ranks.py"), str(store), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[done.stderr.find("Traceback") :][:6000]
    return folder


def test_interrupted_runs_end_with_the_same_bits(ranks):
    first, second = (load_file(ranks / name / "weights/last/model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [r["loss"] for r in rows(ranks / "whole")] == [r["loss"] for r in rows(ranks / "broken")]
    assert [r["step"] for r in rows(ranks / "broken")] == [1, 2, 3, 4, 5, 6]


def test_all_ranks_stop_when_one_is_asked_to(ranks):
    codes = [json.loads((ranks / f"codes{rank}.json").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1]
    assert codes[0]["broken"] == ["cut", 75, 0]


def test_two_ranks_and_every_stage_have_the_losses_of_one_process(ranks, tiny, tmp_path):
    alone = tmp_path / "alone"
    assert train.run(tiny(alone, *KEYS)) == 0
    for name in ("whole", "stage0", "stage3"):
        for mine, other in zip(rows(ranks / name), rows(alone), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5), name
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), name
    for mine, other in zip(rows(ranks / "whole", "val"), rows(alone, "val"), strict=True):
        assert mine["dice_best"] == pytest.approx(other["dice_best"], abs=1e-3)


def test_a_checkpoint_of_two_ranks_is_refused_by_one_with_both_numbers(ranks, tiny):
    with pytest.raises(ConfigError, match="ranks: saved with 2, started with 1"):
        train.run(tiny(ranks / "whole", *KEYS, "optim.steps=8"))
