"""A second look, in mirrors, at every place through which a tree runs: where the student then says otherwise is doubt.

Test-time augmentation (Wang et al. 2019, Neurocomputing 338, 34-45), where it is needed and no further: the confidence
of the nodes is measured once more in the probability that the student gives to mirrored windows. Only windows that a
tree touches are looked at. Each is mirrored in its own place, so that the lattice of windows is the same, and with it
the result, whatever the blocks are.
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
from hpc_neuro.infer import trees
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.model import Job
from hpc_neuro.infer.tiling import Plan, quantised
from hpc_neuro.infer.trees import Floats

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Where the confidence of a volume's trees is measured, sorted by block."""

    node: Ints  # [M]
    voxels: Ints  # [M, 3]
    blocks: dict[Shape, slice]  # index of a block -> its samples


def samples(cfg: InferConfig, work: Work) -> Samples:
    """Those of the trees that were found and wait to be written."""
    node, voxels = tracing.sample_edges(trees.forest(cfg, work), work.source.shape)
    indices, of = np.unique(voxels // np.array(work.plan.write), axis=0, return_inverse=True)
    order, ends = np.argsort(of.ravel(), kind="stable"), np.cumsum(np.bincount(of.ravel()))
    parts = [slice(int(a), int(b)) for a, b in pairwise([0, *ends])]
    return Samples(node[order], voxels[order], dict(zip(map(tuple, indices.tolist()), parts, strict=True)))


def to_look(cfg: InferConfig, work: Work, found: Samples) -> list[Block]:
    """The blocks through which a tree runs and that have not been looked at again."""
    blocks = work.plan.second(work.source.shape)
    return [block for block in blocks if block.index in found.blocks and not _path(cfg, work, block).exists()]


def windows(found: Samples, plan: Plan, block: Block) -> int:
    """How many windows a second look at a block takes in each view: those that hold a sample or a voxel next to one."""
    voxels = found.voxels[found.blocks[block.index]] - np.array(block.read.start)
    window, step = np.array(plan.window), np.array(plan.step)
    last = np.maximum(-((window - np.array(block.read.shape)) // step), 0)
    low, high = np.clip(-((window - voxels) // step), 0, last), np.clip((voxels + 1) // step, 0, last)
    held = np.zeros(last + 1, dtype=bool)
    for offset in np.ndindex(*(np.max(high - low, axis=0) + 1)):
        held[tuple(np.minimum(low + np.array(offset), high).T)] = True
    return int(np.count_nonzero(held))


def look(cfg: InferConfig, job: Job, work: Work, found: Samples, block: Block, seen: Callable[[int], None]) -> None:
    """Keep the confidence at the samples in one block in every mirrored view: nodes [n], values [K, n]."""
    mine = found.blocks[block.index]
    voxels, shape = found.voxels[mine], work.source.shape
    nodes, place = np.unique(found.node[mine], return_inverse=True)
    image, where = work.source.read(block.read), _around(voxels, block.read)
    values = np.ones((len(cfg.flips), len(nodes)))
    for row, name in zip(values, cfg.flips, strict=True):
        flip = [axis for axis, on in enumerate(parse_orientation(name).flips) if on]
        probability = quantised(job.predict(image, seen, flip, where))

        def read(box: Box, probability: NDArray[np.uint8] = probability) -> NDArray[np.uint8]:
            return probability[box.relative_to(block.read.start).slices]

        np.minimum.at(row, place, tracing.read_neighborhood_max(voxels, read, shape))
    with files.atomic(_path(cfg, work, block)) as part, part.open("wb") as handle:
        np.savez(handle, nodes=nodes, values=values)


def looked(cfg: InferConfig, work: Work, tree: Tree) -> Floats:
    """[K, N] confidence of each node in each mirrored view, as tracing.measure_confidence has it in the plain one."""
    found = np.ones((len(cfg.flips), len(tree)))
    for block in work.plan.second(work.source.shape) if cfg.flips else []:
        if (path := _path(cfg, work, block)).exists():
            with np.load(path) as kept:
                nodes = kept["nodes"]
                found[:, nodes] = np.minimum(found[:, nodes], kept["values"])
    return found


def _around(voxels: Ints, box: Box) -> NDArray[np.bool_]:
    """[Z, Y, X] of a box: whether a voxel is one of `voxels` [M, 3] or next to one."""
    where = np.zeros(box.shape, dtype=bool)
    for offset in np.ndindex(3, 3, 3):
        places = np.clip(voxels - np.array(box.start) + np.array(offset) - 1, 0, np.array(box.shape) - 1)
        where[tuple(places.T)] = True
    return where


def _path(cfg: InferConfig, work: Work, block: Block) -> Path:
    return trees.scratch(cfg, work) / f"view_{'_'.join(map(str, block.index))}.npz"
