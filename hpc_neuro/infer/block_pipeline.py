"""Block by block: read, predict, write one shard, read it back, mark it done. A killed run resumes at the next block.

While the student sees one block, the next is read and the one before is written. The worker of core.task_queue tries a
block that fails again, and leaves it out when it fails at every try; the others go on.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import stop_signals
from hpc_neuro.core.geometry import Block, Shape
from hpc_neuro.core.task_queue import RETRYABLE, RetryLimits, Task, TaskFailure, TaskLedger, try_all
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr
from hpc_neuro.data.run_journal import BlockMarker, EmptyEvidence, RunJournal
from hpc_neuro.infer.done_markers import DoneMarkers, make_block_task
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import MASK, Tiling, quantize, quantize_threshold
from hpc_neuro.infer.volumes import InputVolume

Image = NDArray[np.float32]
PredictImage = Callable[[Image, Callable[[int], None]], Image]
"""Normalized image [Z, Y, X] -> probability [Z, Y, X]; calls back with the number of windows of each forward."""
_PENDING_WRITES = 2
"""Blocks that wait for the disk at most."""
_CELL: Shape = (2, 4, 4)
"""[voxel] Means over cells are compared with the empty level: noise averages out there, and a thin neurite does not."""
_CELL_SLAB = 64
"""[voxel] Planes that are averaged at once: the copy in float64 stays small."""


@dataclass(frozen=True)
class EmptyRule:
    """Which blocks the student need not see."""

    level: float | None = 0.0
    """Normalized brightness: a block is empty when no cell is above it; None: no block is empty."""
    proof_share: float = 0.02
    """Share of the empty blocks, drawn at random, that are predicted nevertheless, to prove the rule."""


@dataclass(frozen=True)
class VolumeRun:
    """All that the blocks of one volume are made with."""

    source: InputVolume
    tiling: Tiling
    predict: PredictImage
    threshold: float
    empty: EmptyRule
    limits: RetryLimits
    folder: Path
    """OUT/ID.ome.zarr"""
    markers: DoneMarkers

    @classmethod
    def open(
        cls,
        source: InputVolume,
        tiling: Tiling,
        predict: PredictImage,
        threshold: float,
        key: str,
        out: Path,
        empty: EmptyRule | None = None,
        limits: RetryLimits | None = None,
        journal: RunJournal | None = None,
    ) -> VolumeRun:
        """A run that writes OUT/ID.ome.zarr, and in the journal of OUT the markers that belong to `key`."""
        return cls(
            source=source,
            tiling=tiling,
            predict=predict,
            threshold=threshold,
            empty=empty or EmptyRule(),
            limits=limits or RetryLimits(),
            folder=out / f"{source.id}.ome.zarr",
            markers=DoneMarkers(out, source.id, key, journal),
        )

    @property
    def record(self) -> dict[str, Any]:
        """What the image's folder records of itself: enough to check it without the student."""
        return {
            "key": self.markers.key,
            "shape": list(self.source.shape),
            "voxel_size": list(self.source.voxel_size),
            # The block as it is written, not as it was configured: shards have this shape.
            "shard": list(self.tiling.write),
            "chunk": list(self.tiling.chunk),
        }

    def has_folder(self) -> bool:
        """Whether the image's folder exists and is of this run."""
        return bool(ome_zarr.read_record(self.folder) == self.record)

    def create_folder(self) -> None:
        """Make the image's folder."""
        source, tiling = self.source, self.tiling

        # Image and mask are created together, so that neither is there without the other.
        ome_zarr.create(
            self.folder, "probability", source.shape, source.voxel_size, tiling.write, tiling.chunk, MASK, self.record
        )

    def list_blocks(self) -> list[Block]:
        """The blocks of this run's share of the volume."""
        return self.tiling.take_share(self.tiling.list_blocks(self.source.shape), self.source.share)


def predict_blocks(volume: VolumeRun, blocks: Iterable[Block], progress: WindowProgress) -> list[TaskFailure]:
    """Predict and write blocks in this process alone; those that are left out."""
    name = volume.source.id
    pipeline = BlockPipeline(volume, progress)

    # The ledger counts tries and deaths as it does on several ranks.
    with TaskLedger[Block, None]({name: volume.markers}, volume.limits) as ledger:
        try_all((make_block_task(block, name) for block in blocks), pipeline.run, ledger)
    return ledger.report.failures


