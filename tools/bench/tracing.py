"""What tracing costs, against thinning (scikit-image) and TEASAR (kimimaro), side by side in one run.

    python -m tools.bench.tracing [--size 512] [--neurites 100] [--repeat 2]

The volume holds synthetic neurites (hpc_neuro.data.synthetic) as a probability of 0.9 with a soft border. Every method
runs in a process of its own on the same file; memory is the peak of that process above what it held before it began
(Linux). Ours ends with rooted trees; thinning ends with voxels that are no tree yet; kimimaro ends with unrooted
skeletons of the connected pieces. kimimaro is optional (`pip install hpc_neuro[compare]`, GPL-3); without it, a line
says so. Last line: JSON with seconds, bytes, recall (true cable within 4 voxels of the traced one) and precision.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from tools.bench.process_memory import read_memory, read_peak_memory, reset_peak_memory

_VOXEL: VoxelSize = (0.33, 0.33, 0.33)
"""[um] A trunk is then 2 to 3 voxels thick."""
_TOLERANCE = 4.0
"""[voxel] Of matched cable."""
Points = NDArray[np.float64]
Run = Callable[[], tuple[Points, int]]
"""A method that has read what it needs: points [N, 3] of the cable in voxels, and the number of pieces."""


def main() -> None:
    """Run all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="[voxel] edge of the volume")
    parser.add_argument("--neurites", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each method, in turns; the fastest counts")
    parser.add_argument("--one", choices=tuple(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.one:
        print(json.dumps(measure_method(args.one, args.file)))
        return

    with tempfile.TemporaryDirectory() as folder:
        facts = compare_methods(Path(folder) / "probability.npy", args.size, args.neurites, args.repeat)
    print("\n".join(describe(facts)))
    print(json.dumps(facts))


def compare_methods(file: Path, size: int, neurites: int, repeat: int) -> dict[str, Any]:
    """The figures of all methods on one volume, which is written to `file`."""
    truth = write_volume(file, size, neurites)
    names = [name for name in METHODS if name != "kimimaro" or importlib.util.find_spec("kimimaro")]

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            command = [sys.executable, "-m", "tools.bench.tracing", "--one", name, "--file", str(file)]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(process.stdout.splitlines()[-1]))

    foreground = int((np.load(file, mmap_mode="r") >= 128).sum())
    facts: dict[str, Any] = {"shape": [size] * 3, "neurites": neurites}
    facts |= {"foreground": foreground, "cable": round(len(truth))}
    for name in names:
        best = min(runs[name], key=lambda run: float(run["cpu_seconds"]))
        points = np.load(file.with_name(f"{name}.npy"))
        facts[name] = {**best, "recall": share_near(truth, points), "precision": share_near(points, truth)}

    ours = facts["hpc_neuro"]
    for name in names[1:]:
        for key in ("cpu_seconds", "peak_bytes"):
            facts[f"{key}_to_{name}"] = round(ours[key] / max(facts[name][key], 1e-9), 3)
    return facts


def share_near(points: Points, others: Points) -> float:
    """The share of points within the tolerance of others; 0 where either is empty."""
    if not len(points) or not len(others):
        return 0.0
    distances = np.asarray(cKDTree(others).query(points)[0])
    return round(float(np.mean(distances <= _TOLERANCE)), 4)


def describe(facts: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    size, cable, foreground = facts["shape"][0], facts["cable"], facts["foreground"] / 1e6
    yield (
        f"{size}^3 voxels, {facts['neurites']} neurites of {cable} voxels of cable, "
        f"{foreground:.2f} M foreground voxels"
    )
    for name in METHODS:
        if name in facts:
            row = facts[name]
            yield (
                f"{name:>12}: {row['cpu_seconds']:6.1f} s of CPU, {row['seconds']:6.1f} s, "
                f"{row['peak_bytes'] / 1e6:7.0f} MB, {row['pieces']} pieces, recall {row['recall']:.3f}, "
                f"precision {row['precision']:.3f}"
            )
    if "kimimaro" not in facts:
        yield "    kimimaro: not installed; `pip install hpc_neuro[compare]` adds it"


def write_volume(file: Path, size: int, neurites: int) -> Points:
    """Write the probability [size, size, size] as uint8; samples of the true centerlines, a voxel apart."""
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


def measure_method(name: str, file: Path) -> dict[str, Any]:
    """Time and peak memory of one method; writes its points beside the file."""
    # Imports, which memory does not count.
    run = METHODS[name](file)
    reset_peak_memory()
    before = read_memory()

    start, start_cpu = time.perf_counter(), time.process_time()
    points, pieces = run()
    facts = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - start_cpu, 2),
        "peak_bytes": read_peak_memory() - before,
        "pieces": pieces,
    }
    np.save(file.with_name(f"{name}.npy"), points)
    return facts


def prepare_trace(file: Path) -> Run:
    """Our tracer, which reads the file in blocks."""
    whole = np.load(file, mmap_mode="r")
    (z, y, x), offset = whole.shape, whole.offset

    def read(box: Box) -> NDArray[np.uint8]:
        # Mapped anew each time, so that no pages stay.
        volume = np.memmap(file, np.uint8, "r", offset, (z, y, x))
        return np.array(volume[box.slices])

    def run() -> tuple[Points, int]:
        trees = trace_reader(read, (z, y, x), _VOXEL)
        return np.concatenate([t.points for t in trees] or [np.zeros((0, 3))]), len(trees)

    return run


def prepare_thinning(file: Path) -> Run:
    """Thinning by scikit-image."""
    from skimage.morphology import skeletonize

    def run() -> tuple[Points, int]:
        skeleton = skeletonize(np.load(file) >= 128)
        return np.argwhere(skeleton).astype(np.float64), int(cc3d.connected_components(skeleton).max())

    return run


def prepare_kimimaro(file: Path) -> Run:
    """TEASAR by kimimaro."""
    import kimimaro

    def run() -> tuple[Points, int]:
        labels = cc3d.connected_components(np.load(file) >= 128)
        skeletons = kimimaro.skeletonize(labels, anisotropy=(1, 1, 1), dust_threshold=12, progress=False, parallel=1)
        return np.concatenate([s.vertices for s in skeletons.values()]).astype(np.float64), len(skeletons)

    return run


METHODS: dict[str, Callable[[Path], Run]] = {
    "hpc_neuro": prepare_trace,
    "scikit-image": prepare_thinning,
    "kimimaro": prepare_kimimaro,
}

if __name__ == "__main__":
    main()
