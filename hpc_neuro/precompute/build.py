"""Build shards: reading, the teacher's forward, the copy from the device, and writing overlap in time."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_neuro.core import distributed, files
from hpc_neuro.core.stop_signals import until_stopped
from hpc_neuro.data.feature_cache import RAW, FeatureCoding, ShardSpec, ShardWriter
from hpc_neuro.data.orientation import apply_layout, undo_layout
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import TeacherBatch, iter_teacher_batches, read_pixels

READ_AHEAD = 2
"""Batches that are being read and normalized."""

WRITE_BEHIND = 2
"""Most batches that wait for the disk: memory does not grow when the disk is slow."""

MAX_BATCH = 256
"""Most slices per forward."""

CPU_BATCH = 8
"""Slices per forward on a CPU."""

Features = Callable[[], NDArray[np.float16]]
"""Waits for the features [s, L, h, w, D] of a forward that was started."""


@dataclass(frozen=True)
class _Step:
    """One forward of the build."""

    shard: ShardSpec
    batch: TeacherBatch
    is_last: bool  # of its shard


def build_shards(
    cfg: PrecomputeConfig,
    store: Store,
    teacher: Teacher,
    shards: Iterable[ShardSpec],
    make_key: Callable[[ShardSpec], str],
    codings: Mapping[str, FeatureCoding],
) -> None:
    """Build `shards` in the order in which they are drawn. InputError when the disk is full; leaves no part file."""
    layers = [n % teacher.depth for n in cfg.layers]
    output = _ShardOutput(cfg.out, len(layers), teacher.dim, cfg.tile // teacher.patch, make_key, codings)

    with ThreadPoolExecutor(READ_AHEAD, "read") as readers, ThreadPoolExecutor(1, "write") as writer:
        writes: deque[Future[None]] = deque()
        try:
            for step, pixels in _read_ahead(_iter_steps(cfg, teacher, shards), store, readers):
                # Returns at once on a GPU: the writer waits for the copy.
                features = run_teacher(teacher, pixels, layers, cfg.position_free, step.shard.layout)
                writes.append(writer.submit(output.put, step, features))
                if len(writes) > WRITE_BEHIND:
                    writes.popleft().result()

            # Errors of the last writes must not be lost.
            for write in writes:
                write.result()
        except BaseException:
            # The writing thread must be idle before its open shard is removed.
            writer.shutdown(cancel_futures=True)
            output.abandon()
            raise


def run_teacher(
    teacher: Teacher, pixels: NDArray[np.float32], layers: list[int], position_free: bool, layout: str = ""
) -> Features:
    """Start the teacher on slices [s, H, W] in [0, 1], laid out as `layout`; the result waits for [s, L, h, w, D].

    position_free: without the features of a black slice. The maps lie as in the stored volume. On a GPU the teacher
    runs under autocast (bf16, or fp16 where it has none), and the copy back runs beside the next forward.
    """
    device = distributed.device()
    is_cuda = device.type == "cuda"
    half = torch.bfloat16 if not is_cuda or torch.cuda.is_bf16_supported(False) else torch.float16

    images = torch.from_numpy(pixels)

    if is_cuda:
        images = images.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode(), torch.autocast(device.type, half, enabled=is_cuda):
        look = teacher.position_free_features if position_free else teacher.features
        maps = look(apply_layout(images, layout), layers).movedim(-1, 0)  # [D, L, s, h, w]
        maps = undo_layout(maps, layout).permute(2, 1, 3, 4, 0).half().contiguous()  # [s, L, h, w, D]

    if is_cuda:
        return _copy_to_host(maps, device)
    values: NDArray[np.float16] = maps.numpy()
    return lambda: values


def _copy_to_host(maps: torch.Tensor, device: torch.device) -> Features:
    """Start the copy of a device tensor to page-locked memory on a stream of its own."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host = torch.empty(maps.shape, dtype=maps.dtype, pin_memory=True).copy_(maps, non_blocking=True)

        # The next forward must not get the memory before it is copied.
        maps.record_stream(stream)
        copied = stream.record_event()

    def wait() -> NDArray[np.float16]:
        copied.synchronize()
        values: NDArray[np.float16] = host.numpy()
        return values

    return wait


