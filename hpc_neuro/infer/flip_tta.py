"""Test-time augmentation where it is needed: the confidence of trees in mirrored views of the image.

Where the student's probability in a mirror differs, a place is doubtful (Wang et al. 2019, Neurocomputing 338, 34-45).
Only windows that a tree touches are predicted again. Each is mirrored in its own place, so the lattice of windows is
the same, and with it the result, whatever the blocks are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro import tracing
from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.data.run_journal import name_block
from hpc_neuro.infer.model import Predictor
from hpc_neuro.infer.tiling import Tiling, quantize
from hpc_neuro.infer.trees import Floats, VolumeTrees

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ConfidenceSamples:
    """Where the confidence of a volume's trees is measured, sorted by block."""

    nodes: Ints
    """[M]"""
    voxels: Ints
    """[M, 3]"""
    blocks: dict[Shape, slice]
    """Index of a block -> its samples."""


def sample_forest(trees: VolumeTrees) -> ConfidenceSamples:
    """The samples of trees that were found and wait to be written."""
    volume = trees.volume
    nodes, voxels = tracing.sample_edges(trees.load_forest(), volume.source.shape)

    # Blocks are predicted one at a time, so the samples of each must lie together.
    indices, block_of = np.unique(voxels // np.array(volume.tiling.write), axis=0, return_inverse=True)

    # A stable sort keeps the order of the tree within a block, and makes runs repeatable.
    order = np.argsort(block_of.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(block_of.ravel()))
    slices = [slice(int(start), int(stop)) for start, stop in pairwise([0, *ends])]

    blocks = dict(zip(map(tuple, indices.tolist()), slices, strict=True))
    return ConfidenceSamples(nodes[order], voxels[order], blocks)


def list_missing_blocks(trees: VolumeTrees, samples: ConfidenceSamples) -> list[Block]:
    """The blocks through which a tree runs and whose views are missing."""
    blocks = trees.volume.tiling.list_flip_blocks(trees.volume.source.shape)
    # A block without samples cannot change any confidence.
    return [block for block in blocks if block.index in samples.blocks and not _view_path(trees, block).exists()]


def count_windows(samples: ConfidenceSamples, tiling: Tiling, block: Block) -> int:
    """How many windows of a block are predicted in each view: those that hold a sample or a voxel next to one."""
    # The lattice of windows starts at the first voxel that is read.
    voxels = samples.voxels[samples.blocks[block.index]] - np.array(block.read.start)
    window, step = np.array(tiling.window), np.array(tiling.step)

    # The first and the last window, along each axis, that hold a sample grown by one voxel.
    last = np.maximum(-((window - np.array(block.read.shape)) // step), 0)
    low = np.clip(-((window - voxels) // step), 0, last)
    high = np.clip((voxels + 1) // step, 0, last)

    # A window may hold many samples, and runs once.
    is_needed = np.zeros(last + 1, dtype=bool)
    for offset in np.ndindex(*(np.max(high - low, axis=0) + 1)):
        is_needed[tuple(np.minimum(low + np.array(offset), high).T)] = True
    return int(np.count_nonzero(is_needed))


def predict_views(
    trees: VolumeTrees,
    predictor: Predictor,
    samples: ConfidenceSamples,
    block: Block,
    count_windows: Callable[[int], None],
) -> None:
    """Keep the confidence at the samples of one block in every mirrored view: nodes [n], values [K, n]."""
    source, flips = trees.volume.source, trees.cfg.flips
    own = samples.blocks[block.index]
    voxels = samples.voxels[own]
    nodes, node_of_sample = np.unique(samples.nodes[own], return_inverse=True)

    # All views share one reading of the image.
    image, where = source.read(block.read), _mark_neighborhoods(voxels, block.read)

    # Ones are neutral, since a node keeps the lowest of its samples.
    values = np.ones((len(flips), len(nodes)))
    for row, name in zip(values, flips, strict=True):
        axes = [axis for axis, is_flipped in enumerate(parse_orientation(name).flips) if is_flipped]

        # Rounded as the stored probability is, so that rounding alone shows no disagreement.
        probability = quantize(predictor.predict(image, count_windows, axes, where))

        # The default binds the array of this view, not the variable of the loop.
        def read(box: Box, probability: NDArray[np.uint8] = probability) -> NDArray[np.uint8]:
            return probability[box.relative_to(block.read.start).slices]

        np.minimum.at(row, node_of_sample, tracing.read_neighborhood_max(voxels, read, source.shape))

    # A file that is there counts as done, so it must be whole.
    with files.atomic(_view_path(trees, block)) as part, part.open("wb") as handle:
        np.savez(handle, nodes=nodes, values=values)


def load_views(trees: VolumeTrees, forest: Tree, first: int = 0) -> Floats:
    """[K, N] confidence of each node in each mirrored view, as tracing.measure_confidence has it in the plain one.

    `forest` is a stretch of what `sample_forest` sampled, which begins with its node `first`.
    """
    views = np.ones((len(trees.cfg.flips), len(forest)))
    if not trees.cfg.flips:
        return views

    shape, tiling = trees.volume.source.shape, trees.volume.tiling
    own_blocks = set(
        map(tuple, np.unique(tracing.sample_edges(forest, shape)[1] // np.array(tiling.write), axis=0).tolist())
    )

    # A node whose edge crosses blocks has its lowest confidence in one of them.
    for block in tiling.list_flip_blocks(shape):
        if block.index in own_blocks:
            with np.load(_view_path(trees, block)) as arrays:
                nodes = arrays["nodes"] - first
                is_own = (nodes >= 0) & (nodes < len(forest))
                own = nodes[is_own]
                views[:, own] = np.minimum(views[:, own], arrays["values"][:, is_own])
    return views


def _mark_neighborhoods(voxels: Ints, box: Box) -> NDArray[np.bool_]:
    """[Z, Y, X] of a box: whether a voxel is one of `voxels` [M, 3] or next to one."""
    marked = np.zeros(box.shape, dtype=bool)

    # The confidence at a sample is the highest of its neighborhood, which therefore must be predicted too.
    for offset in np.ndindex(3, 3, 3):
        # At a border the clipped neighbor is another voxel of the same neighborhood.
        neighbors = np.clip(voxels - np.array(box.start) + np.array(offset) - 1, 0, np.array(box.shape) - 1)
        marked[tuple(neighbors.T)] = True
    return marked


def _view_path(trees: VolumeTrees, block: Block) -> Path:
    return trees.scratch / f"view_{name_block(block.index)}.npz"
