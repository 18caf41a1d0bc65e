"""The ranks of a job: a torch group; and MPI, or a process alone, behind one object. The only importer of mpi4py."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.core.stop_signals import Stopped

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

T = TypeVar("T")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
"""The rank on this node, in the words of torchrun, Open MPI, MPICH and Slurm."""


def rank() -> int:
    """This process's index in the torch group; without a group, the launcher's RANK, 0 when alone."""
    group = _torch_group()
    return int(group.get_rank()) if group else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the torch group; without a group, the launcher's WORLD_SIZE, 1 when alone."""
    group = _torch_group()
    return int(group.get_world_size()) if group else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes what is written once."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this process's local rank, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")

    local_rank = next((os.environ[name] for name in _LOCAL_RANK if name in os.environ), "0")
    # A launcher may show each task only its own GPU, so the local rank can exceed the visible devices.
    index = int(local_rank) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def count_gpus() -> int:
    """GPUs that the processes of this job use, one for each process; 0 without CUDA, or before torch is imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    mpi_sizes = [int(os.environ[name]) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if name in os.environ]
    return max(world_size(), *mpi_sizes, 1)


def barrier() -> None:
    """Wait for all ranks of the torch group; return at once when alone."""
    if (group := _torch_group()) and group.get_world_size() > 1:
        group.barrier()


def reduce_scalar(value: float, op: str, on: torch.device) -> float:
    """`value` reduced over all torch ranks by `sum`, `max`, `min` or `mean`; the same on every rank. float64."""
    group = _torch_group()
    if group is None or group.get_world_size() == 1:
        return value

    import torch

    operations = {"sum": group.ReduceOp.SUM, "max": group.ReduceOp.MAX, "min": group.ReduceOp.MIN}
    tensor = torch.tensor(value, dtype=torch.float64, device=on)
    group.all_reduce(tensor, op=operations["sum" if op == "mean" else op])
    return float(tensor.item()) / (group.get_world_size() if op == "mean" else 1)


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag holds on any torch rank; the same on every rank."""
    return [bool(number) for number in largest_of_ranks(*flags)]


def largest_of_ranks(*numbers: int) -> list[int]:
    """Each number as it is on the torch rank that has the largest; the same on every rank.

    The numbers are reduced on the CPU, so that the accelerator's queue is not waited for.
    """
    group = _torch_group()
    if group is None or group.get_world_size() == 1:
        return [int(number) for number in numbers]

    import torch

    tensor = torch.tensor(numbers, dtype=torch.int64)
    group.all_reduce(tensor, op=group.ReduceOp.MAX)
    return [int(number) for number in tensor]


