"""Time and memory of the metrics and of rasterising against the straightforward way.

    python -m tools.bench.metrics [--side 256] [--nodes 20000] [--volume 512] [--seconds 20]

- HD95 of two masks of side^3 voxels against MONAI, on solid blobs, on a neuron and its neighbour, and on two spheres
- ESA, DSA, PDS of two random trees against a plain double loop over samples and segments, timed on as many samples as
  `--seconds` allows and scaled up
- mask, skeleton, distance and tangent of a tree of nodes / 2 nodes in volume^3 voxels against a plain loop that asks,
  edge by edge, every voxel around it (timed on part of the edges and scaled up)

Both ways get the same input, and it is checked that they give the same answer (ESA: on smaller trees). Each runs in a
process of its own, which gives its peak memory above the input, and the best of up to three runs counts; CPU seconds
are what to look at on a busy machine. The last line is one JSON object.
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

_RUNS, _SECONDS = 3, 5.0  # the best of up to three runs, so long as five seconds have not passed

Masks = tuple[NDArray[np.bool_], NDArray[np.bool_]]
Timed = tuple[Any, float, float, int]  # answer, wall seconds, CPU seconds, peak bytes above the input


def main() -> None:
    """Run all benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--volume", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':34}{'ours s':>9}{'cpu s':>8}{'plain s':>10}{'cpu s':>9}{'ratio':>9}{'ours peak':>11}{'plain peak':>12}")
    for name, masks in {"blobs": _blobs, "neuron": _neurons, "spheres": _spheres}.items():
        _compare(rows, f"hd95_{name}", _ours_hd95, _monai_hd95, masks(args.side), 1e-5)
    trees = random_tree(args.nodes, 0), random_tree(args.nodes, 1)
    small = random_tree(80, 3), random_tree(80, 4)
    if not math.isclose(_ours_esa(*small, 0), _plain_esa(*small, math.inf)[0], rel_tol=1e-9):
        raise SystemExit("esa: ours differs from the double loop on small trees")
    _compare(rows, "esa", _ours_esa, _plain_esa, (*trees, args.seconds), None)
    drawn = _drawable(args.nodes // 2, args.volume)
    _compare(rows, "rasterize", _ours_raster, _plain_raster, (drawn, args.volume, args.seconds), None)
    print(json.dumps(rows))


def _compare(
    rows: dict[str, dict[str, float]],
    name: str,
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: tuple[Any, ...],
    tolerance: float | None,
) -> None:
    """Time both, check that they agree within `tolerance` (relative), print a line."""
    mine, other = _alone(ours, inputs), _alone(plain, inputs)
    scale = other[0][1] if isinstance(other[0], tuple) else 1.0
    answer = other[0][0] if isinstance(other[0], tuple) else other[0]
    if tolerance is not None and not math.isclose(mine[0], answer, rel_tol=tolerance, abs_tol=1e-9):
        raise SystemExit(f"{name}: ours gives {mine[0]}, the plain way {answer}")
    wall, cpu = other[1] * scale, other[2] * scale
    rows[name] = {
        "ours_s": mine[1],
        "ours_cpu_s": mine[2],
        "plain_s": wall,
        "plain_cpu_s": cpu,
        "ratio": mine[1] / wall,
        "cpu_ratio": mine[2] / cpu,
        "ours_peak_bytes": mine[3],
        "plain_peak_bytes": other[3],
        "plain_scaled_by": scale,
    }
    note = f"   plain scaled by {scale:.0f}" if scale > 1 else ""
    print(
        f"{name:34}{mine[1]:9.2f}{mine[2]:8.2f}{wall:10.2f}{cpu:9.2f}{mine[2] / cpu:9.4f}"
        f"{files.format_bytes(mine[3]):>11}{files.format_bytes(other[3]):>12}{note}",
        flush=True,
    )


def _alone(work: Callable[..., Any], inputs: tuple[Any, ...]) -> Timed:
    """Run in a forked process of its own: answer, wall and CPU seconds, peak memory above the input."""
    prepare = getattr(work, "prepare", None)
    inputs = (*inputs, prepare()) if prepare else inputs  # imports do not count
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(work, inputs, child))
    process.start()
    child.close()
    result: Timed = parent.recv()
    process.join()
    return result


