"""Centerline Dice, and centerlines of masks that lose no connected component."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import cc3d
import numpy as np
from skimage.morphology import skeletonize

from hpc_neuro.core.geometry import Box, Shape, tile_volume
from hpc_neuro.core.types import Array
from hpc_neuro.metrics.metric import Comparison, Metric, divide, harmonic_mean
from hpc_neuro.metrics.surface import Mask, find_extent
from hpc_neuro.metrics.voxel import drop_unlabelled, read_masks

_SPECK = 8
"""[voxel] A smaller component is represented by one voxel."""


def skeletonize_mask(mask: Mask) -> Mask:
    """One voxel thin centerline of a mask [Z, Y, X]: thinning (Lee, Kashyap and Chu 1994, as in scikit-image).

    Every connected component (26 neighbors) has a centerline. Thinning alone removes some components to their last
    voxel, such as a straight cable of even width, which is its own mirror image: those are thinned again without their
    layer on one side, and specks of fewer than 8 voxels keep one.
    """
    skeleton = np.zeros_like(mask)
    box = find_extent(mask)
    if not box.size:
        return skeleton

    # Padded, because cc3d fails on some boxes that are one voxel high and wide.
    cropped = np.pad(mask[box.slices], 1)
    lines = skeletonize(cropped).astype(bool)
    labels = cc3d.connected_components(cropped, connectivity=26)
    statistics = cc3d.statistics(labels)

    # A component that no line runs through was thinned away; label 0 is the background.
    is_lost = np.ones(len(statistics["voxel_counts"]), dtype=bool)
    is_lost[0] = is_lost[labels[lines]] = False
    for number in np.flatnonzero(is_lost).tolist():
        bounds = statistics["bounding_boxes"][number]
        component = labels[bounds] == number
        is_speck = statistics["voxel_counts"][number] < _SPECK
        lines[bounds] |= _keep_one_voxel(component) if is_speck else _skeletonize_trimmed(component)

    # Take the padding off again.
    skeleton[box.slices] = lines[1:-1, 1:-1, 1:-1]

    return skeleton


def _skeletonize_trimmed(component: Mask) -> Mask:
    """The centerline of a component that thinning removes whole: of its rest without one layer, else one voxel."""
    # Trim along all three axes first, then along fewer.
    for trims in sorted(itertools.product((0, 1), repeat=3), reverse=True):
        # A voxel stays where its next one along the axis is in the component, which removes the last layer.
        rest = component.copy()
        for axis in np.flatnonzero(trims).tolist():
            along = np.moveaxis(rest, axis, 0)
            along[:-1] &= along[1:].copy()
            along[-1] = False

        # An odd width has a middle, so thinning now leaves a line.
        lines: Mask = skeletonize(rest).astype(bool)
        if lines.any():
            return lines
    return _keep_one_voxel(component)


def _keep_one_voxel(component: Mask) -> Mask:
    """The first voxel of a component."""
    kept = np.zeros_like(component)
    kept.ravel()[component.argmax()] = True
    return kept


@dataclass(frozen=True)
class _SkeletonCounts:
    """Voxels of both masks and skeletons. Counts of disjoint blocks add up to the counts of the volume."""

    has_predicted: bool = False
    has_gold: bool = False
    predicted_skeleton: int = 0
    predicted_in_gold: int = 0
    gold_skeleton: int = 0
    gold_in_predicted: int = 0

    def __add__(self, other: _SkeletonCounts) -> _SkeletonCounts:
        return _SkeletonCounts(
            self.has_predicted or other.has_predicted,
            self.has_gold or other.has_gold,
            self.predicted_skeleton + other.predicted_skeleton,
            self.predicted_in_gold + other.predicted_in_gold,
            self.gold_skeleton + other.gold_skeleton,
            self.gold_in_predicted + other.gold_in_predicted,
        )

    @property
    def cldice(self) -> float:
        """clDice, by the rule for empty masks where one is empty."""
        if not self.has_predicted or not self.has_gold:
            return float(self.has_predicted == self.has_gold)
        return harmonic_mean(
            divide(self.predicted_in_gold, self.predicted_skeleton, empty=0.0),
            divide(self.gold_in_predicted, self.gold_skeleton, empty=0.0),
        )


def cldice(predicted: Array, gold: Array) -> float:
    """Centerline Dice: the harmonic mean of the share of the predicted skeleton inside gold and of the gold skeleton
    inside the prediction.

    Source: Shit et al., CVPR 2021, with hard masks.
    """
    p, g = drop_unlabelled(predicted, gold)
    return _count_skeletons(p, g, Box.whole(p.shape)).cldice


def cldice_blockwise(
    predicted: Callable[[Box], Array],
    gold: Callable[[Box], Array],
    shape: Shape,
    block: Shape = (256, 256, 256),
    halo: Shape = (32, 32, 32),
) -> float:
    """The same for volumes beyond memory: each block is thinned with `halo` voxels around it.

    Equal to `cldice` as long as thinning does not reach farther than the halo (neurites thinner than it).
    """
    # The halo gives a block the context that thinning needs; only voxels of the block itself are counted.
    total = _SkeletonCounts()
    for tile in tile_volume(shape, block, halo):
        p, g = drop_unlabelled(predicted(tile.read), gold(tile.read))
        total += _count_skeletons(p, g, tile.write.relative_to(tile.read.start))
    return total.cldice


def _count_skeletons(predicted: Mask, gold: Mask, own: Box) -> _SkeletonCounts:
    """Counts inside the box `own` of masks [Z, Y, X] that are skeletonized whole."""
    # Skeletonize before cropping: the crop's faces would end lines that go on.
    predicted_lines = skeletonize_mask(predicted)[own.slices]
    gold_lines = skeletonize_mask(gold)[own.slices]
    p, g = predicted[own.slices], gold[own.slices]

    return _SkeletonCounts(
        has_predicted=bool(p.any()),
        has_gold=bool(g.any()),
        predicted_skeleton=int(predicted_lines.sum()),
        predicted_in_gold=int((predicted_lines & g).sum()),
        gold_skeleton=int(gold_lines.sum()),
        gold_in_predicted=int((gold_lines & p).sum()),
    )


def _compare_centerlines(comparison: Comparison) -> float:
    """clDice of a comparison, whole or block by block."""
    if comparison.fits_in_memory:
        return cldice(*comparison.once(read_masks))
    return cldice_blockwise(comparison.predicted_mask, comparison.gold_mask, comparison.shape)


CLDICE = Metric(
    key="cldice",
    title="clDice",
    unit="",
    direction="higher",
    digits=3,
    definition=(
        "Centerline Dice (Shit et al. 2021): harmonic mean of the share of the predicted skeleton inside the gold mask "
        "and of the gold skeleton inside the predicted mask; skeletons by thinning (Lee et al. 1994), of which every "
        "connected component keeps a line."
    ),
    compute=_compare_centerlines,
    main=True,
)
