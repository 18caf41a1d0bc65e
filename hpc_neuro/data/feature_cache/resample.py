"""From cells of any size to the student's token grid, by area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.data.feature_cache.layout import Unit
from hpc_neuro.data.orientation import VIEW_AXES


@dataclass(frozen=True)
class Cells:
    """The cells of one view that lie under a crop: which slices, token rows and columns, and their weights."""

    view: str
    slices: slice
    rows: slice
    columns: slice
    weights: tuple[Tensor, Tensor, Tensor]  # [targets, cells] of slices, rows and columns

    @staticmethod
    def under(box: Box, patch: Shape, units: Sequence[Unit]) -> Cells:
        """units: all shards of the view, in the order of their slices. The box may reach past the last cell."""
        first, last = units[0], units[-1]
        count = (last.first - first.first) // first.stride + last.count
        across, down, right = VIEW_AXES[first.view]
        slices, s = cells_along(box, patch, across, first.stride, count)
        rows, r = cells_along(box, patch, down, first.cell[0], first.rows)
        columns, c = cells_along(box, patch, right, first.cell[1], first.columns)
        return Cells(first.view, slices, rows, columns, (s, r, c))

    def on_tokens(self, values: Tensor) -> Tensor:
        """Averages of the cells' values [s, L, r, c, n] -> [L, n, z, y, x] float32."""
        result, (s, r, c) = values.float(), self.weights
        if not _same(s):
            result = (s @ result.flatten(1)).view(-1, *result.shape[1:])
        if not _same(r):
            result = (r @ result.flatten(3)).view(*result.shape[:2], -1, *result.shape[3:])
        if not _same(c):
            result = c @ result
        axes = VIEW_AXES[self.view]  # what slices, rows and columns are in the volume
        return result.permute(1, 4, *((0, 2, 3)[axes.index(axis)] for axis in (0, 1, 2)))


def cells_along(box: Box, patch: Shape, axis: int, cell: float, count: int) -> tuple[slice, Tensor]:
    """Source cells under a box along one axis, and area weights [targets, cells] that bring them to its tokens.

    Source cell i covers voxels [i * cell, (i + 1) * cell), i < count; target t covers patch[axis] voxels.
    """
    edges = np.arange(box.start[axis], box.stop[axis] + 1, patch[axis], dtype=np.float64)
    low = np.minimum(edges[:-1], (count - 0.5) * cell)  # a target wholly past the end takes the last cell
    high = np.maximum(np.minimum(edges[1:], count * cell), low + 1e-6 * cell)
    first = int(low[0] // cell)
    stop = min(count, max(first + 1, int(np.ceil(high[-1] / cell - 1e-9))))
    starts = np.arange(first, stop) * cell
    overlap = np.minimum(high[:, None], starts + cell) - np.maximum(low[:, None], starts)
    weights = np.clip(overlap, 0.0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return slice(first, stop), torch.from_numpy(weights).float()


def _same(weights: Tensor) -> bool:
    """Whether every target is one cell, in their order."""
    return weights.shape[0] == weights.shape[1] and torch.equal(weights, torch.eye(len(weights)))
