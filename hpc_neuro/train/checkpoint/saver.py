"""Saving in the background: all ranks write beside the checkpoint's place, agree, and one of them moves it there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hpc_neuro.core import distributed
from hpc_neuro.train.checkpoint.folder import (
    Marker,
    OptimizerState,
    find_newest,
    part_of_step,
    path_of_step,
    prune,
    publish,
)
from hpc_neuro.train.checkpoint.tensor_files import TensorRange, rank_file, read_ranges, write_ranges
from hpc_neuro.train.config import CheckpointConfig
from hpc_neuro.train.deepspeed.internals import ShardedState

log = logging.getLogger(__name__)


# --- What is saved ---


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint."""

    ranges: list[TensorRange]
    engine: OptimizerState

    def write(self, folder: Path) -> None:
        """Write this rank's file; a rank that owns nothing writes none. Raises OSError."""
        if self.ranges:
            write_ranges(rank_file(folder, distributed.rank()), self.ranges)


def take_snapshot(state: ShardedState, averages: Mapping[int, Tensor] | None, copy: bool) -> Snapshot:
    """This rank's master weights, Adam's moments and averaged weights.

    averages: index of a shard -> average of its weight. copy: to host memory, so that training may go on while the
    snapshot is written; without it the numbers of the moment of writing are written.
    """
    ranges = _collect_ranges(state, averages) if state.owns_ranges else []

    # A copy on the device would take memory that the training needs.
    if copy:
        ranges = [replace(r, values=r.values.detach().to("cpu", copy=True)) for r in ranges]
    return Snapshot(ranges, OptimizerState(state.count_updates(), state.read_loss_scale()))


def restore_snapshot(
    folder: Path, state: ShardedState, engine: OptimizerState, averages: Mapping[int, Tensor] | None
) -> None:
    """Read what any number of ranks saved at any stage into this rank's shards. Raises InputError if some is missing.

    All ranks call this together.
    """
    # A rank begins with the file of its own number: with the same ranks it needs no other.
    read_ranges(folder, _collect_ranges(state, averages), first=distributed.rank())
    state.set_updates(engine.updates)
    state.write_loss_scale(engine.scaler)
    state.refresh_parameters()


def _collect_ranges(state: ShardedState, averages: Mapping[int, Tensor] | None) -> list[TensorRange]:
    ranges = [TensorRange("weight", shard.name, shard.start, shard.weight) for shard in state.shards]

    # Adam's moments and the averages lie as the weights do, so they have the same ranges.
    for shard in state.shards:
        for kind, values in state.moments_of(shard).items():
            ranges.append(TensorRange(kind, shard.name, shard.start, values))
    for index, values in (averages or {}).items():
        shard = state.shards[index]
        ranges.append(TensorRange("average", shard.name, shard.start, values))

    return ranges


# --- How it is saved ---


class Saver:
    """Saves the checkpoints of one run, one after the other; all ranks call `begin` and `complete` together.

    A rank's share is written by a thread. No rank waits for another while it writes, so none waits for one that failed:
    when writing raises OSError on any rank (disk full, quota), the checkpoints before stay, and a warning is logged.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        self._folder = folder
        self._cfg = cfg
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # The checkpoint that is being written.
        self._marker: Marker | None = None
        self._future: Future[None] | None = None
        self._failures: list[str] = []

    @property
    def is_idle(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._future is None or self._future.done()

    def begin(self, marker: Marker, write: Callable[[Path], None]) -> None:
        """Start to save the checkpoint of a step, after the one begun before is complete.

        `write(part)` writes a rank's share into a folder, in a thread: what it writes must not change meanwhile.
        """
        self.complete()
        self._marker, self._failures = marker, []

        # A rest of an earlier start may be of other ranks, whose files would be read as part of this one.
        part = part_of_step(self._folder, marker.step)
        if distributed.is_main():
            shutil.rmtree(part, ignore_errors=True)
            self._try(lambda: part.mkdir(parents=True))

        # The agreement is also what the other ranks wait for before they write into the folder.
        if not self._has_failed():
            self._future = self._pool.submit(self._try, lambda: write(part))

    def complete(self) -> bool:
        """Wait until all ranks have written what was begun, and move it to its place.

        Returns False on all ranks, after a warning, if any failed; True if nothing was begun.
        """
        if self._marker is None:
            return True

        # A second call must find nothing to complete, even after a failure.
        marker, self._marker = self._marker, None
        part, target = part_of_step(self._folder, marker.step), path_of_step(self._folder, marker.step)

        # The ranks agree only after their own writing is over.
        if self._future is not None:
            self._future.result()
            self._future = None

        if not self._has_failed() and distributed.is_main():
            self._try(lambda: publish(part, target, marker))

        # Moving may fail, too, and only one rank knows.
        if self._has_failed():
            if distributed.is_main():
                shutil.rmtree(part, ignore_errors=True)
                self._warn(marker.step)
            return False

        if distributed.is_main():
            prune(self._folder, self._cfg)
        return True

    def close(self) -> None:
        """Wait for the thread; what was begun and not completed is no checkpoint."""
        self._pool.shutdown()

    def _try(self, work: Callable[[], None]) -> None:
        """Note an error of the file system instead of raising it: the ranks then agree on it."""
        try:
            work()
        except OSError as error:
            self._failures.append(str(error))

    def _has_failed(self) -> bool:
        """Whether any rank failed; the same on all. All ranks call this together."""
        return distributed.any_rank(bool(self._failures))[0]

    def _warn(self, step: int) -> None:
        newest = find_newest(self._folder)
        log.warning(
            "the checkpoint of step %d could not be written (%s); training goes on, %s",
            step,
            self._failures[0] if self._failures else "on another rank",
            f"{newest.name} is the last good one" if newest else "and there is none yet: make room",
        )
