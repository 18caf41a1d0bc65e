"""A rank that is lost is named, and the others end although they wait in a collective."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.torchrun import start

MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
MPI_PROGRAM = """
import logging, os, pathlib, signal, sys, time
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.liveness import MpiRankWatch

logging.basicConfig(format="%(message)s")
ranks, lost_rank = Ranks.join(), int(sys.argv[2])
with MpiRankWatch(pathlib.Path(sys.argv[1]), ranks, 2.0):
    time.sleep(0.5)
    if ranks.rank == lost_rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    if ranks.rank == 1:
        time.sleep(2.5)  # busy for longer than the limit, which is no silence
    ranks.barrier()
"""
TORCH_LIMIT = 3.0
"""[s] As in tests/helpers/silent_train.py."""


def run_mpi(folder: Path, ranks: int, lost_rank: int) -> subprocess.CompletedProcess[str]:
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-c", MPI_PROGRAM, str(folder), str(lost_rank)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.mpi
@pytest.mark.parametrize("lost_rank", [0, 1])
def test_mpi_ranks_report_a_silent_rank_once_and_end(tmp_path: Path, lost_rank: int) -> None:
    """The rank is stopped, not killed: this launcher ends the other ranks of a killed one itself."""
    done = run_mpi(tmp_path / "beat", 3, lost_rank)
    assert done.returncode != 0
    assert done.stderr.count("has been silent for") == 1, done.stderr
    assert f"rank {lost_rank} (" in done.stderr
    assert "The same command goes on" in done.stderr


@pytest.mark.mpi
def test_mpi_ranks_that_all_live_leave_nothing(tmp_path: Path) -> None:
    done = run_mpi(tmp_path / "beat", 2, -1)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "lost_rank"), [("kill", 1), ("stop", 0), ("raise", 1)])
def test_torch_ranks_name_a_lost_rank_and_end_in_time(how, lost_rank):
    processes = start("silent_train.py", 3 if how == "kill" else 2, how, lost_rank)
    others = [process for rank, process in enumerate(processes) if rank != lost_rank]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in others]
        ended_at = time.time()
    finally:
        for process in processes:
            process.kill()
    exit_codes = [process.returncode for process in others]
    lost_output = processes[lost_rank].communicate()[0]

    assert set(exit_codes) == {1}, outputs
    name = rf"rank {lost_rank} \(\S+, process {processes[lost_rank].pid}\)"
    if (how, lost_rank) == ("stop", 0):
        name = "rank 0 or the launcher"
    fate = {"kill": "has been silent for", "stop": "has been silent for", "raise": "stopped: MemoryError: no room"}[how]
    for output in outputs:
        assert re.search(name, output), output
        assert lost_rank == 0 or fate in output, output
        assert lost_rank == 0 or "last at: step 7" in output, output
    if how != "raise":
        lost_at = float(re.search(r"AT ([\d.]+)", lost_output)[1])
        # 3 s more: the interpreter's end on a busy machine.
        assert ended_at - lost_at < 1.6 * TORCH_LIMIT + 3
