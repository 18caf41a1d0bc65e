"""Block by block: read, predict, write one shard, read it back, mark it done. A killed run goes on at the next block.

While the student looks at one block the next is read and the one before is written. A block that fails is tried again
at the end, and parked with its traceback when it fails every time; the others go on.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Shape
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.config import EmptyConfig
from hpc_neuro.infer.done_markers import Empty, Mark, Marks, where
from hpc_neuro.infer.empty_blocks import brightest, chosen
from hpc_neuro.infer.progress import Meter
from hpc_neuro.infer.tiling import MASK, Plan, least, quantised
from hpc_neuro.infer.volumes import Source

log = logging.getLogger(__name__)
Image = NDArray[np.float32]
Predict = Callable[[Image, Callable[[int], None]], Image]
"""Normalised image [Z, Y, X] -> probability [Z, Y, X]; calls back with the number of windows of each forward."""
_BEHIND = 2  # blocks that wait for the disk at most
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors after which no other block will fare better."""


@dataclass(frozen=True)
class Work:
    """All that the blocks of one volume are made with."""

    source: Source
    plan: Plan
    predict: Predict
    threshold: float
    empty: EmptyConfig
    tries: int
    deaths: int
    folder: Path
    marks: Marks

    @classmethod
    def open(
        cls,
        source: Source,
        plan: Plan,
        predict: Predict,
        threshold: float,
        key: str,
        out: Path,
        empty: EmptyConfig | None = None,
        tries: int = 1,
        deaths: int = 3,
    ) -> Work:
        """Work that writes OUT/ID.ome.zarr, and marks under OUT/blocks/ID what belongs to `key`."""
        folder, marks = out / f"{source.id}.ome.zarr", Marks(out, source.id, key)
        return cls(source, plan, predict, threshold, empty or EmptyConfig(), tries, deaths, folder, marks)

    @property
    def record(self) -> dict[str, Any]:
        """What the image's folder says of itself: enough to check it without the student."""
        return {
            "key": self.marks.key,
            "shape": list(self.source.shape),
            "voxel_size": list(self.source.voxel_size),
            "shard": list(self.plan.write),
            "chunk": list(self.plan.chunk),
        }

    def fresh(self) -> bool:
        """Whether the folder is there and of this work."""
        return bool(ome_zarr.read_record(self.folder) == self.record)

    def create(self) -> None:
        """Make the image's folder."""
        source, plan = self.source, self.plan
        ome_zarr.create(
            self.folder, "probability", source.shape, source.voxel_size, plan.write, plan.chunk, MASK, self.record
        )


@dataclass(frozen=True)
class _Failure:
    block: Block
    error: BaseException


def predict_blocks(work: Work, todo: Iterable[Block], meter: Meter, alone: bool = False) -> None:
    """Make blocks; the ones that fail `work.tries` times are parked (see Marks).

    `alone`: only one block is in hand at any time, so that if the process is killed it is known at which.
    """

    def once(some: Iterable[Block], attempt: int) -> list[_Failure]:
        if alone:
            return [failure for block in some for failure in _pass(work, [block], meter, attempt)]
        return _pass(work, some, meter, attempt)

    failed = once(todo, 1)
    for attempt in range(2, work.tries + 1):
        failed = once([f.block for f in failed], attempt)
    for failure in failed:
        trace = "".join(traceback.format_exception(failure.error))
        work.marks.park(failure.block.index, where(failure.block), str(failure.error), trace, work.tries)


