"""The confidence that `infer` gives to its trees, held against gold: a table and a curve of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpc_neuro.data.store import Store
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.inputs import Predictions
from hpc_neuro.metrics.calibration import Bin, calibration_error, judged, reliability
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.tracing import confidence


def measured(cfg: EvaluateConfig, store: Store, ids: Sequence[str], model: Predictions) -> list[Bin]:
    """The reliability of the confidence over the cable (voxels) of all volumes; none where nothing is traced."""
    parts = []
    for volume in (store[i] for i in ids):
        prediction = model.read(volume.id, volume.shape)
        if len(prediction.tree):
            sure = confidence(prediction.tree, prediction.probability, volume.shape)
            parts.append(judged(prediction.tree, sure, volume.tree(), cfg.tolerance_vox))
    if not parts:
        return []
    cable, sure, right = (np.concatenate(values) for values in zip(*parts, strict=True))
    return reliability(cable, sure, right)


def section(bins: Sequence[Bin], cfg: EvaluateConfig) -> str:
    """The table, the curve, and what they mean."""
    whole = sum(b.cable for b in bins)
    rows = [
        [
            Cell(f"{b.low:.1f} to {b.high:.1f}", b.low),
            Cell(html.number(b.cable / whole, 3), b.cable),
            Cell(html.number(b.confidence, 2), b.confidence),
            Cell(html.number(b.right, 3), b.right),
        ]
        for b in bins
    ]
    told = html.paragraph(
        f"The model's confidence in a piece of cable is the lowest probability on it; right is what lies within "
        f"{cfg.tolerance_vox:g} voxels of the gold tree. Expected calibration error {calibration_error(bins):.3f} "
        "(mean difference of the two by cable). Where the curve is above the diagonal the confidence is modest: read "
        "the share that is right from the table, not from the confidence.",
        "small",
    )
    curve = charts.lines(
        "Confidence against truth",
        [
            charts.Series("right", [b.confidence for b in bins], [b.right for b in bins]),
            charts.Series("as said", [0.0, 1.0], [0.0, 1.0]),
        ],
        "confidence",
        "share of cable that is right",
    )
    columns = [Column("Confidence"), Column("Share of the cable"), Column("Mean confidence"), Column("Right")]
    return told + html.table(columns, rows) + (html.row([curve]) if len(bins) > 1 else "")
