"""Tell a branch of its own from a bump, a slope or a flank of the branch it springs from."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from scipy.spatial import cKDTree

from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.probability import Bools, Floats, Ints
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_RAYS = 8
"""Directions across a path, in opposite pairs."""
_DROP = 0.3
"""Share by which the probability beside a path must be lower than on it for the path to be a ridge."""
_STRETCH = 4
"""[nodes] To either side of a node, for the direction of its path."""
_WIDEST = 4
"""[reach] Up to where a flat cross section is followed."""
_WINDOW = 21
"""[nodes] Window of the median along a path; wider than a side branch is thick."""
_NODES_AT_ONCE = 512
"""Nodes whose surroundings are sampled together, so that memory does not follow the length of paths."""
_PATH_CELL = 32.0
"""[voxel] Edge of the cells in which the accepted paths of a component are looked up."""
_LINE_SAMPLES = 10
"""Samples on the straight line between a node and the nearest accepted path."""


@dataclass(frozen=True)
class PathBatch:
    """P paths of voxels, each from its tip to its joint with the tree, one after the other."""

    nodes: Ints
    """[n] voxels of all paths."""
    starts: Ints
    """[P + 1] where each path begins in `nodes`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """[P] nodes of each path."""
        return np.diff(self.starts)

    @property
    def tips(self) -> Ints:
        """[P] first voxel of each path."""
        return self.nodes[self.starts[:-1]]

    @property
    def joints(self) -> Ints:
        """[P] last voxel of each path."""
        return self.nodes[self.starts[1:] - 1]

    @property
    def path_of_node(self) -> Ints:
        """[n] number of each node's path."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def steps(self) -> Ints:
        """[n - P] the places in `nodes` of all nodes but the joints; each is followed by the next node of its path."""
        is_step = np.ones(len(self.nodes), dtype=bool)
        is_step[self.starts[1:] - 1] = False
        return np.flatnonzero(is_step)

    def __iter__(self) -> Iterator[Ints]:
        """The voxels of each path."""
        return iter(np.split(self.nodes, self.starts[1:-1]))

    def select(self, paths: Ints) -> PathBatch:
        """The batch of some of the paths."""
        lengths = self.lengths[paths]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        offset = np.repeat(self.starts[paths] - starts[:-1], lengths)

        return PathBatch(self.nodes[np.arange(starts[-1]) + offset], starts)

    def group_by_length(self) -> Iterator[tuple[Ints, Ints]]:
        """For each length L that occurs: [p] the paths of that length, and [p, L] the places of their nodes."""
        lengths = self.lengths
        order = np.argsort(lengths, kind="stable")
        for paths in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
            yield paths, self.starts[paths][:, None] + np.arange(lengths[paths[0]])


class AcceptedPaths:
    """The accepted paths of each component, searchable by position."""

    def __init__(self, graph: VoxelGraph) -> None:
        self._graph = graph
        # Search trees are built when they are needed: most components have one path and are never searched.
        self._pending: defaultdict[int, list[Ints]] = defaultdict(list)
        self._paths: defaultdict[int, _ComponentPaths] = defaultdict(_ComponentPaths)

    def add(self, path: Ints) -> None:
        """Remember a path, given as voxels [n]."""
        self._pending[int(self._graph.component[path[0]])].append(path)

    def find_nearest(self, path: Ints) -> tuple[Floats, Ints]:
        """[n] distance to the nearest accepted voxel of the component, and [n] that voxel, for each of [n] voxels.

        The last voxel of `path` is that of an accepted path, or the component has none; then the distance is infinite.
        """
        component, points = int(self._graph.component[path[0]]), self._graph.points[path]
        distance, nearest = np.full(len(path), np.inf), np.zeros(len(path), dtype=np.int64)

        paths = self._paths[component]
        for nodes in self._pending.pop(component, []):
            paths.add(nodes, self._graph.points[nodes])
        if not paths.kdtrees:
            return distance, nearest

        # No voxel of a path is nearer than its bounding box.
        numbers = paths.list_near(points)
        beyond = np.maximum(paths.low[numbers] - points.max(axis=0), points.min(axis=0) - paths.high[numbers])
        least = np.linalg.norm(np.maximum(0, beyond), axis=1)

        # The nearest boxes come first, so that most of the others are ruled out by their boxes alone.
        order = np.argsort(least, kind="stable")
        for number, bound in zip(numbers[order].tolist(), least[order].tolist(), strict=True):
            candidates = np.flatnonzero(bound < distance)
            if not len(candidates):
                break

            away, index = paths.kdtrees[number].query(points[candidates])
            is_closer = away < distance[candidates]
            distance[candidates[is_closer]] = away[is_closer]
            nearest[candidates[is_closer]] = paths.nodes[number][index[is_closer]]
        return distance, nearest


class _ComponentPaths:
    """The accepted paths of one component."""

    def __init__(self) -> None:
        self.nodes: list[Ints] = []
        """The voxels of each path."""
        self.kdtrees: list[cKDTree] = []
        self.low = np.empty((1, 3))
        """[P or more, 3] low corners of the bounding boxes."""
        self.high = np.empty((1, 3))
        """[P or more, 3] high corners."""
        self._cells: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def add(self, nodes: Ints, points: Floats) -> None:
        """Add a path, given as voxels [n] and their positions [n, 3]."""
        number = len(self.nodes)
        # Arrays that double in length are copied seldom.
        if number == len(self.low):
            self.low, self.high = (np.concatenate([corners, corners]) for corners in (self.low, self.high))

        self.nodes.append(nodes)
        self.kdtrees.append(cKDTree(points))
        self.low[number], self.high[number] = points.min(axis=0), points.max(axis=0)
        for cell in set(map(tuple, (points // _PATH_CELL).astype(np.int64).tolist())):
            self._cells[cell].append(number)

    def list_near(self, points: Floats) -> Ints:
        """The ascending numbers of the paths that may be nearest to some of `points` [n, 3]; the last is on a path."""
        reach = float(np.linalg.norm(points - points[-1], axis=1).max())
        low = ((points.min(axis=0) - reach) // _PATH_CELL).astype(np.int64).tolist()
        high = ((points.max(axis=0) + reach) // _PATH_CELL).astype(np.int64).tolist()

        # A look at all paths is quicker than one at more cells.
        spans = [range(a, b + 1) for a, b in zip(low, high, strict=True)]
        if math.prod(map(len, spans)) >= len(self.nodes):
            return np.arange(len(self.nodes))

        near = {number for cell in itertools.product(*spans) for number in self._cells.get(cell, ())}
        return np.array(sorted(near), dtype=np.int64)


def measure_evidence(
    graph: VoxelGraph, accepted: AcceptedPaths, batch: PathBatch, is_outside: Bools, cfg: TraceConfig
) -> list[float]:
    """[P] length of each path that speaks for a branch of its own, in the metric's unit.

    Only steps that begin `is_outside` [n] the tube they lead to count. Each step counts its length times
    - its probability, from 0 at the lower threshold to 1 at the upper one;
    - how much of a ridge it is: in every direction across the path, the probability must fall off on one side at least.
      The slope beside a thick branch fails, for it is level along that branch;
    - 1 where darker voxels lie between it and the nearest accepted path, else only by how much it leads away from it: a
      second path along the same thick branch fails.
    """
    searches = [accepted.find_nearest(path) for path in batch]
    away, nearest = (np.concatenate(parts) for parts in zip(*searches, strict=True))

    points, steps = graph.points[batch.nodes], batch.steps

    length = np.linalg.norm(points[steps + 1] - points[steps], axis=1)

    # Steps back towards an accepted path do not undo the evidence of earlier steps.
    growth = np.clip(away[steps] - away[steps + 1], 0, None)
    is_apart = _is_gap_between(graph, batch.nodes, nearest)[steps]

    # The two thresholds may be equal.
    span = max(cfg.threshold - cfg.floor, 1e-6)
    certainty = np.clip((graph.probability[batch.nodes[steps]] - cfg.floor) / span, 0, 1)

    evidence = np.where(is_apart, length, np.minimum(growth, length)) * certainty * _measure_ridge(graph, batch)[steps]

    # Each path is summed by itself: the sum must not depend on the other paths of the batch.
    ends = batch.starts - np.arange(len(batch.starts))
    is_counted = is_outside[steps]
    return [
        float(evidence[begin:end][is_counted[begin:end]].sum())
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


def _is_gap_between(graph: VoxelGraph, nodes: Ints, nearest: Ints) -> Bools:
    """[n] whether the probability dips on the straight line from a node to the accepted voxel nearest to it."""
    share = np.linspace(0, 1, _LINE_SAMPLES + 2)[1:-1, None]
    lowest = np.empty(len(nodes), dtype=np.float32)

    for part in _split_places(len(nodes)):
        a, b = graph.voxels[nodes[part]].astype(np.float64), graph.voxels[nearest[part]].astype(np.float64)
        line = a[:, None] * (1 - share) + b[:, None] * share  # [n, samples, 3]
        lowest[part] = graph.sampler.sample(line.reshape(-1, 3)).reshape(line.shape[:2]).min(axis=1)

    # The dimmer end sets the level: a dim branch beside a bright one is no gap by itself.
    ends = np.minimum(graph.probability[nodes], graph.probability[nearest])
    return np.asarray(lowest < (1 - _DROP) * ends)


def _measure_ridge(graph: VoxelGraph, batch: PathBatch) -> Floats:
    """[n] 0 to 1: fall-off of the probability across the path, in the direction where it falls off least."""
    # The ray has to leave the tube and the blur around it.
    reach = 1.5 * graph.distance[batch.nodes] + 1.5
    ridge = np.empty(len(batch.nodes))

    for places in _split_places(len(batch.nodes)):
        nodes, rays = batch.nodes[places], _find_rays_across(graph.points, batch, places)
        beside = _sample_along_rays(graph, nodes, rays, reach[places], np.linspace(0.25, 1, 5)).min(axis=2)

        # One side is enough, since the other may face the thick branch.
        lower = np.minimum(beside[:, : _RAYS // 2], beside[:, _RAYS // 2 :]).max(axis=1)
        ridge[places] = np.clip((1 - lower / graph.probability[nodes]) / _DROP, 0, 1)
    return ridge


def cover_flat_sections(graph: VoxelGraph, batch: PathBatch, reach: Floats) -> tuple[Floats, Floats, Ints]:
    """Balls beside the paths that cover their cross sections where these are wide and flat.

    `reach` [n] is the radius of the ball on each node. Returns the centers [M, 3], the radii [M] and the number of each
    ball's path [M].
    """
    # The median over a stretch of path leaves real side branches out.
    width = _filter_median(_measure_flat_width(graph, batch, reach), batch)
    place, ray = np.nonzero(width >= 5)
    rays = _find_rays_across(graph.points, batch, place)[np.arange(len(place)), ray]

    # Balls lie half a reach apart, the last one just inside.
    counts = width[place, ray] // 2 - 1
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    place, rays = np.repeat(place, counts), np.repeat(rays, counts, axis=0)
    centers = graph.points[batch.nodes[place]] + rays * (reach[place] * number / 2)[:, None]
    return centers, reach[place], batch.path_of_node[place]


def _measure_flat_width(graph: VoxelGraph, batch: PathBatch, reach: Floats) -> Ints:
    """[n, rays] how far the probability does not dip along the rays across a path, in quarters of the reach [n]."""
    width = np.empty((len(batch.nodes), _RAYS), dtype=np.int64)
    for places in _split_places(len(batch.nodes)):
        nodes, rays = batch.nodes[places], _find_rays_across(graph.points, batch, places)
        values = _sample_along_rays(graph, nodes, rays, reach[places], np.linspace(0.25, _WIDEST, 4 * _WIDEST))

        # Only the stretch up to the first dip counts. What is bright beyond it is another neurite.
        level = (1 - _DROP) * graph.probability[nodes]
        width[places] = np.logical_and.accumulate(values >= level[:, None, None], axis=2).sum(axis=2)
    return width


def _filter_median(values: Ints, batch: PathBatch) -> Ints:
    """[n, rays] running median of `values` [n, rays] along each path, whose ends are repeated beyond it."""
    median = np.empty_like(values)
    is_long = batch.lengths >= _WINDOW

    # Paths of one length form an array, which takes one call.
    for paths, places in batch.group_by_length():
        if not is_long[paths[0]]:
            median[places] = median_filter(values[places], size=(1, places.shape[1], 1), mode="nearest")
    if not is_long.any():
        return median

    # Long paths are filtered in one go, with their repeated ends between them.
    margin = _WINDOW // 2
    parts, is_inner = [], []
    for start, stop in zip(batch.starts[:-1][is_long].tolist(), batch.starts[1:][is_long].tolist(), strict=True):
        padded = np.arange(start - margin, stop + margin)
        is_inner.append((padded >= start) & (padded < stop))
        parts.append(np.clip(padded, start, stop - 1))
    place, inner = np.concatenate(parts), np.concatenate(is_inner)
    median[place[inner]] = median_filter(values[place], size=(_WINDOW, 1), mode="nearest")[inner]
    return median


def _find_rays_across(points: Floats, batch: PathBatch, places: Ints) -> Floats:
    """[n, rays, 3] unit vectors orthogonal to the path at the nodes at `places` [n] of a batch.

    The second half of the rays are the opposites of the first.
    """
    # A single step has one of 26 directions, which is too coarse. A stretch of path is smoother.
    path = np.searchsorted(batch.starts, places, side="right") - 1
    ahead = batch.nodes[np.minimum(places + _STRETCH, batch.starts[path + 1] - 1)]
    behind = batch.nodes[np.maximum(places - _STRETCH, batch.starts[path])]
    along = points[ahead] - points[behind]

    # A path of one node has no direction, and must not divide by zero.
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)

    # The axis farthest from the direction of the path gives a product that never vanishes.
    first = np.cross(along, np.eye(3)[np.abs(along).argmin(axis=1)])
    first /= np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-9)
    second = np.cross(along, first)

    angle = 2 * np.pi * np.arange(_RAYS) / _RAYS
    return np.asarray(first[:, None] * np.cos(angle)[:, None] + second[:, None] * np.sin(angle)[:, None])


def _sample_along_rays(
    graph: VoxelGraph, nodes: Ints, rays: Floats, reach: Floats, shares: Floats
) -> NDArray[np.float32]:
    """[n, rays, S] probability along the rays of each node, at `shares` [S] of its reach [n]."""
    away = reach[:, None] * shares
    positions = graph.points[nodes][:, None, None] + rays[:, :, None] * away[:, None, :, None]
    values = graph.sampler.sample((positions / graph.spacing).reshape(-1, 3))
    return values.reshape(positions.shape[:3])


def _split_places(count: int) -> Iterator[Ints]:
    """The numbers 0 to count - 1 in parts of at most `_NODES_AT_ONCE`."""
    for begin in range(0, count, _NODES_AT_ONCE):
        yield np.arange(begin, min(begin + _NODES_AT_ONCE, count))
