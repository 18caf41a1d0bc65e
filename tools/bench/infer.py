"""What inference costs: against MONAI, over volumes of growing size, over an empty brain, and by overlap.

    python -m tools.bench.infer monai    [--model FOLDER] [--shape 32 192 192] [--overlap 0.5]
    python -m tools.bench.infer memory   [--model FOLDER]
    python -m tools.bench.infer sparse   [--model FOLDER | --stand-in] [--occupied 0.01]
    python -m tools.bench.infer overlap  --model FOLDER --store STORE --volume ID

Without --model a small untrained student is used. In `sparse --stand-in` one takes the student's place that gives the
image back as its probability, so that the engine itself is timed. Last line: JSON with ratios and peaks.
"""

from __future__ import annotations

import argparse
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
from hpc_neuro.infer.block_pipeline import Predict, Work, predict_blocks
from hpc_neuro.infer.config import EmptyConfig
from hpc_neuro.infer.progress import Meter
from hpc_neuro.infer.tiling import Plan
from hpc_neuro.infer.volumes import Source
from hpc_neuro.metrics import voxel
from hpc_neuro.models import sliding_window
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import Student, build_student, load_student

_BRAIN: Shape = (2048, 4096, 4096)
_SMALL = StudentConfig(depth=1, patch=(4, 16, 16), stem_channels=(2, 4, 4))
_SMALL_WINDOW: Shape = (16, 64, 64)


