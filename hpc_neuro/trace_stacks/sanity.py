"""Warnings in words, where the figures of a trace say that its trees cannot be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.trace_stacks.tracer import LEAST_SEEN, TraceFigures

_MOST_MASK = 0.06
"""Share of the volume that neurites fill at most."""
_LEAST_CONTRAST = 6.0
"""[standard deviation of the background] Median brightness of neurites, at least."""
_MOST_SPECKS = 0.1
"""Share of the foreground in specks, at most."""
_LEAST_KEPT = 0.5
"""Share of the cable that hangs together in the trees, at least."""
_LEAST_AGREEMENT = 0.6
"""F1 against the tree of a higher level, at least."""
_MOST_TIPS = 12.0
"""[per 100 voxels of cable] Ends of branches, at most."""


_LEAST_CABLE = 30.0
"""[voxel] Cable of trees, at least; without a root shorter pieces are dropped as specks."""
_WIDTHS_UM = (0.05, 30.0)
"""[um] Neurites are so wide under a light microscope, with its blur."""
_MOST_LABELS = 8
"""An image of so few values is one of labels."""
_USUAL_MASK = 0.01
"""Share of the volume that neurites usually fill."""
_MASK_WEIGHT = 0.3
"""Doubt for each factor of ten above the usual share."""
NO_TREE_DOUBT = 4.0
"""Doubt of a trace without a tree, above all others."""


def measure_doubt(figures: TraceFigures) -> float:
    """How doubtful the trees are, from about 0 to 4: traces with more doubt are more often bad.

    The sum of what a second opinion does not share, of the cable that hardly reaches its level, of a foreground that
    fills more than neurites do, and with a student of the foreground that it does not see. It ranks traces and is no
    probability (`python -m tools.bench.trace_warnings`).
    """
    if not figures.trees or figures.agreement is None or figures.cable < _LEAST_CABLE:
        return NO_TREE_DOUBT
    unseen = 0.0 if figures.seen_share is None else 1 - figures.seen_share
    excess = _MASK_WEIGHT * math.log10(max(figures.mask_share, 1e-4) / _USUAL_MASK)
    return round(max(1 - figures.agreement + figures.weak_share + unseen + excess, 0.0), 3)


def list_warnings(figures: TraceFigures, is_inverted: bool, has_student: bool = False) -> list[str]:
    """What a person must know before using the trees; [] where nothing is suspicious."""
    if not figures.trees:
        return ["nothing that looks like a neurite was traced; is it the right channel, and is it in focus?"]

    # A student that knows noise may see through it.
    advice = "" if has_student else "; compare with model=bundled"
    warnings = []
    if figures.cable < _LEAST_CABLE:
        warnings.append(
            f"the trees hold only {figures.cable:.0f} voxels of cable: the root may lie on a speck, or beside a break; "
            "give another root, or trace without one"
        )
    if is_inverted:
        warnings.append("the image is dark on bright and was traced inverted; if it is not, give another channel")
    if figures.mask_share > _MOST_MASK:
        warnings.append(
            f"the foreground fills {figures.mask_share:.1%} of the volume, neurites rarely fill {_MOST_MASK:.0%}: "
            "tissue, nuclei or haze may be traced as neurites"
        )
    if figures.contrast_to_noise is not None and figures.contrast_to_noise < _LEAST_CONTRAST:
        warnings.append(
            f"the foreground is only {figures.contrast_to_noise:.1f} times as bright as the noise of the background "
            f"(expected {_LEAST_CONTRAST:g}): noise may be traced as neurites{advice}"
        )
    if figures.speck_share > _MOST_SPECKS:
        warnings.append(
            f"{figures.speck_share:.0%} of the foreground lies in specks: the image is noisy, or neurites are "
            f"broken{advice}"
        )
    kept = figures.cable / max(figures.cable + figures.left_out_cable, 1e-9)
    if kept < _LEAST_KEPT:
        warnings.append(
            f"only {kept:.0%} of the cable hangs together; {figures.left_out_trees} short pieces are left out"
        )
    if 100 * figures.tips / max(figures.cable, 1.0) > _MOST_TIPS:
        warnings.append(
            f"there are {figures.tips} tips on {figures.cable:.0f} voxels of cable: the trees fill tissue rather than "
            "follow neurites"
        )
    warnings += _list_disagreements(figures, has_student)
    return warnings


def list_label_values(read: ReadBox, shape: Shape, dtype: np.dtype[Any]) -> list[int]:
    """The values of an image that holds so few of them that they are labels; [] for other images.

    Reads slice by slice, and no further than to the first slices with many values.
    """
    # Only these have few enough values to be counted one by one.
    if dtype.kind not in "bu" or dtype.itemsize > 2:
        return []
    counts = np.zeros(1 << (8 * dtype.itemsize), dtype=np.int64)
    for z in range(shape[0]):
        plane = np.asarray(read(Box((z, 0, 0), (z + 1, shape[1], shape[2]))))
        counts += np.bincount(plane.ravel(), minlength=len(counts))
        if np.count_nonzero(counts) > _MOST_LABELS:
            return []
    return [int(value) for value in np.flatnonzero(counts)]


def describe_labels(values: Sequence[int]) -> str:
    """A warning for an image that holds labels."""
    return (
        f"the image holds only the values {', '.join(map(str, values))}: it is a mask or a label volume, and its "
        "labels are traced as if they were brightness; give the image that was labelled"
    )


def describe_odd_width(width: float | None, size: VoxelSize | None) -> str:
    """A warning for neurites of `width` voxels in the plane that a voxel size (um, z y x) makes absurd, else ""."""
    if width is None or size is None:
        return ""
    least, most = _WIDTHS_UM
    um = width * math.sqrt(size[1] * size[2])
    if least <= um <= most:
        return ""
    limit = f"thinner than {least:g} um" if um < least else f"wider than {most:g} um"
    return (
        f"WRONG VOXEL SIZE? With voxels of {' x '.join(f'{side:.4g}' for side in size)} um the neurites are {um:.3g} "
        f"um wide, and neurites are hardly ever {limit}. All micrometers in the results are wrong with it, the tree in "
        "voxels is not; give the right one:  voxel_size=z,y,x"
    )


def _list_disagreements(figures: TraceFigures, has_student: bool) -> list[str]:
    """What a second opinion says against the trees."""
    if has_student and figures.followed == "image":
        return [
            "the student finds no neurite, so the trees follow the image's own foreground: the student does not know "
            "such images"
        ]
    if figures.seen_share is not None and figures.seen_share < LEAST_SEEN:
        return [
            f"the student takes {figures.seen_share:.0%} of what is bright in the image for neurites, and is followed "
            "alone: the rest may be tissue, or the student may not know such images; compare with model=none"
        ]
    if figures.agreement is None or figures.agreement >= _LEAST_AGREEMENT:
        return []

    measured = f"(agreement {figures.agreement:.2f}, expected {_LEAST_AGREEMENT:g})"
    if has_student:
        return [
            f"the image itself gives another tree than the student {measured}: the student may not know such images; "
            "compare with model=none"
        ]
    return [
        f"a higher level of brightness gives another tree {measured}: background may be traced as neurites; compare "
        "with model=bundled, or give range=DARK,BRIGHT, which sets darker voxels to 0"
    ]
