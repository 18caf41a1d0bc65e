"""Volumes with known neurites."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.tracing import TraceConfig
from hpc_neuro.tracing.block_skeleton import list_trace_blocks, skeletonize_block
from hpc_neuro.tracing.probability import Floats
from hpc_neuro.tracing.voxel_graph import VoxelGraph, merge_block_skeletons


def paint_points(volume: NDArray[np.float32], points: Floats, radius: float, value: float = 1.0) -> None:
    """Raise `volume` to `value` within `radius` of each of the points (z y x voxels)."""
    reach = int(np.ceil(radius))
    steps = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))
    for point in points:
        near = np.rint(point).astype(int) + steps
        near = near[np.linalg.norm(near - point, axis=1) <= radius]
        near = near[np.all((near >= 0) & (near < volume.shape), axis=1)]
        index = tuple(near.T)
        volume[index] = np.maximum(volume[index], value)


def sample_line(*corners: tuple[float, float, float], step: float = 0.5) -> Floats:
    """Points along straight pieces."""
    parts = []
    for a, b in itertools.pairwise(np.array(corners, dtype=float)):
        count = int(np.ceil(np.linalg.norm(b - a) / step))
        parts.append(a + (b - a) * (np.arange(count + 1) / count)[:, None])
    return np.concatenate(parts)


def paint_tree(tree: Tree, shape: Shape, radius: float = 2.0) -> NDArray[np.float32]:
    """The tree painted with one radius, as 0 and 1."""
    volume = np.zeros(shape, dtype=np.float32)
    paint_points(volume, morphology.resample_tree(tree, 0.5).points, radius)
    return volume


def grow_crooked_tree(seed: int, shape: Shape, branches: int) -> Tree:
    """A random tree of smooth branches that keep clear of one another and of the border."""
    rng = np.random.default_rng(seed)
    size = np.array(shape)
    points = [np.array([size[0] / 2, size[1] / 2, 6.0])]
    parents = [-1]
    _grow(rng, points, parents, 0, np.array([0.0, 0.0, 1.0]), size[2] - 14, size, 0.03)
    trunk = len(points)
    for _ in range(200 * branches):
        if branches == 0:
            break
        start = int(rng.integers(6, trunk - 6))
        away = rng.normal(size=3)
        away[2] *= 0.3
        made: list[Floats] = list(points)
        above = list(parents)
        _grow(rng, made, above, start, away / np.linalg.norm(away), int(rng.integers(18, 40)), size, 0.1)
        fresh, old = np.array(made[len(points) :]), np.array(points)
        if len(fresh) < 9:
            continue
        far = np.linalg.norm(fresh[:, None] - old, axis=2)
        fork = np.array([old[i] for i in set(parents[trunk:]) & set(range(trunk))] or [[1e9] * 3])
        if far[5:].min() < 7 or np.linalg.norm(fork - old[start], axis=1).min() < 12:
            continue
        points, parents, branches = made, above, branches - 1
    assert branches == 0, "the volume is too small for so many branches"
    return morphology.build_tree(np.array(points), np.array(parents))


def _grow(
    rng: np.random.Generator,
    points: list[Floats],
    parents: list[int],
    start: int,
    direction: Floats,
    length: int,
    size: NDArray[np.int64],
    bend: float,
) -> None:
    """Append a smooth branch in steps of two voxels; it ends early at the border."""
    above = start
    for _ in range(length // 2):
        direction = direction + rng.normal(size=3) * bend
        direction /= np.linalg.norm(direction)
        point = points[above] + 2 * direction
        if np.any(point < 5) or np.any(point > size - 6):
            return
        points.append(point)
        parents.append(above)
        above = len(points) - 1


def build_voxel_graph(
    array: NDArray[np.generic], cfg: TraceConfig, voxel_size: VoxelSize = (1, 1, 1)
) -> VoxelGraph | None:
    """The voxel graph of a probability, made from the blocks of `cfg`."""
    z, y, x = array.shape

    def read(box: Box) -> NDArray[np.generic]:
        return array[box.slices]

    blocks = [skeletonize_block(read, (z, y, x), box, voxel_size, cfg) for box in list_trace_blocks((z, y, x), cfg)]
    skeletons = [block for block in blocks if block is not None]
    return merge_block_skeletons(skeletons, read, (z, y, x), cfg.spacing(voxel_size), cfg.floor, cfg.min_voxels)
