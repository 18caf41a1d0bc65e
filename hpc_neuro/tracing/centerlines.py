"""Centered paths through a voxel graph, longest first (in the manner of TEASAR, Sato et al. 2000).

One run of Dijkstra's algorithm from a source in every component gives each voxel its path home. A path is cheap where
the probability is high and the border far, so it runs along the middle. The farthest voxel of a component that no path
covers yet is its next tip, and the path from there to the tree so far is the next path. Components do not depend on one
another, so one path of each is processed at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hpc_neuro.tracing.branch_test import AcceptedPaths, PathBatch, cover_flat_sections, measure_evidence
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.probability import Bools, Floats, Ints
from hpc_neuro.tracing.voxel_graph import VoxelGraph, compute_cost, find_minimum_cost_paths, sum_to_root

_COVER_SCALE = 1.5
"""[border distance] Radius around an accepted path within which voxels belong to it, plus `_COVER_MARGIN`."""
_COVER_MARGIN = 3.0
"""[voxel] See `_COVER_SCALE`."""
_OWN_SHARE = 0.25
"""[reach] How much of a voxel's own thickness must lie within the reach of a path, too, for the path to cover it."""
_PATHS_AT_ONCE = 4096
"""Paths whose surroundings are held in memory together."""
_BALLS_AT_ONCE = 8192
"""Balls whose voxels are held in memory together."""
_FEW = 8
"""Paths up to which following them one by one is quicker than all at once."""


@dataclass(frozen=True)
class Centerlines:
    """The centerlines of all components, as voxels of the graph."""

    following: Ints
    """[N] next voxel on the path to the component's source; a source points to itself."""
    on_path: Bools
    """[N] whether a voxel lies on a centerline."""


def find_centerlines(graph: VoxelGraph, sources: Ints, cfg: TraceConfig, required: Sequence[int] = ()) -> Centerlines:
    """Paths from `sources` [C], one voxel of each component, to all tips and to the `required` voxels.

    A component has one path at least.
    """
    # Required paths come first, so that the voxels they cover raise no tips of their own.
    search = _PathSearch(graph, sources, cfg)
    for tip in required:
        search.trace_required(tip)

    queue = _TipQueue(graph.component, search.length)

    while len(tips := queue.advance(search.is_covered)):
        for begin in range(0, len(tips), _PATHS_AT_ONCE):
            search.trace_tips(tips[begin : begin + _PATHS_AT_ONCE])
    return Centerlines(search.following, search.on_path)


def find_far_ends(graph: VoxelGraph) -> tuple[Ints, Floats]:
    """[C] one end of every component, the voxel farthest from an arbitrary one of it, and [C] how far that is."""
    _, starts = np.unique(graph.component, return_index=True)

    # Only lengths matter here, so every voxel costs the same.
    _, length = find_paths_home(graph, starts, np.ones(len(graph.voxels)))

    order = np.lexsort((length, graph.component))
    last = np.searchsorted(graph.component[order], np.arange(graph.components), side="right") - 1

    ends = order[last]
    return ends, length[ends]


def find_paths_home(graph: VoxelGraph, sources: Ints, cost: Floats) -> tuple[Ints, Floats]:
    """[N] next voxel on the minimum-cost path to a source [C], and [N] the path's length (not its cost)."""
    following = find_minimum_cost_paths(graph.component, graph.pairs, graph.step, cost, sources)
    step = np.linalg.norm(graph.points - graph.points[following], axis=1)
    return following, sum_to_root(step, following)


