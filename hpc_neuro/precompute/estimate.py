"""What a build takes: bytes, files, time; and smaller settings when it does not fit."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import itertools
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import distributed, files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.feature_cache import TOKEN_CHUNK, ShardSpec
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute.build import choose_batch_size, run_teacher
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import iter_teacher_batches, plan_shards, read_pixels

HEADER_BYTES = 8192
"""[bytes] A shard besides its features and their index."""

EXTRA_FILES = 16
"""Files of a cache besides the shards."""

USABLE_SHARE = 0.99
"""Share of the free space that a build may use."""


def plan_all_shards(cfg: PrecomputeConfig, store: Store, patch: int) -> list[ShardSpec]:
    """All shards, the largest first, so that ranks end together. Raises InputError when the splits are empty."""
    volumes = [volume for split in cfg.splits for volume in store.split(split)]
    if not volumes:
        raise InputError(
            f"{cfg.store} has no volume in the splits {', '.join(cfg.splits)}; choose others with splits=[...]"
        )
    shards = [
        shard for volume in volumes for view in cfg.views for shard in plan_shards(cfg, store[volume], view, patch)
    ]
    return sorted(shards, key=lambda shard: (-shard.tokens, shard.name))


def estimate_bytes(cfg: PrecomputeConfig, shards: Sequence[ShardSpec], dim: int) -> int:
    """Bytes of the shards: whole chunks of tokens, their index, header and sums."""
    # HDF5 stores whole chunks, also at the border of a token map.
    channels = dim if cfg.pca is None else cfg.pca
    bytes_per_token = len(cfg.layers) * channels * (1 if cfg.dtype == "int8" else 2)
    bytes_per_sums = 16 * len(cfg.layers) * dim

    total = 0
    for shard in shards:
        chunk_rows, chunk_columns = (min(TOKEN_CHUNK, n) for n in (shard.rows, shard.columns))
        chunks = -(-shard.rows // chunk_rows) * -(-shard.columns // chunk_columns)
        tokens = chunks * chunk_rows * chunk_columns
        total += shard.count * (tokens * bytes_per_token + chunks * 8) + bytes_per_sums + HEADER_BYTES
    return total


def describe_plan(
    cfg: PrecomputeConfig,
    teacher: Teacher,
    shards: Sequence[ShardSpec],
    todo: Sequence[ShardSpec],
    space: str,
    seconds: Sequence[float],
) -> list[str]:
    """The forecast in lines for people. space: from `check_space`. seconds: from `measure_speed`, of each rank."""
    total_bytes, todo_bytes = (estimate_bytes(cfg, listed, teacher.dim) for listed in (shards, todo))
    channels = "all channels" if cfg.pca is None else f"{cfg.pca} of {teacher.dim} components"
    volumes = files.format_count(len({shard.volume for shard in shards}), "volume")
    orientations = f" and those of {', '.join(cfg.augment_views)}" if cfg.augment_views else ""
    largest = shards[0]
    largest_shape = [largest.count, len(cfg.layers), largest.rows, largest.columns]
    ranks = "1 rank" if len(seconds) == 1 else f"each of {len(seconds)} ranks"

    # A slower rank takes fewer slabs.
    shared_seconds = 1 / sum(1 / max(s, 1e-9) for s in seconds)

    return [
        f"teacher {teacher.identity['name']} (sha256 {teacher.identity['sha256'][:12]}), {teacher.depth} blocks, "
        f"{teacher.dim} channels, patch {teacher.patch}",
        f"{volumes}, views {' '.join(cfg.views)}{orientations}, layers {list(cfg.layers)}, {channels}: "
        f"{files.format_count(len(shards), 'shard')} of at most {largest_shape} slices, "
        f"layers, token rows, columns; {files.format_bytes(total_bytes)} {cfg.dtype} in {cfg.out}",
        f"{files.format_count(len(todo), 'shard')} to make, {files.format_bytes(todo_bytes)}; {space}",
        f"about {shared_seconds:.0f} s on {ranks}, by a timed probe",
    ]


def measure_speed(cfg: PrecomputeConfig, store: Store, teacher: Teacher, todo: Sequence[ShardSpec]) -> float:
    """Seconds of reading and of the teacher's forward if this rank built all of `todo` alone, timed on a few slices.

    The slices come from the largest shard of each view: a whole batch on a GPU, which fewer do not fill, and two on a
    CPU. Ranks that will work at the same time measure at the same time, because they share a machine.
    """
    layers = [n % teacher.depth for n in cfg.layers]
    is_cuda = distributed.device().type == "cuda"

    # Seconds of a forward by shape of its images: two views often have the same.
    forward_seconds: dict[tuple[int, ...], float] = {}
    total = 0.0

    for view in cfg.views:
        shards = [shard for shard in todo if shard.view == view]
        if not shards:
            continue
        largest = shards[0]
        batch_size = choose_batch_size(cfg, teacher, largest)
        batch_size = batch_size if is_cuda else min(2, batch_size)
        batch = next(iter_teacher_batches(cfg, largest, teacher.patch, batch_size))

        begin = time.monotonic()
        pixels = read_pixels(store[largest.volume], largest, batch)
        read_seconds = time.monotonic() - begin

        if pixels.shape not in forward_seconds:
            # The first call pays for set-up.
            run_teacher(teacher, pixels[:1], layers, cfg.position_free)()
            begin = time.monotonic()
            run_teacher(teacher, pixels, layers, cfg.position_free)()
            forward_seconds[pixels.shape] = time.monotonic() - begin

        # Reading and forward overlap.
        tokens = len(pixels) * (batch.rows.stop - batch.rows.start) * (batch.columns.stop - batch.columns.start)
        seconds_per_token = max(read_seconds, forward_seconds[pixels.shape]) / tokens
        total += seconds_per_token * sum(shard.tokens for shard in shards)

    return total


def check_space(cfg: PrecomputeConfig, store: Store, teacher: Teacher, todo: Sequence[ShardSpec]) -> str:
    """The free space, and whether a quota allows its use. InputError, with smaller settings, when it is short."""
    needed = estimate_bytes(cfg, todo, teacher.dim)

    # The output folder may not exist yet; its file system does.
    folder = cfg.out
    while not folder.exists():
        folder = folder.parent

    # A file system that does not count its files reports 0.
    counts = os.statvfs(folder)
    if counts.f_files and len(todo) + EXTRA_FILES > counts.f_favail:
        raise InputError(
            f"the feature cache needs {len(todo)} files in {cfg.out}, but only {counts.f_favail} more can be made "
            f"there; remove some, choose another `out`, or put more slices into each with slab={2 * cfg.slab}"
        )

    # A file system may have room that a quota does not grant, so it is asked for the bytes.
    free = shutil.disk_usage(folder).free
    usable = int(USABLE_SHARE * free)
    is_granted = needed <= USABLE_SHARE * free and _is_granted(folder, needed)
    if is_granted is False:
        reason = f"only {files.format_bytes(free)} are free there"
        if needed <= usable:
            usable = _find_quota(folder, needed)
            reason = (
                f"your quota allows only {files.format_bytes(usable)} there, though {files.format_bytes(free)} are free"
            )
        raise InputError(
            f"the feature cache needs {files.format_bytes(needed)} in {cfg.out}, but {reason}; make room, choose "
            "another `out`, or keep less:\n  "
            + "\n  ".join(list_alternatives(cfg, store, teacher.patch, teacher.dim, usable))
        )

    quota = "a quota, if any, allows it" if is_granted else "this file system does not say what a quota allows"
    return f"{files.format_bytes(free)} are free, {quota}"


def _is_granted(folder: Path, size: int) -> bool | None:
    """Whether `folder` grants `size` bytes, quota included: they are taken and given back. None: cannot be known.

    Calls fallocate itself: posix_fallocate would write out the file where a file system cannot reserve.
    """
    if size <= 0 or not os.access(folder, os.W_OK):
        return None

    probe = folder / f".reserve.{uuid.uuid4().hex[:8]}.part"
    handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if call(handle, 0, 0, size) == 0:
            return True
        return False if ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT) else None
    finally:
        os.close(handle)
        probe.unlink()


def _find_quota(folder: Path, refused: int) -> int:
    """The most bytes that `folder` grants, to one part in a thousand of the `refused` size; by bisection."""
    low, high = 0, refused

    # Every probe gives its bytes back at once.
    while high - low > max(1, refused // 1000):
        middle = (low + high) // 2
        if _is_granted(folder, middle):
            low = middle
        else:
            high = middle
    return low


def list_alternatives(cfg: PrecomputeConfig, store: Store, patch: int, dim: int, usable: int) -> list[str]:
    """For each setting, the mildest value that fits into `usable` bytes, or by how much the strongest one misses."""
    lines = []
    for key, values in _list_milder_values(cfg, dim):
        line = ""
        for value in values:
            # Planned anew, since most settings change the number of shards or their shapes.
            smaller = dataclasses.replace(cfg, **{key: value})
            size = estimate_bytes(smaller, plan_all_shards(smaller, store, patch), dim)
            setting = f"{key}=[{','.join(map(str, value))}]" if isinstance(value, tuple) else f"{key}={value}"
            if size <= usable:
                spare = files.format_bytes(usable - size)
                line = f"{setting} would fit: {files.format_bytes(size)}, {spare} to spare"
                break
            excess = files.format_bytes(size - usable)
            line = f"{key} alone would not do: {setting} still takes {excess} too much"
        if line:
            lines.append(line)
    return lines


def _list_milder_values(cfg: PrecomputeConfig, dim: int) -> Iterator[tuple[str, list[Any]]]:
    """Settings with values that take less and less space."""
    # Quarter turns need both y and x slices.
    has_quarter_turn = any(parse_orientation(name).swap for name in cfg.augment_views)
    fewer_views = [v for n in range(len(cfg.views) - 1, 0, -1) for v in itertools.combinations(cfg.views, n)]
    yield "views", [views for views in fewer_views if not has_quarter_turn or ("y" in views) == ("x" in views)]

    # The last entries are dropped first.
    yield "augment_views", [cfg.augment_views[:n] for n in range(len(cfg.augment_views) - 1, -1, -1)]
    yield "stride_v", [cfg.stride_v * n for n in (2, 3, 4, 6, 8, 12, 16)]
    yield "layers", [cfg.layers[-n:] for n in range(len(cfg.layers) - 1, 0, -1)]
    yield "scale", [round(cfg.scale * share, 4) for share in (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)]

    components = dim if cfg.pca is None else cfg.pca
    yield "pca", [n for divisor in (2, 3, 4, 6, 8, 12, 16) if (n := components // divisor) >= 1]
    yield "dtype", ["int8"] if cfg.dtype == "float16" else []
