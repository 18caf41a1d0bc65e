"""What a feature cache costs to build and to read, as ratios taken in one run.

    python -m tools.bench.cache [--teachers bundled vit_small_patch16_224 vit_base_patch16_224] [--threads 1]

build     seconds of `precompute`, including its forecast, against the bare teacher forward of the same batches, without
          reading or writing
reads     random crops from the cache against the same bytes read in order by h5py, from gzip-1 HDF5, and from zarr
steps     for each teacher a training step (reading, student, losses, distillation, backward, AdamW; one crop) with the
          cache, against two live teachers. `same` computes the very features of the cache (whole tiles of every slice
          that the crop touches). `crop` sees the crop alone and gives other, poorer features. The cosines are to the
          cached features, of the view that is least alike. `wait` is the share of a step spent waiting for batches.

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
from hpc_neuro.precompute.build import run_teacher
from hpc_neuro.precompute.slices import iter_teacher_batches, plan_shards, read_pixels
from hpc_neuro.train.batches import AHEAD
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.setup import build_parts
from tools.bench import live_teacher
from tools.bench.random_store import write_store

PATCH = (8, 16, 16)
"""[voxel] The student's patch."""

READS = 50
"""Random crops that are read."""

LiveTeacher = Callable[..., dict[str, Tensor]]


def main(argv: Sequence[str]) -> int:
    """Run all parts and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 512, 512), help="of the volume of build and reads")
    parser.add_argument("--step-shape", type=int, nargs=3, default=(64, 512, 512), help="of the volume of steps")
    parser.add_argument("--crop", type=int, nargs=3, default=(32, 128, 128))
    parser.add_argument("--teachers", nargs="+", default=["bundled", "vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--steps", type=int, default=20, help="of the first teacher; a fifth of it of the others")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        cfg = _make_config(Path(folder) / "build", tuple(args.shape), args.teachers[0])
        result: dict[str, Any] = {"build": measure_build(cfg), **measure_reads(cfg, args.crop)}

        for number, teacher in enumerate(args.teachers):
            cfg = _make_config(Path(folder) / str(number), tuple(args.step_shape), teacher)
            precompute.run(cfg)
            steps = max(1, args.steps // (1 if number == 0 else 5))
            result[f"steps {teacher}"] = measure_steps(cfg, args.crop, steps)

    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    for key, value in result.items():
        sys.stdout.write(f"{key:28} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def measure_build(cfg: precompute.PrecomputeConfig) -> dict[str, float]:
    """Seconds of the bare forward and of the whole build, and their ratio."""
    store, teacher = Store(cfg.store), load_teacher(cfg.teacher)
    last_layer = [teacher.depth - 1]

    inputs = []
    for view in cfg.views:
        for shard in plan_shards(cfg, store["a"], view, teacher.patch):
            inputs += [read_pixels(store["a"], shard, b) for b in iter_teacher_batches(cfg, shard, teacher.patch, 8)]

    # The first call pays for set-up.
    run_teacher(teacher, inputs[0], last_layer, cfg.position_free)()
    bare = measure_seconds(lambda: [run_teacher(teacher, pixels, last_layer, cfg.position_free)() for pixels in inputs])

    with_start = measure_seconds(lambda: precompute.run(cfg))

    # The record's seconds include the forecast, but not the start.
    build = json.loads((cfg.out / "run.json").read_text())["summary"]["seconds"]
    return {
        "bare_s": round(bare, 3),
        "build_s": build,
        "with_start_s": round(with_start, 3),
        "ratio": round(bare / build, 3),
    }


def measure_reads(cfg: precompute.PrecomputeConfig, crop: Sequence[int]) -> dict[str, Any]:
    """Megabytes of features per second, by way of reading. `crops` includes resampling to the student's grid."""
    cache, rng = FeatureCache(cfg.out), np.random.default_rng(0)
    shape = Store(cfg.store)["a"].shape
    boxes = [_draw_box(rng, shape, crop) for _ in range(READS)]

    crop_bytes = sum(values.nbytes for values in cache.read_crop("a", boxes[0], PATCH).values()) * len(boxes)
    crop_seconds = measure_seconds(lambda: [cache.read_crop("a", box, PATCH) for box in boxes])
    speeds = {"crops": crop_bytes / crop_seconds / 1e6}

    files = sorted(cfg.out.glob("*.h5"))
    total = sum(path.stat().st_size for path in files)
    speeds["sequential"] = total / measure_seconds(lambda: [_read_shard(path) for path in files]) / 1e6

    z_shard = next(path for path in files if ".z." in path.name)
    speeds |= _measure_formats(z_shard, cfg.out / "probe", rng, crop)

    rounded = {name: round(speed, 1) for name, speed in speeds.items()}
    raw = speeds["raw_windows"]
    ratios = {f"raw_over_{name}": round(raw / speeds[f"{name}_windows"], 2) for name in ("gzip1", "zarr")}
    return {"reads_mb_per_s": rounded, **ratios, "crop_ms": round(1000 * crop_seconds / len(boxes), 2)}


