"""Centerline Dice, and the centerlines of masks of which no part is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cc3d
import numpy as np
from skimage.morphology import skeletonize

from hpc_neuro.core.geometry import Box, Shape, tile_volume
from hpc_neuro.core.types import Array
from hpc_neuro.metrics.surface import Mask, extent
from hpc_neuro.metrics.voxel import _harmonic, _share, labelled

_SPECK = 8  # voxels; a smaller part has no line to speak of


def skeletonize_mask(mask: Mask) -> Mask:
    """One voxel thin centreline of a mask [Z, Y, X]: thinning (Lee, Kashyap and Chu 1994, as in scikit-image).

    Every connected part (26 neighbours) has a centreline. Thinning alone removes some parts to their last voxel, such
    as a straight cable of even width, which is its own mirror image: those are thinned again without their layer on
    one side, and specks of fewer than 8 voxels keep one.
    """
    thin = np.zeros_like(mask)
    box = extent(mask)
    if not box.size:
        return thin
    inside = np.pad(mask[box.slices], 1)  # cc3d fails on some boxes that are one voxel high and wide
    lines = skeletonize(inside).astype(bool)
    parts = cc3d.connected_components(inside, connectivity=26)
    found = cc3d.statistics(parts)
    lost = np.ones(len(found["voxel_counts"]), dtype=bool)
    lost[0] = lost[parts[lines]] = False
    for number in np.flatnonzero(lost).tolist():
        place = found["bounding_boxes"][number]
        part = parts[place] == number
        lines[place] |= _again(part) if found["voxel_counts"][number] >= _SPECK else _one(part)
    thin[box.slices] = lines[1:-1, 1:-1, 1:-1]
    return thin


def _again(part: Mask) -> Mask:
    """The centreline of a part that thinning removes whole: of what is left of it after a shift, else one voxel."""
    for shift in sorted(itertools.product((0, 1), repeat=3), reverse=True):  # by all three axes first
        rest = part.copy()
        for axis in np.flatnonzero(shift).tolist():
            along = np.moveaxis(rest, axis, 0)
            along[:-1] &= along[1:].copy()
            along[-1] = False
        lines: Mask = skeletonize(rest).astype(bool)
        if lines.any():
            return lines
    return _one(part)


def _one(part: Mask) -> Mask:
    """The first voxel of a part."""
    kept = np.zeros_like(part)
    kept.ravel()[part.argmax()] = True
    return kept


def cldice(predicted: Array, gold: Array) -> float:
    """Centreline Dice: the harmonic mean of the share of the predicted skeleton inside gold and of the gold skeleton
    inside the prediction.

    Source: Shit et al., CVPR 2021, with hard masks.
    """
    p, g = labelled(predicted, gold)
    if not p.any() or not g.any():
        return float(p.any() == g.any())
    thin_p, thin_g = skeletonize_mask(p), skeletonize_mask(g)
    inside = _share(int((thin_p & g).sum()), int(thin_p.sum()), 0.0)
    found = _share(int((thin_g & p).sum()), int(thin_g.sum()), 0.0)
    return _harmonic(inside, found)


def cldice_streamed(
    predicted: Callable[[Box], Array],
    gold: Callable[[Box], Array],
    shape: Shape,
    block: Shape = (256, 256, 256),
    halo: Shape = (32, 32, 32),
) -> float:
    """The same for volumes beyond memory: each block is thinned with `halo` voxels around it.

    Equal to `cldice` as long as thinning does not reach farther than the halo (neurites thinner than it).
    """
    thin_p = thin_g = inside = found = 0
    any_p = any_g = False
    for tile in tile_volume(shape, block, halo):
        p, g = labelled(predicted(tile.read), gold(tile.read))
        own = tile.write.relative_to(tile.read.start).slices
        any_p, any_g = any_p or bool(p[own].any()), any_g or bool(g[own].any())
        lines_p, lines_g = skeletonize_mask(p)[own], skeletonize_mask(g)[own]
        thin_p, thin_g = thin_p + int(lines_p.sum()), thin_g + int(lines_g.sum())
        inside, found = inside + int((lines_p & g[own]).sum()), found + int((lines_g & p[own]).sum())
    if not any_p or not any_g:
        return float(any_p == any_g)
    return _harmonic(_share(inside, thin_p, 0.0), _share(found, thin_g, 0.0))
