"""What inference costs: against MONAI, over volumes of growing size, over an empty brain, and by overlap.

    python -m tools.bench.infer monai    [--model FOLDER] [--shape 32 192 192] [--overlap 0.25]
    python -m tools.bench.infer memory   [--model FOLDER]
    python -m tools.bench.infer sparse   [--model FOLDER | --stand-in] [--occupied 0.01]
    python -m tools.bench.infer overlap  --model FOLDER --store STORE --volume ID

Without --model a small untrained student is used. In `sparse --stand-in` the image itself is the probability, so that
the pipeline is timed without a student. Last line: JSON with ratios and peaks.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Block, Box, Shape
from hpc_neuro.data.store import Store
from hpc_neuro.infer.block_pipeline import EmptyRule, Image, PredictImage, VolumeRun, predict_blocks
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.infer.volumes import InputVolume
from hpc_neuro.metrics import voxel
from hpc_neuro.models import sliding_window
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import Student, build_student, load_student

_BRAIN: Shape = (2048, 4096, 4096)
_SMALL_STUDENT = StudentConfig(depth=1, patch=(4, 16, 16), channels=(2, 4, 4))
_SMALL_WINDOW: Shape = (16, 64, 64)
_ROUNDS = 4
"""Timed runs of each program that is compared."""
_BATCHES = (1, 2, 4)
"""Windows at once."""


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="?", default="monai", choices=tuple(BENCHMARKS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 192, 192))
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--occupied", type=float, default=0.01)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--volume")
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    print(json.dumps(BENCHMARKS[args.benchmark](args)))


def compare_with_monai(args: argparse.Namespace) -> dict[str, Any]:
    """Our sliding window and MONAI's: the same student, windows, overlap and Gaussian, each at its fastest batch."""
    from monai.inferers import SlidingWindowInferer

    student, window = _open_student(args.model)
    z, y, x = args.shape
    image = np.random.default_rng(0).random((z, y, x), dtype=np.float32)

    def predict_with_monai(batch: int) -> Image:
        inferer = SlidingWindowInferer(
            window, sw_batch_size=batch, overlap=args.overlap, mode="gaussian", sigma_scale=0.125, progress=False
        )
        with torch.inference_mode():
            output = inferer(torch.from_numpy(image)[None, None], lambda patch: student(patch).logits.sigmoid())
        probability: Image = np.asarray(output, dtype=np.float32).reshape(image.shape)
        return probability

    def predict(batch: int) -> Image:
        return sliding_window.predict(student, image, window, args.overlap, batch)

    # MONAI bounds the weights of a window from below, we those of each axis: corners of windows may differ.
    difference = float(np.abs(predict(1) - predict_with_monai(1)).mean())

    # A peer runs at its best setting, or the ratio would praise the wrong program.
    programs = {"ours": predict, "monai": predict_with_monai}
    cpu_seconds = _time_in_turns(
        {f"{name} {batch}": functools.partial(run, batch) for name, run in programs.items() for batch in _BATCHES}
    )
    for name, best in cpu_seconds.items():
        print(f"{name:>8}: {best:.2f} s of CPU, {image.size / best / 1e6:.2f} M voxels/s")

    fastest = {name: min(cpu_seconds[f"{name} {batch}"] for batch in _BATCHES) for name in programs}
    return {
        "throughput_to_monai": round(fastest["monai"] / fastest["ours"], 3),
        "mean_difference": difference,
        "cpu_seconds": cpu_seconds,
    }


