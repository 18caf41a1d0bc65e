"""A rank that is lost is named, and the others end although they wait in a collective."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.liveness import FolderBoard, MemoryBoard, Ring
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
    counts = ranks.gather(len(list(pathlib.Path(sys.argv[1]).glob("*"))))
    if ranks.is_main:  # alone, because a launcher may mix the lines of several ranks
        print(*counts, flush=True)
    if ranks.rank == lost_rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    if ranks.rank == 1:
        time.sleep(2.5)  # busy for longer than the limit, which is no silence
    ranks.barrier()
"""
TORCH_LIMIT = 3.0
"""[s] As in tests/helpers/silent_train.py."""


NODES = {
    "one node": {"MPIR_CVAR_NUM_CLIQUES": "1"},
    "two nodes": {"MPIR_CVAR_NUM_CLIQUES": "2"},
    "a node each": {"MPIR_CVAR_NOLOCAL": "1"},
}
"""What makes MPICH take the processes of this machine for those of several."""


def run_mpi(folder: Path, ranks: int, lost_rank: int, nodes: str) -> subprocess.CompletedProcess[str]:
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-c", MPI_PROGRAM, str(folder), str(lost_rank)]
    environment = os.environ | NODES[nodes]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("nodes", "lost_rank"),
    [("one node", 0), ("one node", 1), ("two nodes", 0), ("two nodes", 2), ("two nodes", 3), ("a node each", 1)],
)
def test_mpi_ranks_report_a_silent_rank_once_and_end(tmp_path: Path, nodes: str, lost_rank: int) -> None:
    """The rank is stopped, not killed: this launcher ends the other ranks of a killed one itself.

    Of two nodes, ranks 0 and 2 are the first and beat for all, and rank 3 is known to rank 2 alone.
    """
    done = run_mpi(tmp_path / "beat", 4, lost_rank, nodes)
    assert done.returncode != 0
    assert done.stderr.count("has been silent for") == 1, done.stderr
    assert f"rank {lost_rank} (" in done.stderr
    assert "The same command goes on" in done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(("nodes", "files"), [("one node", 0), ("two nodes", 2), ("a node each", 4)])
def test_mpi_ranks_that_all_live_leave_nothing(tmp_path: Path, nodes: str, files: int) -> None:
    done = run_mpi(tmp_path / "beat", 4, -1, nodes)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(files)] * 4, "one rank of each node beats for all of its ranks"
    assert not list(tmp_path.iterdir())


def test_a_beat_after_the_folder_was_emptied_leaves_it_empty(tmp_path: Path) -> None:
    """A rank that is still at its last beat while another one removes the folder must not keep it there."""
    ring = Ring(FolderBoard(tmp_path), [0, 1], 0, 60.0, 6)
    ring.begin()
    (tmp_path / "sign_0").unlink()
    assert ring.beat_and_look("") == ""
    assert not list(tmp_path.iterdir())


def test_a_text_in_memory_is_whole_or_not_there() -> None:
    slots = np.zeros((2, 32), dtype=np.uint8)
    board = MemoryBoard(["a", "b"], slots)
    assert board.read("a") == ""
    board.write("a", "a long text that does not fit into the slot")
    assert board.read("a") == "a long text that does not fit i"
    board.write("a", "short")
    assert (board.read("a"), board.read("b")) == ("short", "")
    slots[0, 5:] = 0
    assert board.read("a") == "", "half written"


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
