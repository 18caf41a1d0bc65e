"""What tracing costs, against thinning (scikit-image) and TEASAR (kimimaro), side by side in one run.

    python -m tools.bench.tracing [--size 512] [--neurites 100] [--repeat 2]

The volume holds synthetic neurites (hpc_neuro.data.synthetic) as a probability of 0.9 with a soft border. Every method
runs in a process of its own on the same file; memory is the peak of that process above what it held before it began
(Linux). Ours ends with rooted trees; thinning ends with voxels that are no tree yet; kimimaro ends with unrooted
skeletons of the connected pieces. kimimaro is optional (`pip install hpc_neuro[compare]`, GPL-3); without it, a line
says so. Last line: JSON with seconds, bytes, and the shares of cable within 4 voxels of the true and of the found one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.data.rasterize import paint_tree
from hpc_neuro.data.synthetic import TreeForm, grow_random_tree
from hpc_neuro.tracing import trace_reader

_VOXEL: VoxelSize = (0.33, 0.33, 0.33)  # [um]; a trunk is then 2 to 3 voxels thick
_NEAR = 4.0  # [voxel] of found cable
Points = NDArray[np.float64]


def main() -> None:
    """Run all methods."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--size", type=int, default=512, help="[voxel] edge of the volume")
    ask.add_argument("--neurites", type=int, default=100)
    ask.add_argument("--repeat", type=int, default=2, help="runs of each method, in turns; the fastest counts")
    ask.add_argument("--one", choices=tuple(METHODS), help=argparse.SUPPRESS)
    ask.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probability.npy"
        print(json.dumps(compared(file, args.size, args.neurites, args.repeat)))


def compared(file: Path, size: int, neurites: int, repeat: int) -> dict[str, Any]:
    """The table of all methods, printed, and its figures."""
    truth = write_volume(file, size, neurites)
    names = [name for name in METHODS if name != "kimimaro" or importlib.util.find_spec("kimimaro")]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            command = [sys.executable, "-m", "tools.bench.tracing", "--one", name, "--file", str(file)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    lit = int((np.load(file, mmap_mode="r") >= 128).sum())
    facts: dict[str, Any] = {"shape": [size] * 3, "neurites": neurites, "foreground": lit, "cable": round(len(truth))}
    print(
        f"{size}^3 voxels, {neurites} neurites of {len(truth):.0f} voxels of cable, {lit / 1e6:.2f} M foreground voxels"
    )
    for name in names:
        best = min(runs[name], key=lambda run: float(run["cpu_seconds"]))
        skeleton = np.load(file.with_name(f"{name}.npy"))
        recall = float(np.mean(np.asarray(cKDTree(skeleton).query(truth)[0]) <= _NEAR)) if len(skeleton) else 0.0
        precision = float(np.mean(np.asarray(cKDTree(truth).query(skeleton)[0]) <= _NEAR)) if len(skeleton) else 0.0
        facts[name] = {**best, "recall": round(recall, 4), "precision": round(precision, 4)}
        print(
            f"{name:>12}: {best['cpu_seconds']:6.1f} s of CPU, {best['seconds']:6.1f} s, "
            f"{best['peak_bytes'] / 1e6:7.0f} MB, {best['pieces']} pieces, recall {recall:.3f}, "
            f"precision {precision:.3f}"
        )
    if "kimimaro" not in names:
        print("    kimimaro: not installed; `pip install hpc_neuro[compare]` adds it")
    ours = facts["hpc_neuro"]
    for name in names[1:]:
        for key in ("cpu_seconds", "peak_bytes"):
            facts[f"{key}_to_{name}"] = round(ours[key] / max(facts[name][key], 1e-9), 3)
    return facts


def write_volume(file: Path, size: int, neurites: int) -> Points:
    """Write the probability [size, size, size] as uint8; samples of the true center lines, a voxel apart."""
    shape: Shape = (size, size, size)
    cfg = TreeForm(orders=0, soma=0.0)
    trees = [grow_random_tree(seed, shape, _VOXEL, cfg) for seed in range(neurites)]
    volume = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    for block in tile_volume(shape, (min(size, 128),) * 3):
        around = block.write.grow((4, 4, 4))
        values = np.zeros(block.write.shape, dtype=np.float32)
        for tree in trees:
            if np.all((tree.points >= around.start) & (tree.points < around.stop), axis=1).any():
                values = np.maximum(values, paint_tree(tree, np.full(len(tree), 0.9), block.write, _VOXEL))
        volume[block.write.slices] = np.rint(values * 255)
    volume.flush()
    return np.concatenate([morphology.resample_tree(tree, 1.0).points for tree in trees])


def one(name: str, file: Path) -> dict[str, Any]:
    """Time and peak memory of one method; writes what it found beside the file."""
    run = METHODS[name](file)  # imports what it needs
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _memory("VmRSS")
    begun, busy = time.perf_counter(), time.process_time()
    points, pieces = run()
    facts = {
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
        "peak_bytes": _memory("VmHWM") - before,
        "pieces": pieces,
    }
    np.save(file.with_name(f"{name}.npy"), points)
    return facts


def _memory(which: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


Run = Callable[[], tuple[Points, int]]


def _ours(file: Path) -> Run:
    whole = np.load(file, mmap_mode="r")
    (z, y, x), offset = whole.shape, whole.offset

    def read(box: Box) -> NDArray[np.uint8]:
        again = np.memmap(file, np.uint8, "r", offset, (z, y, x))  # mapped anew each time, so that no pages stay
        return np.array(again[box.slices])

    def run() -> tuple[Points, int]:
        trees = trace_reader(read, (z, y, x), _VOXEL)
        return np.concatenate([t.points for t in trees] or [np.zeros((0, 3))]), len(trees)

    return run


def _thinning(file: Path) -> Run:
    from skimage.morphology import skeletonize

    def run() -> tuple[Points, int]:
        skeleton = skeletonize(np.load(file) >= 128)
        return np.argwhere(skeleton).astype(np.float64), int(cc3d.connected_components(skeleton).max())

    return run


def _kimimaro(file: Path) -> Run:
    import kimimaro

    def run() -> tuple[Points, int]:
        labels = cc3d.connected_components(np.load(file) >= 128)
        skeletons = kimimaro.skeletonize(labels, anisotropy=(1, 1, 1), dust_threshold=12, progress=False, parallel=1)
        return np.concatenate([s.vertices for s in skeletons.values()]).astype(np.float64), len(skeletons)

    return run


METHODS: dict[str, Callable[[Path], Run]] = {
    "hpc_neuro": _ours,
    "scikit-image": _thinning,
    "kimimaro": _kimimaro,
}

if __name__ == "__main__":
    main()
