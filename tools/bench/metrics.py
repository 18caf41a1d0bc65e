"""Time and memory of the metrics and of rasterizing compared with straightforward implementations.

    python -m tools.bench.metrics [--side 256] [--nodes 20000] [--volume 512] [--seconds 20]

- HD95 of two masks of side^3 voxels against MONAI, on solid blobs, on a neuron and its neighbor, and on two spheres
- ESA, DSA, PDS of two random trees against a plain double loop over samples and segments, timed on as many samples as
  `--seconds` allows and scaled up
- mask, skeleton, distance and tangent of a tree of nodes / 2 nodes in volume^3 voxels against a plain loop over the
  edges and all voxels around each (timed on part of the edges and scaled up)

Both implementations get the same input, and the benchmark checks that their results agree (ESA: on smaller trees).
Each runs in a process of its own, whose peak memory above the input is reported, and the best of up to three runs
counts. Compare CPU seconds on a busy machine. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.rasterize import rasterize
from hpc_neuro.metrics import tree as tree_metrics
from hpc_neuro.metrics import voxel

_MAX_RUNS = 3
_MAX_SECONDS = 5.0
"""[s] No further run begins after this time."""
_REACH = 8.0
"""[voxel] Distance around an edge within which the plain rasterizer looks at every voxel."""

Masks = tuple[NDArray[np.bool_], NDArray[np.bool_]]


@dataclass(frozen=True)
class Measurement:
    """One implementation on one input."""

    result: float
    wall_s: float
    cpu_s: float
    peak_bytes: int
    """Peak memory above the input."""
    scale: float = 1.0
    """How much larger the whole input is than the measured part; the times are scaled by it."""


def main() -> None:
    """Run all benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--volume", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()

    print(f"{'':34}{'ours s':>9}{'cpu s':>8}{'plain s':>10}{'cpu s':>9}{'ratio':>9}{'ours peak':>11}{'plain peak':>12}")
    rows: dict[str, dict[str, float]] = {}
    for name, make_masks in {"blobs": make_blobs, "neuron": make_neurons, "spheres": make_spheres}.items():
        rows[f"hd95_{name}"] = compare_implementations(
            f"hd95_{name}", measure_hd95, measure_hd95_by_monai, make_masks(args.side), 1e-5
        )

    # The double loop sees only part of the large trees, so the results are compared on small ones.
    small = grow_tree(80, 3), grow_tree(80, 4)
    if not math.isclose(measure_esa(*small, 0), measure_esa_by_loop(*small, math.inf)[0], rel_tol=1e-9):
        raise SystemExit("esa: ours differs from the double loop on small trees")
    trees = grow_tree(args.nodes, 0), grow_tree(args.nodes, 1)
    rows["esa"] = compare_implementations("esa", measure_esa, measure_esa_by_loop, (*trees, args.seconds), None)

    tree = fit_tree(args.nodes // 2, args.volume)
    rows["rasterize"] = compare_implementations(
        "rasterize", rasterize_tree, rasterize_by_edge, (tree, args.volume, args.seconds), None
    )
    print(json.dumps(rows))


def compare_implementations(
    name: str,
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: tuple[Any, ...],
    tolerance: float | None,
) -> dict[str, float]:
    """Measure both, check that they agree within `tolerance` (relative; None: no check), print a line."""
    first, second = measure_alone(ours, inputs), measure_alone(plain, inputs)
    if tolerance is not None and not math.isclose(first.result, second.result, rel_tol=tolerance, abs_tol=1e-9):
        raise SystemExit(f"{name}: ours gives {first.result}, the plain implementation {second.result}")

    note = f"   plain scaled by {second.scale:.0f}" if second.scale > 1 else ""
    print(
        f"{name:34}{first.wall_s:9.2f}{first.cpu_s:8.2f}{second.wall_s:10.2f}{second.cpu_s:9.2f}"
        f"{first.cpu_s / second.cpu_s:9.4f}"
        f"{files.format_bytes(first.peak_bytes):>11}{files.format_bytes(second.peak_bytes):>12}{note}",
        flush=True,
    )

    return {
        "ours_s": first.wall_s,
        "ours_cpu_s": first.cpu_s,
        "plain_s": second.wall_s,
        "plain_cpu_s": second.cpu_s,
        "ratio": first.wall_s / second.wall_s,
        "cpu_ratio": first.cpu_s / second.cpu_s,
        "ours_peak_bytes": first.peak_bytes,
        "plain_peak_bytes": second.peak_bytes,
        "plain_scaled_by": second.scale,
    }


def measure_alone(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Measurement:
    """Measure a function in a forked process of its own."""
    # Imports of the competitor count neither as time nor as memory.
    prepare = getattr(function, "prepare", None)
    inputs = (*inputs, prepare()) if prepare else inputs

    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(function, inputs, child))
    process.start()
    child.close()
    measurement: Measurement = parent.recv()
    process.join()

    return measurement


def _measure(function: Callable[..., Any], inputs: tuple[Any, ...], pipe: Any) -> None:
    """Send the best of up to three runs; a function that returns a pair says with the second by how much to scale."""
    warnings.simplefilter("ignore")
    peak_before, begin = _read_peak(), time.perf_counter()
    walls: list[float] = []
    cpus: list[float] = []
    while not walls or (len(walls) < _MAX_RUNS and time.perf_counter() - begin < _MAX_SECONDS):
        start, start_cpu = time.perf_counter(), time.process_time()
        output = function(*inputs)
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - start_cpu)

    result, scale = output if isinstance(output, tuple) else (output, 1.0)
    pipe.send(Measurement(result, min(walls) * scale, min(cpus) * scale, _read_peak() - peak_before, scale))


