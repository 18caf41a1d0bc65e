"""Making shards: reading, the teacher's forward, the copy from the device, and writing at the same time."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_neuro.core import distributed, files
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.orientation import apply_layout, undo_layout
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import Job, jobs, pixels

_AHEAD = 2  # batches that are being read and normalised
_BEHIND = 2  # batches that wait for the disk at most: memory does not grow when it is slow
_MOST = 256  # slices per forward
Values = Callable[[], NDArray[np.float16]]


def build(
    cfg: PrecomputeConfig,
    store: Store,
    teacher: Teacher,
    units: Iterable[cache.Unit],
    key: Callable[[cache.Unit], str],
    codings: Mapping[str, cache.Coding],
) -> None:
    """Make the shards of `units`, drawn as they come. Raises InputError when the disk is full; no part file is left."""
    layers = [n % teacher.depth for n in cfg.layers]
    shards = _Shards(cfg.out, len(layers), teacher.dim, cfg.tile // teacher.patch, key, codings)
    with ThreadPoolExecutor(_AHEAD, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        steps = _steps(cfg, teacher, units)
        ahead: deque[tuple[cache.Unit, Job, bool, Future[NDArray[np.float32]]]] = deque()
        behind: deque[Future[None]] = deque()

        def read(count: int) -> None:
            for unit, job, last in itertools.islice(steps, count):
                ahead.append((unit, job, last, reader.submit(pixels, store[unit.volume], unit, job)))

        try:
            read(_AHEAD)
            while ahead:
                unit, job, last, seen = ahead.popleft()
                images = seen.result()
                read(1)
                behind.append(writer.submit(shards.put, unit, job, look(teacher, images, layers, unit.how), last))
                if len(behind) > _BEHIND:
                    behind.popleft().result()
            for future in behind:
                future.result()
        except BaseException:
            writer.shutdown(cancel_futures=True)
            shards.abandon()
            raise


def look(teacher: Teacher, seen: NDArray[np.float32], layers: list[int], how: str = "") -> Values:
    """Start the teacher on slices [s, H, W] in [0, 1], laid as `how` says -> a call that waits for [s, L, h, w, D].

    The maps lie as the volume stands. Autocast on a GPU (bf16, or fp16 where it has none), whose copy back runs beside
    the next forward.
    """
    device = distributed.device()
    half = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else torch.float16
    images = torch.from_numpy(seen)
    if device.type == "cuda":
        images = images.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode(), torch.autocast(device.type, half, enabled=device.type == "cuda"):
        maps = teacher.features(apply_layout(images, how), layers).movedim(-1, 0)  # [D, L, s, h, w]
        maps = undo_layout(maps, how).permute(2, 1, 3, 4, 0).half().contiguous()  # [s, L, h, w, D]
    if device.type != "cuda":
        values: NDArray[np.float16] = maps.numpy()
        return lambda: values
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        host = torch.empty(maps.shape, dtype=maps.dtype, pin_memory=True).copy_(maps, non_blocking=True)
        maps.record_stream(beside)  # its memory is not given to the next forward before it is copied
        copied = beside.record_event()

    def wait() -> NDArray[np.float16]:
        copied.synchronize()
        arrived: NDArray[np.float16] = host.numpy()
        return arrived

    return wait


def batch_size(cfg: PrecomputeConfig, teacher: Teacher, unit: cache.Unit) -> int:
    """Slices per forward: as asked for, else 8 on a CPU, and on a GPU what fills half of its free memory."""
    device = distributed.device()
    if cfg.batch is not None:
        return cfg.batch
    if device.type != "cuda":
        return 8
    size = cfg.tile + 2 * cfg.halo
    probe = np.zeros((2, *(min(size, n * teacher.patch) for n in (unit.rows, unit.columns))), np.float32)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    look(teacher, probe, [n % teacher.depth for n in cfg.layers])()
    each = max(1, torch.cuda.max_memory_allocated(device) - before) / len(probe)
    return int(min(_MOST, max(1, torch.cuda.mem_get_info(device)[0] / 2 // each)))


def _steps(
    cfg: PrecomputeConfig, teacher: Teacher, units: Iterable[cache.Unit]
) -> Iterator[tuple[cache.Unit, Job, bool]]:
    """Every forward of every shard; the flag marks a shard's last."""
    sizes: dict[tuple[int, int], int] = {}
    for unit in units:
        shape = (unit.rows, unit.columns)
        sizes[shape] = sizes.get(shape) or batch_size(cfg, teacher, unit)
        each = list(jobs(cfg, unit, teacher.patch, sizes[shape]))
        for i, job in enumerate(each, start=1):
            yield unit, job, i == len(each)


class _Shards:
    """Opens, fills and finishes one shard after another; at home in the writing thread."""

    def __init__(
        self,
        out: Path,
        layers: int,
        dim: int,
        tile: int,
        key: Callable[[cache.Unit], str],
        codings: Mapping[str, cache.Coding],
    ) -> None:
        self.out, self.layers, self.dim, self.tile, self.key, self.codings = out, layers, dim, tile, key, codings
        self._open: tuple[contextlib.ExitStack, cache.ShardWriter] | None = None

    def put(self, unit: cache.Unit, job: Job, values: Values, last: bool) -> None:
        """Write one forward's features; with the `last` the shard appears under its name."""
        with files.explain_full_disk(self.out, unit.name):
            stack, shard = self._open or self._start(unit)
            shard.write(job.slices, job.rows, job.columns, values()[:, :, job.inner_rows, job.inner_columns])
            if last:
                shard.finish()
                self._open = None
                stack.close()

    def abandon(self) -> None:
        """Remove what is unfinished."""
        if self._open is not None:
            stack, self._open = self._open[0], None
            stack.__exit__(*sys.exc_info())

    def _start(self, unit: cache.Unit) -> tuple[contextlib.ExitStack, cache.ShardWriter]:
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(files.atomic(self.out / unit.name))
            coding = self.codings.get(unit.view, cache.RAW)
            shard = cache.ShardWriter(part, unit, self.layers, self.dim, self.key(unit), self.tile, coding)
            stack.enter_context(contextlib.closing(shard))
            self._open = stack.pop_all(), shard
        return self._open
