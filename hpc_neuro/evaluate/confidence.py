"""The confidence that `infer` gives to its trees, compared with gold: a table and a curve of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.morphology import Tree, edge_lengths, resample_tree
from hpc_neuro.data.store import Store
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.predictions import PredictionFolder
from hpc_neuro.metrics.metric import divide
from hpc_neuro.metrics.segments import SegmentIndex
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.tracing import measure_confidence

Floats = NDArray[np.float64]

_BINS = 10
"""Equal parts of the confidence from 0 to 1."""


@dataclass(frozen=True)
class ConfidenceBin:
    """The cable whose confidence lies between `low` and `high`."""

    low: float
    high: float
    cable: float
    """Cable, in the trees' unit."""
    confidence: float
    """Mean confidence by cable."""
    right: float
    """Share of the cable that is near gold."""


@dataclass(frozen=True)
class JudgedCable:
    """Short pieces of traced cable with their confidence, each compared with gold."""

    lengths: Floats  # [M] in the trees' unit
    confidence: Floats  # [M]
    is_right: NDArray[np.bool_]  # [M] whether the middle is within the tolerance of gold


def judge_cable(tree: Tree, confidence: Floats, gold: Tree, tolerance: float) -> JudgedCable:
    """Cut a tree into pieces of at most 1 and compare each with gold; units are the trees'.

    `confidence` [N] is that of the edge from each node to its parent.
    """
    # `resample_tree` cuts each edge into this many parts, in the order of the nodes: so a piece knows its edge.
    fine = resample_tree(tree, 1.0)
    parts = np.maximum(1, np.ceil(edge_lengths(tree) - 1e-9)).astype(np.int64)
    parts[tree.parents < 0] = 1
    owner = np.repeat(np.arange(len(tree)), parts)

    piece = fine.parents >= 0
    middle = (fine.points[piece] + fine.points[fine.parents[piece]]) / 2
    is_right = SegmentIndex(gold).query(middle) <= tolerance

    return JudgedCable(edge_lengths(fine)[piece], confidence[owner[piece]], is_right)


def bin_by_confidence(cable: JudgedCable) -> list[ConfidenceBin]:
    """The bins that hold any cable, from the least confident to the most."""
    # A confidence of exactly 1 belongs to the last bin.
    number = np.minimum((cable.confidence * _BINS).astype(np.int64), _BINS - 1)
    bins = []
    for i in range(_BINS):
        inside = (number == i) & (cable.lengths > 0)
        total = float(cable.lengths[inside].sum())

        # An empty bin has neither a mean nor a share.
        if total > 0:
            mean = float((cable.lengths * cable.confidence)[inside].sum()) / total
            right = float(cable.lengths[inside & cable.is_right].sum()) / total
            bins.append(ConfidenceBin(i / _BINS, (i + 1) / _BINS, total, mean, right))

    return bins


def compute_calibration_error(bins: Sequence[ConfidenceBin]) -> float:
    """Expected calibration error (Naeini et al. 2015): mean of |right - confidence| over bins, weighted by cable."""
    total = sum(b.cable for b in bins)
    return divide(sum(b.cable * abs(b.right - b.confidence) for b in bins), total, empty=0.0)


def measure_reliability(
    cfg: EvaluateConfig, store: Store, ids: Sequence[str], model: PredictionFolder
) -> dict[str, list[ConfidenceBin]]:
    """The bins over the cable (voxels) of all volumes; {} where nothing is traced.

    `confidence`: of the plain prediction; where `infer` looked at flipped images too, also `mean`, of all flips, and
    `agreement`, one minus their disagreement.
    """
    parts: dict[str, list[JudgedCable]] = {}
    traced = 0
    for volume in (store[i] for i in ids):
        prediction = model.read(volume.id, volume.shape)
        tree = prediction.tree
        if not len(tree):
            continue

        # The flips' confidence is in a table of `infer`; the plain one is measured again from the probability.
        traced += 1
        confidences = {"confidence": measure_confidence(tree, prediction.probability, volume.shape)}
        confidences |= model.read_flip_confidence(volume.id, len(tree))
        for name, confidence in confidences.items():
            parts.setdefault(name, []).append(judge_cable(tree, confidence, volume.tree(), cfg.tolerance_vox))

    # A confidence that only some volumes have could not be compared with the others.
    return {name: bin_by_confidence(_concatenate(cables)) for name, cables in parts.items() if len(cables) == traced}


def _concatenate(cables: Sequence[JudgedCable]) -> JudgedCable:
    return JudgedCable(
        np.concatenate([c.lengths for c in cables]),
        np.concatenate([c.confidence for c in cables]),
        np.concatenate([c.is_right for c in cables]),
    )


def build_json(reliability: Mapping[str, Sequence[ConfidenceBin]]) -> dict[str, Any]:
    """The confidence's bins and error, and under `views` those with flipped images, if there are any."""
    tables = {
        name: {"bins": [asdict(b) for b in bins], "error": compute_calibration_error(bins)}
        for name, bins in reliability.items()
    }
    # The plain confidence has always stood at the top level, where programs read it.
    views = {name: table for name, table in tables.items() if name != "confidence"}

    return tables.get("confidence", {"bins": [], "error": 0.0}) | ({"views": views} if views else {})


def render_section(reliability: Mapping[str, Sequence[ConfidenceBin]], cfg: EvaluateConfig) -> str:
    """The table, the curve, and what they mean; then those with flipped images."""
    # Say what the two words mean before the numbers.
    bins = reliability["confidence"]
    explanation = html.paragraph(
        f"The model's confidence in a piece of cable is the lowest probability on it; right is what lies within "
        f"{cfg.tolerance_vox:g} voxels of the gold tree. Expected calibration error "
        f"{compute_calibration_error(bins):.3f} (mean difference of the two by cable). Where the curve is above the "
        "diagonal, the model is right more often than its confidence says: read the share that is right from the "
        "table, not from the confidence.",
        "small",
    )

    # The diagonal is what a calibrated confidence would follow.
    curve = charts.draw_lines(
        "Confidence and share that is right",
        [
            charts.Series("share that is right", [b.confidence for b in bins], [b.right for b in bins]),
            charts.Series("if calibrated", [0.0, 1.0], [0.0, 1.0]),
        ],
        "confidence",
        "share of cable that is right",
    )

    # One bin is a point and no curve.
    parts = [explanation, _render_table("Confidence", bins), html.row([curve]) if len(bins) > 1 else ""]

    if "agreement" in reliability:
        parts += [
            html.paragraph(
                "The student also predicted flipped images. The mean confidence of all flips has an expected "
                f"calibration error of {compute_calibration_error(reliability['mean']):.3f}; agreement is one minus "
                "the mean difference of the flips from the plain prediction.",
                "small",
            ),
            _render_table("Mean of all flips", reliability["mean"]),
            _render_table("Agreement", reliability["agreement"]),
        ]

    return "".join(parts)


def _render_table(title: str, bins: Sequence[ConfidenceBin]) -> str:
    # Cells sort by the numbers behind their texts.
    total = sum(b.cable for b in bins)
    columns = [Column(title), Column("Share of the cable"), Column(f"Mean {title.lower()}"), Column("Right")]
    rows = [
        [
            Cell(f"{b.low:.1f} to {b.high:.1f}", b.low),
            Cell(html.format_number(b.cable / total, 3), b.cable),
            Cell(html.format_number(b.confidence, 2), b.confidence),
            Cell(html.format_number(b.right, 3), b.right),
        ]
        for b in bins
    ]

    return html.table(columns, rows)