def _pass(work: Work, todo: Iterable[Block], meter: Meter, attempt: int) -> list[_Failure]:
    """Every block once; the failed ones."""
    failed: list[_Failure] = []

    def caught(block: Block, error: OSError | ValueError | RuntimeError) -> None:
        if getattr(error, "errno", None) in FULL:
            raise error
        tries = f"try {attempt} of {work.tries}"
        log.warning("%s: block %s failed (%s): %s", work.source.id, block.index, tries, error)
        failed.append(_Failure(block, error))
        release(block)

    in_hand: dict[Shape, Block] = {}

    def begin(block: Block) -> Future[tuple[Image | None, Empty | None]]:
        in_hand[block.index] = block
        work.marks.begin(block.index)  # counted before, for a killed process cannot say so afterwards
        return reader.submit(_read, work, block)

    def release(block: Block) -> None:
        del in_hand[block.index]
        work.marks.end(block.index)

    arrays = ome_zarr.open_level(work.folder), ome_zarr.open_level(work.folder, label=MASK)
    remaining = iter(todo)
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        behind: deque[tuple[Block, Future[None]]] = deque()

        def settle(most: int) -> None:
            while len(behind) > most:
                block, future = behind.popleft()
                try:
                    future.result()
                    release(block)
                except (OSError, ValueError, RuntimeError) as error:
                    caught(block, error)

        try:
            block = next(remaining, None)
            ahead = None if block is None else begin(block)
            while block is not None and ahead is not None:
                now, seen, block = block, ahead, next(remaining, None)
                begun = time.monotonic()
                try:
                    image, empty = seen.result()
                    if block is not None:
                        ahead = begin(block)
                    arrived = time.monotonic()
                    values = None if image is None else _look(work, now, image, meter)
                except (OSError, ValueError, RuntimeError) as error:
                    if block is not None and ahead is seen:  # the reading failed, and the next one is not begun
                        ahead = begin(block)
                    caught(now, error)
                    continue
                if values is None:
                    meter.skip(work.plan.cost(now))
                looked = time.monotonic()
                behind.append((now, writer.submit(_write, work, now, values, empty, arrays, looked - begun)))
                settle(_BEHIND)
                for name, seconds in (
                    ("reading", arrived - begun),
                    ("student", looked - arrived),
                    ("writing", time.monotonic() - looked),
                ):
                    meter.waited[name] += seconds
            settle(0)
        except BaseException:
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
            for block in list(in_hand.values()):  # stopped in good order: no death
                release(block)
            raise
    return failed


def _read(work: Work, block: Block) -> tuple[Image | None, Empty | None]:
    """The block with its context, and why it is empty, if it is; None for the image where it need not be looked at."""
    level, source = work.empty.level, work.source
    if level is None:
        return source.read(block.read), None
    if source.overview is not None:
        bright = source.overview(block.read)
        if bright > level:
            return source.read(block.read), None
        proving = chosen(work.empty.prove, work.marks.key, block.index)
        return source.read(block.read) if proving else None, Empty(bright, level)
    image = source.read(block.read)
    bright = brightest(image, work.empty.cell)
    if bright > level:
        return image, None
    # a black image was shown to the student before (see verb), so only what is not quite black is left to prove
    proving = bright > 0 and chosen(work.empty.prove, work.marks.key, block.index)
    return image if proving else None, Empty(bright, level)


def _look(work: Work, block: Block, image: Image, meter: Meter) -> NDArray[np.uint8]:
    inner = block.write.relative_to(block.read.start).slices
    return quantised(work.predict(image, meter.add)[inner])


def _write(
    work: Work,
    block: Block,
    values: NDArray[np.uint8] | None,
    empty: Empty | None,
    arrays: tuple[Any, Any],
    seconds: float,
) -> None:
    """Write both shards, read them back, and mark the block done."""
    index, start = block.index, block.write.start
    shards = [ome_zarr.shard_path(index), ome_zarr.shard_path(index, label=MASK)]
    for shard in shards:
        (work.folder / shard).unlink(missing_ok=True)  # a torn one is not read
    if values is None:
        work.marks.write(Mark(work.marks.key, index, start, {}, "", skipped=empty))
        return
    above = (values >= least(work.threshold)).astype(np.uint8)
    for array, content in zip(arrays, (values, above), strict=True):
        ome_zarr.write_box(array, block.write, content)
        if digest(np.asarray(ome_zarr.read_box(array, block.write))) != digest(content):
            raise OSError(f"the block at {start} reads back other than it was written; is the disk sound?")
    sums = {shard: files.sha256(work.folder / shard) for shard in shards if (work.folder / shard).exists()}
    mark = Mark(work.marks.key, index, start, sums, digest(values), int(above.sum()), round(seconds, 3), proof=empty)
    work.marks.write(mark)


def digest(values: Array) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
