"""One trial: its folder, its record, and what its metrics say. The record is written before anything is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core import files
from hpc_neuro.core.metric_rows import MetricRow, list_rows, read_lines
from hpc_neuro.metrics.score_file import read_scores
from hpc_neuro.search.config import Objective
from hpc_neuro.search.space import Point

RECORD_FILE = "trial.json"
"""Record of a trial, in its folder."""
METRICS_FILE = Path("train") / "metrics.jsonl"
"""Metrics of a trial's training, in its folder."""
State = Literal["waiting", "running", "stopping", "done", "pruned", "failed"]
ENDED_STATES: tuple[State, ...] = ("done", "pruned", "failed")
"""States of trials that are over."""


@dataclass
class Attempt:
    """One job of a trial."""

    job: str | None = None
    """Id of the job; None: about to be submitted."""
    submitted: float = 0.0
    """[s] Since the epoch."""
    ended: float | None = None
    """[s] Since the epoch; None: not yet."""
    reason: str = ""
    """Why the job ended."""


@dataclass
class Trial:
    """The state of a trial; `save` writes it into its folder."""

    number: int
    values: Point
    folder: Path
    state: State = "waiting"
    attempts: list[Attempt] = field(default_factory=list)
    rungs: dict[int, float] = field(default_factory=dict)
    """Step of a rung -> value when it was reached."""
    value: float | None = None
    """Of the objective."""
    step: int = 0
    """The last one in metrics.jsonl."""
    note: str = ""
    """Why it failed or was pruned."""

    @property
    def job(self) -> str | None:
        """The job that is queued or running, None when there is none."""
        # Earlier attempts have ended.
        last = self.attempts[-1] if self.attempts else None
        return last.job if last is not None and last.ended is None else None

    @property
    def attempt_name(self) -> str:
        """Name of the files of the present attempt, in the folder."""
        return f"attempt_{len(self.attempts)}"

    @property
    def seconds(self) -> float:
        """[s] From submission to end, over all attempts."""
        return sum(a.ended - a.submitted for a in self.attempts if a.ended is not None)

    def save(self) -> None:
        """Write the record."""
        record = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        files.write_json(self.folder / RECORD_FILE, record)


def trial_folder(out: Path, number: int) -> Path:
    """OUT/trials/0007."""
    return out / "trials" / f"{number:04d}"


def load_trials(out: Path) -> list[Trial]:
    """Load the trials of a study, by number."""
    # A folder without a record is one whose making was interrupted.
    trials = [_load_trial(path.parent) for path in (out / "trials").glob(f"*/{RECORD_FILE}")]
    return sorted(trials, key=lambda trial: trial.number)


def _load_trial(folder: Path) -> Trial:
    hint = f"remove {folder}; the study then makes this trial again"
    record = files.read_json(folder / RECORD_FILE, hint, dict[str, Any])
    return files.check_form({**record, "folder": folder}, Trial, str(folder / RECORD_FILE), hint)


def read_metric_rows(path: Path) -> list[MetricRow]:
    """Read the whole rows of a metrics.jsonl; [] while it does not exist."""
    # The last line may still be written, and lines without a step are remarks of the run.
    return list_rows(read_lines(path))


def iterate_values(rows: list[MetricRow], key: str) -> Iterator[tuple[int, float]]:
    """Yield (step, value) of a key such as `val.dice`, in step order; null stands for not finite and is left out."""
    kind, _, name = key.partition(".")
    for row in rows:
        if row.get("kind") == kind and isinstance(row.get(name), (int, float)):
            yield row["step"], float(row[name])


def find_value_at(rows: list[MetricRow], key: str, step: int) -> float | None:
    """The first value at or after a step, None before there is one."""
    return next((value for at, value in iterate_values(rows, key) if at >= step), None)


def read_objective(folder: Path, objective: Objective) -> float | None:
    """Read the value of a finished trial; None when it left no such number."""
    # The prefix says which file holds the number.
    source, _, name = objective.key.partition(".")
    if source == "evaluate":
        mean = (
            read_scores(folder / "evaluate", f"remove {folder} to run the trial again")["mean"]
            .get("model", {})
            .get(name)
        )
        return None if mean is None else float(mean)

    rows = read_metric_rows(folder / METRICS_FILE)
    # Step 0 is the untrained student.
    values = [value for step, value in iterate_values(rows, objective.key) if step > 0]
    if not values:
        return None
    # The best row is that of the weights that the training keeps as its best.
    return max(values) if objective.goal == "maximize" else min(values)