def compare_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a process for volumes 1, 8 and 64 times as large, blocks of one size."""
    peaks = {}
    for times, blocks_per_axis in ((1, 3), (8, 6), (64, 12)):
        shape = [32 * blocks_per_axis, 64 * blocks_per_axis, 64 * blocks_per_axis]
        command = [sys.executable, "-m", "tools.bench.infer", "one", "--shape", *map(str, shape)]
        if args.model:
            command += ["--model", str(args.model)]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[times] = json.loads(process.stdout.splitlines()[-1])["peak_bytes"]
        print(f"{times:3} x {shape}: peak {peaks[times] / 1e6:.0f} MB")
    return {"peak_8_to_1": round(peaks[8] / peaks[1], 3), "peak_64_to_1": round(peaks[64] / peaks[1], 3)}


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one volume of noise, made up as it is read. About sixteen blocks are predicted."""
    z, y, x = args.shape
    shape: Shape = (z, y, x)
    student, window = _open_student(args.model)
    tiling = Tiling(window, 0.25, student.patch, (32, 64, 64), (16, 32, 32))
    blocks = tiling.list_blocks(shape)
    predicted = {block.index for block in blocks[:: max(len(blocks) // 16, 1)]}

    def read(box: Box) -> Image:
        return np.random.default_rng(box.start).random(box.shape, dtype=np.float32)

    predict = _make_predict(student, tiling)
    with tempfile.TemporaryDirectory() as folder:
        run = _open_run(shape, read, predict, tiling, Path(folder), lambda block: block.index in predicted)
        predict_blocks(run, blocks, WindowProgress("one", 1, show=False))
    return {"peak_bytes": _read_peak()}


def time_sparse_brain(args: argparse.Namespace) -> dict[str, Any]:
    """A brain of 2048 x 4096 x 4096 voxels, made up as it is read, of whose blocks few hold a neurite."""
    name, predict, tiling = _choose_predictor(args)
    blocks = tiling.list_blocks(_BRAIN)
    read, is_occupied = _invent_brain(blocks, args.occupied)

    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = _open_run(_BRAIN, read, predict, tiling, Path(folder), is_occupied)
        progress = WindowProgress("brain", sum(map(tiling.count_windows, blocks)))
        predict_blocks(run, blocks, progress)
        markers = list(run.markers.read_all(blocks))
        bytes_on_disk = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    seconds = time.perf_counter() - started_at

    skipped_share = sum(marker.skipped is not None for marker in markers) / len(blocks)
    windows_per_s, voxels_per_s = progress.done / seconds, Box.whole(_BRAIN).size / seconds
    print(f"{name}: {len(blocks)} blocks of {tiling.write}, {skipped_share:.1%} skipped")
    print(
        f"{progress.done} windows in {seconds:.0f} s, {windows_per_s:.0f} windows/s, "
        f"{voxels_per_s / 1e6:.0f} M voxels/s"
    )
    return {
        "student": name,
        "blocks": len(blocks),
        "skipped_share": round(skipped_share, 4),
        "seconds": round(seconds, 1),
        "windows": progress.done,
        "voxels_per_s": round(voxels_per_s),
        "foreground": sum(marker.foreground for marker in markers),
        "bytes_on_disk": bytes_on_disk,
        "peak_bytes": _read_peak(),
    }


def compare_overlaps(args: argparse.Namespace) -> dict[str, Any]:
    """Dice and time by overlap and window, on the part of a labeled volume with most neurite."""
    student, window = _open_student(args.model)
    _, meta = load_student(_find_weights(args.model))
    volume = Store(args.store)[args.volume]
    box = _find_densest_box(volume.mask, volume.shape, tuple(args.shape))
    image, gold = volume.normalized_image(box), volume.mask(box)

    deep_window: Shape = (window[0] * 2, window[1], window[2])
    large_window: Shape = (window[0] * 2, window[1] * 2, window[2] * 2)
    cases = [(overlap, window) for overlap in (0.5, 0.375, 0.25, 0.0)]
    rows = []
    for overlap, size in [*cases, (0.5, deep_window), (0.25, large_window)]:
        started_at = time.perf_counter()
        probability = sliding_window.predict(student, image, size, overlap)
        seconds = time.perf_counter() - started_at
        dice = voxel.dice(*voxel.drop_unlabelled(probability >= meta["threshold"], gold))
        rows.append({"window": size, "overlap": overlap, "dice": round(dice, 4), "seconds": round(seconds, 1)})
        print(f"window {size} overlap {overlap}: Dice {dice:.4f}, {seconds:.1f} s")
    return {"volume": args.volume, "box": [box.start, box.stop], "rows": rows}


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "monai": compare_with_monai,
    "memory": compare_memory,
    "sparse": time_sparse_brain,
    "overlap": compare_overlaps,
    "one": measure_memory,
}
"""`one` is a process of `memory`."""


def _time_in_turns(programs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """[s] Least CPU time of each program: of all threads, so that other users of the machine do not blur it."""
    seconds = {name: list[float]() for name in programs}
    turns = list(programs.items())
    for _ in range(_ROUNDS):
        # Either goes first in turns, so that both meet the same machine.
        turns.reverse()
        for name, run in turns:
            started_at = time.process_time()
            run()
            seconds[name].append(time.process_time() - started_at)
    return {name: min(times) for name, times in seconds.items()}


def _choose_predictor(args: argparse.Namespace) -> tuple[str, PredictImage, Tiling]:
    """Its name for people, the prediction, and how volumes are cut."""
    if args.stand_in:
        tiling = Tiling((16, 64, 64), 0.5, (8, 16, 16), (128, 512, 512), (32, 64, 64))
        return "a stand-in for the student (the image itself)", _echo_image, tiling

    student, window = _open_student(args.model)
    tiling = Tiling(window, 0.25, student.patch, (128, 512, 512), (32, 64, 64))
    name = f"the student of {args.model}" if args.model else "a small untrained student"
    return name, _make_predict(student, tiling), tiling


def _invent_brain(blocks: list[Block], occupied_share: float) -> tuple[Callable[[Box], Image], Callable[[Block], bool]]:
    """A function that reads boxes of a brain with bundles of thin neurites along x in few blocks, and one that tells
    which blocks see any."""
    draw = np.random.default_rng(0)
    occupied = draw.choice(len(blocks), max(round(occupied_share * len(blocks)), 1), replace=False)
    bundles = [Box(_find_corner(blocks[i], 0.25), _find_corner(blocks[i], 0.75)) for i in sorted(occupied)]
    visible = {block.index for block in blocks if any(bundle.clip(block.read).size for bundle in bundles)}

    def read(box: Box) -> Image:
        image = np.zeros(box.shape, np.float32)
        for bundle in bundles:
            part = bundle.clip(box)
            if part.size:
                image[part.relative_to(box.start).slices][::9, ::9] = 0.9
        return image

    return read, lambda block: block.index in visible


def _open_student(model: Path | None) -> tuple[Student, Shape]:
    """A student and its window."""
    if model is None:
        return build_student(_SMALL_STUDENT).eval(), _SMALL_WINDOW
    student, meta = load_student(_find_weights(model))
    z, y, x = meta["window"]
    return student.eval(), (z, y, x)


def _find_weights(model: Path) -> Path:
    best = model / "weights" / "best"
    return best if best.exists() else model


def _make_predict(student: Student, tiling: Tiling) -> PredictImage:
    return lambda image, count_windows: sliding_window.predict(
        student, image, tiling.window, tiling.overlap, seen=count_windows
    )


def _echo_image(image: Image, count_windows: Callable[[int], None]) -> Image:
    count_windows(1)
    return image


def _open_run(
    shape: Shape,
    read: Callable[[Box], Image],
    predict: PredictImage,
    tiling: Tiling,
    folder: Path,
    is_occupied: Callable[[Block], bool],
) -> VolumeRun:
    """A run of a volume whose overview knows the occupied blocks."""
    brightness = {block.read: float(is_occupied(block)) for block in tiling.list_blocks(shape)}
    source = InputVolume("v", "made up", shape, (1.0, 1.0, 1.0), (), "", read, overview=brightness.__getitem__)
    run = VolumeRun.open(source, tiling, predict, 0.5, "", folder, EmptyRule(proof_share=0))
    run.create_folder()
    return run


def _find_corner(block: Block, share: float) -> Shape:
    """The voxel at a share of the way from a block's first to its last corner."""
    z, y, x = (a + round(share * n) for a, n in zip(block.write.start, block.write.shape, strict=True))
    return z, y, x


def _find_densest_box(mask: Callable[[Box], Any], shape: Shape, size: Shape) -> Box:
    """The box of `size` with most foreground, from a summed-volume table."""
    size_z, size_y, size_x = (min(a, b) for a, b in zip(size, shape, strict=True))

    is_foreground = mask(Box.whole(shape)) == 1
    table: NDArray[Any] = np.pad(is_foreground.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
    for axis, n in enumerate((size_z, size_y, size_x)):
        count = table.shape[axis] - n
        table = np.take(table, range(n, n + count), axis) - np.take(table, range(count), axis)

    z, y, x = np.unravel_index(table.argmax(), table.shape)
    return Box.at((int(z), int(y), int(x)), (size_z, size_y, size_x))


def _read_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
