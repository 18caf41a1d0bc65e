"""Centrelines of masks, of which no part is lost."""

from __future__ import annotations

import itertools

import cc3d
import numpy as np
from scipy import ndimage
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
    inside = np.ascontiguousarray(mask[box.slices])
    lines = skeletonize(inside).astype(bool)
    parts = cc3d.connected_components(inside, connectivity=26)
    sizes = np.bincount(parts.ravel())
    lost = sizes > 0
    lost[parts[lines]] = lost[0] = False
    if lost.any():
        at = np.flatnonzero((lost & (sizes < _SPECK))[parts])
        lines.ravel()[at[np.unique(parts.ravel()[at], return_index=True)[1]]] = True
        places = ndimage.find_objects(parts)
        for number in np.flatnonzero(lost & (sizes >= _SPECK)).tolist():
            lines[places[number - 1]] |= _again(parts[places[number - 1]] == number)
    thin[box.slices] = lines
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
    lines = np.zeros_like(part)
    lines[tuple(np.argwhere(part)[0])] = True
    return lines
