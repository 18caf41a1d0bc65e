"""Test-time augmentation where it is needed: the confidence of trees in mirrored views of the image.

Where the student's probability in a mirror differs, a place is doubtful (Wang et al. 2019, Neurocomputing 338, 34-45).
Only windows that a tree touches are predicted again. Each is mirrored in its own place, so the lattice of windows is
the same, and with it the result, whatever the blocks are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro import tracing
from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.data.run_journal import name_block
from hpc_neuro.infer.predictor import Predictor
from hpc_neuro.infer.tiling import Tiling, quantize
from hpc_neuro.infer.trees import Floats, VolumeTrees, save_arrays

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ConfidenceSamples:
    """Where the confidence of the trees of a batch is measured, sorted by block."""

    nodes: Ints
    """[M] of the batch."""
    voxels: Ints
    """[M, 3]"""
    indices: Ints
    """[B, 3] of the blocks that hold a sample."""
    ends: Ints
    """[B] the samples up to the end of each."""
    windows: Ints
    """[B] windows of each that are predicted in each view, if it holds no other samples."""

    def find(self, block: Block) -> slice:
        """The samples of a block; none where it has none."""
        number = np.flatnonzero((self.indices == block.index).all(axis=1))
        if not len(number):
            return slice(0, 0)
        return slice(int(self.ends[number[0] - 1]) if number[0] else 0, int(self.ends[number[0]]))


def sample_trees(trees: VolumeTrees, batch: int) -> ConfidenceSamples:
    """The samples of a batch of trees that were found and wait to be written."""
    volume = trees.volume
    shape, tiling = volume.source.shape, volume.tiling
    nodes, voxels = tracing.sample_edges(trees.load_batch(batch), shape)

    # Blocks are predicted one at a time, so the samples of each must lie together. A stable sort keeps the order of the
    # tree within a block, and makes runs repeatable.
    grid = [-(-n // edge) for n, edge in zip(shape, tiling.write, strict=True)]
    keys = np.ravel_multi_index(tuple((voxels // np.array(tiling.write)).T), grid)
    order = np.argsort(keys, kind="stable")
    nodes, voxels = nodes[order], voxels[order]
    own, counts = np.unique(keys, return_counts=True)
    indices, ends = np.stack(np.unravel_index(own, grid), axis=1), np.cumsum(counts)

    # Only few of the blocks of a brain hold a sample of one batch.
    blocks = {block.index: block for block in tiling.list_flip_blocks(shape)}
    parts = np.split(voxels, ends[:-1])
    windows = [
        count_windows(*tiling.find_neighborhoods(part, shape), tiling, blocks[z, y, x])
        for part, (z, y, x) in zip(parts, indices.tolist(), strict=False)
    ]
    return ConfidenceSamples(nodes, voxels, indices, ends, np.array(windows, dtype=np.int64))


def list_batches_to_sample(trees: VolumeTrees) -> list[int]:
    """The batches whose samples are missing."""
    if not trees.has_forest():
        return []
    return [batch for batch in range(trees.count_batches()) if not _samples_path(trees, batch).exists()]


def keep_samples(trees: VolumeTrees, batch: int) -> None:
    """Sample a batch of trees, and keep it until the views are predicted."""
    save_arrays(_samples_path(trees, batch), sample_trees(trees, batch))


def read_samples(trees: VolumeTrees, batch: int) -> ConfidenceSamples:
    """The samples that were kept of a batch."""
    with np.load(_samples_path(trees, batch)) as arrays:
        return ConfidenceSamples(**arrays)


@dataclass(frozen=True)
class SampledBlock:
    """A block through which trees run."""

    block: Block
    batches: tuple[int, ...]
    """Their batches."""
    windows: int
    """Windows of each view; those that hold samples of several batches count several times."""


def list_missing_blocks(trees: VolumeTrees) -> list[SampledBlock]:
    """The blocks through which a tree runs and whose views are missing."""
    batches, windows = defaultdict[Shape, list[int]](list), Counter[Shape]()
    for batch in range(trees.count_batches()):
        # The samples themselves are not read.
        with np.load(_samples_path(trees, batch)) as arrays:
            for (z, y, x), count in zip(arrays["indices"].tolist(), arrays["windows"].tolist(), strict=True):
                batches[z, y, x].append(batch)
                windows[z, y, x] += count

    # A block without samples cannot change any confidence.
    blocks = trees.volume.tiling.list_flip_blocks(trees.volume.source.shape)
    return [
        SampledBlock(block, tuple(batches[block.index]), windows[block.index])
        for block in blocks
        if block.index in batches and not _view_path(trees, block).exists()
    ]


def count_windows(first: Ints, last: Ints, tiling: Tiling, block: Block) -> int:
    """How many windows of a block are predicted in each view: those that hold a voxel of a neighborhood.

    first, last: [M, 3] of the neighborhoods, on the student's grid.
    """
    # The lattice of windows starts at the first voxel that is read.
    start = np.array(block.read.start)
    window, step = np.array(tiling.window), np.array(tiling.step)

    # The first and the last window, along each axis, that hold a voxel of a neighborhood.
    end = np.maximum(-((window - np.array(block.read.shape)) // step), 0)
    low = np.clip(-((window - 1 - (first - start)) // step), 0, end)
    high = np.clip((last - start) // step, 0, end)

    # A window may hold many samples, and runs once.
    is_needed = np.zeros(end + 1, dtype=bool)
    _mark_between(is_needed, low, high)
    return int(np.count_nonzero(is_needed))


def predict_views(
    trees: VolumeTrees, predictor: Predictor, sampled: SampledBlock, count_windows: Callable[[int], None]
) -> None:
    """Keep the confidence at the samples of one block in every mirrored view: nodes [n], values [K, n] by batch."""
    source, flips, block = trees.volume.source, trees.cfg.flips, sampled.block
    samples = [read_samples(trees, batch) for batch in sampled.batches]
    own = [part.find(block) for part in samples]
    voxels = np.concatenate([part.voxels[place] for part, place in zip(samples, own, strict=True)])
    pairs = [np.unique(part.nodes[place], return_inverse=True) for part, place in zip(samples, own, strict=True)]
    firsts = np.cumsum([0, *(len(nodes) for nodes, _ in pairs)])
    value_of_sample = np.concatenate([inverse + first for (_, inverse), first in zip(pairs, firsts, strict=False)])

    # All views share one reading of the image.
    tiling = trees.volume.tiling
    image = source.show(block.read)
    where = np.zeros(block.read.shape, dtype=bool)
    first, last = tiling.find_neighborhoods(voxels, source.shape)
    _mark_between(where, first - np.array(block.read.start), last - np.array(block.read.start))

    # Ones are neutral, since a node keeps the lowest of its samples.
    values = np.ones((len(flips), int(firsts[-1])))
    for row, name in zip(values, flips, strict=True):
        axes = [axis for axis, is_flipped in enumerate(parse_orientation(name).flips) if is_flipped]

        probability = tiling.make_reader(block, predictor.predict(image, count_windows, axes, where))

        # Rounded as the stored probability is, so that rounding alone shows no disagreement. The default binds the
        # reader of this view, not the variable of the loop.
        def read(box: Box, probability: Callable[[Box], NDArray[np.float32]] = probability) -> NDArray[np.uint8]:
            return quantize(probability(box))

        np.minimum.at(row, value_of_sample, tracing.read_neighborhood_max(voxels, read, source.shape))

    # A file that is there counts as done, so it must be whole.
    arrays = dict[str, NDArray[Any]]()
    for batch, (nodes, _), part in zip(sampled.batches, pairs, np.split(values, firsts[1:-1], axis=1), strict=True):
        arrays |= {f"nodes {batch}": nodes, f"values {batch}": part}
    files.write_npz(_view_path(trees, block), arrays)


def load_views(trees: VolumeTrees, forest: Tree, batch: int = 0) -> Floats:
    """[K, N] confidence of each node of a batch in each mirrored view, as tracing.measure_confidence has the plain."""
    views = np.ones((len(trees.cfg.flips), len(forest)))
    if not trees.cfg.flips:
        return views

    own = set(map(tuple, read_samples(trees, batch).indices.tolist()))
    # A node whose edge crosses blocks has its lowest confidence in one of them.
    for block in trees.volume.tiling.list_flip_blocks(trees.volume.source.shape):
        if block.index in own:
            with np.load(_view_path(trees, block)) as arrays:
                nodes = arrays[f"nodes {batch}"]
                views[:, nodes] = np.minimum(views[:, nodes], arrays[f"values {batch}"])
    return views


def _mark_between(marked: NDArray[np.bool_], first: Ints, last: Ints) -> None:
    """Mark all cells of [Z, Y, X] between the corners `first` and `last`, both [M, 3] and included."""
    for offset in np.ndindex(*(np.max(last - first, axis=0) + 1)):
        marked[tuple(np.minimum(first + np.array(offset), last).T)] = True


def _view_path(trees: VolumeTrees, block: Block) -> Path:
    return trees.scratch / f"view_{name_block(block.index)}.npz"


def _samples_path(trees: VolumeTrees, batch: int) -> Path:
    return trees.scratch / f"samples_{batch}.npz"