def _measure(work: Callable[..., Any], inputs: tuple[Any, ...], pipe: Any) -> None:
    warnings.simplefilter("ignore")
    before, begun = _peak(), time.perf_counter()
    walls: list[float] = []
    cpus: list[float] = []
    while not walls or (len(walls) < _RUNS and time.perf_counter() - begun < _SECONDS):
        wall, cpu = time.perf_counter(), time.process_time()
        answer = work(*inputs)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    pipe.send((answer, min(walls), min(cpus), _peak() - before))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ours_hd95(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return voxel.hd95(a, b)


def _monai_hd95(a: NDArray[np.bool_], b: NDArray[np.bool_], tools: Any) -> float:
    torch, hausdorff = tools
    masks = [torch.from_numpy(m)[None, None] for m in (a, b)]
    return float(hausdorff(*masks, include_background=True, percentile=95))


def _import_monai() -> Any:
    import torch
    from monai.metrics import compute_hausdorff_distance

    torch.set_num_threads(1)
    return torch, compute_hausdorff_distance


_monai_hd95.prepare = _import_monai  # type: ignore[attr-defined]


def _ours_esa(a: Tree, b: Tree, seconds: float) -> float:
    return tree_metrics.distances(a, b)["esa"]


def _plain_esa(a: Tree, b: Tree, seconds: float) -> tuple[float, float]:
    """The double loop on evenly chosen samples of both directions, until the time is up; the answer and the scale."""
    means, scales = [], []
    for tree, other in ((a, b), (b, a)):
        samples = tree_metrics.sample_tree(tree)
        segments = [(p, q) for p, q in zip(*(other.points[other.edges[:, k]].tolist() for k in (0, 1)), strict=True)]
        order = np.random.default_rng(0).permutation(len(samples))
        found, begun = [], time.perf_counter()
        for index in order:
            point = samples[index].tolist()
            found.append(min(_to_segment(point, p, q) for p, q in segments))
            if time.perf_counter() - begun > seconds / 2:
                break
        means.append(sum(found) / len(found))
        scales.append(len(samples) / len(found))
    return sum(means) / 2, sum(scales) / 2


def _to_segment(p: list[float], a: list[float], b: list[float]) -> float:
    d = [b[k] - a[k] for k in range(3)]
    square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    t = 0.0
    if square:
        t = min(1.0, max(0.0, sum((p[k] - a[k]) * d[k] for k in range(3)) / square))
    return math.sqrt(sum((p[k] - a[k] - t * d[k]) ** 2 for k in range(3)))


def _ours_raster(tree: Tree, side: int, seconds: float) -> float:
    return float((rasterize(tree, Box.whole((side, side, side)), (1.0, 1.0, 1.0)).mask == 1).sum())


def _plain_raster(tree: Tree, side: int, seconds: float) -> tuple[float, float]:
    """Mask, distance and tangent edge by edge, each over all voxels within reach of the edge."""
    reach = 8.0
    mask = np.zeros((side, side, side), dtype=bool)
    distance = np.full(mask.shape, reach, dtype=np.float32)
    tangent = np.zeros((3, *mask.shape), dtype=np.float32)
    begun, done = time.perf_counter(), 0
    for child, parent in np.random.default_rng(0).permutation(tree.edges):
        a, b, ra, rb = tree.points[child], tree.points[parent], tree.radii[child], tree.radii[parent]
        along = b - a
        norm = math.sqrt(float(along @ along))
        low = np.maximum(np.floor(np.minimum(a, b) - reach), 0).astype(int)
        high = np.minimum(np.ceil(np.maximum(a, b) + reach) + 1, side).astype(int)
        for z in range(low[0], high[0]):
            for y in range(low[1], high[1]):
                for x in range(low[2], high[2]):
                    offset = (z - a[0], y - a[1], x - a[2])
                    t = sum(o * d for o, d in zip(offset, along, strict=True)) / (norm * norm) if norm else 0.0
                    t = min(1.0, max(0.0, t))
                    away = math.sqrt(sum((o - t * d) ** 2 for o, d in zip(offset, along, strict=True)))
                    mask[z, y, x] |= away <= ra + t * (rb - ra)
                    if away < distance[z, y, x] and norm:
                        distance[z, y, x] = away
                        tangent[:, z, y, x] = along / norm
        done += 1
        if time.perf_counter() - begun > seconds:
            break
    return float(mask.sum()), len(tree.edges) / done


def random_tree(nodes: int, seed: int, step: float = 2.5) -> Tree:
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


def _drawable(nodes: int, side: int) -> Tree:
    """A random tree brought into a cube."""
    tree = random_tree(nodes, 2)
    low, high = tree.points.min(axis=0), tree.points.max(axis=0)
    points = (tree.points - low) / (high - low).max() * (side - 20) + 10
    return Tree(points, tree.radii, tree.parents, tree.types)


def _blobs(side: int) -> Masks:
    a, b = (
        ndimage.gaussian_filter(np.random.default_rng(s).normal(size=(side,) * 3).astype(np.float32), 4.0)
        for s in (0, 1)
    )
    return a > 0, a + 0.3 * b > 0


def _neurons(side: int) -> Masks:
    tree = _drawable(1000, side)
    near = Tree(tree.points + np.array([0.5, 1.5, 0.0]), tree.radii, tree.parents, tree.types)
    a, b = (rasterize(t, Box.whole((side, side, side)), (1.0, 1.0, 1.0)).mask == 1 for t in (tree, near))
    return a, b


def _spheres(side: int) -> Masks:
    z, y, x = np.ogrid[:side, :side, :side]
    middle = side / 2

    def ball(cy: float, r: float) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = (z - middle) ** 2 + (y - cy) ** 2 + (x - middle) ** 2 < r * r
        return inside

    return ball(middle, 0.4 * side), ball(middle * 1.02, 0.37 * side)


if __name__ == "__main__":
    main()
