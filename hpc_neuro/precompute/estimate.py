"""What a build will take: bytes, files, time, and what would make it fit where it does not."""

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
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute.build import batch_size, look
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import jobs, pixels, plan

_HEADER = 8192  # bytes of a shard besides its features and their index
_FILES = 16  # besides the shards
_MARGIN = 0.99  # share of the free space that may be used


def planned(cfg: PrecomputeConfig, store: Store, patch: int) -> list[cache.Unit]:
    """All shards, the largest first, so that ranks end together. Raises InputError when the splits are empty."""
    volumes = [v for split in cfg.splits for v in store.split(split)]
    if not volumes:
        raise InputError(
            f"{cfg.store} has no volume in the splits {', '.join(cfg.splits)}; choose others with splits=[...]"
        )
    units = [unit for v in volumes for view in cfg.views for unit in plan(cfg, store[v], view, patch)]
    return sorted(units, key=lambda u: (-u.tokens, u.name))


def needed(cfg: PrecomputeConfig, units: Sequence[cache.Unit], dim: int) -> int:
    """Bytes of the shards: whole chunks of 8 x 8 tokens, their index, header and sums."""
    values = len(cfg.layers) * (dim if cfg.pca is None else cfg.pca) * (1 if cfg.dtype == "int8" else 2)
    total = 0
    for unit in units:
        rows, columns = (-(-n // min(8, n)) for n in (unit.rows, unit.columns))
        tokens = rows * min(8, unit.rows) * columns * min(8, unit.columns)
        total += unit.count * (tokens * values + rows * columns * 8) + 16 * len(cfg.layers) * dim + _HEADER
    return total


def lines(
    cfg: PrecomputeConfig,
    teacher: Teacher,
    units: Sequence[cache.Unit],
    todo: Sequence[cache.Unit],
    space: str,
    seconds: Sequence[float],
) -> list[str]:
    """What for people; space: what `space` says of `todo`, seconds: what `probe` says of `todo` on each rank."""
    size, rest = (needed(cfg, some, teacher.dim) for some in (units, todo))
    kept = "all channels" if cfg.pca is None else f"{cfg.pca} of {teacher.dim} components"
    volumes = len({u.volume for u in units})
    turned = f" and those of {', '.join(cfg.augment_views)}" if cfg.augment_views else ""
    largest = units[0]
    each = 1 / sum(1 / max(s, 1e-9) for s in seconds)  # a slower rank takes fewer slabs
    return [
        f"teacher {teacher.identity['name']} (sha256 {teacher.identity['sha256'][:12]}), {teacher.depth} blocks, "
        f"{teacher.dim} channels, patch {teacher.patch}",
        f"{volumes} volumes, views {' '.join(cfg.views)}{turned}, layers {list(cfg.layers)}, {kept}: {len(units)} "
        f"shards of at most {[largest.count, len(cfg.layers), largest.rows, largest.columns]} slices, layers, token "
        f"rows, columns; {files.format_bytes(size)} {cfg.dtype} in {cfg.out}",
        f"{len(todo)} shards to make, {files.format_bytes(rest)}; {space}",
        f"about {each:.0f} s on each of {len(seconds)} rank(s), by a timed probe",
    ]


def probe(cfg: PrecomputeConfig, store: Store, teacher: Teacher, todo: Sequence[cache.Unit]) -> float:
    """Seconds of reading and of the teacher's forward of all, were this rank alone to do it; from a few slices.

    The largest shard of each view gives some: a whole batch on a GPU, which is not filled by less, two on a CPU. Ranks
    that will work at the same time probe at the same time, for they share a machine.
    """
    layers, total = [n % teacher.depth for n in cfg.layers], 0.0
    forward: dict[tuple[int, ...], float] = {}  # seconds by shape of the images: two views often have the same
    for view in cfg.views:
        mine = [u for u in todo if u.view == view]
        if not mine:
            continue
        batch = batch_size(cfg, teacher, mine[0])
        job = next(jobs(cfg, mine[0], teacher.patch, batch if distributed.device().type == "cuda" else min(2, batch)))
        begun = time.monotonic()
        seen = pixels(store[mine[0].volume], mine[0], job)
        reading = time.monotonic() - begun
        if seen.shape not in forward:
            look(teacher, seen[:1], layers)()  # the first call pays for set-up
            begun = time.monotonic()
            look(teacher, seen, layers)()
            forward[seen.shape] = time.monotonic() - begun
        tokens = len(seen) * (job.rows.stop - job.rows.start) * (job.columns.stop - job.columns.start)
        total += max(reading, forward[seen.shape]) / tokens * sum(u.tokens for u in mine)  # they overlap
    return total


def space(cfg: PrecomputeConfig, store: Store, teacher: Teacher, todo: Sequence[cache.Unit]) -> str:
    """What is free, and whether quotas leave it to us. Raises InputError when `todo` will not fit: what would."""
    rest, folder = needed(cfg, todo, teacher.dim), cfg.out
    while not folder.exists():
        folder = folder.parent
    count = os.statvfs(folder)
    if count.f_files and len(todo) + _FILES > count.f_favail:  # 0: a file system that does not count
        raise InputError(
            f"the feature cache needs {len(todo)} files in {cfg.out}, but only {count.f_favail} more can be made "
            f"there; remove some, choose another `out`, or put more slices into each with slab={2 * cfg.slab}"
        )
    free = shutil.disk_usage(folder).free
    granted = rest <= _MARGIN * free and _granted(folder, rest)
    if granted is False:
        room, why = int(_MARGIN * free), f"only {files.format_bytes(free)} are free there"
        if rest <= room:
            room = _most(folder, rest)
            why = f"your quota allows only {files.format_bytes(room)} there, though {files.format_bytes(free)} are free"
        raise InputError(
            f"the feature cache needs {files.format_bytes(rest)} in {cfg.out}, but {why}; make room, choose another "
            "`out`, or keep less:\n  " + "\n  ".join(alternatives(cfg, store, teacher.patch, teacher.dim, room))
        )
    quota = "a quota, if any, allows it" if granted else "this file system does not say what a quota allows"
    return f"{files.format_bytes(free)} are free, {quota}"


def _granted(folder: Path, size: int) -> bool | None:
    """Whether `size` bytes can be had in `folder`, quota included: asked for and given back; None: not to be known.

    The system call itself: posix_fallocate would write out the file where a file system cannot reserve.
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


def _most(folder: Path, refused: int) -> int:
    """About the most bytes, to one part in a thousand of those that were refused, that are granted in `folder`."""
    low, high = 0, refused
    while high - low > max(1, refused // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if _granted(folder, middle) else (low, middle)
    return low


def alternatives(cfg: PrecomputeConfig, store: Store, patch: int, dim: int, room: int) -> list[str]:
    """For each knob, the mildest setting that fits into `room` bytes and what it leaves, or how much it lacks."""
    found = []
    for knob, settings in _milder(cfg, dim):
        best = ""
        for setting in settings:
            less = dataclasses.replace(cfg, **{knob: setting})
            size = needed(less, planned(less, store, patch), dim)
            text = ",".join(map(str, setting)) if isinstance(setting, tuple) else str(setting)
            name = f"{knob}=[{text}]" if isinstance(setting, tuple) else f"{knob}={text}"
            if size <= room:
                best = f"{name} would fit: {files.format_bytes(size)}, {files.format_bytes(room - size)} to spare"
                break
            best = f"{knob} alone would not do: {name} still takes {files.format_bytes(size - room)} too much"
        if best:
            found.append(best)
    return found


def _milder(cfg: PrecomputeConfig, dim: int) -> Iterator[tuple[str, list[Any]]]:
    """Knobs, with settings that take less and less."""
    views = [v for n in range(len(cfg.views) - 1, 0, -1) for v in itertools.combinations(cfg.views, n)]
    turned = any(parse_orientation(name).swap for name in cfg.augment_views)
    yield "views", [v for v in views if not turned or ("y" in v) == ("x" in v)]
    yield "augment_views", [cfg.augment_views[:n] for n in range(len(cfg.augment_views) - 1, -1, -1)]
    yield "stride_v", [cfg.stride_v * n for n in (2, 3, 4, 6, 8, 12, 16)]
    yield "layers", [cfg.layers[-n:] for n in range(len(cfg.layers) - 1, 0, -1)]
    yield "scale", [round(cfg.scale * share, 4) for share in (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)]
    most = dim if cfg.pca is None else cfg.pca
    yield "pca", [n for share in (2, 3, 4, 6, 8, 12, 16) if (n := most // share) >= 1]
    yield "dtype", ["int8"] if cfg.dtype == "float16" else []
