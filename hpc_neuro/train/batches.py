"""This rank's batches in order, read ahead by other processes and copied to the device one ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any

import torch

from hpc_neuro.core import distributed
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch
from hpc_neuro.data.dataset import CropDataset, load_batches
from hpc_neuro.train.config import TrainConfig

log = logging.getLogger(__name__)

_MOST_DEATHS = 5
"""Deaths of reading processes in a row, without a batch in between, after which the run ends."""

_GPU_WORKERS = 4
"""Default number of reading processes beside a GPU."""

AHEAD = 4
"""[batch] Batches that each reader reads ahead."""


def read_batches(
    cfg: TrainConfig, crops: CropDataset, micro: int, first_step: int, device: torch.device
) -> Generator[Batch, None, None]:
    """This rank's batches on the host, from `first_step` on. A reading process that is killed is replaced.

    micro: crops per pass. Raises InputError when reading processes die again and again at the same batch.
    """
    is_gpu = device.type == "cuda"

    # Beside a GPU the host is free to read. On a CPU the readers would compete with the training.
    workers = cfg.workers if cfg.workers is not None else _GPU_WORKERS * is_gpu
    count, deaths, last_death = 0, 0, -1

    while True:
        # A new set of readers begins at the batch that the old one owed.
        indices = itertools.islice(iterate_indices(first_step, cfg.optim.steps, cfg.optim.batch, micro), count, None)
        try:
            with load_batches(crops, indices, workers, AHEAD, pin=is_gpu) as batches:
                _remove_child_handler()
                for batch in batches:
                    count += 1
                    yield batch
            return
        except RuntimeError as error:
            deaths = deaths + 1 if last_death == count else 1
            last_death = count
            if "DataLoader worker" not in str(error):
                raise
            # Readers that always die at the same batch die of it.
            if deaths == _MOST_DEATHS:
                raise InputError(
                    f"{deaths} times a process that reads crops was killed at the same batch ({error}); give "
                    "workers=0, or more memory, of which /dev/shm is a part"
                ) from error
            log.warning("train: a process that reads crops was killed (%s); others take its place", error)


def _remove_child_handler() -> None:
    """Remove torch's handler of SIGCHLD, which raises wherever the step is; the next batch notices a death, too."""
    handler = signal.getsignal(signal.SIGCHLD)
    is_torchs = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"

    # Python sets handlers in the main thread only.
    if is_torchs and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def share_step(batch: int, micro: int) -> list[tuple[int, int]]:
    """[first, stop) of a step's samples in each of this rank's passes; empty where other ranks have the rest.

    All ranks have the same number of passes, because they meet in each of them.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    firsts = [start + rank * micro for start in range(0, batch, ranks * micro)]
    return [(min(first, batch), min(first + micro, batch)) for first in firsts]


def iterate_indices(first_step: int, steps: int, batch: int, micro: int) -> Iterator[list[int]]:
    """Global sample indices of this rank's passes from `first_step` on; step s has samples s * batch and the next.

    A pass without a share reads the step's first sample, which then counts for nothing.
    """
    for base in range(first_step * batch, steps * batch, batch):
        for start, stop in share_step(batch, micro):
            yield list(range(base + start, base + stop)) or [base]


class DevicePrefetcher:
    """Copies batches to the device, one ahead, on a stream of its own.

    `fetch` after a backward has been queued copies the next batch while the GPU computes. What the host decides by
    (`index`, `distilled`) stays on the host: reading it from the device would wait for the device.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches = batches
        self._device = device
        self._next: Batch | None = None
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self) -> None:
        """Start the copy of the next batch, if none is under way and one is left."""
        if self._next is not None:
            return
        batch = next(self._batches, None)
        if batch is None:
            return

        # The copy runs on a stream of its own, so that it does not queue behind the backward pass.
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            moved = batch.to(self._device)

        self._next = dataclasses.replace(moved, index=batch.index, distilled=batch.distilled)

    def take(self) -> Batch:
        """The next batch, for the current stream. Raises StopIteration after the last."""
        self.fetch()
        if self._next is None:
            raise StopIteration
        batch, self._next = self._next, None

        # The copy may still be under way on its own stream.
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            # The allocator must not reuse this memory before the current stream is done with it.
            for tensor in (batch.image, batch.mask, batch.skeleton, *batch.features.values()):
                tensor.record_stream(current)
        return batch
