"""Rank, world size, device, scalar reductions, and the MPI communicator. The only importer of mpi4py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from hpc_neuro.core.schema import ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# as torchrun, Open MPI, MPICH and Slurm say it
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def _group() -> Any:
    """torch.distributed when this process has joined a group, else None.

    Who has not imported torch is in no group, and need not import it (2 s) to learn that: `--help`, a login node.
    """
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def rank() -> int:
    """This process's index in the torch group; without one, as the launcher says, 0 when alone."""
    group = _group()
    return int(group.get_rank()) if group else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the torch group; without one, as the launcher says, 1 when alone."""
    group = _group()
    return int(group.get_world_size()) if group else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes what is written once."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this process's local rank, else the CPU."""
    import torch

    if torch.cuda.is_available():
        local = next((os.environ[k] for k in _LOCAL_RANK if k in os.environ), "0")
        index = int(local) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks; nothing to wait for when alone."""
    if (group := _group()) and group.get_world_size() > 1:
        group.barrier()


def reduced(value: float, how: str, on: torch.device) -> float:
    """`value` reduced over all ranks by `sum`, `max`, `min` or `mean`; the same on every rank. float64."""
    dist = _group()
    if dist is None or dist.get_world_size() == 1:
        return value
    import torch

    op = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[how]
    tensor = torch.tensor(value, dtype=torch.float64, device=on)
    dist.all_reduce(tensor, op=op)
    return float(tensor.item()) / (dist.get_world_size() if how == "mean" else 1)


def mpi_comm() -> Any:
    """The MPI world communicator when this process was started by an MPI launcher, else None.

    Raises ConfigError when the launcher's process count and MPI's disagree (a wrong PMI gives N worlds of one process).
    """
    launched = next((os.environ[k] for k in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK") if k in os.environ), None)
    tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
    if launched is None and tasks == 1:
        return None
    from mpi4py import MPI  # importing starts MPI, which a process without a launcher must not do

    size = MPI.COMM_WORLD.Get_size()
    if tasks > 1 and size != tasks:
        raise ConfigError(
            f"Slurm started {tasks} tasks but MPI sees {size}: the PMI of srun and of the MPI library differ; "
            "use `srun --mpi=pmix` for Open MPI or `srun --mpi=pmi2` for MPICH"
        )
    return MPI.COMM_WORLD if size > 1 else None


def share_threads(comm: Any) -> None:
    """Divide the cores among the ranks of `comm` (None: alone) on this machine, unless their launcher did so already.

    Collective. srun and batch systems bind ranks to cores or set OMP_NUM_THREADS; mpiexec leaves every rank all cores.
    """
    if comm is None:
        return
    import torch
    from mpi4py import MPI

    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    if "OMP_NUM_THREADS" not in os.environ and len(os.sched_getaffinity(0)) == os.cpu_count():
        torch.set_num_threads(max(1, torch.get_num_threads() // here.Get_size()))
    here.Free()


def together(step: Callable[[], T], comm: Any) -> T:
    """What `step` returns on this rank of `comm` (None: alone); when it fails on one, all stop. Collective.

    The lowest rank that failed raises its error, which is then said once; the others raise SystemExit(2), so that none
    waits for one that has stopped.
    """
    done: list[T] = []
    failed: Exception | None = None
    try:
        done.append(step())
    except Exception as error:  # raised again below, when no rank waits for this one any more
        failed = error
    ranks = [failed is not None] if comm is None else comm.allgather(failed is not None)
    if not any(ranks):
        return done[0]
    if failed is not None and (comm is None or ranks.index(True) == comm.Get_rank()):
        raise failed
    raise SystemExit(2)


def turns(count: int, comm: Any) -> Iterator[int]:
    """Share the numbers 0 to count - 1 among the ranks of `comm` (None: alone): each takes the next one nobody has.

    One counter in rank 0's memory, raised by one-sided access, so a rank that is done early takes more and none waits.
    """
    if comm is None:
        yield from range(count)
        return
    import numpy as np
    from mpi4py import MPI

    window = MPI.Win.Allocate(8 if comm.Get_rank() == 0 else 0, 8, comm=comm)
    if comm.Get_rank() == 0:
        np.asarray(window.tomemory()).view(np.int64)[0] = 0
    comm.Barrier()
    one, mine = np.ones(1, np.int64), np.zeros(1, np.int64)
    while True:
        window.Lock(0)
        window.Fetch_and_op(one, mine, 0)
        window.Unlock(0)
        if mine[0] >= count:
            break
        yield int(mine[0])
    window.Free()  # collective: every rank has drawn its last number
