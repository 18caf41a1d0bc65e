"""What a feature cache costs to make and to read, as ratios taken in one run.

    python -m tools.bench.cache [--teachers bundled vit_small_patch16_224 vit_base_patch16_224] [--threads 1]

build     seconds of `precompute`, forecast and all, against the bare teacher forward of the same batches, without
          reading or writing
reads     random crops from the cache against the same bytes read in order by h5py, from gzip-1 HDF5, and from zarr
steps     for each teacher a training step (reading, student, losses, distillation, backward, AdamW; one crop) with the
          cache, against one that asks the live teacher for the very same features (`same`: whole tiles of every slice
          that the crop touches, which is what the cache holds), and against one whose teacher sees the crop alone and
          gives other, poorer features (`crop`; the cosines are to the cached ones, of the view that is least alike).
          `wait` is the share of a step spent waiting for what is read ahead.

`bundled` is the teacher in the package; other names are timm architectures with random weights. Everything is in the
page cache; times on a busy machine vary. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from torch import Tensor

from hpc_neuro import precompute
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import load
from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.data.dataset import load_batches, read_crop, stack_samples
from hpc_neuro.data.feature_cache import FeatureCache
from hpc_neuro.data.store import Store
from hpc_neuro.losses import sum_losses
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute.build import look
from hpc_neuro.precompute.slices import jobs, pixels
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.setup import build_parts
from tools.bench import live_teacher
from tools.bench.random_store import write_store

PATCH = (8, 16, 16)
WAYS = (live_teacher.same_as_cache, live_teacher.crop_alone)


def main(argv: Sequence[str]) -> int:
    """Run all and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 512, 512), help="of the volume of build and reads")
    parser.add_argument("--step-shape", type=int, nargs=3, default=(64, 512, 512), help="of the volume of steps")
    parser.add_argument("--crop", type=int, nargs=3, default=(32, 128, 128))
    parser.add_argument("--teachers", nargs="+", default=["bundled", "vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--steps", type=int, default=20, help="of the first teacher; a fifth of it of the others")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        cfg = _config(Path(name) / "build", tuple(given.shape), given.teachers[0])
        result: dict[str, Any] = {"build": build(cfg), **reads(cfg, given.crop)}
        for number, teacher in enumerate(given.teachers):
            cfg = _config(Path(name) / str(number), tuple(given.step_shape), teacher)
            precompute.run(cfg)
            result[f"steps {teacher}"] = steps(cfg, given.crop, max(1, given.steps // (1 if number == 0 else 5)))
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    for key, value in result.items():
        sys.stdout.write(f"{key:28} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def build(cfg: precompute.PrecomputeConfig) -> dict[str, float]:
    """Throughput of the whole build as a share of the bare forward's."""
    store, teacher = Store(cfg.store), load_teacher(cfg.teacher)
    units = [u for view in cfg.views for u in precompute.plan(cfg, store["a"], view, teacher.patch)]
    seen = [pixels(store["a"], u, j) for u in units for j in jobs(cfg, u, teacher.patch, 8)]
    look(teacher, seen[0], [teacher.depth - 1])()
    bare = timed(lambda: [look(teacher, b, [teacher.depth - 1])() for b in seen])
    whole = timed(lambda: precompute.run(cfg))
    made = json.loads((cfg.out / "run.json").read_text())["summary"]["seconds"]  # with its forecast, not its start
    return {"bare_s": round(bare, 3), "build_s": made, "with_start_s": round(whole, 3), "ratio": round(bare / made, 3)}


def reads(cfg: precompute.PrecomputeConfig, crop: Sequence[int]) -> dict[str, Any]:
    """Megabytes per second of features, by way of reading; resampling to the student's grid is part of `crops`."""
    cache, draw = FeatureCache(cfg.out), np.random.default_rng(0)
    shape = Store(cfg.store)["a"].shape
    boxes = [_box(draw, shape, crop) for _ in range(50)]
    size = sum(v.nbytes for v in cache.crop("a", boxes[0], PATCH).values()) * len(boxes)
    seconds = timed(lambda: [cache.crop("a", b, PATCH) for b in boxes])
    found = {"crops": size / seconds / 1e6}
    files = sorted(cfg.out.glob("*.h5"))
    total = sum(p.stat().st_size for p in files)
    found["sequential"] = total / timed(lambda: [_whole(p) for p in files]) / 1e6
    with h5py.File(next(p for p in files if ".z." in p.name), locking=False) as file:
        raw, chunks = file["features"][()], file["features"].chunks
    windows = [_window(draw, raw.shape, crop) for _ in range(50)]
    bytes_each = sum(raw[w].nbytes for w in windows)
    path = cfg.out / "probe"
    with h5py.File(path, "w") as file:
        plain = file.create_dataset("raw", data=raw, chunks=chunks)
        packed = file.create_dataset("gzip", data=raw, chunks=chunks, compression="gzip", compression_opts=1)
        other = zarr.create_array(store=str(path) + ".zarr", shape=raw.shape, chunks=chunks, dtype=raw.dtype)
        other[...] = raw
        for name, data in (("raw_windows", plain), ("gzip1_windows", packed), ("zarr_windows", other)):
            _each(data, windows[:2])  # the first call pays for set-up
            found[name] = bytes_each / timed(partial(_each, data, windows)) / 1e6
    rounded = {k: round(v, 1) for k, v in found.items()}
    ratios = {f"raw_over_{k}": round(found["raw_windows"] / found[k + "_windows"], 2) for k in ("gzip1", "zarr")}
    return {"reads_mb_per_s": rounded, **ratios, "crop_ms": round(1000 * seconds / len(boxes), 2)}


def steps(cfg: precompute.PrecomputeConfig, crop: Sequence[int], count: int) -> dict[str, float]:
    """Median seconds per step with the cache and with the two live teachers, and the share of waiting."""
    keys = [
        f"store={cfg.store}",
        f"out={cfg.out}",
        f"cache={cfg.out}",
        f"crop.size={list(crop)}",
        "transfer.rule=scratch",
    ]
    keys += [f"teacher.model={cfg.teacher.model}", f"teacher.arch={cfg.teacher.arch}", "distill_fraction=1"]
    train = load(TrainConfig, None, [*keys, "optim.batch=1"])
    parts, teacher, volume = build_parts(train), load_teacher(cfg.teacher), Store(cfg.store)["a"]
    module, crops = parts.make().train(), parts.crops
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def learn(batch: Batch) -> None:
        logits, distillation, _ = module(dict(vars(batch)))
        loss, _ = sum_losses(train.losses, StudentOutput(logits, {}), batch)
        (loss if distillation is None else loss + distillation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def live(index: int, ask: Callable[..., dict[str, Tensor]]) -> None:
        draw = crops.sampler(index)
        sample = replace(read_crop(crops.store, draw.volume, draw.box), distilled=True)
        features = ask(cfg, volume, teacher, draw.box, PATCH)
        learn(stack_samples([sample], [index], {v: f[None] for v, f in features.items()}))

    whole, waits = [], []
    with load_batches(crops, ([i] for i in range(count + 1)), 0, train.ahead, pin=False) as ready:
        for _ in range(count + 1):
            begun = time.monotonic()
            batch = next(ready)
            waits.append(time.monotonic() - begun)
            learn(batch)
            whole.append(time.monotonic() - begun)
    same, alone = ([timed(partial(live, i, ask)) for i in range(count + 1)] for ask in WAYS)
    place = crops.sampler(0)
    held = crops.cache.crop(place.volume, place.box, PATCH) if crops.cache else {}
    alike = [
        min(float(torch.cosine_similarity(f.float(), held[v].float(), dim=1).mean()) for v, f in features.items())
        for features in (ask(cfg, volume, teacher, place.box, PATCH) for ask in WAYS)
    ]
    cached, same_s, alone_s = (statistics.median(times[1:]) for times in (whole, same, alone))  # without the first
    return {
        "cache_s": round(cached, 3), "same_s": round(same_s, 3), "ratio": round(cached / same_s, 3),
        "crop_s": round(alone_s, 3), "crop_ratio": round(cached / alone_s, 3),
        "cosine_of_same": round(alike[0], 5), "cosine_of_crop": round(alike[1], 5),
        "wait": round(sum(waits[1:]) / sum(whole[1:]), 4), "steps": count,
    }  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def _config(folder: Path, shape: tuple[int, int, int], teacher: str) -> precompute.PrecomputeConfig:
    """A build of one volume, whose store is made."""
    store = write_store(folder / "store", ["a"], shape)
    named = "teacher.model=bundled" if teacher == "bundled" else "teacher.model=random"
    keys = [f"store={store}", f"out={folder / 'cache'}", named]
    return load(
        precompute.PrecomputeConfig, None, [*keys, *([] if teacher == "bundled" else [f"teacher.arch={teacher}"])]
    )


def _box(draw: np.random.Generator, shape: Sequence[int], crop: Sequence[int]) -> Box:
    z, y, x = (int(draw.integers((n - c) // p + 1)) * p for n, c, p in zip(shape, crop, PATCH, strict=True))
    return Box.at((z, y, x), (crop[0], crop[1], crop[2]))


def _window(draw: np.random.Generator, shape: Sequence[int], crop: Sequence[int]) -> tuple[slice, ...]:
    """A crop's part of a shard of view z."""
    size = (crop[0] // 8, shape[1], crop[1] // 16, crop[2] // 16, shape[4])
    starts = [int(draw.integers(max(1, n - s + 1))) for n, s in zip(shape, size, strict=True)]
    return tuple(slice(a, a + s) for a, s in zip(starts, size, strict=True))


def _whole(path: Path) -> Any:
    with h5py.File(path, locking=False) as file:
        return file["features"][()]


def _each(data: Any, windows: Sequence[tuple[slice, ...]]) -> list[Any]:
    return [data[window] for window in windows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