class BlockPipeline:
    """Reads, predicts and writes blocks of one volume at the same time; `run` is a Worker of core.task_queue."""

    def __init__(self, volume: VolumeRun, progress: WindowProgress, is_fresh: bool = False) -> None:
        """is_fresh: no process has begun any block before, so no shard is there."""
        self._volume, self._progress, self._is_fresh = volume, progress, is_fresh

        # Opened once, so that no block reads the metadata again.
        self._writers = ome_zarr.ShardWriter(volume.folder), ome_zarr.ShardWriter(volume.folder, label=MASK)

    def run(self, tasks: Iterable[Task[Block]], ledger: TaskLedger[Block, None]) -> None:
        """Work through tasks and report each to the ledger."""
        pending: deque[tuple[Task[Block], Future[None]]] = deque()

        # One thread each keeps few blocks in memory, and the writes in the order of their tasks.
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            try:
                for task, reading in self._read_ahead(tasks, reader, ledger):
                    started_at = time.monotonic()
                    try:
                        # An error of the reading thread is raised here, so a failed reading is tried again too.
                        image, evidence = reading.result()
                        arrived_at = time.monotonic()
                        levels = self._predict(task.payload, image)
                    except RETRYABLE as error:
                        ledger.fail(task, error)
                        continue

                    # The clock ends here: a write may wait behind others, which this block does not cost.
                    predicted_at = time.monotonic()
                    seconds = predicted_at - started_at
                    writing = writer.submit(
                        write_block,
                        self._volume,
                        task.payload,
                        levels,
                        evidence,
                        self._writers,
                        seconds,
                        self._is_fresh,
                    )

                    # A slow disk must not let predicted blocks pile up in memory.
                    pending.append((task, writing))
                    _settle(pending, ledger, _PENDING_WRITES)
                    self._count_waits(arrived_at - started_at, predicted_at - arrived_at, predicted_at)

                # A task counts as done only once its shards are on the disk.
                _settle(pending, ledger, 0)
            except stop_signals.Stopped:
                # Predicted blocks are soon written, and would else have to be predicted again.
                _settle(pending, ledger, 0)
                raise
            except BaseException:
                # Leaving the pools waits for all that is queued, which would delay the error.
                reader.shutdown(cancel_futures=True)
                writer.shutdown(cancel_futures=True)
                raise

    def _read_ahead(
        self, tasks: Iterable[Task[Block]], reader: ThreadPoolExecutor, ledger: TaskLedger[Block, None]
    ) -> Iterator[tuple[Task[Block], Future[tuple[Image | None, EmptyEvidence | None]]]]:
        """Each task with its voxels, once the next one is being read."""
        ahead = None

        # The next task is drawn early, so that it is read while the student is busy.
        for task in tasks:
            # Reading may kill the process too, so the task is counted as begun before it.
            ledger.begin(task)
            following = task, reader.submit(read_block, self._volume, task.payload)

            if ahead is not None:
                yield ahead
            ahead = following

        # No further task pushes the last one out.
        if ahead is not None:
            yield ahead

    def _predict(self, block: Block, image: Image | None) -> NDArray[np.uint8] | None:
        """The probability of the block itself, 0 to 255; None for a block that the student need not see."""
        # Windows that are not needed leave the total, or the time left would be too long.
        if image is None:
            self._progress.skip(self._volume.tiling.count_windows(block))
            return None

        return quantize(self._volume.tiling.select_own(block, self._volume.predict(image, self._count_windows)))

    def _count_windows(self, windows: int) -> None:
        self._progress.advance(windows)
        # A block may take minutes, and a warning may leave less: the block is given back after this forward.
        stop_signals.check()

    def _count_waits(self, reading: float, student: float, predicted_at: float) -> None:
        waited = self._progress.waited
        waited["reading"] += reading
        waited["student"] += student
        waited["writing"] += time.monotonic() - predicted_at


