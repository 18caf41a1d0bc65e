"""Whether a path is a branch of its own, or only a bump, a slope or a flank of the branch it springs from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from scipy.spatial import cKDTree

from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.voxel_graph import Floats, Foreground, Ints

_RAYS = 8  # directions round a path, in opposite pairs
_DROP = 0.3  # a probability this share lower beside the path than on it makes the path a ridge
_STRETCH = 4  # [nodes] to either side, for a path's direction
_WIDEST = 4  # a flat cross section is followed to this many times the reach
_AT_ONCE = 256  # nodes of a path that are looked at together, so that memory does not follow its length
_WINDOW = 21  # [nodes] more than a side branch is wide


class Traced:
    """The paths accepted so far, searchable by position."""

    def __init__(self, components: int) -> None:
        self._trees: list[list[cKDTree]] = [[] for _ in range(components)]
        self._nodes: list[list[Ints]] = [[] for _ in range(components)]

    def add(self, component: int, points: Floats, nodes: Ints) -> None:
        """Remember a path of a component: positions [n, 3] and voxel indices [n]."""
        self._trees[component].append(cKDTree(points))
        self._nodes[component].append(nodes)

    def nearest(self, component: int, points: Floats) -> tuple[Floats, Ints]:
        """Distance to, and voxel index of, the nearest path voxel of a component for each of [n, 3] points."""
        best, index = np.full(len(points), np.inf), np.zeros(len(points), dtype=np.int64)
        trees, nodes = self._trees[component], self._nodes[component]
        if not trees:
            return best, index
        lows, highs = np.array([t.mins for t in trees]), np.array([t.maxes for t in trees])
        beyond = np.maximum(0, np.maximum(lows - points.max(axis=0), points.min(axis=0) - highs))
        apart = np.linalg.norm(beyond, axis=1)  # no point of a path is nearer to any of these points
        for which in np.argsort(apart, kind="stable"):
            near = np.flatnonzero(apart[which] < best)
            if not len(near):
                break
            found, at = (np.atleast_1d(v) for v in trees[which].query(points[near]))
            closer = found < best[near]
            best[near[closer]], index[near[closer]] = found[closer], nodes[which][at[closer]]
        return best, index


def strength(found: Foreground, traced: Traced, path: Ints, outside: NDArray[np.bool_], cfg: TraceConfig) -> float:
    """Length of a path (tip first, joint last) that speaks for a branch of its own, in the metric's unit.

    Each step counts its length times
    - its probability, from 0 at `floor` to 1 at `threshold`;
    - how much of a ridge it is: in every direction across the path, the probability must fall off on one side at least.
      The slope beside a thick branch fails, for it is level along that branch;
    - 1 where darker voxels lie between it and the nearest traced path, else only by how much it leads away from it: a
      second path along the same thick branch fails.
    """
    points = found.points[path]
    away, nearest = traced.nearest(int(found.component[path[0]]), points)
    step = np.linalg.norm(np.diff(points, axis=0), axis=1)
    growth = np.clip(away[:-1] - away[1:], 0, None)
    apart = _gap_between(found, path, nearest)[:-1]
    certain = np.clip((found.probability[path[:-1]] - cfg.floor) / max(cfg.threshold - cfg.floor, 1e-6), 0, 1)
    ridge = _ridge(found, path)[:-1]
    return float((np.where(apart, step, np.minimum(growth, step)) * certain * ridge)[outside[:-1]].sum())


def _gap_between(found: Foreground, path: Ints, nearest: Ints) -> NDArray[np.bool_]:
    """[n] whether the straight line from a path voxel to the traced voxel nearest to it dips."""
    share = np.linspace(0, 1, 12)[1:-1, None]
    a, b = found.voxels[path].astype(np.float64), found.voxels[nearest].astype(np.float64)
    line = a[:, None] * (1 - share) + b[:, None] * share  # [n, 10, 3]
    values = found.at(line.reshape(-1, 3)).reshape(len(path), -1)
    ends = np.minimum(found.probability[path], found.probability[nearest])
    return np.asarray(values.min(axis=1) < (1 - _DROP) * ends)


def _ridge(found: Foreground, path: Ints) -> Floats:
    """[n] 0 to 1: fall-off of the probability across the path, in the direction where it falls off least."""
    rays = _across(found.points[path])
    reach = 1.5 * found.distance[path] + 1.5
    beside = _along_rays(found, path, rays, reach[:, None] * np.linspace(0.25, 1, 5)).min(axis=2)
    lower = np.minimum(beside[:, : _RAYS // 2], beside[:, _RAYS // 2 :]).max(axis=1)
    return np.asarray(np.clip((1 - lower / found.probability[path]) / _DROP, 0, 1))


def flanks(found: Foreground, path: Ints, reach: Floats) -> tuple[Floats, Floats]:
    """Places [M, 3] beside a path, and a radius for each, that cover its cross section where that is wide and flat.

    Along rays across the path, as far as the probability does not dip; the median over a stretch of path leaves real
    side branches out.
    """
    rays = _across(found.points[path])
    share = np.linspace(0.25, _WIDEST, 4 * _WIDEST)
    values = _along_rays(found, path, rays, reach[path][:, None] * share)
    inside = np.logical_and.accumulate(values >= (1 - _DROP) * found.probability[path][:, None, None], axis=2)
    window = min(_WINDOW, len(path))
    wide = median_filter(inside.sum(axis=2), size=(window, 1), mode="nearest")  # [n, rays] quarters of the reach
    node, ray = np.nonzero(wide >= 5)
    if not len(node):
        return np.zeros((0, 3)), np.zeros(0)
    steps = wide[node, ray] // 2 - 1  # balls half a reach apart, the last one just inside
    node, ray = np.repeat(node, steps), np.repeat(ray, steps)
    place = np.arange(len(node)) - np.repeat(np.cumsum(steps) - steps, steps) + 1
    radius = reach[path][node]
    return found.points[path][node] + rays[node, ray] * (radius * place / 2)[:, None], radius


def _across(points: Floats) -> Floats:
    """[n, rays, 3] unit vectors orthogonal to a path; the second half are the opposites of the first."""
    n = len(points)
    ahead = points[np.minimum(np.arange(n) + _STRETCH, n - 1)]
    along = ahead - points[np.maximum(np.arange(n) - _STRETCH, 0)]
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    first = np.cross(along, np.eye(3)[np.abs(along).argmin(axis=1)])
    first /= np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-9)
    second = np.cross(along, first)
    angle = 2 * np.pi * np.arange(_RAYS) / _RAYS
    return np.asarray(first[:, None] * np.cos(angle)[:, None] + second[:, None] * np.sin(angle)[:, None])


def _along_rays(found: Foreground, path: Ints, rays: Floats, distances: Floats) -> NDArray[np.float32]:
    """[n, rays, steps] probability at `distances` [n, steps] from the path's voxels."""
    points, values = found.points[path], np.empty((*rays.shape[:2], distances.shape[1]), dtype=np.float32)
    for some in (slice(i, i + _AT_ONCE) for i in range(0, len(path), _AT_ONCE)):
        at = points[some][:, None, None] + rays[some, :, None] * distances[some, None, :, None]
        values[some] = found.at((at / found.spacing).reshape(-1, 3)).reshape(at.shape[:3])
    return values
