"""The learning curves of a training run, from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import InputError
from hpc_neuro.report import charts

_TRAIN_FACTS = {"step", "kind", "lr", "grad_norm", "crops_per_s", "tokens_per_s", "mfu", "data_wait_share"}
_TRAIN_FACTS |= {"memory_bytes", "eta_s"}
_VALIDATION = ("dice", "dice_best", "precision", "recall")


def read(folder: Path) -> list[dict[str, Any]]:
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
            if number < len(lines):  # a training run at work, or killed, may have torn the last line
                raise InputError(f"line {number} of {path} is no JSON ({error}); the file is damaged") from None
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Charts: the loss and its terms, those of the distillation, validation, learning rate."""
    train = [r for r in rows if r.get("kind") == "train"]
    val = [r for r in rows if r.get("kind") == "val"]
    terms = list(dict.fromkeys(k for r in train for k, v in r.items() if k not in _TRAIN_FACTS and _is_number(v)))
    parts = [t for t in terms if t.startswith("distill_")]
    figures = [
        charts.draw_lines(title, [_series(train, k) for k in chosen], "step", "loss", log_y=True)
        for title, chosen in (
            ("Training loss and its terms", [t for t in terms if t not in parts]),
            ("Terms of the distillation", parts),
        )
        if chosen
    ]
    return [
        *figures,
        charts.draw_lines("Validation on fixed crops", [_series(val, k) for k in _VALIDATION], "step", "share"),
        charts.draw_lines("Learning rate", [_series(train, "lr")], "step", "learning rate"),
    ]


def _series(rows: Sequence[dict[str, Any]], key: str) -> charts.Series:
    found = [(r["step"], r[key]) for r in rows if _is_number(r.get(key))]
    return charts.Series(key.replace("_", " "), [x for x, _ in found], [y for _, y in found])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