def read_block(volume: VolumeRun, block: Block) -> tuple[Image | None, EmptyEvidence | None]:
    """The voxels that the student must see, None where it need not; and why the block is empty, None for others."""
    level, source = volume.empty.level, volume.source
    if level is None:
        return source.show(block.read), None

    # Most empty blocks are found in the overview without being read.
    if source.overview is not None:
        brightness = source.overview(block.read)
        if brightness > level:
            return source.show(block.read), None

        # The voxels are needed only where the student is to prove the rule.
        is_proof = is_drawn_as_proof(volume, block)
        return source.show(block.read) if is_proof else None, EmptyEvidence(brightness, level)

    # Without an overview a block must be read to see whether it is empty.
    image = source.show(block.read)
    brightness = brightest_cell(image, _CELL)
    if brightness > level:
        return image, None
    # The student has seen a black image before (see verb.py), so only what is not quite black is left to prove.
    is_proof = brightness > 0 and is_drawn_as_proof(volume, block)
    return image if is_proof else None, EmptyEvidence(brightness, level)


def write_block(
    volume: VolumeRun,
    block: Block,
    levels: NDArray[np.uint8] | None,
    evidence: EmptyEvidence | None,
    writers: tuple[ome_zarr.ShardWriter, ome_zarr.ShardWriter],
    seconds: float,
    is_fresh: bool = False,
) -> None:
    """Write both shards of a block, read them back, and mark the block done. levels None: the block is skipped.

    is_fresh: no shard is there yet. Raises OSError when the read-back differs.
    """
    index, start = block.index, block.write.start
    shards = [ome_zarr.shard_path(index), ome_zarr.shard_path(index, label=MASK)]

    # What an earlier run left here may be of other values.
    for shard in shards if not is_fresh else ():
        ome_zarr.remove_shard(volume.folder, shard)

    # An empty block needs no shards: where no file is, viewers read zeros.
    if levels is None:
        volume.markers.write(BlockMarker(index, start, {}, "", skipped=evidence))
        return

    # The threshold is applied to the stored levels, so that mask and probability agree exactly.
    mask = (levels >= quantize_threshold(volume.threshold)).astype(np.uint8)
    checksums, sizes = dict[str, str](), dict[str, int]()
    for shard, writer, content in zip(shards, writers, (levels, mask), strict=True):
        # A shard of zeros has no file, and so no checksum.
        if content.any():
            checksums[shard], sizes[shard] = writer.write(block.write, content)

    # The marker comes last: a block whose process dies before it is written again.
    volume.markers.write(
        BlockMarker(
            index=index,
            start=start,
            files=checksums,
            sizes=sizes,
            sha256=hash_array(levels),
            foreground=int(mask.sum()),
            seconds=round(seconds, 3),
            proof=evidence,
        )
    )


def brightest_cell(image: Image, cell: Shape) -> float:
    """The largest mean of any cell of a normalized image [Z, Y, X]; cells at the end may be smaller.

    The mean over a cell sets a thin dim neurite off from noise, which the largest voxel of millions does not.
    """
    # Black blocks are frequent, and need no means.
    if not image.any():
        return 0.0

    brightest = 0.0

    # Slabs end between two cells, so that no cell is divided.
    planes = max(_CELL_SLAB // cell[0], 1) * cell[0]
    for first in range(0, len(image), planes):
        sums, counts = image[first : first + planes].astype(np.float64), np.ones(1)

        # reduceat lets the last cell of an axis be narrower than the others.
        for axis, size in enumerate(cell):
            starts = np.arange(0, sums.shape[axis], size)
            widths = np.diff(np.append(starts, sums.shape[axis]))
            sums = np.add.reduceat(sums, starts, axis=axis)
            counts = counts * widths.reshape([-1 if a == axis else 1 for a in range(3)])
        brightest = max(brightest, float((sums / counts).max()))
    return brightest


def is_drawn_as_proof(volume: VolumeRun, block: Block) -> bool:
    """Whether an empty block belongs to the random share that is predicted; the same blocks on every rank."""
    # A hash needs no shared random state: every rank, and every resumed run, draws the same blocks.
    digest = hashlib.sha256(f"{volume.markers.key} {block.index}".encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < volume.empty.proof_share


def hash_array(values: Array) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _settle(
    pending: deque[tuple[Task[Block], Future[None]]], ledger: TaskLedger[Block, None], most_pending: int
) -> None:
    """Report finished writes, oldest first, until at most `most_pending` wait."""
    # One thread writes, so the oldest write is the first to end.
    while len(pending) > most_pending:
        task, writing = pending.popleft()
        try:
            writing.result()
        except RETRYABLE as error:
            ledger.fail(task, error)
        else:
            ledger.finish(task)
