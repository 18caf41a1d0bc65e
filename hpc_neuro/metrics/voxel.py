"""Mask against mask: overlap and surface distance, each by a named definition.

A gold voxel of value 255 is unlabelled: it counts for no metric, whatever the prediction is there.
Rules for empty masks, everywhere: two empty masks agree (scores 1, distances 0); one empty mask is a miss (scores 0,
distances the diagonal of the volume), so that no failure leaves a mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.core.types import Array
from hpc_neuro.metrics.metric import Comparison, Metric, divide, measure_diagonal
from hpc_neuro.metrics.surface import Mask, SurfacePair, find_surface_points, measure_point_distances

_BLOCK: Shape = (256, 256, 256)
"""[voxel] Blocks in which volumes beyond memory are read."""


@dataclass(frozen=True)
class Counts:
    """Labelled voxels that agree or not. Counts of disjoint blocks add up to the counts of the volume."""

    both: int = 0
    """Foreground in the prediction and in gold."""
    predicted_only: int = 0
    gold_only: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.both + other.both,
            self.predicted_only + other.predicted_only,
            self.gold_only + other.gold_only,
        )

    @property
    def dice(self) -> float:
        """2 |P and G| / (|P| + |G|), foreground only."""
        return divide(2 * self.both, 2 * self.both + self.predicted_only + self.gold_only, empty=1.0)

    @property
    def precision(self) -> float:
        """|P and G| / |P|."""
        return divide(self.both, self.both + self.predicted_only, empty=0.0 if self.gold_only else 1.0)

    @property
    def recall(self) -> float:
        """|P and G| / |G|."""
        return divide(self.both, self.both + self.gold_only, empty=0.0 if self.predicted_only else 1.0)

    @property
    def is_miss(self) -> bool:
        """Whether exactly one of the two masks is empty."""
        predicted, gold = self.both + self.predicted_only, self.both + self.gold_only
        return (predicted == 0) != (gold == 0)


def drop_unlabelled(predicted: Array, gold: Array) -> tuple[Mask, Mask]:
    """Return both masks as booleans, False where gold is unlabelled. Raises ValueError when shapes differ."""
    if predicted.shape != gold.shape:
        raise ValueError(f"the prediction has shape {predicted.shape}, gold has {gold.shape}")

    # A boolean mask has no room for the value 255, so all of it is labelled.
    p, g = predicted.astype(bool, copy=False), gold.astype(bool, copy=False)
    if gold.dtype != np.bool_:
        labelled = gold != UNLABELED
        p, g = p & labelled, g & labelled

    return p, g


def read_masks(comparison: Comparison) -> tuple[Mask, Mask]:
    """Read the whole masks of a comparison that fits in memory, without unlabelled voxels."""
    whole = Box.whole(comparison.shape)
    return drop_unlabelled(comparison.predicted_mask(whole), comparison.gold_mask(whole))


def count_voxels(predicted: Array, gold: Array) -> Counts:
    """Count two masks [Z, Y, X]: non-zero is foreground, gold 255 is unlabelled. ValueError when shapes differ."""
    # The three disjoint counts give every overlap score.
    p, g = drop_unlabelled(predicted, gold)
    both = int(np.count_nonzero(p & g))
    return Counts(both, int(np.count_nonzero(p)) - both, int(np.count_nonzero(g)) - both)


def count_voxels_blockwise(
    predicted: Callable[[Box], Array], gold: Callable[[Box], Array], shape: Shape, block: Shape = _BLOCK
) -> Counts:
    """Count two masks of a volume beyond memory, read block by block."""
    total = Counts()
    for tile in tile_volume(shape, block):
        total += count_voxels(predicted(tile.write), gold(tile.write))
    return total


def dice(predicted: Array, gold: Array) -> float:
    """Foreground Dice of two masks [Z, Y, X]."""
    return count_voxels(predicted, gold).dice


def precision(predicted: Array, gold: Array) -> float:
    """Share of the predicted voxels that are gold."""
    return count_voxels(predicted, gold).precision


def recall(predicted: Array, gold: Array) -> float:
    """Share of the gold voxels that are predicted."""
    return count_voxels(predicted, gold).recall


def _count(comparison: Comparison) -> Counts:
    """Count the voxels of a comparison, whole or block by block."""
    if comparison.fits_in_memory:
        return count_voxels(*comparison.once(read_masks))
    return count_voxels_blockwise(comparison.predicted_mask, comparison.gold_mask, comparison.shape)


DICE = Metric(
    key="dice",
    title="Dice",
    unit="",
    direction="higher",
    digits=3,
    definition="Foreground Dice, 2|P∩G| / (|P|+|G|), over labelled voxels; background is never averaged in.",
    compute=lambda comparison: comparison.once(_count).dice,
    main=True,
)

OVERLAP_METRICS = (
    Metric(
        key="voxel_precision",
        title="Voxel precision",
        unit="",
        direction="higher",
        digits=3,
        definition="Share of the predicted voxels that are gold.",
        compute=lambda comparison: comparison.once(_count).precision,
    ),
    Metric(
        key="voxel_recall",
        title="Voxel recall",
        unit="",
        direction="higher",
        digits=3,
        definition="Share of the gold voxels that are predicted.",
        compute=lambda comparison: comparison.once(_count).recall,
    ),
    Metric(
        key="mask_missed",
        title="Mask missed",
        unit="",
        direction="lower",
        digits=0,
        definition="1 where exactly one of the two masks is empty.",
        compute=lambda comparison: float(comparison.once(_count).is_miss),
    ),
)


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces in um, by published definitions."""

    hd95: float
    """The larger of the two directed 95th percentiles (linear interpolation), as MONAI computes it."""
    hd95_pooled: float
    """The 95th percentile of the distances of both directions in one set, as medpy computes it."""
    assd: float
    """Average symmetric surface distance: the mean of the distances of both directions in one set, as medpy (since 0.5)
    computes it. The larger surface has the larger weight."""
    is_miss: bool
    """One mask is empty: the three numbers are the diagonal of the volume."""