def _read_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_hd95(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """HD95 in voxels."""
    return voxel.hd95(a, b)


def measure_hd95_by_monai(a: NDArray[np.bool_], b: NDArray[np.bool_], modules: Any) -> float:
    """HD95 in voxels by MONAI."""
    torch, hausdorff = modules
    masks = [torch.from_numpy(m)[None, None] for m in (a, b)]
    return float(hausdorff(*masks, include_background=True, percentile=95))


def _import_monai() -> Any:
    import torch
    from monai.metrics import compute_hausdorff_distance

    torch.set_num_threads(1)
    return torch, compute_hausdorff_distance


measure_hd95_by_monai.prepare = _import_monai  # type: ignore[attr-defined]


def measure_esa(a: Tree, b: Tree, seconds: float) -> float:
    """ESA; `seconds` is not used."""
    return tree_metrics.distances(a, b)["esa"]


def measure_esa_by_loop(a: Tree, b: Tree, seconds: float) -> tuple[float, float]:
    """ESA by the double loop on random samples of both directions until the time is over, and the scale."""
    means, scales = [], []
    for tree, other in ((a, b), (b, a)):
        samples = tree_metrics.sample_tree(tree)
        child, parent = (other.points[other.edges[:, k]].tolist() for k in (0, 1))
        segments = list(zip(child, parent, strict=True))

        distances = []
        start = time.perf_counter()
        for index in np.random.default_rng(0).permutation(len(samples)):
            point = samples[index].tolist()
            distances.append(min(_measure_to_segment(point, p, q) for p, q in segments))
            if time.perf_counter() - start > seconds / 2:
                break
        means.append(sum(distances) / len(distances))
        scales.append(len(samples) / len(distances))

    return sum(means) / 2, sum(scales) / 2


def _measure_to_segment(p: list[float], a: list[float], b: list[float]) -> float:
    d = [b[k] - a[k] for k in range(3)]
    square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    t = 0.0
    if square:
        t = min(1.0, max(0.0, sum((p[k] - a[k]) * d[k] for k in range(3)) / square))

    return math.sqrt(sum((p[k] - a[k] - t * d[k]) ** 2 for k in range(3)))


def rasterize_tree(tree: Tree, side: int, seconds: float) -> float:
    """Foreground voxels of a tree in a cube; `seconds` is not used."""
    return float((rasterize(tree, Box.whole((side, side, side)), (1.0, 1.0, 1.0)).mask == 1).sum())


def rasterize_by_edge(tree: Tree, side: int, seconds: float) -> tuple[float, float]:
    """Mask, distance and tangent edge by edge in random order, until the time is over; foreground and the scale."""
    mask = np.zeros((side, side, side), dtype=bool)
    distance = np.full(mask.shape, _REACH, dtype=np.float32)
    tangent = np.zeros((3, *mask.shape), dtype=np.float32)

    start, drawn_edges = time.perf_counter(), 0
    for child, parent in np.random.default_rng(0).permutation(tree.edges):
        _draw_edge(tree, child, parent, mask, distance, tangent)
        drawn_edges += 1
        if time.perf_counter() - start > seconds:
            break

    return float(mask.sum()), len(tree.edges) / drawn_edges


def _draw_edge(
    tree: Tree,
    child: int,
    parent: int,
    mask: NDArray[np.bool_],
    distance: NDArray[np.float32],
    tangent: NDArray[np.float32],
) -> None:
    """Update the three arrays at every voxel within reach of an edge."""
    a, b, radius_a, radius_b = tree.points[child], tree.points[parent], tree.radii[child], tree.radii[parent]
    along = b - a
    norm = math.sqrt(float(along @ along))

    low = np.maximum(np.floor(np.minimum(a, b) - _REACH), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(a, b) + _REACH) + 1, len(mask)).astype(int)
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            for x in range(low[2], high[2]):
                offset = (z - a[0], y - a[1], x - a[2])
                t = sum(o * d for o, d in zip(offset, along, strict=True)) / (norm * norm) if norm else 0.0
                t = min(1.0, max(0.0, t))
                away = math.sqrt(sum((o - t * d) ** 2 for o, d in zip(offset, along, strict=True)))
                mask[z, y, x] |= away <= radius_a + t * (radius_b - radius_a)
                if away < distance[z, y, x] and norm:
                    distance[z, y, x] = away
                    tangent[:, z, y, x] = along / norm


