"""A program for test_silent, run on two MPI ranks: an inference in which the second one is suspended for ever.

    mpiexec -n 2 python -m tests.helpers.silent_infer KEY=VALUE ...

Each rank first says how many threads it computes with.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from mpi4py import MPI

from hpc_neuro.cli import main
from hpc_neuro.infer import block_pipeline

read = block_pipeline._read


def suspended(*given: Any) -> Any:
    """Reads a block of the first rank."""
    if MPI.COMM_WORLD.Get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return read(*given)


def told(*given: Any, **more: Any) -> None:
    """As it is, and says the threads."""
    print(f"{torch.get_num_threads()} threads", flush=True)
    predict(*given, **more)


if __name__ == "__main__":
    from hpc_neuro.infer import verb

    predict = verb.predict_blocks
    block_pipeline._read, verb.predict_blocks = suspended, told
    sys.exit(main(["infer", *sys.argv[1:]]))
