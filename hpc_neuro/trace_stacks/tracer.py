"""Trace one image, with a student or without: foreground, somas, trees, and how far the result can be trusted."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from hpc_neuro.core import morphology, stop_signals
from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.foreground import HALF, SLAB_ITEMSIZE, Foreground, measure_foreground, measure_mask
from hpc_neuro.data.intensity import iter_slabs
from hpc_neuro.infer.proofread import DoubtfulPlace, NodeConfidence, find_places
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.metrics.metric import divide, harmonic_mean
from hpc_neuro.trace_stacks.edits import Edits, continue_from
from hpc_neuro.tracing import (
    BlockSkeleton,
    CrowdDecision,
    Soma,
    TraceConfig,
    TracedVolume,
    find_somas,
    list_trace_blocks,
    measure_confidence,
    skeletonize_block,
    trace_block_skeletons,
    trace_volume,
)

# It imports torch, which a stack that is traced without a student does not need.
if TYPE_CHECKING:
    from hpc_neuro.trace_stacks.predictor import StackPredictor

log = logging.getLogger(__name__)
ReadBox = Callable[[Box], Array]
Followed = Literal["image", "student", "both"]

_SOMA_TYPE = 1
"""SWC type of a soma."""
_LEAST_SHARE = 0.05
"""[longest tree] Without a given root, shorter trees are left out."""
_STRICT_RATIO = 1.6
"""[level] The level of the second opinion."""
LEAST_SEEN = 0.1
"""Share of the image's own foreground that a student must see for that foreground to be used."""
_SEEN_VOXELS = 2
"""[voxel] A student sees foreground that is so near to its own."""
_WEAK_CONFIDENCE = 0.6
"""Confidence below which cable is weak."""
_AGREEMENT_VOXELS = 4.0
"""[voxel] Tolerance of the agreement with the second opinion."""


@dataclass(frozen=True)
class TraceFigures:
    """What is measured of an image and its trees. Lengths are in voxels."""

    mask_share: float
    """Share of the volume that is foreground."""
    speck_share: float
    """Share of the foreground in connected components of fewer than 12 voxels."""
    contrast_to_noise: float | None
    """Median brightness of the foreground over the noise of the background; None where there is no noise."""
    trees: int
    somas: int
    cable: float
    tips: int
    left_out_trees: int
    """Pieces that were too short to be trees."""
    left_out_cable: float
    agreement: float | None
    """With a student: the harmonic mean of the share of the image's own trees that the student sees, and of the share
    of the trees that the image shows. Else the F1 of the cable, at 4 voxels, against a level 1.6 times as high. None
    without a tree."""
    weak_share: float = 0.0
    """Share of the cable on which the foreground hardly reaches its level: confidence below 0.6."""
    seen_share: float | None = None
    """Share of the image's own foreground that lies within 2 voxels of the student's; None without a student."""
    followed: Followed = "image"
    """What the trees follow: the image's own foreground, the student's, or both."""


@dataclass(frozen=True)
class ImageTrace:
    """The trees of one image, and what was measured on the way."""

    trees: list[Tree]
    """In voxels: those of the roots or somas in their order, then the longest first."""
    somas: list[Soma]
    foreground: Foreground
    probability: ReadBox | None
    """[Z, Y, X] what the student found, 128 at its threshold; None without a student."""
    figures: TraceFigures
    places: list[DoubtfulPlace]
    """Places to look at, worst first."""
    confidence: NDArray[np.float64]
    """[N] of the nodes of all trees, one after the other: the lowest probability on the edge to the parent."""
    crowd: CrowdDecision | None = None
    """Whether the image was taken for a crowd; None where neighbors are not cut off, or several roots are given."""


