"""Centrelines of masks, of which no part is lost."""

from __future__ import annotations

import itertools

import cc3d
import numpy as np
from skimage.morphology import skeletonize

from hpc_neuro.metrics.surface import Mask, extent

_SPECK = 8  # voxels; a smaller part has no line to speak of


def skeleton(mask: Mask) -> Mask:
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
