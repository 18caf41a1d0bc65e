"""What a feature cache costs to make and to read, as ratios taken in one run.

    python -m tools.bench_cache [--shape 64 256 256] [--teacher random] [--crop 32 96 96] [--steps 30] [--threads 1]

build     seconds of `precompute` against the bare teacher forward of the same batches, without reading or writing
reads     random crops from the cache against the same bytes read in order by h5py, from gzip-1 HDF5, and from zarr
step      a training step (read, student forward and backward) with the cache against one that asks the live teacher
wait      share of a step spent waiting for features read ahead in a thread

Everything is in the page cache; times on a busy machine vary. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from torch import nn

from hpc_neuro import precompute
from hpc_neuro.data.feature_cache import PLANE, FeatureCache
from hpc_neuro.data.store import Store
from hpc_neuro.geometry import Box
from hpc_neuro.models.student import StudentConfig, build_student
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute.build import look
from hpc_neuro.precompute.slices import jobs, pixels
from hpc_neuro.schema import load
from tests.tiny_store import write_store

PATCH = (8, 16, 16)


def main(argv: Sequence[str]) -> int:
    """Run all and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 256, 256))
    parser.add_argument("--crop", type=int, nargs=3, default=(32, 96, 96))
    parser.add_argument("--teacher", default="random", help="random, bundled or a timm name")
    parser.add_argument("--arch", default="vit_tiny_patch16_224", help="of the random teacher")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_store(folder / "store", {"a": "train"}, tuple(given.shape))
        keys = [f"store={store}", f"out={folder / 'cache'}", f"teacher.model={given.teacher}", "slab=16"]
        keys += [f"teacher.arch={given.arch}"] if given.teacher == "random" else []
        cfg = load(precompute.PrecomputeConfig, None, keys)
        result = {"build": build(cfg), **reads(cfg, given.crop), "step": steps(cfg, given.crop, given.steps)}
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    for key, value in result.items():
        sys.stdout.write(f"{key:8} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def build(cfg: precompute.PrecomputeConfig) -> dict[str, float]:
    """Throughput of the whole build as a share of the bare forward's."""
    store, teacher = Store(cfg.store), load_teacher(cfg.teacher)
    units = [u for view in cfg.views for u in precompute.plan(cfg, store["a"], view, teacher.patch)]
    batches = [pixels(store["a"], u, j) for u in units for j in jobs(cfg, u, teacher.patch, 8)]
    look(teacher, batches[0], [teacher.depth - 1])()
    bare = timed(lambda: [look(teacher, b, [teacher.depth - 1])() for b in batches])
    whole = timed(lambda: precompute.run(cfg))
    made = json.loads((cfg.out / "run.json").read_text())["summary"]["seconds"]  # with its forecast, not its start
    return {"bare_s": round(bare, 2), "build_s": made, "with_start_s": round(whole, 2), "ratio": round(bare / made, 3)}


def reads(cfg: precompute.PrecomputeConfig, crop: Sequence[int]) -> dict[str, Any]:
    """Megabytes per second of features, by way of reading; resampling to the student's grid is part of `crops`."""
    cache, draw = FeatureCache(cfg.out), np.random.default_rng(0)
    shape = Store(cfg.store)["a"].shape
    boxes = [_box(draw, shape, crop) for _ in range(20)]
    cache.crop("a", boxes[0], PATCH)
    size = sum(v.nbytes for v in cache.crop("a", boxes[0], PATCH).values()) * len(boxes)
    found = {"crops": size / timed(lambda: [cache.crop("a", b, PATCH) for b in boxes]) / 1e6}
    files = sorted(cfg.out.glob("*.h5"))
    total = sum(p.stat().st_size for p in files)
    found["sequential"] = total / timed(lambda: [_whole(p) for p in files]) / 1e6
    with h5py.File(next(p for p in files if ".z." in p.name), locking=False) as file:
        raw, chunks = file["features"][()], file["features"].chunks
    windows = [_window(draw, raw.shape, crop) for _ in range(20)]
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
    return {"reads_mb_per_s": rounded, **ratios}


def steps(cfg: precompute.PrecomputeConfig, crop: Sequence[int], count: int) -> dict[str, float]:
    """Seconds per step with the cache and with the live teacher; the features' loss is a plain mean square."""
    store, cache, teacher = Store(cfg.store), FeatureCache(cfg.out), load_teacher(cfg.teacher)
    student = build_student(StudentConfig(patch=PATCH))
    head = nn.Linear(student.vit.norm.weight.numel(), 3 * cache.dim)
    last = len(student.vit.blocks) - 1
    draw = np.random.default_rng(1)
    boxes = [_box(draw, store["a"].shape, crop) for _ in range(count + 1)]

    def learn(box: Box, features: dict[str, torch.Tensor]) -> float:
        image = torch.from_numpy(store["a"].normalised(box))[None, None]
        prediction = student(image, (last,))
        goal = torch.cat([features[v][-1].float() for v in PLANE])  # [3 * D, z, y, x]
        guess = head(prediction.features[last][0].movedim(0, -1)).movedim(-1, 0)
        loss = prediction.logits.mean() + (guess - goal).square().mean()
        loss.backward()
        return float(loss.detach())

    def live(box: Box) -> dict[str, torch.Tensor]:
        """The crop's own slices, every 8th along each axis, brought to the token grid."""
        image, found = store["a"].normalised(box), {}
        grid = [n // p for n, p in zip(box.shape, PATCH, strict=True)]
        for view, (across, *_) in PLANE.items():
            slices = np.moveaxis(image, across, 0)[cfg.stride_v // 2 :: cfg.stride_v]
            padded = np.pad(slices, [(0, 0), *[(0, -n % teacher.patch) for n in slices.shape[1:]]], mode="edge")
            maps = torch.from_numpy(look(teacher, padded, [teacher.depth - 1])()).float()[:, 0]  # [s, h, w, D]
            volume = maps.movedim(0, across).movedim(-1, 0)[None]
            found[view] = nn.functional.interpolate(volume, size=grid, mode="trilinear")
        return found

    def cached() -> list[float]:
        waits = []
        with ThreadPoolExecutor(1) as ahead:
            ready = ahead.submit(cache.crop, "a", boxes[1], PATCH)
            for box, following in zip(boxes[1:], [*boxes[2:], None], strict=True):
                begun = time.monotonic()
                features = ready.result()
                waits.append(time.monotonic() - begun)
                if following is not None:
                    ready = ahead.submit(cache.crop, "a", following, PATCH)
                learn(box, features)
        return waits

    learn(boxes[0], cache.crop("a", boxes[0], PATCH))
    waited: list[float] = []
    with_cache = timed(lambda: waited.extend(cached())) / count
    with_teacher = timed(lambda: [learn(b, live(b)) for b in boxes[1:]]) / count
    return {
        "cache_s": round(with_cache, 3), "live_s": round(with_teacher, 3), "ratio": round(with_cache / with_teacher, 3),
        "wait_share": round(sum(waited) / (count * with_cache), 4),
    }  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


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
