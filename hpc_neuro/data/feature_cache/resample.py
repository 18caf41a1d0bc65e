"""Average cells of any size onto the student's token grid, by area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.data.feature_cache.manifest import ShardSpec
from hpc_neuro.data.orientation import VIEW_AXES


@dataclass(frozen=True)
class CropCells:
    """The cells of one view that overlap a crop: which slices, token rows and columns, and their weights."""

    view: str
    slices: slice
    rows: slice
    columns: slice
    weights: tuple[Tensor, Tensor, Tensor]  # [targets, cells] of slices, rows and columns

    @staticmethod
    def for_box(box: Box, patch: Shape, shards: Sequence[ShardSpec]) -> CropCells:
        """shards: all of the view, in the order of their slices. The box may reach past the last cell."""
        # The cells of all shards of a view form one regular grid.
        first, last = shards[0], shards[-1]
        slice_count = (last.first - first.first) // first.stride + last.count
        slice_axis, row_axis, column_axis = VIEW_AXES[first.view]

        slices, slice_weights = weigh_cells(box, patch, slice_axis, first.stride, slice_count)
        rows, row_weights = weigh_cells(box, patch, row_axis, first.cell[0], first.rows)
        columns, column_weights = weigh_cells(box, patch, column_axis, first.cell[1], first.columns)
        return CropCells(first.view, slices, rows, columns, (slice_weights, row_weights, column_weights))

    def average_onto_tokens(self, values: Tensor) -> Tensor:
        """Average the cells' values [s, L, r, c, n] -> [L, n, z, y, x] float32."""
        slice_weights, row_weights, column_weights = self.weights

        # One axis after the other: the weights of a box are a product of those of its axes.
        tokens = values.float()
        if not _is_identity(slice_weights):
            tokens = (slice_weights @ tokens.flatten(1)).view(-1, *tokens.shape[1:])
        if not _is_identity(row_weights):
            tokens = (row_weights @ tokens.flatten(3)).view(*tokens.shape[:2], -1, *tokens.shape[3:])
        if not _is_identity(column_weights):
            tokens = column_weights @ tokens

        # Dimensions 0, 2 and 3 are slices, rows and columns; bring them into the order z, y, x.
        view_axes = VIEW_AXES[self.view]
        return tokens.permute(1, 4, *((0, 2, 3)[view_axes.index(axis)] for axis in (0, 1, 2)))


def weigh_cells(box: Box, patch: Shape, axis: int, cell: float, count: int) -> tuple[slice, Tensor]:
    """Source cells under a box along one axis, and area weights [targets, cells] that average them onto its tokens.

    Source cell i covers voxels [i * cell, (i + 1) * cell), i < count; a target covers patch[axis] voxels.
    """
    # The borders of the targets, in voxels.
    edges = np.arange(box.start[axis], box.stop[axis] + 1, patch[axis], dtype=np.float64)

    # A target wholly past the end takes the last cell.
    low = np.minimum(edges[:-1], (count - 0.5) * cell)
    high = np.maximum(np.minimum(edges[1:], count * cell), low + 1e-6 * cell)

    # Rounding must not add a cell that only touches the last border.
    first = int(low[0] // cell)
    stop = min(count, max(first + 1, int(np.ceil(high[-1] / cell - 1e-9))))
    cell_starts = np.arange(first, stop) * cell
    overlap = np.minimum(high[:, None], cell_starts + cell) - np.maximum(low[:, None], cell_starts)
    weights = np.clip(overlap, 0.0, None)

    # Weights are shares, also where a target reaches past the last cell.
    weights /= weights.sum(axis=1, keepdims=True)
    return slice(first, stop), torch.from_numpy(weights).float()


def _is_identity(weights: Tensor) -> bool:
    """Whether every target is one cell, in their order."""
    return weights.shape[0] == weights.shape[1] and torch.equal(weights, torch.eye(len(weights)))
