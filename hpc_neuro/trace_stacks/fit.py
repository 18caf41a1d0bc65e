"""The grid on which a student sees a stack: one on which the neurites are as wide as those of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_neuro.core import morphology, stop_signals
from hpc_neuro.core.geometry import Point, Shape, VoxelSize
from hpc_neuro.data.foreground import Foreground, measure_foreground
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.data.neurite_width import NeuriteWidths, has_square_voxels, measure_widths
from hpc_neuro.data.resample import Resampling
from hpc_neuro.infer.grid import choose_grid, describe_grid
from hpc_neuro.models.student_folder import Widths, fit_widths, format_widths, read_widths
from hpc_neuro.tracing import (
    BlockSkeleton,
    TraceConfig,
    list_trace_blocks,
    skeletonize_block,
    trace_block_skeletons,
)

if TYPE_CHECKING:
    from hpc_neuro.trace_stacks.predictor import StackPredictor

_CUBES: VoxelSize = (1.0, 1.0, 1.0)
"""Voxels of a stack without a voxel size."""
_MOST_BLOCKS = 32
"""[block] Widths are measured in so many blocks at most, evenly spread over the stack."""
_ROUGH = TraceConfig(gap=0.0, signal_gap=0.0, min_cable=8.0)
"""Settings of the trees along which widths are measured: gaps do not matter there, and short pieces count."""
_LOOKS: tuple[float, ...] = (1.0, 0.5, 0.25)
"""[voxel] Where too little cable shows, the stack is looked at with smaller voxels."""
_LOOKED_VOXELS = 1 << 24
"""[voxel] A stack with smaller voxels that is larger than this is not looked at."""


@dataclass(frozen=True)
class StackFit:
    """How a stack is shown to a student."""

    grid: Resampling | None = None
    """None: that of the stack."""
    foreground: Foreground | None = None
    """Of the stack on its own grid, where it was measured."""
    widths: Widths = (None, None)
    """[voxel of the stack]"""
    is_by_width: bool = False
    """Whether the widths of the neurites decided."""
    line: str = ""
    """What happens to the stack and why, for people; "" where nothing does."""


def fit_stack(
    read: ReadBox, shape: Shape, size: VoxelSize | None, predictor: StackPredictor, model: Path, image: str
) -> StackFit:
    """Choose the grid of a stack that is read by box. `size`: [um] z y x.

    The widths of its neurites decide; the voxel sizes do where widths are unknown, or where voxels are no squares in
    the plane. Raises InputError for an image without contrast, and for one that no grid can fit.
    """
    foreground = measure_foreground(stop_signals.stop_on_request(read), shape).keep_probability()
    widths: Widths = (None, None)
    factor: Point | None = None
    trained = read_widths(predictor.meta)
    if trained is not None and (size is None or has_square_voxels(size)):
        widths = measure_image_widths(foreground).median
        factor = fit_widths(predictor.meta, model, widths, image)

    if factor is None:
        grid = choose_grid(predictor.meta, model, shape, size, image)
        return StackFit(grid, foreground, widths, line="" if grid is None else describe_grid(grid))
    if factor == (1, 1, 1) or trained is None:
        return StackFit(None, foreground, widths, is_by_width=True)

    grid = Resampling(shape, size or _CUBES, factor)
    times = math.prod(grid.new_shape) / math.prod(shape)
    line = (
        f"the neurites are {format_widths(widths)} voxels wide and this student knows {format_widths(trained[1])}: "
        f"resampled to {' x '.join(map(str, grid.new_shape))} voxels, {times:.2g} times as many (any_voxel_size=true "
        "takes them as they are)"
    )
    return StackFit(grid, None, widths, is_by_width=True, line=line)


def measure_image_widths(foreground: Foreground) -> NeuriteWidths:
    """Widths along the cable that a foreground shows, in its voxels; unknown in noise and where too little shows."""
    widths = measure_widths(morphology.empty_tree(), foreground.read_image, foreground.shape)
    if foreground.is_noise:
        return widths

    z, y, x = foreground.shape
    for side in _LOOKS:
        grid = Resampling((z, y, x), _CUBES, (side if z > 1 else 1.0, side, side))
        if side != 1 and math.prod(grid.new_shape) > _LOOKED_VOXELS:
            break
        shown = foreground
        if side != 1:
            shown = measure_foreground(grid.read_new(foreground.read_image), grid.new_shape)
        closer = _measure_widths(shown)
        if len(closer.plane):
            widths = NeuriteWidths(closer.depth * grid.factor[0], closer.plane * side)
        if len(widths.plane) and (len(widths.depth) or z == 1):
            break
    return widths


def _measure_widths(foreground: Foreground) -> NeuriteWidths:
    """Widths along rough trees of a foreground."""
    blocks = list_trace_blocks(foreground.shape, _ROUGH)
    every = -(-len(blocks) // _MOST_BLOCKS)
    skeletons = list[BlockSkeleton]()
    for box in stop_signals.until_stopped(blocks[every // 2 :: every]):
        skeleton = skeletonize_block(foreground.probability, foreground.shape, box, _CUBES, _ROUGH)
        if skeleton is not None:
            skeletons.append(skeleton)

    trees = trace_block_skeletons(skeletons, foreground.probability, foreground.shape, _CUBES, cfg=_ROUGH)
    return measure_widths(morphology.concatenate_trees(trees), foreground.read_image, foreground.shape)
