"""Mask against mask: overlap, centreline overlap and surface distance, each by a named definition.

A gold voxel of value 255 is unlabelled: it counts for no metric, whatever the prediction says there.
Rules for empty masks, everywhere: both empty agree (scores 1, distances 0); one empty is a miss (scores 0, distances
the diagonal of the volume), so that a failure can never leave a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.constants import UNLABELLED
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.core.types import Array
from hpc_neuro.metrics.surface import Mask, SurfacePair, point_distances, surface_points


@dataclass(frozen=True)
class Counts:
    """Labelled voxels that agree or not. Counts of disjoint blocks add up to the counts of the volume."""

    both: int = 0  # foreground in the prediction and in gold
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
        return _share(2 * self.both, 2 * self.both + self.predicted_only + self.gold_only, 1.0)

    @property
    def precision(self) -> float:
        """|P and G| / |P|."""
        return _share(self.both, self.both + self.predicted_only, 0.0 if self.gold_only else 1.0)

    @property
    def recall(self) -> float:
        """|P and G| / |G|."""
        return _share(self.both, self.both + self.gold_only, 0.0 if self.predicted_only else 1.0)

    @property
    def missed(self) -> bool:
        """Whether exactly one of the two is empty."""
        predicted, gold = self.both + self.predicted_only, self.both + self.gold_only
        return (predicted == 0) != (gold == 0)


def counts(predicted: Array, gold: Array) -> Counts:
    """Counts of two masks [Z, Y, X]: non-zero is foreground, gold 255 is unlabelled. ValueError when shapes differ."""
    p, g = labelled(predicted, gold)
    both = int(np.count_nonzero(p & g))
    return Counts(both, int(np.count_nonzero(p)) - both, int(np.count_nonzero(g)) - both)


def counts_streamed(
    predicted: Callable[[Box], Array], gold: Callable[[Box], Array], shape: Shape, block: Shape = (256, 256, 256)
) -> Counts:
    """The same for volumes beyond memory: both masks are read block by block."""
    total = Counts()
    for tile in tile_volume(shape, block):
        total += counts(predicted(tile.write), gold(tile.write))
    return total


def labelled(predicted: Array, gold: Array) -> tuple[Mask, Mask]:
    """Both masks as booleans, False where gold is unlabelled. ValueError when shapes differ."""
    if predicted.shape != gold.shape:
        raise ValueError(f"the prediction has shape {predicted.shape}, gold has {gold.shape}")
    p, g = predicted.astype(bool, copy=False), gold.astype(bool, copy=False)
    if gold.dtype != np.bool_:
        known = gold != UNLABELLED
        p, g = p & known, g & known
    return p, g


def dice(predicted: Array, gold: Array) -> float:
    """Foreground Dice of two masks [Z, Y, X]."""
    return counts(predicted, gold).dice


def precision(predicted: Array, gold: Array) -> float:
    """Share of the predicted voxels that are gold."""
    return counts(predicted, gold).precision


def recall(predicted: Array, gold: Array) -> float:
    """Share of the gold voxels that are predicted."""
    return counts(predicted, gold).recall


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces in um, by the definitions people publish."""

    hd95: float
    """The larger of the two directed 95th percentiles (linear interpolation), as MONAI computes it."""
    hd95_pooled: float
    """The 95th percentile of the distances of both directions in one set, as medpy computes it."""
    assd: float
    """Average symmetric surface distance: the mean of the two directed means, as in medpy."""
    missed: bool
    """One mask is empty: the three numbers are the diagonal of the volume."""


def surface_metrics(predicted: Array, gold: Array, voxel_size: VoxelSize) -> SurfaceDistances:
    """HD95 in both definitions and the average surface distance of two masks [Z, Y, X], in um.

    Surfaces are the foreground voxels with one of six neighbours outside; distances run between voxel centres.
    """
    p, g = labelled(predicted, gold)
    empty = _empty_rule(bool(p.any()), bool(g.any()), p.shape, voxel_size)
    return empty or _surface_metrics(*SurfacePair(p, g, voxel_size).distances())


def surface_metrics_streamed(
    predicted: Callable[[Box], Array],
    gold: Callable[[Box], Array],
    shape: Shape,
    voxel_size: VoxelSize,
    block: Shape = (256, 256, 256),
) -> SurfaceDistances:
    """The same for volumes beyond memory: only the surface voxels are held, at about 50 bytes each."""
    of_p = surface_points(lambda box: labelled(predicted(box), gold(box))[0], shape, block)
    of_g = surface_points(lambda box: labelled(predicted(box), gold(box))[1], shape, block)
    empty = _empty_rule(len(of_p) > 0, len(of_g) > 0, shape, voxel_size)
    return empty or _surface_metrics(*point_distances(of_p, of_g, voxel_size))


def hd95(predicted: Array, gold: Array, voxel_size: VoxelSize = (1.0, 1.0, 1.0)) -> float:
    """95 % Hausdorff distance in um: the larger of the two directed 95th percentiles (MONAI's definition)."""
    p, g = labelled(predicted, gold)
    empty = _empty_rule(bool(p.any()), bool(g.any()), p.shape, voxel_size)
    return empty.hd95 if empty else max(SurfacePair(p, g, voxel_size).percentiles(95.0))


def hd95_pooled(predicted: Array, gold: Array, voxel_size: VoxelSize = (1.0, 1.0, 1.0)) -> float:
    """95 % Hausdorff distance in um: the percentile of both directions pooled (medpy's definition)."""
    return surface_metrics(predicted, gold, voxel_size).hd95_pooled


def diagonal(shape: tuple[int, ...], voxel_size: VoxelSize) -> float:
    """Length of a volume's diagonal, in um."""
    return math.dist((0, 0, 0), [n * s for n, s in zip(shape, voxel_size, strict=True)])


def _surface_metrics(forth: NDArray[np.float64], back: NDArray[np.float64]) -> SurfaceDistances:
    return SurfaceDistances(
        hd95=float(max(np.percentile(forth, 95), np.percentile(back, 95))),
        hd95_pooled=float(np.percentile(np.concatenate([forth, back]), 95)),
        assd=float((forth.mean() + back.mean()) / 2),
        missed=False,
    )


def _empty_rule(predicted: bool, gold: bool, shape: tuple[int, ...], voxel_size: VoxelSize) -> SurfaceDistances | None:
    """The answer when a mask is empty, None when neither is."""
    if predicted and gold:
        return None
    value = 0.0 if predicted == gold else diagonal(shape, voxel_size)
    return SurfaceDistances(value, value, value, missed=predicted != gold)


def _share(part: float, whole: float, empty: float) -> float:
    return float(part / whole) if whole else empty


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
