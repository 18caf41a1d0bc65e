"""The learning curves of a training run, from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import InputError
from hpc_neuro.report import charts

_NOT_LOSSES = {
    *("step", "kind", "lr", "grad_norm", "crops_per_s", "tokens_per_s", "mfu", "data_wait_share"),
    *("memory_bytes", "eta_s"),
}
"""Numbers of a training step that are no terms of the loss."""
_VALIDATION = ("dice", "dice_best", "precision", "recall")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder`/metrics.jsonl. Raises InputError for a missing file or a broken line other than the last."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist; give the `out` of a `train` run as `train`, or leave it out")

    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            # The last line of a run that is at work, or was killed, may be incomplete.
            if number < len(lines):
                raise InputError(f"line {number} of {path} is no JSON ({error}); the file is damaged") from None
    return rows


def draw_curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Charts: the loss and its terms, those of the distillation, validation, learning rate."""
    train = [r for r in rows if r.get("kind") == "train"]
    validation = [r for r in rows if r.get("kind") == "val"]
    terms = list(dict.fromkeys(k for r in train for k, v in r.items() if k not in _NOT_LOSSES and _is_number(v)))
    distillation = [t for t in terms if t.startswith("distill_")]
    others = [t for t in terms if t not in distillation]

    figures = []
    for title, keys in (("Training loss and its terms", others), ("Terms of the distillation", distillation)):
        if keys:
            curves = [_build_series(train, k) for k in keys]
            figures.append(charts.draw_lines(title, curves, "step", "loss", log_y=True))

    scores = [_build_series(validation, k) for k in _VALIDATION]
    figures.append(charts.draw_lines("Validation on fixed crops", scores, "step", "share"))
    figures.append(charts.draw_lines("Learning rate", [_build_series(train, "lr")], "step", "learning rate"))
    return figures


def _build_series(rows: Sequence[dict[str, Any]], key: str) -> charts.Series:
    points = [(r["step"], r[key]) for r in rows if _is_number(r.get(key))]
    return charts.Series(key.replace("_", " "), [x for x, _ in points], [y for _, y in points])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
