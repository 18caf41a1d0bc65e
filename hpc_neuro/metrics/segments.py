"""Exact distance from points to the nearest edge of a tree, with a KD-tree over short pieces of its edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core.morphology import Tree

_PER_QUERY = 1 << 20  # candidates held at once: 24 MB per float64 array of vectors


class Segments:
    """The edges of a tree as line segments, ready for many `distance` questions.

    A tree without any edge is its nodes (segments of no length). Otherwise, as in Vaa3D, a node with neither parent nor
    child has no cable and does not count.
    """

    def __init__(self, tree: Tree) -> None:
        edges = tree.edges
        if len(edges):
            self.start, self.stop = tree.points[edges[:, 0]], tree.points[edges[:, 1]]  # [E, 3] child, parent
        else:
            self.start = self.stop = tree.points
        self.lengths = np.linalg.norm(self.stop - self.start, axis=1)  # [E]
        # Long edges are cut, so that a small ball around a piece's middle holds the piece; at most two pieces per edge
        # on average, whatever the unit.
        longest = float(self.lengths.mean()) if len(self.lengths) else 0.0
        parts = np.maximum(1, np.ceil(self.lengths / longest)).astype(np.int64) if longest > 0 else _ones(self.lengths)
        middles, self._edge = _middles(self.start, self.stop, parts)
        self._half = 0.5 * float((self.lengths / parts).max(initial=0.0))
        self._tree = cKDTree(middles) if len(middles) else None

    def __len__(self) -> int:
        return len(self.start)

    def distance(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, 3] points -> [N] exact distance to the nearest segment; infinite where the tree is empty."""
        best = np.full(len(points), np.inf)
        if self._tree is None:
            return best
        count = self._tree.n
        k = min(8, count)
        pending = np.arange(len(points))
        while len(pending):
            unsure = []
            step = max(1, _PER_QUERY // k)
            for at in range(0, len(pending), step):
                part = pending[at : at + step]
                found_at, piece = self._tree.query(points[part], k=np.arange(1, k + 1))  # nearest first
                centre, edge = np.asarray(found_at), self._edge[piece]  # [n, k] both
                found = _to_segments(points[part, None], self.start[edge], self.stop[edge]).min(axis=1)
                best[part] = found
                # A piece not yet seen has its middle beyond the k-th, so none of it is nearer than that minus half.
                unsure.append(part[(found > centre[:, -1] - self._half) & (k < count)])
            pending = np.concatenate(unsure)
            k = min(4 * k, count)
        return best


def pieces(tree: Tree, step: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cable cut into equal pieces no longer than `step`: their middles [P, 3] and lengths [P], in the tree's unit.

    A tree without any edge gives its nodes, each with length 1.
    """
    edges = tree.edges
    if not len(edges):
        return tree.points, np.ones(len(tree))
    start, stop = tree.points[edges[:, 0]], tree.points[edges[:, 1]]
    lengths = np.linalg.norm(stop - start, axis=1)
    parts = np.maximum(1, np.ceil(lengths / step - 1e-9)).astype(np.int64)
    middles, edge = _middles(start, stop, parts)
    return middles, (lengths / parts)[edge]


def _middles(
    start: NDArray[np.float64], stop: NDArray[np.float64], parts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The middles of `parts` equal pieces of each segment, and the segment each belongs to."""
    edge = np.repeat(np.arange(len(parts)), parts)
    place = np.arange(len(edge)) - np.repeat(np.cumsum(parts) - parts, parts)
    share = ((place + 0.5) / parts[edge])[:, None]
    return start[edge] * (1 - share) + stop[edge] * share, edge


def _to_segments(
    points: NDArray[np.float64], start: NDArray[np.float64], stop: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance from points to segments, by broadcasting over all but the last axis."""
    along = stop - start
    square = (along * along).sum(axis=-1)
    share = ((points - start) * along).sum(axis=-1) / np.where(square > 0, square, 1.0)
    nearest = start + np.clip(share, 0.0, 1.0)[..., None] * along
    return np.asarray(np.linalg.norm(points - nearest, axis=-1))


def _ones(like: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.ones(len(like), dtype=np.int64)
