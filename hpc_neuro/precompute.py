"""The verb `precompute`: a frozen 2D teacher looks at every slice of every volume, along each axis, once.

Alone, or as `mpiexec -n N hpc-neuro precompute ...`: work is cut into slabs of slices, ranks draw the next slab from
one shared counter, and each slab is one file, so the result does not depend on who made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from hpc_neuro import distributed, files, runs
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.geometry import Box
from hpc_neuro.models.teacher import Teacher, TeacherConfig, load_teacher
from hpc_neuro.schema import ConfigError, InputError, config

log = logging.getLogger(__name__)
View = Literal["z", "y", "x"]


@config
class PrecomputeConfig:
    """Which features of which volumes to keep."""

    store: Path
    """The folder that `prepare` wrote."""
    out: Path
    """Folder of the feature cache."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The frozen 2D network."""
    splits: tuple[Literal["train", "val", "test"], ...] = ("train",)
    """Splits whose volumes get features; training reads those of `train`."""
    views: tuple[View, ...] = Field(default=("z", "y", "x"), min_length=1)
    """Axes that slices stand orthogonal to."""
    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    """Teacher blocks whose output is kept; negative ones count from the end."""
    stride_v: int = Field(default=8, ge=1)
    """[voxel] Every how many slices one is kept; features change slowly across slices."""
    scale: float = Field(default=1.0, gt=0)
    """Slices are enlarged by this factor first: tokens then stand for finer cells, at its square of the cost."""
    isotropic: bool = True
    """Stretch the coarser axis of a slice so that its pixels are square, as a photograph's are."""
    tile: int = Field(default=512, ge=16)
    """[pixel] Slices larger than this are cut into tiles."""
    halo: int = Field(default=64, ge=0)
    """[pixel] Context around each tile."""
    batch: int = Field(default=8, ge=1)
    """Slices per teacher forward."""
    slab: int = Field(default=64, ge=1)
    """Slices per shard file."""


def forecast(cfg: PrecomputeConfig) -> list[str]:
    """Check the store, the teacher and the space; say how many slices, shards and bytes, and the time of a probe."""
    return _forecast(cfg, *_open(cfg))


def run(cfg: PrecomputeConfig) -> int:
    """Build the cache, or what is missing of it. All MPI ranks call this."""
    comm = distributed.mpi_comm()
    main = comm is None or comm.Get_rank() == 0
    store, teacher, units = _open(cfg)
    if not main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)
    if comm is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.Get_size()))
    digests = {v: store[v].digest for v in _volumes(cfg, store)}
    inputs = {f"volume {k}": d for k, d in digests.items()}
    todo = _missing(cfg, units, digests, teacher)
    if comm is not None:
        todo = comm.bcast(todo)  # ranks that start late would miss what the early ones already made
    with runs.start("precompute", cfg, cfg.out, inputs, main=main, whole=not todo) as this:
        if this.complete:
            return 0
        if main:
            log.info("\n".join(_forecast(cfg, store, teacher, units)))
        if comm is not None:
            comm.Barrier()  # the folder is there, and nobody writes before it was cleaned
        begun = time.monotonic()
        turns = distributed.turns(len(todo), comm)
        failed: Exception | None = None
        for i in runs.progress(turns, "teacher features", total=len(todo), unit="slab") if main else turns:
            if failed is None:  # after a failure the rest is drawn unbuilt, so that the other ranks stop soon
                try:
                    _build(cfg, store[todo[i].volume], teacher, todo[i], _key(cfg, todo[i], digests, teacher))
                except Exception as error:  # raised again below, when no rank waits for this one any more
                    failed = error
        distributed.agree(failed, comm)
        if main:
            _finish(cfg, teacher, units, digests)
            summary = {"shards": len(units), "seconds": round(time.monotonic() - begun, 1)}
            this.finish(summary, outputs=[cfg.out / cache.MANIFEST])
            log.info("wrote %d shards, %s, to %s", len(units), files.human(_bytes(cfg, units, teacher)), cfg.out)
        if comm is not None:
            comm.Barrier()
    return 0


def _open(cfg: PrecomputeConfig) -> tuple[Store, Teacher, list[cache.Unit]]:
    store = Store(cfg.store)
    volumes = _volumes(cfg, store)
    teacher = load_teacher(cfg.teacher).to(distributed.device())
    if bad := [n for n in cfg.layers if not -teacher.depth <= n < teacher.depth]:
        raise ConfigError(f"layers: the teacher has blocks 0 to {teacher.depth - 1}, not {bad}")
    if cfg.tile % teacher.patch or cfg.halo % teacher.patch:
        raise ConfigError(f"tile and halo: multiples of the teacher's patch, {teacher.patch}, are wanted")
    units = [unit for v in volumes for view in cfg.views for unit in plan(cfg, store[v], view, teacher.patch)]
    # the largest first, so that ranks end together
    return store, teacher, sorted(units, key=lambda u: (-u.count * u.rows * u.columns, u.name))