def main() -> None:
    """Run one benchmark."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("what", nargs="?", default="monai", choices=("monai", "memory", "sparse", "overlap", "one"))
    ask.add_argument("--model", type=Path)
    ask.add_argument("--shape", type=int, nargs=3, default=(32, 192, 192))
    ask.add_argument("--overlap", type=float, default=0.5)
    ask.add_argument("--occupied", type=float, default=0.01)
    ask.add_argument("--stand-in", action="store_true")
    ask.add_argument("--store", type=Path)
    ask.add_argument("--volume")
    args = ask.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress
    torch.manual_seed(0)
    facts: dict[str, Any] = {
        "monai": monai, "memory": memory, "sparse": sparse, "overlap": overlaps, "one": one
    }[args.what](args)  # fmt: skip
    print(json.dumps(facts))


def monai(args: argparse.Namespace) -> dict[str, Any]:
    """Our sliding window and MONAI's: the same student, windows, overlap, Gaussian, batch of one."""
    from monai.inferers import SlidingWindowInferer

    student, window = _student(args.model)
    z, y, x = args.shape
    image = np.random.default_rng(0).random((z, y, x), dtype=np.float32)
    inferer = SlidingWindowInferer(
        window, sw_batch_size=1, overlap=args.overlap, mode="gaussian", sigma_scale=0.125, progress=False
    )

    def theirs() -> NDArray[np.float32]:
        with torch.inference_mode():
            found = inferer(torch.from_numpy(image)[None, None], lambda patch: student(patch).logits.sigmoid())
        whole: NDArray[np.float32] = np.asarray(found, dtype=np.float32)
        return whole.reshape(image.shape)

    def ours() -> NDArray[np.float32]:
        return sliding_window.predict(student, image, window, args.overlap)

    ours(), theirs()
    seconds = {"ours": list[float](), "monai": list[float]()}
    turns = [("ours", ours), ("monai", theirs)]
    for _ in range(4):  # in turns and either first, so that both meet the same machine
        turns.reverse()
        for name, run in turns:
            begun = time.process_time()  # of all threads: a machine that others use too does not blur it
            run()
            seconds[name].append(time.process_time() - begun)
    best = {name: min(s) for name, s in seconds.items()}
    off = float(np.abs(ours() - theirs()).max())
    voxels = image.size
    for name, s in best.items():
        print(f"{name:>6}: {s:.2f} s of CPU, {voxels / s / 1e6:.2f} M voxels/s")
    return {
        "throughput_to_monai": round(best["monai"] / best["ours"], 3),
        "largest_difference": off,
        "cpu_seconds": best,
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a process for volumes 1, 8 and 64 times as large, blocks of one size."""
    peaks = {}
    for times, n in ((1, 3), (8, 6), (64, 12)):
        shape = [32 * n, 64 * n, 64 * n]
        command = [sys.executable, "-m", "tools.bench.infer", "one", "--shape", *map(str, shape)]
        if args.model:
            command += ["--model", str(args.model)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[times] = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
        print(f"{times:3} x {shape}: peak {peaks[times] / 1e6:.0f} MB")
    return {"peak_8_to_1": round(peaks[8] / peaks[1], 3), "peak_64_to_1": round(peaks[64] / peaks[1], 3)}


def one(args: argparse.Namespace) -> dict[str, Any]:
    """One volume of noise made up as it is read; its peak memory. Every eighth block of large ones is looked at."""
    z, y, x = args.shape
    shape: Shape = (z, y, x)

    def read(box: Box) -> NDArray[np.float32]:
        return np.random.default_rng(box.start).random(box.shape, dtype=np.float32)

    student, window = _student(args.model)
    plan = Plan(window, 0.25, student.patch, (32, 64, 64), (16, 32, 32))
    blocks = plan.blocks(shape)
    few = max(len(blocks) // 16, 1)
    looked = {b.index for b in blocks[::few]}
    with tempfile.TemporaryDirectory() as folder:
        work = _work(shape, read, _by(student, plan), plan, Path(folder), lambda block: block.index in looked)
        predict_blocks(work, blocks, Meter("one", 1, show=False))
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def sparse(args: argparse.Namespace) -> dict[str, Any]:
    """A brain of 2048 x 4096 x 4096 voxels, made up as it is read, of whose blocks few hold a neurite."""
    predict: Predict = _stand_in
    if args.stand_in:
        plan = Plan((16, 64, 64), 0.5, (8, 16, 16), (128, 512, 512), (32, 64, 64))
        who = "a stand-in for the student (the image itself)"
    else:
        student, window = _student(args.model)
        plan = Plan(window, 0.25, student.patch, (128, 512, 512), (32, 64, 64))
        predict, who = _by(student, plan), f"the student of {args.model}" if args.model else "a small untrained student"
    blocks = plan.blocks(_BRAIN)
    draw = np.random.default_rng(0)
    chosen = draw.choice(len(blocks), max(round(args.occupied * len(blocks)), 1), replace=False)
    tubes = [Box(_inner(blocks[i], 0.25), _inner(blocks[i], 0.75)) for i in sorted(chosen)]

    def read(box: Box) -> NDArray[np.float32]:
        image = np.zeros(box.shape, np.float32)
        for tube in tubes:
            part = tube.clip(box)
            if part.size:  # a bundle of thin neurites along x
                image[part.relative_to(box.start).slices][::9, ::9] = 0.9
        return image

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        touched = {b.index for b in blocks if any(t.clip(b.read).size for t in tubes)}
        work = _work(_BRAIN, read, predict, plan, Path(folder), lambda block: block.index in touched)
        meter = Meter("brain", sum(map(plan.cost, blocks)))
        predict_blocks(work, blocks, meter)
        marks = list(work.marks.all(blocks))
        written = sum(p.stat().st_size for p in work.folder.rglob("*") if p.is_file())
        lit = sum(m.foreground for m in marks)
    seconds = time.perf_counter() - begun
    skipped = sum(m.skipped is not None for m in marks)
    rate = Box.whole(_BRAIN).size / seconds
    print(f"{who}: {len(blocks)} blocks of {plan.write}, {skipped} skipped ({skipped / len(blocks):.1%})")
    print(f"{meter.done} windows in {seconds:.0f} s, {meter.done / seconds:.0f} windows/s, {rate / 1e6:.0f} M voxels/s")
    return {
        "student": who,
        "blocks": len(blocks),
        "skipped_share": round(skipped / len(blocks), 4),
        "seconds": round(seconds, 1),
        "windows": meter.done,
        "voxels_per_s": round(rate),
        "foreground": lit,
        "bytes_on_disk": written,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def overlaps(args: argparse.Namespace) -> dict[str, Any]:
    """Dice and time by overlap and window, on the part of a labelled volume with most neurite."""
    student, window = _student(args.model)
    _, meta = load_student(_weights(args.model))
    volume = Store(args.store)[args.volume]
    box = _richest(volume.mask, volume.shape, tuple(args.shape))
    image, gold = volume.normalized_image(box), volume.mask(box)
    rows = []
    wider: Shape = (window[0] * 2, window[1], window[2])
    larger: Shape = (window[0] * 2, window[1] * 2, window[2] * 2)
    for overlap, size in ((0.5, window), (0.375, window), (0.25, window), (0.0, window), (0.5, wider), (0.25, larger)):
        begun = time.perf_counter()
        found = sliding_window.predict(student, image, size, overlap)
        seconds = time.perf_counter() - begun
        dice = voxel.dice(*voxel.drop_unlabelled(found >= meta["threshold"], gold))
        rows.append({"window": size, "overlap": overlap, "dice": round(dice, 4), "seconds": round(seconds, 1)})
        print(f"window {size} overlap {overlap}: Dice {dice:.4f}, {seconds:.1f} s")
    return {"volume": args.volume, "box": [box.start, box.stop], "rows": rows}


def _student(model: Path | None) -> tuple[Student, Shape]:
    if model is None:
        return build_student(_SMALL).eval(), _SMALL_WINDOW
    student, meta = load_student(_weights(model))
    z, y, x = meta["window"]
    return student.eval(), (z, y, x)


def _weights(model: Path) -> Path:
    best = model / "weights" / "best"
    return best if best.exists() else model


def _by(student: Student, plan: Plan) -> Predict:
    return lambda image, seen: sliding_window.predict(student, image, plan.window, plan.overlap, seen=seen)


def _stand_in(image: NDArray[np.float32], seen: Callable[[int], None]) -> NDArray[np.float32]:
    seen(1)
    return image


def _work(
    shape: Shape,
    read: Callable[[Box], NDArray[np.float32]],
    predict: Predict,
    plan: Plan,
    folder: Path,
    occupied: Callable[[Block], bool],
) -> Work:
    boxes = {block.read: float(occupied(block)) for block in plan.blocks(shape)}
    source = Source("v", "made up", shape, (1.0, 1.0, 1.0), (), "", read, overview=boxes.__getitem__)
    work = Work.open(source, plan, predict, 0.5, "", folder, EmptyConfig(prove=0))
    work.create()
    return work


def _inner(block: Block, share: float) -> Shape:
    z, y, x = (a + round(share * n) for a, n in zip(block.write.start, block.write.shape, strict=True))
    return z, y, x


def _richest(mask: Callable[[Box], Any], shape: Shape, size: Shape) -> Box:
    size_z, size_y, size_x = (min(a, b) for a, b in zip(size, shape, strict=True))
    on = mask(Box.whole(shape)) == 1
    table = np.pad(on.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
    for axis, n in enumerate((size_z, size_y, size_x)):
        table = np.take(table, range(n, table.shape[axis]), axis) - np.take(table, range(table.shape[axis] - n), axis)
    z, y, x = np.unravel_index(table.argmax(), table.shape)
    return Box.at((int(z), int(y), int(x)), (size_z, size_y, size_x))


if __name__ == "__main__":
    main()
