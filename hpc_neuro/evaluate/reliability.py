"""The confidence that `infer` gives to its trees, held against gold: a table and a curve of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.data.store import Store
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.predictions import Predictions
from hpc_neuro.metrics.calibration import Bin, Floats, calibration_error, judged, reliability
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.tracing import measure_confidence


def measured(cfg: EvaluateConfig, store: Store, ids: Sequence[str], model: Predictions) -> dict[str, list[Bin]]:
    """The reliability over the cable (voxels) of all volumes; nothing where nothing is traced.

    `confidence`: as told; where `infer` looked again in mirrors also `mean`, of all views, and `agreement`, one minus
    their disagreement.
    """
    parts: dict[str, list[tuple[Floats, Floats, NDArray[np.bool_]]]] = {}
    traced = 0
    for volume in (store[i] for i in ids):
        prediction = model.read(volume.id, volume.shape)
        if len(tree := prediction.tree):
            traced += 1
            told = {"confidence": measure_confidence(tree, prediction.probability, volume.shape)}
            told |= model.views(volume.id, len(tree))
            for name, sure in told.items():
                parts.setdefault(name, []).append(judged(tree, sure, volume.tree(), cfg.tolerance_vox))
    found = {}
    for name, some in parts.items():
        if len(some) == traced:  # of some volumes only, it could not be compared with the others
            cable, sure, right = (np.concatenate(values) for values in zip(*some, strict=True))
            found[name] = reliability(cable, sure, right)
    return found


def as_json(found: Mapping[str, Sequence[Bin]]) -> dict[str, Any]:
    """The confidence's bins and error, and under `views` those of the second look, if there was one."""
    told = {name: {"bins": [asdict(b) for b in bins], "error": calibration_error(bins)} for name, bins in found.items()}
    views = {name: values for name, values in told.items() if name != "confidence"}
    return told.get("confidence", {"bins": [], "error": 0.0}) | ({"views": views} if views else {})


def section(found: Mapping[str, Sequence[Bin]], cfg: EvaluateConfig) -> str:
    """The table, the curve, and what they mean; then those of the second look in mirrors."""
    bins = found["confidence"]
    told = html.paragraph(
        f"The model's confidence in a piece of cable is the lowest probability on it; right is what lies within "
        f"{cfg.tolerance_vox:g} voxels of the gold tree. Expected calibration error {calibration_error(bins):.3f} "
        "(mean difference of the two by cable). Where the curve is above the diagonal the confidence is modest: read "
        "the share that is right from the table, not from the confidence.",
        "small",
    )
    curve = charts.draw_lines(
        "Confidence against truth",
        [
            charts.Series("right", [b.confidence for b in bins], [b.right for b in bins]),
            charts.Series("as said", [0.0, 1.0], [0.0, 1.0]),
        ],
        "confidence",
        "share of cable that is right",
    )
    parts = [told, _table("Confidence", bins), html.row([curve]) if len(bins) > 1 else ""]
    if "agreement" in found:
        parts.append(
            html.paragraph(
                "The student looked again in mirrors. The mean confidence of all views has an expected calibration "
                f"error of {calibration_error(found['mean']):.3f}; agreement is one minus the mean difference of the "
                "mirrored views from the plain one.",
                "small",
            )
        )
        parts += [_table("Mean of all views", found["mean"]), _table("Agreement", found["agreement"])]
    return "".join(parts)


def _table(what: str, bins: Sequence[Bin]) -> str:
    whole = sum(b.cable for b in bins)
    rows = [
        [
            Cell(f"{b.low:.1f} to {b.high:.1f}", b.low),
            Cell(html.format_number(b.cable / whole, 3), b.cable),
            Cell(html.format_number(b.confidence, 2), b.confidence),
            Cell(html.format_number(b.right, 3), b.right),
        ]
        for b in bins
    ]
    columns = [Column(what), Column("Share of the cable"), Column(f"Mean {what.lower()}"), Column("Right")]
    return html.table(columns, rows)