def _volumes(cfg: PrecomputeConfig, store: Store) -> list[str]:
    volumes = [v for split in cfg.splits for v in store.split(split)]
    if not volumes:
        raise InputError(
            f"{cfg.store} has no volume in the splits {', '.join(cfg.splits)}; choose others with splits=[...]"
        )
    return volumes


def plan(cfg: PrecomputeConfig, volume: StoredVolume, view: View, patch: int) -> list[cache.Unit]:
    """The shards of one view of one volume, in slice order."""
    across, down, right = cache.PLANE[view]
    size, finest = volume.voxel_size, min(volume.voxel_size)
    factors = [cfg.scale * (size[a] / finest if cfg.isotropic else 1.0) for a in (down, right)]
    rows, columns = (math.ceil(volume.shape[a] * f / patch) for a, f in zip((down, right), factors, strict=True))
    cell = (patch / factors[0], patch / factors[1])
    count = math.ceil(volume.shape[across] / cfg.stride_v)
    return [
        cache.Unit(volume.id, view, i * cfg.stride_v, cfg.stride_v, min(cfg.slab, count - i), rows, columns, cell)
        for i in range(0, count, cfg.slab)
    ]


def _key(cfg: PrecomputeConfig, unit: cache.Unit, digests: dict[str, str], teacher: Teacher) -> str:
    """Everything a shard's content depends on, hashed: a file with this key need not be made again."""
    facts = [asdict(unit), digests[unit.volume], teacher.identity, cfg.layers, cfg.tile, cfg.halo]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _missing(
    cfg: PrecomputeConfig, units: list[cache.Unit], digests: dict[str, str], teacher: Teacher
) -> list[cache.Unit]:
    return [u for u in units if cache.shard_key(cfg.out / u.name) != _key(cfg, u, digests, teacher)]


def _build(cfg: PrecomputeConfig, volume: StoredVolume, teacher: Teacher, unit: cache.Unit, key: str) -> None:
    """One shard: read, forward and write overlap, each a tile of slices at a time, so memory does not grow."""
    layers = [n % teacher.depth for n in cfg.layers]
    with (
        files.full_disk_named(cfg.out, unit.name),
        files.atomic(cfg.out / unit.name) as part,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
        contextlib.closing(cache.ShardWriter(part, unit, len(layers), teacher.dim, key)) as shard,
    ):
        jobs = list(_tiles(cfg, unit, teacher.patch))
        ahead: Future[NDArray[np.float32]] = reader.submit(_pixels, volume, unit, jobs[0])
        behind: Future[None] | None = None
        for i, job in enumerate(jobs):
            pixels = ahead.result()
            if i + 1 < len(jobs):
                ahead = reader.submit(_pixels, volume, unit, jobs[i + 1])
            inner = teacher_features(teacher, pixels, layers)[:, :, job["inner_rows"], job["inner_columns"]]
            if behind is not None:
                behind.result()
            behind = writer.submit(shard.write, job["slices"], job["rows"], job["columns"], inner)
        if behind is not None:
            behind.result()
        shard.finish()


def teacher_features(teacher: Teacher, pixels: NDArray[np.float32], layers: list[int]) -> NDArray[np.float16]:
    """Slices [s, H, W] in [0, 1] -> [s, L, h, w, D] float16; autocast to bf16 on a GPU."""
    device = distributed.device()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        maps = teacher.features(torch.from_numpy(pixels).to(device), layers)  # [L, s, h, w, D]
    result: NDArray[np.float16] = maps.transpose(0, 1).half().cpu().numpy()
    return result


def _tiles(cfg: PrecomputeConfig, unit: cache.Unit, patch: int) -> Iterator[dict[str, Any]]:
    """Batches of slices x tiles of tokens; `grown_*` are with context, `inner_*` cut the context off again."""
    size, halo = cfg.tile // patch, cfg.halo // patch
    for r in range(0, unit.rows, size):
        for c in range(0, unit.columns, size):
            rows, columns = slice(r, min(r + size, unit.rows)), slice(c, min(c + size, unit.columns))
            grown = [
                slice(max(0, s.start - halo), min(n, s.stop + halo))
                for s, n in ((rows, unit.rows), (columns, unit.columns))
            ]
            inner = [slice(s.start - g.start, s.stop - g.start) for s, g in zip((rows, columns), grown, strict=True)]
            for i in range(0, unit.count, cfg.batch):
                yield {
                    "slices": slice(i, min(i + cfg.batch, unit.count)), "rows": rows, "columns": columns,
                    "inner_rows": inner[0], "inner_columns": inner[1],
                    "pixel_rows": np.arange(grown[0].start * patch, grown[0].stop * patch) * (unit.cell[0] / patch),
                    "pixel_columns": np.arange(grown[1].start * patch, grown[1].stop * patch) * (unit.cell[1] / patch),
                    "half": (unit.cell[0] / patch / 2 - 0.5, unit.cell[1] / patch / 2 - 0.5),
                }  # fmt: skip


