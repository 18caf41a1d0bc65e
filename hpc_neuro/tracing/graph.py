"""The undirected forest of centre lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from hpc_neuro.tracing.centerlines import Skeleton
from hpc_neuro.tracing.voxel_graph import Floats, Foreground, Ints


@dataclass(frozen=True)
class Join:
    """Two foreground voxels of different pieces to be joined, and the points between them."""

    end: int
    target: int
    via: Floats  # [k, 3] from end to target, both excluded, in the metric's unit


@dataclass(frozen=True)
class Wires:
    """K nodes in the metric's unit."""

    points: Floats  # [K, 3]
    radii: Floats  # [K]
    edges: Ints  # [E, 2]
    voxels: Ints  # [K] foreground voxel of each node, -1 on a bridge

    @property
    def degree(self) -> Ints:
        """[K] number of edges at each node."""
        return np.bincount(self.edges.ravel(), minlength=len(self.points))

    @property
    def lengths(self) -> Floats:
        """[E] length of each edge."""
        a, b = self.edges.T
        return np.asarray(np.linalg.norm(self.points[a] - self.points[b], axis=1))

    def neighbor_lists(self) -> list[list[int]]:
        """The nodes joined to each node."""
        around: list[list[int]] = [[] for _ in self.points]
        for a, b in self.edges.tolist():
            around[a].append(b)
            around[b].append(a)
        return around


class Lines:
    """The centre lines of a foreground, searchable by position."""

    def __init__(self, found: Foreground, traced: Skeleton) -> None:
        self._found, self._voxels = found, np.flatnonzero(traced.on_tree)
        self._near = cKDTree(found.points[self._voxels])

    def beside(self, place: Floats, component: int, flank: float) -> int | None:
        """The voxel of a component's centre lines from which a place is at most its radius and `flank` away."""
        away, at = self._near.query(place)
        line = int(self._voxels[int(at)])
        mine = self._found.component[line] == component
        return line if mine and away <= self._found.thickness[line] + flank else None


def wires(found: Foreground, traced: Skeleton, joins: Sequence[Join]) -> Wires:
    """All paths and joins as one forest. A join goes on from its end and its target by these voxels' ways home."""
    on_tree = traced.on_tree.copy()
    for join in joins:
        for voxel in (join.end, join.target):
            while not on_tree[voxel]:
                on_tree[voxel] = True
                voxel = int(traced.way[voxel])
    voxels = np.flatnonzero(on_tree)
    index = np.full(len(on_tree), -1, dtype=np.int64)
    index[voxels] = np.arange(len(voxels))
    inner = voxels[traced.way[voxels] != voxels]
    thickness = found.thickness[voxels]
    points, radii, count = [found.points[voxels]], [thickness], len(voxels)
    edges = [np.stack([index[inner], index[traced.way[inner]]], axis=1)]
    for join in joins:
        a, b, between = index[join.end], index[join.target], len(join.via)
        chain = np.concatenate([[a], np.arange(count, count + between), [b]])
        points.append(join.via)
        radii.append(np.full(between, min(thickness[a], thickness[b])))
        edges.append(np.stack([chain[:-1], chain[1:]], axis=1))
        count += between
    origin = np.concatenate([voxels, np.full(count - len(voxels), -1)])
    return Wires(np.concatenate(points), np.concatenate(radii), np.concatenate(edges).astype(np.int64), origin)


def straight(found: Foreground, end: int, target: int) -> Join:
    """A join in a straight line, with a point about every voxel."""
    a, b = found.points[end], found.points[target]
    between = max(int(np.ceil(np.linalg.norm(b - a))) - 1, 0)
    share = (np.arange(1, between + 1) / (between + 1))[:, None]
    return Join(end, target, a * (1 - share) + b * share)