def choose_batch_size(cfg: PrecomputeConfig, teacher: Teacher, shard: ShardSpec) -> int:
    """Slices per forward: `cfg.batch`, else CPU_BATCH on a CPU, and on a GPU what fills half of its free memory."""
    device = distributed.device()
    if cfg.batch is not None:
        return cfg.batch
    if device.type != "cuda":
        return CPU_BATCH

    # Measure the memory of a forward of two slices.
    side = cfg.tile + 2 * cfg.halo
    pixels = np.zeros((2, *(min(side, n * teacher.patch) for n in (shard.rows, shard.columns))), np.float32)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_teacher(teacher, pixels, [n % teacher.depth for n in cfg.layers], cfg.position_free)()
    bytes_per_slice = max(1, torch.cuda.max_memory_allocated(device) - before) / len(pixels)

    # Half of the free memory leaves room for fragmentation and for the copies.
    free_bytes = torch.cuda.mem_get_info(device)[0]
    return int(min(MAX_BATCH, max(1, free_bytes / 2 // bytes_per_slice)))


def _iter_steps(cfg: PrecomputeConfig, teacher: Teacher, shards: Iterable[ShardSpec]) -> Iterator[_Step]:
    """Every forward of every shard."""
    batch_sizes: dict[tuple[int, int], int] = {}
    for shard in shards:
        # Shards of one view of one volume have the same maps; measuring is slow.
        map_shape = (shard.rows, shard.columns)
        if map_shape not in batch_sizes:
            batch_sizes[map_shape] = choose_batch_size(cfg, teacher, shard)

        batches = list(iter_teacher_batches(cfg, shard, teacher.patch, batch_sizes[map_shape]))
        for i, batch in enumerate(until_stopped(batches), start=1):
            yield _Step(shard, batch, is_last=i == len(batches))


def _read_ahead(
    steps: Iterator[_Step], store: Store, readers: ThreadPoolExecutor
) -> Iterator[tuple[_Step, NDArray[np.float32]]]:
    """The steps with their pixels, which threads read while earlier steps are at work."""
    reads = deque(_start_read(step, store, readers) for step in itertools.islice(steps, READ_AHEAD))
    while reads:
        step, read = reads.popleft()
        pixels = read.result()

        # The next read starts before the teacher does, so that both overlap.
        reads.extend(_start_read(next_step, store, readers) for next_step in itertools.islice(steps, 1))
        yield step, pixels


def _start_read(step: _Step, store: Store, readers: ThreadPoolExecutor) -> tuple[_Step, Future[NDArray[np.float32]]]:
    return step, readers.submit(read_pixels, store[step.shard.volume], step.shard, step.batch)


class _ShardOutput:
    """Opens, fills and finishes one shard after another. Runs in the writing thread."""

    def __init__(
        self,
        out: Path,
        layers: int,
        dim: int,
        tile: int,
        make_key: Callable[[ShardSpec], str],
        codings: Mapping[str, FeatureCoding],
    ) -> None:
        self.out = out
        self.layers = layers
        self.dim = dim
        self.tile = tile
        self.make_key = make_key
        self.codings = codings
        self._open: tuple[contextlib.ExitStack, ShardWriter] | None = None

    def put(self, step: _Step, features: Features) -> None:
        """Write one forward's features; the last one of a shard makes it appear under its name."""
        batch = step.batch
        with files.explain_full_disk(self.out, step.shard.name):
            stack, writer = self._open or self._start(step.shard)
            inner = features()[:, :, batch.inner_rows, batch.inner_columns]
            writer.write(batch.slices, batch.rows, batch.columns, inner)
            if step.is_last:
                writer.finish()
                self._open = None
                stack.close()

    def abandon(self) -> None:
        """Remove an unfinished shard."""
        if self._open is not None:
            stack, self._open = self._open[0], None
            stack.__exit__(*sys.exc_info())

    def _start(self, shard: ShardSpec) -> tuple[contextlib.ExitStack, ShardWriter]:
        with contextlib.ExitStack() as stack:
            # The stack closes the HDF5 file before the part file is renamed.
            part = stack.enter_context(files.atomic(self.out / shard.name))
            coding = self.codings.get(shard.view, RAW)
            writer = ShardWriter(part, shard, self.layers, self.dim, self.make_key(shard), self.tile, coding)
            stack.enter_context(contextlib.closing(writer))
            self._open = stack.pop_all(), writer
        return self._open