class _PathSearch:
    """The state of a search for centerlines: which voxels lie on accepted paths, and which are covered."""

    def __init__(self, graph: VoxelGraph, sources: Ints, cfg: TraceConfig) -> None:
        self._graph, self._cfg = graph, cfg
        cost = compute_cost(graph.distance, graph.probability)
        self.following, self.length = find_paths_home(graph, sources, cost)

        self.is_covered = np.zeros(len(self.following), dtype=bool)
        self.on_path = np.zeros(len(self.following), dtype=bool)
        self.on_path[sources] = True

        # Without one path that needs no evidence, a short or dim component would vanish.
        self._is_empty = np.ones(graph.components, dtype=bool)
        self._reach = _COVER_SCALE * graph.distance + _COVER_MARGIN
        self._accepted = AcceptedPaths(graph)

    def trace_required(self, tip: int) -> None:
        """Accept the path from a voxel without a test."""
        batch = self._follow(np.array([tip], dtype=np.int64))
        if len(batch.nodes) > 1:
            self._accept(batch)
            self._cover(batch)

    def trace_tips(self, tips: Ints) -> None:
        """Accept the paths from `tips`, voxels of different components, where they are branches; cover all of them."""
        graph = self._graph
        batch = self._follow(tips)
        is_accepted = self._is_empty[graph.component[tips]]

        # The first path of a component needs no evidence.
        tested = np.flatnonzero(~is_accepted)
        if len(tested):
            paths = batch.select(tested)
            joints = paths.joints[paths.path_of_node]
            is_outside = self.length[paths.nodes] - self.length[joints] > graph.distance[joints]
            evidence = measure_evidence(graph, self._accepted, paths, is_outside, self._cfg)
            is_accepted[tested] = np.array(evidence) >= self._cfg.min_branch

        # A path that fails covers its voxels, too: else the next tip would be its neighbor.
        self._accept(batch.select(np.flatnonzero(is_accepted)))
        self._cover(batch)

    def _accept(self, batch: PathBatch) -> None:
        if not len(batch):
            return
        self._is_empty[self._graph.component[batch.tips]] = False
        self.on_path[batch.nodes] = True
        for path in batch:
            self._accepted.add(path)

    def _follow(self, tips: Ints) -> PathBatch:
        """The paths from `tips` up to the tree so far."""
        paths, current = np.arange(len(tips)), tips
        path_parts, node_parts = [paths], [current]

        while True:
            is_open = ~self.on_path[current]
            paths, current = paths[is_open], self.following[current[is_open]]
            if len(paths) <= _FEW:
                break
            path_parts.append(paths)
            node_parts.append(current)

        # For the last few paths the overhead of numpy exceeds the work.
        for path, voxel in zip(paths.tolist(), current.tolist(), strict=True):
            nodes = [voxel]
            while not self.on_path[nodes[-1]]:
                nodes.append(int(self.following[nodes[-1]]))
            path_parts.append(np.full(len(nodes), path))
            node_parts.append(np.array(nodes, dtype=np.int64))

        # The order by path is stable, so the nodes of a path stay in the order in which they were walked.
        path_of_node = np.concatenate(path_parts)
        order = np.argsort(path_of_node, kind="stable")
        starts = np.searchsorted(path_of_node[order], np.arange(len(tips) + 1))
        return PathBatch(np.concatenate(node_parts)[order], starts)

    def _cover(self, batch: PathBatch) -> None:
        """Mark the voxels of a component that lie within reach of its path, with much of their own thickness.

        A wide and flat cross section is covered to its sides.
        """
        on_line = self._choose_centers(batch)
        nodes = batch.nodes[on_line]
        self._mark_balls(self._graph.points[nodes], self._reach[nodes], self._graph.component[nodes], _OWN_SHARE)

        centers, radii, path = cover_flat_sections(self._graph, batch, self._reach[batch.nodes])
        self._mark_balls(centers, radii, self._graph.component[batch.tips][path], 0.0)
        self.is_covered[batch.nodes] = True

    def _choose_centers(self, batch: PathBatch) -> Bools:
        """[n] whether a node is the center of a ball: a third of a radius apart, they leave no notch worth a branch."""
        is_center = np.empty(len(batch.nodes), dtype=bool)

        length, reach = self.length[batch.nodes], self._reach[batch.nodes]
        for _, places in batch.group_by_length():
            step = np.diff(length[places], axis=1, prepend=length[places[:, :1]])
            ball = np.floor(np.cumsum(np.abs(step) / (reach[places] / 3), axis=1))
            is_center[places] = np.diff(ball, axis=1, prepend=-1) != 0

        # Without a ball on the joint, a notch could stay between the path and the tree.
        is_center[batch.starts[1:] - 1] = True
        return is_center

    def _mark_balls(self, centers: Floats, radii: Floats, component: Ints, own_share: float) -> None:
        """Cover the voxels of `component` [B] in the balls, with their own thickness up to a share of the radius."""
        graph = self._graph

        # Voxels in many overlapping balls are listed many times, so memory has to be bounded.
        for begin in range(0, len(centers), _BALLS_AT_ONCE):
            part = slice(begin, begin + _BALLS_AT_ONCE)
            balls = graph.kdtree.query_ball_point(centers[part], radii[part], return_sorted=False)
            counts = np.fromiter(map(len, balls), dtype=np.int64, count=len(balls))
            voxels = np.fromiter(chain.from_iterable(balls), dtype=np.int64, count=int(counts.sum()))
            ball = np.repeat(np.arange(len(balls)) + begin, counts)

            # Another component may be near. It must not lose its voxels.
            is_own = graph.component[voxels] == component[ball]
            voxels, ball = voxels[is_own], ball[is_own]

            away = np.linalg.norm(graph.points[voxels] - centers[ball], axis=1)
            thickness = np.minimum(graph.thickness[voxels], own_share * radii[ball])
            self.is_covered[voxels[away + thickness <= radii[ball]]] = True


class _TipQueue:
    """The voxels of each component by their path length, longest first."""

    def __init__(self, component: Ints, length: Floats) -> None:
        self._order = np.lexsort((-length, component))
        starts = np.searchsorted(component[self._order], np.arange(component.max(initial=-1) + 2))
        self._next, self._stop = starts[:-1].copy(), starts[1:]

    def advance(self, is_covered: Bools) -> Ints:
        """The first voxel of each component that is not covered; components without one are left out for good."""
        pending = np.arange(len(self._next))

        # Covered voxels stay covered, so places that were passed are never looked at again.
        while len(pending):
            # Few components are searched farther at once than many.
            width = int(np.clip(65536 // len(pending), 8, 4096))
            places = self._next[pending][:, None] + np.arange(width)

            is_open = ~is_covered[self._order[np.minimum(places, len(self._order) - 1)]]

            # The end of a component stops the search, as an open voxel would.
            is_open |= places >= self._stop[pending][:, None]

            self._next[pending] += np.where(is_open.any(axis=1), is_open.argmax(axis=1), width)
            pending = pending[~is_open.any(axis=1)]

        is_left = self._next < self._stop
        self._next, self._stop = self._next[is_left], self._stop[is_left]
        return self._order[self._next]
