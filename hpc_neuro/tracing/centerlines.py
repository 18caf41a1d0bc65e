"""Centred paths through a foreground, longest first (in the manner of TEASAR, Sato et al. 2000).

One run of Dijkstra's algorithm from a source in every component gives each voxel its way home. The way is cheap where
the probability is high and the border far, so it runs along the middle. The farthest voxel that no path explains yet is
the next tip; its way home, up to the tree so far, is the next path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import dijkstra

from hpc_neuro.tracing.branch_test import Traced, flanks, strength
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.voxel_graph import Floats, Foreground, Ints, accumulated, cost

_CHUNK = 4096
_OWN = 0.25  # of the reach: so much of its own thickness must lie within it too


@dataclass(frozen=True)
class Skeleton:
    """Centre lines of all components, as voxels of the foreground."""

    way: Ints  # [N] next voxel on the way to the component's source; a source points to itself
    on_tree: NDArray[np.bool_]  # [N] voxels that lie on a path


def skeleton(found: Foreground, sources: Ints, cfg: TraceConfig, must: Sequence[int] = ()) -> Skeleton:
    """Paths from `sources` (one voxel per component) to all tips and to `must`. A component has one path at least."""
    way, length = ways(found, sources, cost(found.distance, found.probability))
    covered = np.zeros(len(way), dtype=bool)
    on_tree = np.zeros(len(way), dtype=bool)
    on_tree[sources] = True
    empty = np.ones(found.components, dtype=bool)
    reach = cfg.cover_scale * found.distance + cfg.cover_margin
    traced = Traced(found.components)
    for tip in must:
        path = _to_tree(tip, way, on_tree)
        if len(path) > 1:
            empty[found.component[tip]] = False
            on_tree[path] = True
            traced.add(int(found.component[tip]), found.points[path], path)
            _cover(covered, found, path, length, reach)
    order = np.argsort(-length, kind="stable")
    for begin in range(0, len(order), _CHUNK):
        chunk = order[begin : begin + _CHUNK]
        while len(chunk := chunk[~covered[chunk]]):
            path = _to_tree(int(chunk[0]), way, on_tree)
            component = int(found.component[path[0]])
            outside = length[path] - length[path[-1]] > found.distance[path[-1]]
            if empty[component] or strength(found, traced, path, outside, cfg) >= cfg.min_branch:
                empty[component] = False
                on_tree[path] = True
                traced.add(component, found.points[path], path)
            _cover(covered, found, path, length, reach)
    return Skeleton(way, on_tree)


def far_ends(found: Foreground) -> tuple[Ints, Floats]:
    """One end of every component, the voxel farthest from an arbitrary one of it, and how far that is."""
    _, starts = np.unique(found.component, return_index=True)
    _, length = ways(found, starts, np.ones(len(found.voxels)))
    order = np.lexsort((length, found.component))
    ends = order[np.searchsorted(found.component[order], np.arange(found.components), side="right") - 1]
    return ends, length[ends]


def ways(found: Foreground, sources: Ints, price: Floats) -> tuple[Ints, Floats]:
    """[N] next voxel on the cheapest way to a source, and [N] the way's length (not its price)."""
    a, b = found.pairs.T
    graph = found.graph(found.step * (price[a] + price[b]) / 2)
    _, before, _ = dijkstra(graph, directed=False, indices=sources, min_only=True, return_predecessors=True)
    way: Ints = np.asarray(before, dtype=np.int64)
    way[sources] = sources
    return way, accumulated(np.linalg.norm(found.points - found.points[way], axis=1), way)


def _to_tree(tip: int, way: Ints, on_tree: NDArray[np.bool_]) -> Ints:
    path = [tip]
    while not on_tree[path[-1]]:
        path.append(int(way[path[-1]]))
    return np.array(path, dtype=np.int64)


def _cover(covered: NDArray[np.bool_], found: Foreground, path: Ints, length: Floats, reach: Floats) -> None:
    """Mark what lies within reach of the path with all of its own thickness, and hangs together with it.

    Balls a third of a radius apart leave no notch worth a branch.
    """
    step = np.diff(length[path], prepend=length[path[0]])
    balls = np.floor(np.cumsum(np.abs(step) / (reach[path] / 3)))
    chosen = path[np.append(np.flatnonzero(np.diff(balls, prepend=-1)), len(path) - 1)]
    beside, wide = flanks(found, path, reach)
    component = found.component[path[0]]
    for centres, radii, own in ((found.points[chosen], reach[chosen], _OWN), (beside, wide, 0.0)):
        for centre, radius, ball in zip(centres, radii, found.near.query_ball_point(centres, radii), strict=True):
            inside = np.array(ball, dtype=np.int64)
            inside = inside[found.component[inside] == component]
            away = np.linalg.norm(found.points[inside] - centre, axis=1)
            covered[inside[away + np.minimum(found.thickness[inside], own * radius) <= radius]] = True
    covered[path] = True