def grow_tree(nodes: int, seed: int, step: float = 2.5) -> Tree:
    """A branching random walk."""
    rng = np.random.default_rng(seed)
    parents, points = np.full(nodes, -1), np.zeros((nodes, 3))

    heading = rng.normal(size=3)
    for i in range(1, nodes):
        parents[i] = i - 1 if rng.random() > 0.02 else rng.integers(0, i)
        if parents[i] != i - 1:
            heading = rng.normal(size=3)

        heading = heading + rng.normal(size=3) * 0.3
        heading /= np.linalg.norm(heading)
        points[i] = points[parents[i]] + heading * step

    return morphology.build_tree(points, parents, radii=2.0)


def fit_tree(nodes: int, side: int) -> Tree:
    """A random tree scaled into a cube."""
    tree = grow_tree(nodes, 2)
    low, high = tree.points.min(axis=0), tree.points.max(axis=0)
    points = (tree.points - low) / (high - low).max() * (side - 20) + 10
    return Tree(points, tree.radii, tree.parents, tree.types)


def make_blobs(side: int) -> Masks:
    """Two solid random masks, the second about half like the first."""
    a, b = (
        ndimage.gaussian_filter(np.random.default_rng(s).normal(size=(side,) * 3).astype(np.float32), 4.0)
        for s in (0, 1)
    )
    return a > 0, a + 0.3 * b > 0


def make_neurons(side: int) -> Masks:
    """A random tree and its shifted copy."""
    tree = fit_tree(1000, side)
    shifted = Tree(tree.points + np.array([0.5, 1.5, 0.0]), tree.radii, tree.parents, tree.types)
    a, b = (rasterize(t, Box.whole((side, side, side)), (1.0, 1.0, 1.0)).mask == 1 for t in (tree, shifted))
    return a, b


def make_spheres(side: int) -> Masks:
    """Two spheres that nearly coincide."""
    return _make_ball(side, 0.5 * side, 0.4 * side), _make_ball(side, 0.51 * side, 0.37 * side)


def _make_ball(side: int, center_y: float, radius: float) -> NDArray[np.bool_]:
    z, y, x = np.ogrid[:side, :side, :side]
    inside: NDArray[np.bool_] = (z - side / 2) ** 2 + (y - center_y) ** 2 + (x - side / 2) ** 2 < radius * radius
    return inside


if __name__ == "__main__":
    main()