def trace_image(
    read: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize | None,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    search_somas: bool = True,
    predictor: StackPredictor | None = None,
    edits: Edits | None = None,
    foreground: Foreground | None = None,
    label: str = "trace",
) -> ImageTrace:
    """Trace an image that is read by box: its own foreground, or with `predictor` what a student finds in it.

    What a student adds to the image's own foreground joins pieces; ends that only the student sees are left out. Where
    a student sees hardly anything of that foreground, the student alone is followed, unless that gives no tree.
    With `roots` (z y x voxels): one tree for each. Without: one tree for each soma, which has type 1 there, and for
    each other piece that is long enough, from its thickest end. `voxel_size` (um, z y x) None: voxels are taken for
    cubes. With `edits` the trees go on from those that a person corrected. `foreground` spares measuring that of the
    image again. Raises InputError for an image without contrast, and for a root off the foreground.
    """
    cfg, size = cfg or TraceConfig(), voxel_size or (1.0, 1.0, 1.0)
    if foreground is None:
        foreground = measure_foreground(stop_signals.stop_on_request(read), shape).keep_probability()
    prediction = None if predictor is None else predictor.predict(foreground, label)
    student = None if prediction is None else _read_from(prediction)
    evidence = _weigh_evidence(foreground, prediction)
    follow = functools.partial(_follow, foreground, size, cfg, roots, search_somas, edits is not None)
    somas, trees, left_out, traced = follow(evidence)
    # A student that knows no such images finds nothing in them; in noise there is nothing to find.
    if not trees and evidence.followed == "student" and not foreground.is_noise:
        evidence = replace(_weigh_evidence(foreground, None), seen_share=evidence.seen_share)
        somas, trees, left_out, traced = follow(evidence)
    trees = trees if edits is None else continue_from(edits, trees, left_out)

    forest = morphology.concatenate_trees(trees)
    confidence = measure_confidence(forest, evidence.probability, shape)
    agreement = None
    if trees and student is not None:
        others = _trace_again(foreground, size, cfg, roots)
        agreement = _measure_mutual_support(forest, others, foreground, student)
    elif trees:
        strict = replace(cfg, threshold=min(_STRICT_RATIO * cfg.threshold, 1.0), low=None)
        others = _trace_again(foreground, size, strict, roots)
        agreement = round(match_cable(forest, others, _AGREEMENT_VOXELS).f1, 3)

    noise = foreground.noise_level
    figures = TraceFigures(
        mask_share=round(evidence.mask_share, 5),
        speck_share=round(evidence.speck_share, 4),
        contrast_to_noise=round(foreground.brightness / noise, 1) if noise > 1e-3 * foreground.brightness else None,
        trees=len(trees),
        somas=len(somas),
        cable=round(morphology.length(forest), 1),
        tips=len(morphology.tips(forest)),
        left_out_trees=len(left_out),
        left_out_cable=round(sum(map(morphology.length, left_out)), 1),
        agreement=agreement,
        weak_share=_measure_weak_share(forest, confidence),
        seen_share=evidence.seen_share,
        followed=evidence.followed,
    )
    places = list[DoubtfulPlace]()
    if len(forest):
        single = NodeConfidence(confidence, np.zeros((0, len(forest))), cfg.floor, cfg.threshold)
        places = find_places(forest, single, shape, size, traced.contacts)
    return ImageTrace(trees, somas, foreground, student, figures, places, confidence, traced.crowd)


def _follow(
    foreground: Foreground,
    size: VoxelSize,
    cfg: TraceConfig,
    roots: Sequence[Point],
    search_somas: bool,
    keep_rest: bool,
    evidence: _Evidence,
) -> tuple[list[Soma], list[Tree], list[Tree], TracedVolume]:
    """Somas, trees, the pieces that are left out, and all that was traced, with the neighbors that were cut off.

    With `keep_rest` what belongs to no given root is left out as well.
    """
    shape, probability = foreground.shape, evidence.probability
    skeletons = _skeletonize(probability, shape, size, cfg)
    somas = list[Soma]()
    if search_somas and not roots:
        somas = find_somas(skeletons, probability, foreground.read_image, shape, size, cfg)
    starts = list(roots) or [soma.point for soma in somas]
    # Whose neurites surround a soma is not asked: only a given root says that one neuron is wanted.
    cfg = cfg if roots else replace(cfg, contacts=False)

    traced = trace_volume(
        skeletons,
        probability,
        shape,
        size,
        roots=starts,
        cfg=cfg,
        image=foreground.read_image,
        shown=evidence.shown,
        keep_rest=not roots or keep_rest,
    )
    trees, left_out = _select_trees(traced.trees, len(starts), bool(roots))
    trees = [_mark_soma(tree) if number < len(somas) else tree for number, tree in enumerate(trees)]
    return somas, trees, left_out, traced


def _measure_weak_share(forest: Tree, confidence: NDArray[np.float64]) -> float:
    lengths = morphology.edge_lengths(forest)
    return round(divide(lengths[confidence < _WEAK_CONFIDENCE].sum(), lengths.sum(), empty=0.0), 3)


def _unite(one: ReadBox, other: ReadBox) -> ReadBox:
    """Reads the higher of two probabilities."""
    return lambda box: np.maximum(one(box), other(box))


def _read_from(array: NDArray[np.uint8]) -> ReadBox:
    """Reads boxes of an array."""
    return lambda box: array[box.slices]


