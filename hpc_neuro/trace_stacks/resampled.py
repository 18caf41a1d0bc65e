"""Trace an image on another grid, whose voxels a student was trained on, with places in voxels of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.foreground import Foreground
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.data.neurite_width import measure_widths
from hpc_neuro.data.resample import Resampling
from hpc_neuro.infer.proofread import DoubtfulPlace
from hpc_neuro.trace_stacks.edits import Edits
from hpc_neuro.trace_stacks.tracer import ImageTrace, trace_image
from hpc_neuro.tracing import Soma


@dataclass(frozen=True)
class GridTrace:
    """The trees of an image, and how they were found on the grid that was traced."""

    trace: ImageTrace
    """Trees, somas and places in voxels of the image; foreground, probability and figures of the grid."""
    grid_trees: list[Tree]
    """The trees in voxels of the grid."""
    grid_size: VoxelSize | None
    """[um] Voxels of the grid; on another grid of an image without a voxel size, in voxels of the image."""
    grid: Resampling | None = None
    """None: the grid of the image."""

    def measure_width(self) -> float | None:
        """[voxel of the image] Median width in the plane of what was traced; None where it is unknown."""
        foreground = self.trace.foreground
        forest = morphology.concatenate_trees(self.grid_trees)
        _, width = measure_widths(forest, foreground.read_image, foreground.shape).median
        return width if width is None or self.grid is None else width * self.grid.factor[2]


def trace_on_grid(
    read: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize | None,
    grid: Resampling | None,
    *,
    roots: Sequence[Point] = (),
    edits: Edits | None = None,
    foreground: Foreground | None = None,
    **settings: Any,
) -> GridTrace:
    """Trace an image on `grid`, None: its own. `foreground`: of its own grid. `settings`, and errors, as of
    `trace_image`."""
    if grid is None:
        trace = trace_image(read, shape, voxel_size, roots=roots, edits=edits, foreground=foreground, **settings)
        return GridTrace(trace, trace.trees, voxel_size)

    trace = trace_image(
        grid.read_new(read),
        grid.new_shape,
        grid.new_voxel_size,
        roots=[grid.move_root(root) for root in roots],
        edits=None if edits is None else _move_edits(edits, grid),
        **settings,
    )
    moved = replace(
        trace,
        trees=[grid.move_tree_back(tree) for tree in trace.trees],
        somas=[_move_soma(soma, grid) for soma in trace.somas],
        places=[_move_place(place, grid) for place in trace.places],
    )
    return GridTrace(moved, trace.trees, grid.new_voxel_size, grid)


def _move_edits(edits: Edits, grid: Resampling) -> Edits:
    return Edits(grid.move_tree_to_new(edits.tree), grid.move_tree_to_new(edits.deleted))


def _move_soma(soma: Soma, grid: Resampling) -> Soma:
    return Soma(grid.move_point_back(soma.point), soma.radius * grid.radius_scale)


def _move_place(place: DoubtfulPlace, grid: Resampling) -> DoubtfulPlace:
    z, y, x = np.round(grid.move_point_back((place.z, place.y, place.x)), 2).tolist()
    return replace(place, z=z, y=y, x=x)
