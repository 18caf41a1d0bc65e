"""One trial: its folder, its record, and what its metrics say. The record is written before anything is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core import files
from hpc_neuro.search.config import Objective
from hpc_neuro.search.space import Point

RECORD = "trial.json"
METRICS = Path("train") / "metrics.jsonl"
State = Literal["waiting", "running", "stopping", "done", "pruned", "failed"]
FINAL: tuple[State, ...] = ("done", "pruned", "failed")


@dataclass
class Attempt:
    """One job of a trial."""

    job: str | None = None  # None: about to be submitted
    submitted: float = 0.0  # s since the epoch
    ended: float | None = None
    reason: str = ""


@dataclass
class Trial:
    """What is known of a trial; `save` puts it into its folder."""

    number: int
    values: Point
    folder: Path
    state: State = "waiting"
    attempts: list[Attempt] = field(default_factory=list)
    rungs: dict[int, float] = field(default_factory=dict)  # step of the rung -> value when it was reached
    value: float | None = None
    step: int = 0  # the last in metrics.jsonl
    note: str = ""

    @property
    def job(self) -> str | None:
        """The job at work, None when there is none."""
        last = self.attempts[-1] if self.attempts else None
        return last.job if last is not None and last.ended is None else None

    @property
    def attempt(self) -> str:
        """The name of the present attempt's files in the folder."""
        return f"attempt_{len(self.attempts)}"

    @property
    def seconds(self) -> float:
        """[s] From submission to end, over all attempts."""
        return sum(a.ended - a.submitted for a in self.attempts if a.ended is not None)

    def save(self) -> None:
        """Write the record."""
        record = {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"}
        files.write_json(self.folder / RECORD, record)


def folder_of(out: Path, number: int) -> Path:
    """OUT/trials/0007."""
    return out / "trials" / f"{number:04d}"


def load_all(out: Path) -> list[Trial]:
    """The trials of a study, by number."""
    found = [_load(path.parent) for path in (out / "trials").glob(f"*/{RECORD}")]
    return sorted(found, key=lambda t: t.number)


def _load(folder: Path) -> Trial:
    record = files.read_json(folder / RECORD, f"remove {folder}; the study then makes this trial again")
    record["attempts"] = [Attempt(**a) for a in record["attempts"]]
    record["rungs"] = {int(k): v for k, v in record["rungs"].items()}
    return Trial(folder=folder, **record)


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; none where it is not there yet. A torn last line is still being written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in found if isinstance(r, dict) and isinstance(r.get("step"), int)]


def series(table: list[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(step, value) of `val.dice` in step order; null, which stands for not finite, is left out."""
    kind, _, name = key.partition(".")
    for row in table:
        if row.get("kind") == kind and isinstance(row.get(name), (int, float)):
            yield row["step"], float(row[name])


def at_rung(table: list[dict[str, Any]], key: str, rung: int) -> float | None:
    """The first value at or after a step, None when that is still to come."""
    return next((v for step, v in series(table, key) if step >= rung), None)


def outcome(folder: Path, objective: Objective) -> float | None:
    """What a finished trial is worth; None when it left no such number."""
    source, _, name = objective.key.partition(".")
    if source == "evaluate":
        path = folder / "evaluate" / "metrics.json"
        found = files.read_json(path, "remove the trial's folder to run it again")["mean"]["model"].get(name)
        return None if found is None else float(found)
    values = [v for step, v in series(rows(folder / METRICS), objective.key) if step > 0]
    if not values:
        return None
    if objective.take == "last":
        return values[-1]
    return max(values) if objective.goal == "maximize" else min(values)