def _skeletonize(probability: ReadBox, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> list[BlockSkeleton]:
    skeletons = []
    for box in stop_signals.until_stopped(list_trace_blocks(shape, cfg)):
        skeleton = skeletonize_block(probability, shape, box, voxel_size, cfg)
        # Most blocks of a sparse volume hold nothing.
        if skeleton is not None:
            skeletons.append(skeleton)
    return skeletons


def _select_trees(trees: list[Tree], rooted: int, is_given: bool) -> tuple[list[Tree], list[Tree]]:
    """The trees that stay, and those that are left out because they are short beside the longest one."""
    if is_given or not trees:
        return trees[:rooted], trees[rooted:]
    least = _LEAST_SHARE * max(map(morphology.length, trees))

    # Many small pieces are specks and fragments of other neurons; a soma counts however short its tree is.
    stays = [number < rooted or morphology.length(tree) >= least for number, tree in enumerate(trees)]
    return (
        [tree for tree, stay in zip(trees, stays, strict=True) if stay],
        [tree for tree, stay in zip(trees, stays, strict=True) if not stay],
    )


def _mark_soma(tree: Tree) -> Tree:
    types = tree.types.copy()
    types[0] = _SOMA_TYPE
    return replace(tree, types=types)


@dataclass(frozen=True)
class _Evidence:
    """What the trees follow."""

    probability: ReadBox
    shown: ReadBox | None
    """What the image shows by itself, where ends that only the student sees are to be left out."""
    mask_share: float
    speck_share: float
    seen_share: float | None
    followed: Followed


def _weigh_evidence(foreground: Foreground, prediction: NDArray[np.uint8] | None) -> _Evidence:
    """The image's own foreground, the student's, or both together."""
    if prediction is None:
        return _Evidence(foreground.probability, None, foreground.mask_share, foreground.speck_share, None, "image")

    student = _read_from(prediction)
    mask_share, speck_share = measure_mask(prediction)
    seen_share = round(_measure_seen_share(foreground, student), 3)
    # An image whose foreground is something else than neurites, tissue for example, has no say.
    if seen_share < LEAST_SEEN:
        return _Evidence(student, None, mask_share, speck_share, seen_share, "student")
    both = _unite(student, foreground.probability)
    return _Evidence(both, foreground.probability, mask_share, speck_share, seen_share, "both")


def _measure_seen_share(foreground: Foreground, student: ReadBox) -> float:
    """The share of the image's foreground within 2 voxels of the student's; 0 without foreground."""
    total = seen = 0
    for box in iter_slabs(foreground.shape, SLAB_ITEMSIZE):
        mask = foreground.probability(box) >= HALF
        if not mask.any():
            continue

        # Voxels of the student may lie beyond the slab.
        around = box.grow((_SEEN_VOXELS,) * 3).clip(Box.whole(foreground.shape))
        near = maximum_filter(np.asarray(student(around), dtype=np.uint8) >= HALF, 2 * _SEEN_VOXELS + 1)
        total += int(np.count_nonzero(mask))
        seen += int(np.count_nonzero(mask & near[box.relative_to(around.start).slices]))
    return seen / max(total, 1)


def _measure_mutual_support(trees: Tree, others: Tree, foreground: Foreground, student: ReadBox) -> float:
    """Harmonic mean of the share of the trees that the image shows and of the others that the student sees."""
    support = _measure_support(trees, foreground.probability, foreground.shape)
    return round(harmonic_mean(support, _measure_support(others, student, foreground.shape)), 3)


def _measure_support(tree: Tree, probability: ReadBox, shape: Shape) -> float:
    """The share of the cable on which a probability is at least half; 0 without cable."""
    lengths = morphology.edge_lengths(tree)
    is_supported = measure_confidence(tree, probability, shape) >= 0.5
    return divide(lengths[is_supported].sum(), lengths.sum(), empty=0.0)


def _trace_again(foreground: Foreground, size: VoxelSize, cfg: TraceConfig, roots: Sequence[Point]) -> Tree:
    """All trees of the image's own foreground, from the given roots if there are any; an empty tree where it fails."""
    shape = foreground.shape
    skeletons = _skeletonize(foreground.probability, shape, size, cfg)
    try:
        trees = trace_block_skeletons(
            skeletons,
            foreground.probability,
            shape,
            size,
            roots=roots,
            cfg=cfg,
            image=foreground.read_image,
            keep_rest=not roots,
        )
    except InputError:
        return morphology.empty_tree()
    return morphology.concatenate_trees(_select_trees(trees, len(roots), bool(roots))[0])