def _pixels(volume: StoredVolume, unit: cache.Unit, job: dict[str, Any]) -> NDArray[np.float32]:
    """The slices of a job as the teacher sees them [s, H, W]: normalised, stretched, the border repeated."""
    across, down, right = cache.PLANE[unit.view]
    taps = [
        _linear(job[name] + half, volume.shape[axis])
        for name, half, axis in zip(("pixel_rows", "pixel_columns"), job["half"], (down, right), strict=True)
    ]
    picked = []
    for i in range(job["slices"].start, job["slices"].stop):
        # the middle slice stands for its `stride` neighbours
        middle = min(unit.first + i * unit.stride + unit.stride // 2, volume.shape[across] - 1)
        start, stop = [0, 0, 0], [0, 0, 0]
        start[across], stop[across] = middle, middle + 1
        for axis, (low, high, _) in zip((down, right), taps, strict=True):
            start[axis], stop[axis] = int(low.min()), int(high.max()) + 1
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        plane = volume.normalised(box).squeeze(across)  # rows and columns keep their order
        for place, (low, high, share) in enumerate(taps):
            offset = int(low.min())
            weight = share[:, None] if place == 0 else share
            plane = plane.take(low - offset, place) * (1 - weight) + plane.take(high - offset, place) * weight
        picked.append(plane.astype(np.float32))
    return np.stack(picked)


def _linear(
    position: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Neighbours and weight of linear interpolation at positions along an axis of `count` voxels, clamped to it."""
    inside = np.clip(position, 0, count - 1)
    low = np.floor(inside).astype(np.int64)
    return low, np.minimum(low + 1, count - 1), (inside - low).astype(np.float32)


def _bytes(cfg: PrecomputeConfig, units: list[cache.Unit], teacher: Teacher) -> int:
    return sum(u.count * u.rows * u.columns for u in units) * len(cfg.layers) * teacher.dim * 2


def _forecast(cfg: PrecomputeConfig, store: Store, teacher: Teacher, units: list[cache.Unit]) -> list[str]:
    size = _bytes(cfg, units, teacher)
    digests = {v: store[v].digest for v in _volumes(cfg, store)}
    todo = _missing(cfg, units, digests, teacher)
    files.require_space(cfg.out, _bytes(cfg, todo, teacher), "the feature cache")
    tokens = sum(u.count * u.rows * u.columns for u in todo)
    probe = np.zeros((1, *(min(cfg.tile, n * teacher.patch) for n in (units[0].rows, units[0].columns))), np.float32)
    teacher_features(teacher, probe, [teacher.depth - 1])  # the first call pays for set-up
    begun = time.monotonic()
    teacher_features(teacher, probe, [teacher.depth - 1])
    seconds = (time.monotonic() - begun) * tokens * teacher.patch**2 / probe.size
    return [
        f"teacher {teacher.identity['name']} (sha256 {teacher.identity['sha256'][:12]}), {teacher.depth} blocks, "
        f"{teacher.dim} channels, patch {teacher.patch}",
        f"{len(digests)} volumes, views {' '.join(cfg.views)}, layers {list(cfg.layers)}: {len(units)} shards, "
        f"{files.human(size)} float16 in {cfg.out}",
        f"{len(todo)} shards to make, {tokens} tokens, about {seconds:.0f} s on one process",
    ]


def _finish(cfg: PrecomputeConfig, teacher: Teacher, units: list[cache.Unit], digests: dict[str, str]) -> None:
    ordered = sorted(units, key=lambda u: u.name)
    facts = {
        "teacher": teacher.identity,
        "random_teacher": teacher.random,
        "dim": teacher.dim,
        "patch": teacher.patch,
        "layers": [n % teacher.depth for n in cfg.layers],
        "views": list(cfg.views),
        "stride_v": cfg.stride_v,
        "scale": cfg.scale,
        "isotropic": cfg.isotropic,
        "augment_views": [],
        "volumes": digests,
        "store": str(cfg.store),
        "code": runs.code_version(),
    }
    cache.write_manifest(cfg.out, facts, [cache.shard_record(cfg.out / u.name, u) for u in ordered])
