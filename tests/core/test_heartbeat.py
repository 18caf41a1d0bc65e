"""A rank that is gone is named, and the others end although they wait in MPI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
RANKS = """
import logging, os, pathlib, signal, sys, time
from mpi4py import MPI
from hpc_neuro.core.heartbeat import Heartbeat

logging.basicConfig(format="%(message)s")
comm, lost = MPI.COMM_WORLD, int(sys.argv[2])
with Heartbeat(pathlib.Path(sys.argv[1]), comm, 2.0):
    time.sleep(0.5)
    if comm.Get_rank() == lost:
        os.kill(os.getpid(), signal.SIGSTOP)
    if comm.Get_rank() == 1:
        time.sleep(2.5)  # busy for longer than the limit, which is no silence
    comm.Barrier()
"""


def run(folder: Path, ranks: int, lost: int) -> subprocess.CompletedProcess[str]:
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-c", RANKS, str(folder), str(lost)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.mpi
@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_of_a_silent_rank_say_so_and_end(tmp_path: Path, lost: int) -> None:
    """It is stopped, not killed: this launcher ends the others of a killed rank itself, others wait for a while."""
    ended = run(tmp_path / "beat", 3, lost)
    assert ended.returncode != 0
    assert ended.stderr.count("has been silent for") == 1, ended.stderr
    assert f"rank {lost} (" in ended.stderr
    assert "The same command goes on" in ended.stderr


@pytest.mark.mpi
def test_ranks_that_all_live_leave_nothing(tmp_path: Path) -> None:
    ended = run(tmp_path / "beat", 2, -1)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