def _measure_formats(shard: Path, path: Path, rng: np.random.Generator, crop: Sequence[int]) -> dict[str, float]:
    """Megabytes per second of random windows of one shard, as plain HDF5, gzip-1 HDF5 and zarr."""
    with h5py.File(shard, locking=False) as file:
        values, chunks = file["features"][()], file["features"].chunks
    windows = [_draw_window(rng, values.shape, crop) for _ in range(READS)]
    window_bytes = sum(values[window].nbytes for window in windows)

    speeds = {}
    with h5py.File(path, "w") as file:
        plain = file.create_dataset("raw", data=values, chunks=chunks)
        packed = file.create_dataset("gzip", data=values, chunks=chunks, compression="gzip", compression_opts=1)
        other = zarr.create_array(store=f"{path}.zarr", shape=values.shape, chunks=chunks, dtype=values.dtype)
        other[...] = values
        for name, data in (("raw_windows", plain), ("gzip1_windows", packed), ("zarr_windows", other)):
            # The first call pays for set-up.
            _read_windows(data, windows[:2])
            speeds[name] = window_bytes / measure_seconds(partial(_read_windows, data, windows)) / 1e6
    return speeds


class _StepBench:
    """Training steps of one crop, with features from the cache or from a live teacher."""

    def __init__(self, cfg: precompute.PrecomputeConfig, crop: Sequence[int]) -> None:
        keys = [
            f"store={cfg.store}",
            f"out={cfg.out}",
            f"cache={cfg.out}",
            f"crop.size={list(crop)}",
            "transfer.rule=scratch",
            f"teacher.model={cfg.teacher.model}",
            f"teacher.arch={cfg.teacher.arch}",
            "distill_fraction=1",
            "optim.batch=1",
        ]
        self.cfg = cfg
        self.train = load(TrainConfig, None, keys)
        parts = build_parts(self.train)
        self.crops = parts.crops
        self.teacher = load_teacher(cfg.teacher)
        self.volume = Store(cfg.store)["a"]
        self._module = parts.make().train()
        self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=1e-4)

    def step(self, batch: Batch) -> None:
        """Forward, losses, backward, update."""
        logits, distillation, _ = self._module(dict(vars(batch)))
        loss, _ = sum_losses(self.train.losses, StudentOutput(logits, {}), batch)
        (loss if distillation is None else loss + distillation).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def step_live(self, index: int, compute: LiveTeacher) -> None:
        """A step whose features come from a live teacher."""
        crop = self.crops.sampler(index)
        sample = replace(read_crop(self.crops.store, crop.volume, crop.box), distilled=True)
        features = compute(self.cfg, self.volume, self.teacher, crop.box, PATCH)
        self.step(stack_samples([sample], [index], {view: values[None] for view, values in features.items()}))

    def time_cached_steps(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds of each step with the cache, and of its wait for the batch."""
        seconds, waits = [], []
        indices = ([i] for i in range(count))
        with load_batches(self.crops, indices, 0, AHEAD, pin=False) as batches:
            for _ in range(count):
                start = time.monotonic()
                batch = next(batches)
                waits.append(time.monotonic() - start)
                self.step(batch)
                seconds.append(time.monotonic() - start)
        return seconds, waits

    def measure_lowest_cosine(self, compute: LiveTeacher) -> float:
        """Mean cosine of a live teacher's features to the cached ones, of the view that is least alike."""
        crop = self.crops.sampler(0)
        cached = self.crops.cache.read_crop(crop.volume, crop.box, PATCH) if self.crops.cache else {}
        live = compute(self.cfg, self.volume, self.teacher, crop.box, PATCH)
        return min(
            float(torch.cosine_similarity(values.float(), cached[view].float(), dim=1).mean())
            for view, values in live.items()
        )


def measure_steps(cfg: precompute.PrecomputeConfig, crop: Sequence[int], count: int) -> dict[str, float]:
    """Median seconds per step with the cache and with the two live teachers, and the share of waiting."""
    bench = _StepBench(cfg, crop)
    same, alone = live_teacher.compute_as_cached, live_teacher.compute_from_crop

    # The first step of each kind pays for set-up and is not counted.
    cached_times, waits = bench.time_cached_steps(count + 1)
    same_times = [measure_seconds(partial(bench.step_live, i, same)) for i in range(count + 1)]
    alone_times = [measure_seconds(partial(bench.step_live, i, alone)) for i in range(count + 1)]
    cached_s, same_s, alone_s = (statistics.median(t[1:]) for t in (cached_times, same_times, alone_times))

    return {
        "cache_s": round(cached_s, 3),
        "same_s": round(same_s, 3),
        "ratio": round(cached_s / same_s, 3),
        "crop_s": round(alone_s, 3),
        "crop_ratio": round(cached_s / alone_s, 3),
        "cosine_of_same": round(bench.measure_lowest_cosine(same), 5),
        "cosine_of_crop": round(bench.measure_lowest_cosine(alone), 5),
        "wait": round(sum(waits[1:]) / sum(cached_times[1:]), 4),
        "steps": count,
    }


def measure_seconds(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def _make_config(folder: Path, shape: tuple[int, int, int], teacher: str) -> precompute.PrecomputeConfig:
    """The config of a build of one volume; writes its store."""
    store = write_store(folder / "store", ["a"], shape)
    keys = [f"store={store}", f"out={folder / 'cache'}"]
    if teacher == "bundled":
        keys.append("teacher.model=bundled")
    else:
        keys += ["teacher.model=random", f"teacher.arch={teacher}"]
    return load(precompute.PrecomputeConfig, None, keys)


def _draw_box(rng: np.random.Generator, shape: Sequence[int], crop: Sequence[int]) -> Box:
    z, y, x = (int(rng.integers((n - c) // p + 1)) * p for n, c, p in zip(shape, crop, PATCH, strict=True))
    return Box.at((z, y, x), (crop[0], crop[1], crop[2]))


def _draw_window(rng: np.random.Generator, shape: Sequence[int], crop: Sequence[int]) -> tuple[slice, ...]:
    """A crop's part of a shard of view z."""
    size = (crop[0] // 8, shape[1], crop[1] // 16, crop[2] // 16, shape[4])
    starts = [int(rng.integers(max(1, n - s + 1))) for n, s in zip(shape, size, strict=True)]
    return tuple(slice(a, a + s) for a, s in zip(starts, size, strict=True))


def _read_shard(path: Path) -> Any:
    with h5py.File(path, locking=False) as file:
        return file["features"][()]


def _read_windows(data: Any, windows: Sequence[tuple[slice, ...]]) -> list[Any]:
    return [data[window] for window in windows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