def compute_surface_distances(predicted: Array, gold: Array, voxel_size: VoxelSize) -> SurfaceDistances:
    """HD95 by both definitions and the average surface distance of two masks [Z, Y, X], in um.

    Surfaces are the foreground voxels with one of six neighbors outside; distances run between voxel centers.
    """
    p, g = drop_unlabelled(predicted, gold)
    empty = _apply_empty_rule(bool(p.any()), bool(g.any()), p.shape, voxel_size)
    return empty or _summarize_distances(*SurfacePair(p, g, voxel_size).measure_distances())


def compute_surface_distances_blockwise(
    predicted: Callable[[Box], Array],
    gold: Callable[[Box], Array],
    shape: Shape,
    voxel_size: VoxelSize,
    block: Shape = _BLOCK,
) -> SurfaceDistances:
    """The same for volumes beyond memory: only the surface voxels are in memory, at about 50 bytes each."""
    predicted_points = find_surface_points(lambda box: drop_unlabelled(predicted(box), gold(box))[0], shape, block)
    gold_points = find_surface_points(lambda box: drop_unlabelled(predicted(box), gold(box))[1], shape, block)
    empty = _apply_empty_rule(len(predicted_points) > 0, len(gold_points) > 0, shape, voxel_size)
    return empty or _summarize_distances(*measure_point_distances(predicted_points, gold_points, voxel_size))


def hd95(predicted: Array, gold: Array, voxel_size: VoxelSize = (1.0, 1.0, 1.0)) -> float:
    """95 % Hausdorff distance in um: the larger of the two directed 95th percentiles (MONAI's definition)."""
    p, g = drop_unlabelled(predicted, gold)
    empty = _apply_empty_rule(bool(p.any()), bool(g.any()), p.shape, voxel_size)
    return empty.hd95 if empty else max(SurfacePair(p, g, voxel_size).measure_percentiles(95.0))


def hd95_pooled(predicted: Array, gold: Array, voxel_size: VoxelSize = (1.0, 1.0, 1.0)) -> float:
    """95 % Hausdorff distance in um: the percentile of both directions pooled (medpy's definition)."""
    return compute_surface_distances(predicted, gold, voxel_size).hd95_pooled


def _summarize_distances(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> SurfaceDistances:
    # MONAI keeps the directions apart, medpy pools them.
    return SurfaceDistances(
        hd95=float(max(np.percentile(forward, 95), np.percentile(backward, 95))),
        hd95_pooled=float(np.percentile(np.concatenate([forward, backward]), 95)),
        assd=float(np.concatenate([forward, backward]).mean()),
        is_miss=False,
    )


def _apply_empty_rule(
    has_predicted: bool, has_gold: bool, shape: tuple[int, ...], voxel_size: VoxelSize
) -> SurfaceDistances | None:
    """The distances when a mask is empty, None when neither is."""
    if has_predicted and has_gold:
        return None

    # No distance can be larger than the diagonal, so no failure looks better than a bad success.
    value = 0.0 if has_predicted == has_gold else measure_diagonal(shape, voxel_size)

    return SurfaceDistances(value, value, value, is_miss=has_predicted != has_gold)


def _compare_surfaces(comparison: Comparison) -> SurfaceDistances:
    """Surface distances of a comparison, whole or block by block."""
    if comparison.fits_in_memory:
        return compute_surface_distances(*comparison.once(read_masks), comparison.voxel_size)
    return compute_surface_distances_blockwise(
        comparison.predicted_mask, comparison.gold_mask, comparison.shape, comparison.voxel_size
    )


SURFACE_METRICS = (
    Metric(
        key="hd95_um",
        title="HD95",
        unit="µm",
        direction="lower",
        digits=2,
        definition=(
            "95 % Hausdorff distance, the larger of the two directed 95th percentiles between surface voxels "
            "(6-neighborhood), as MONAI computes it; anisotropic, in micrometers. One empty mask: the volume's "
            "diagonal."
        ),
        compute=lambda comparison: comparison.once(_compare_surfaces).hd95,
        main=True,
    ),
    Metric(
        key="hd95_pooled_um",
        title="HD95 pooled",
        unit="µm",
        direction="lower",
        digits=2,
        definition="95th percentile of the surface distances of both directions in one set, as medpy computes it.",
        compute=lambda comparison: comparison.once(_compare_surfaces).hd95_pooled,
    ),
    Metric(
        key="assd_um",
        title="ASSD",
        unit="µm",
        direction="lower",
        digits=2,
        definition=(
            "Average symmetric surface distance: mean of the surface distances of both directions in one set, as medpy "
            "(since 0.5) computes it."
        ),
        compute=lambda comparison: comparison.once(_compare_surfaces).assd,
    ),
)
