"""The undirected forest of centre lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_neuro.tracing.foreground import Floats, Foreground, Ints
from hpc_neuro.tracing.paths import Skeleton


@dataclass(frozen=True)
class Wires:
    """K nodes in the metric's unit."""

    points: Floats  # [K, 3]
    radii: Floats  # [K]
    edges: Ints  # [E, 2]
    voxels: Ints  # [K] foreground voxel of each node, -1 on a bridge

    def neighbours(self) -> list[list[int]]:
        """The nodes joined to each node."""
        around: list[list[int]] = [[] for _ in self.points]
        for a, b in self.edges.tolist():
            around[a].append(b)
            around[b].append(a)
        return around


def wires(found: Foreground, traced: Skeleton, joins: Sequence[tuple[int, int]]) -> Wires:
    """All paths and bridges as one forest. A bridge runs straight to its target voxel, then that voxel's way home."""
    on_tree = traced.on_tree.copy()
    for _, target in joins:
        voxel = target
        while not on_tree[voxel]:
            on_tree[voxel] = True
            voxel = int(traced.way[voxel])
    voxels = np.flatnonzero(on_tree)
    index = np.full(len(on_tree), -1, dtype=np.int64)
    index[voxels] = np.arange(len(voxels))
    inner = voxels[traced.way[voxels] != voxels]
    places = found.voxels[voxels] * found.spacing
    thickness = np.maximum(found.distance[voxels] - 0.5, 0.5)  # the border runs between two voxel centres
    points, radii, count = [places], [thickness], len(voxels)
    edges = [np.stack([index[inner], index[traced.way[inner]]], axis=1)]
    for end, target in joins:
        a, b = places[index[end]], places[index[target]]
        between = max(int(np.ceil(np.linalg.norm(b - a))) - 1, 0)
        share = (np.arange(1, between + 1) / (between + 1))[:, None]
        chain = np.concatenate([[index[end]], np.arange(count, count + between), [index[target]]])
        points.append(a * (1 - share) + b * share)
        radii.append(np.full(between, min(thickness[index[end]], thickness[index[target]])))
        edges.append(np.stack([chain[:-1], chain[1:]], axis=1))
        count += between
    origin = np.concatenate([voxels, np.full(count - len(voxels), -1)])
    return Wires(np.concatenate(points), np.concatenate(radii), np.concatenate(edges).astype(np.int64), origin)