class PacedAgreement:
    """Flags that all torch ranks agree on after some steps, about once per `seconds`: the same steps on every rank.

    At hundreds of ranks and many steps per second, an agreement after each step would be the longest part of a step.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next_step = 0
        self._last_step = 0
        self._last_time = time.monotonic()

    def agree(self, step: int, *flags: bool) -> list[bool] | None:
        """Whether each flag holds on any rank; None after a step at which the ranks do not ask one another."""
        if step < self._next_step and world_size() > 1:
            return None

        now = time.monotonic()
        steps = max(1, step - self._last_step)
        milliseconds = math.ceil(1000 * (now - self._last_time) / steps)
        *answers, slowest = largest_of_ranks(*flags, milliseconds)

        # The slowest rank's time decides, so that the next agreement is at the same step on all of them.
        self._next_step = step + max(1, int(1000 * self._seconds / max(1, slowest)))
        self._last_step, self._last_time = step, now
        return [bool(answer) for answer in answers]


@dataclass(frozen=True)
class NodeMemory:
    """Memory that the ranks of a node share."""

    members: list[int]
    """[n] The ranks of the node, in their order."""
    slots: NDArray[np.uint8]
    """[n + 1, byte]"""


class Ranks:
    """The processes that run one verb together: this process alone, or all ranks of an MPI job.

    Every method is collective: all ranks call it.
    """

    def __init__(self, comm: Any = None) -> None:
        """comm: an MPI communicator; None: this process is alone."""
        self.comm = comm
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()
        self._store: Any = None
        self._stores_opened = 0

    @classmethod
    def join(cls) -> Ranks:
        """The ranks that an MPI launcher started, else this process alone.

        Raises ConfigError when the process counts of the launcher and of MPI differ: a wrong PMI gives N worlds of one
        process each.
        """
        mpi_variables = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
        slurm_tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
        if slurm_tasks == 1 and not any(name in os.environ for name in mpi_variables):
            return cls()

        # Importing mpi4py starts MPI, which a process without an MPI launcher must not do.
        from mpi4py import MPI

        size = MPI.COMM_WORLD.Get_size()
        if slurm_tasks > 1 and size != slurm_tasks:
            raise ConfigError(
                f"Slurm started {slurm_tasks} tasks but MPI sees {size}: the PMI of srun and of the MPI library "
                "differ; use `srun --mpi=pmix` for Open MPI or `srun --mpi=pmi2` for MPICH"
            )
        return cls(MPI.COMM_WORLD) if size > 1 else cls()

    @property
    def is_main(self) -> bool:
        """Whether this rank logs, and writes what is written once."""
        return self.rank == 0

    def run(self, step: Callable[[], T]) -> T:
        """The result of `step` on this rank; when it fails or is stopped on one rank, all ranks end.

        The lowest rank that failed raises its error, so that it is reported once; the others raise SystemExit(2), so
        that none waits for a rank that has ended. When no rank failed and one was stopped by a signal, all raise
        Stopped.
        """
        results: list[T] = []
        error: Exception | Stopped | None = None
        try:
            results.append(step())
        except (Exception, Stopped) as raised:
            # Raised again below, once no rank waits for this one.
            error = raised

        stop_reason = error.reason if isinstance(error, Stopped) else ""
        outcomes = self.gather((error is not None and not stop_reason, stop_reason))
        failed_ranks = [rank for rank, (is_failed, _) in enumerate(outcomes) if is_failed]
        stop_reasons = [reason for _, reason in outcomes if reason]

        if failed_ranks and failed_ranks[0] == self.rank and error is not None:
            raise error
        if failed_ranks:
            raise SystemExit(2)
        if stop_reasons:
            raise Stopped(stop_reasons[0])
        return results[0]

    def run_on_main(self, step: Callable[[], T]) -> T:
        """The result of `step`, which only the first rank runs; all ranks get it, and end as in `run` when it fails."""
        results = self.run(lambda: [step()] if self.is_main else [])
        return results[0] if self.comm is None else self.comm.bcast(results)[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks."""
        return [value] if self.comm is None else list(self.comm.allgather(value))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.comm is not None:
            self.comm.Barrier()

    def open_store(self) -> Any:
        """A torch store with keys of its own that all ranks see. Its server is a thread of rank 0 that needs no Python.

        The store of a process alone lives in its memory.
        """
        import torch.distributed

        stores: Any = torch.distributed
        if self._store is None:
            self._store = stores.HashStore() if self.size == 1 else self._connect_store(stores.TCPStore)
        self._stores_opened += 1
        return stores.PrefixStore(str(self._stores_opened), self._store)

    def _connect_store(self, tcp_store: Any) -> Any:
        """A client of the store that rank 0 serves on a free port."""
        # On one node the loopback address works even where the host's name does not resolve.
        is_one_node = len(set(self.gather(platform.node()))) == 1
        host = "127.0.0.1" if is_one_node else platform.node()
        server = self.run(lambda: tcp_store(host, 0, is_master=True, wait_for_workers=False) if self.is_main else None)
        main_host, port = self.gather((host, server.port if server else 0))[0]
        return self.run(lambda: server or tcp_store(main_host, port, is_master=False, wait_for_workers=False))

    def share_node_memory(self, slot_bytes: int) -> NodeMemory:
        """Memory that the ranks of each node share, with a slot for each of them and one more; zeros at first.

        It is given back when the process ends.
        """
        import numpy as np

        if self.comm is None:
            return NodeMemory([self.rank], np.zeros((2, slot_bytes), dtype=np.uint8))

        from mpi4py import MPI

        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        members = node.allgather(self.rank)
        size = (len(members) + 1) * slot_bytes
        window = MPI.Win.Allocate_shared(size if node.Get_rank() == 0 else 0, comm=node)
        memory: Any = window.Shared_query(0)[0]
        slots = np.frombuffer(memory, dtype=np.uint8, count=size).reshape(-1, slot_bytes)
        if node.Get_rank() == 0:
            slots[:] = 0
        node.Barrier()
        node.Free()
        return NodeMemory(members, slots)

    def share_threads(self) -> None:
        """Divide the cores of each node among its ranks, unless the launcher did so already.

        srun and batch systems bind ranks to cores or set OMP_NUM_THREADS; mpiexec leaves every rank all cores.
        """
        if self.comm is None:
            return

        import torch
        from mpi4py import MPI

        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        if "OMP_NUM_THREADS" not in os.environ and len(os.sched_getaffinity(0)) == os.cpu_count():
            torch.set_num_threads(max(1, torch.get_num_threads() // node.Get_size()))
        node.Free()


def _torch_group() -> Any:
    """torch.distributed when this process has joined a group, else None.

    A process that has not imported torch is in no group, and need not import it (2 s) to learn that: `--help`, a login
    node.
    """
    group = sys.modules.get("torch.distributed")
    return group if group is not None and group.is_initialized() else None
