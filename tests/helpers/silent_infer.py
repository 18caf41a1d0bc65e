"""A program for test_silent, run on two MPI ranks: an inference in which the second one is suspended for ever.

    mpiexec -n 2 python -m tests.helpers.silent_infer KEY=VALUE ...

Each rank first prints how many threads it computes with.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from mpi4py import MPI

from hpc_neuro.cli import main
from hpc_neuro.infer import block_pipeline, verb

read_block, predict_volume = block_pipeline.read_block, verb.predict_volume


def read_or_suspend(*args: Any) -> Any:
    """Read a block on the first rank; suspend the second one."""
    if MPI.COMM_WORLD.Get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return read_block(*args)


def print_threads_and_predict(*args: Any) -> Any:
    """Print the number of threads, and predict."""
    print(f"{torch.get_num_threads()} threads", flush=True)
    return predict_volume(*args)


if __name__ == "__main__":
    block_pipeline.read_block, verb.predict_volume = read_or_suspend, print_threads_and_predict
    sys.exit(main(["infer", *sys.argv[1:]]))
