"""Exact distance from points to the nearest edge of a tree, and cable cut into short pieces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core.morphology import Tree

_MAX_CANDIDATES = 1 << 20
"""Pairs of points and segments in memory at once: 24 MB per float64 array of vectors."""


class SegmentIndex:
    """The edges of a tree as line segments, with a KD-tree over short pieces of them for many distance queries.

    A tree without any edge counts as its nodes (segments of length 0). Otherwise, as in Vaa3D, a node with neither
    parent nor child has no cable and does not count.
    """

    def __init__(self, tree: Tree) -> None:
        # A tree of single nodes still has places to be near to.
        edges = tree.edges
        if len(edges):
            self.start, self.stop = tree.points[edges[:, 0]], tree.points[edges[:, 1]]  # [E, 3] child, parent
        else:
            self.start = self.stop = tree.points

        self.lengths = np.linalg.norm(self.stop - self.start, axis=1)  # [E]

        # Cut long edges, so that a small ball around a piece's middle holds the piece. Pieces of the mean length are at
        # most two per edge on average, whatever the unit.
        mean = float(self.lengths.mean()) if len(self.lengths) else 0.0
        parts = np.ones(len(self.lengths), dtype=np.int64)
        if mean > 0:
            parts = np.maximum(1, np.ceil(self.lengths / mean)).astype(np.int64)

        # A query goes from a piece's middle to its edge, so the distance is to the whole edge and stays exact.
        middles, self._edge = _cut_segments(self.start, self.stop, parts)
        self._half_piece = 0.5 * float((self.lengths / parts).max(initial=0.0))
        self._kd_tree = cKDTree(middles) if len(middles) else None

    def __len__(self) -> int:
        return len(self.start)

    def query(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, 3] points -> [N] exact distance to the nearest segment; infinite for an empty tree."""
        distances = np.full(len(points), np.inf)
        if self._kd_tree is None:
            return distances

        # Ask for more and more neighbors until none that was not seen can be nearer.
        count = self._kd_tree.n
        k = min(8, count)
        pending = np.arange(len(points))
        while len(pending):
            unsettled = []
            batch = max(1, _MAX_CANDIDATES // k)
            for start in range(0, len(pending), batch):
                part = pending[start : start + batch]
                distances[part], is_settled = self._query_nearest(points[part], k)
                unsettled.append(part[~is_settled])
            pending = np.concatenate(unsettled)
            k = min(4 * k, count)

        return distances

    def _query_nearest(self, points: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Distance to the nearest of the segments of the `k` nearest pieces, and whether it is the nearest of all."""
        assert self._kd_tree is not None
        to_middles, piece = self._kd_tree.query(points, k=np.arange(1, k + 1))
        edge = self._edge[piece]  # [n, k]
        distances = _measure_to_segments(points[:, None], self.start[edge], self.stop[edge]).min(axis=1)

        # The middle of an unseen piece is beyond the k-th, so no part of it is nearer than that minus half a piece.
        nearest_unseen = np.asarray(to_middles)[:, -1] - self._half_piece

        return distances, (distances <= nearest_unseen) | (k >= self._kd_tree.n)


def cut_cable(tree: Tree, step: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cut cable into equal pieces no longer than `step`: their middles [P, 3] and lengths [P], in the tree's unit.

    A tree without any edge gives its nodes, each with length 1.
    """
    edges = tree.edges
    if not len(edges):
        return tree.points, np.ones(len(tree))

    start, stop = tree.points[edges[:, 0]], tree.points[edges[:, 1]]
    lengths = np.linalg.norm(stop - start, axis=1)

    # The margin keeps rounding from cutting an edge of exactly n steps into n + 1 pieces.
    parts = np.maximum(1, np.ceil(lengths / step - 1e-9)).astype(np.int64)
    middles, edge = _cut_segments(start, stop, parts)

    return middles, (lengths / parts)[edge]


def _cut_segments(
    start: NDArray[np.float64], stop: NDArray[np.float64], parts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The middles of `parts` equal pieces of each segment, and the segment each belongs to."""
    # Number the pieces of each segment from 0.
    edge = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(edge)) - np.repeat(np.cumsum(parts) - parts, parts)

    share = ((number + 0.5) / parts[edge])[:, None]
    return start[edge] * (1 - share) + stop[edge] * share, edge


def _measure_to_segments(
    points: NDArray[np.float64], start: NDArray[np.float64], stop: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance from points to segments, by broadcasting over all but the last axis."""
    along = stop - start
    square = (along * along).sum(axis=-1)

    # The share of the way at which a point projects onto the segment; a segment of no length has only its start.
    share = ((points - start) * along).sum(axis=-1) / np.where(square > 0, square, 1.0)
    nearest = start + np.clip(share, 0.0, 1.0)[..., None] * along

    return np.asarray(np.linalg.norm(points - nearest, axis=-1))
