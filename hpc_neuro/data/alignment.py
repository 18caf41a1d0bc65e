"""Does a tree lie on the neuron? Intensity percentile along it, against flips, axis swaps and the other unit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.intensity import Histogram, ReadBox, iter_slabs

_MAX_POINTS = 4000
"""Points along the cable at which intensities are compared, about."""
_MAX_OUTSIDE = 0.05
"""A change that moves more than this share of the cable out of the image is no candidate."""
_MARGIN = 0.10
"""By how much another orientation must fit better, in mean percentile (0 to 1)."""


@dataclass(frozen=True)
class Fit:
    """How well a tree lies on bright voxels as given, and the best of its other orientations."""

    score: float
    """Mean intensity percentile along the cable, 0 to 1; a point outside the image counts 0."""
    best_score: float
    """The same for the best other orientation."""
    best_change: str
    """Words for the best other orientation, such as "y flipped"."""

    @property
    def is_misaligned(self) -> bool:
        """Whether another orientation fits clearly better."""
        return self.best_score > self.score + _MARGIN


def outside_fraction(tree: Tree, shape: Shape) -> float:
    """The share of the nodes of a tree (voxels) that lie more than half a voxel beyond the image."""
    if not len(tree):
        return 0.0
    return float(np.mean(~_is_inside(tree.points, shape)))


def list_changes_inside(tree: Tree, shape: Shape, size: VoxelSize, unit: str) -> list[str]:
    """The changes (other unit, axes swapped) under which a tree that lies outside the image would lie inside."""
    return [name for name in _build_candidates(tree.points, shape, size, unit) if name and "flipped" not in name]


def compare_orientations(tree: Tree, read: ReadBox, shape: Shape, counts: Histogram, size: VoxelSize, unit: str) -> Fit:
    """Compare `tree` (voxels, taken to be given in `unit`, "voxel" or "um") with its alternatives in one pass.

    Percentiles are mid-ranks of the whole image's intensities, so half of an all-black background scores 0.5.
    """
    # A stand-in outside the image scores 0 where no alternative stays inside.
    points = _sample_cable(tree)
    others = _build_candidates(points, shape, size, unit) or {"none": np.full_like(points, -10.0)}
    candidates = {"": points, **others}

    # All candidates are looked up in one pass over the image.
    places = np.concatenate(list(candidates.values()))
    ranks = np.zeros(len(places))
    inside = _is_inside(places, shape)
    voxels = np.rint(places[inside]).astype(np.int64)
    ranks[inside] = counts.percentile_rank(read_voxels(voxels, read, shape, counts))

    parts = np.split(ranks, len(candidates))
    scores = {name: float(part.mean()) for name, part in zip(candidates, parts, strict=True)}
    score = scores.pop("")
    best = max(scores, key=lambda name: scores[name])
    return Fit(score, scores[best], best)


def read_voxels(voxels: NDArray[np.int64], read: ReadBox, shape: Shape, counts: Histogram) -> NDArray[np.generic]:
    """[N, 3] voxels inside the image -> [N] their values, in one streamed pass."""
    voxels = np.clip(voxels, 0, np.asarray(shape) - 1)
    values = np.zeros(len(voxels), dtype=counts.dtype)

    for box in iter_slabs(shape, counts.dtype.itemsize):
        rows = np.flatnonzero(np.all((voxels >= box.start) & (voxels < box.stop), axis=1))
        # Slabs without a voxel are not read.
        if len(rows):
            z, y, x = (voxels[rows] - np.asarray(box.start)).T
            values[rows] = read(box)[z, y, x]
    return values


def _sample_cable(tree: Tree) -> NDArray[np.float64]:
    """Points evenly along the cable, at most some thousands."""
    step = max(1.0, morphology.length(tree) / _MAX_POINTS)
    return morphology.resample_tree(tree, step).points


def _build_candidates(
    points: NDArray[np.float64], shape: Shape, size: VoxelSize, unit: str
) -> dict[str, NDArray[np.float64]]:
    """The cable flipped, axis-swapped, both, and read in the other unit; those that stay in the image."""
    last = np.asarray(shape) - 1
    other = "um" if unit == "voxel" else "voxel"
    converted = points / np.asarray(size) if unit == "voxel" else points * np.asarray(size)
    # With voxels of 1 um both units are the same.
    candidates = {} if np.allclose(converted, points) else {f"swc_unit={other}": converted}

    for order in itertools.permutations(range(3)):
        swapped = points[:, order]
        for flips in itertools.product((False, True), repeat=3):
            words = _describe_change(order, flips)
            if words:
                candidates[words] = np.where(flips, last - swapped, swapped)
    return {name: p for name, p in candidates.items() if np.mean(~_is_inside(p, shape)) <= _MAX_OUTSIDE}


def _describe_change(order: tuple[int, ...], flips: tuple[bool, ...]) -> str:
    """Such as "axes z and y swapped, then x flipped"; "" for the identity."""
    names = "zyx"
    moved = [names[i] for i in range(3) if order[i] != i]
    swap = f"axes {' and '.join(moved)} swapped" if len(moved) == 2 else ""
    if len(moved) == 3:
        swap = f"axes z y x read as {' '.join(names[i] for i in order)}"

    mirrored = [names[i] for i in range(3) if flips[i]]
    flip = f"{' and '.join(mirrored)} flipped" if mirrored else ""
    return ", then ".join(part for part in (swap, flip) if part)


def _is_inside(points: NDArray[np.float64], shape: Shape) -> NDArray[np.bool_]:
    """[N] whether each point lies in the image, with half a voxel around it."""
    inside: NDArray[np.bool_] = np.all((points >= -0.5) & (points <= np.asarray(shape) - 0.5), axis=1)
    return inside
