"""`hpc-neuro runs [FOLDER...]`: the run folders below some folders, as a table, as JSON or as one page."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hpc_neuro.core import files, folder_lock, metric_rows, run_folder
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES, EXIT_STOPPED
from hpc_neuro.core.run_folder import RECORD, REMAKE, SHARES
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import STAGES, VERBS
from hpc_neuro.report import html
from hpc_neuro.report.html import Cell, Column

log = logging.getLogger(__name__)

HELP = """usage: hpc-neuro runs [FOLDER ...] [--verb VERB] [--state STATE] [--sort KEY] [--json] [--html FILE]

Lists the run folders in and below FOLDER (`runs` if none is given), from their run.json.
  --verb VERB    only runs of this verb; may be given several times
  --state STATE  only runs in this state; may be given several times:
                   complete  finished
                   running   a process works in the folder
                   stopped   by a signal, the time limit or a kill; the same command resumes it
                   failed    ended with an error, or with failures that it lists
                   broken    its run.json cannot be read; such a run is listed whatever is chosen
  --sort KEY     date (the default), best, hours: largest first; verb, state, code, path: in alphabetic order
  --json         one JSON array in place of the table
  --html FILE    also write a page whose table is sorted by a click on a heading
Exit code: 0 done, 2 a folder that does not exist, 3 some run.json cannot be read."""

_STATES = ("complete", "running", "stopped", "failed", "broken")
_DEFAULT_FOLDER = Path("runs")
_LABELS = {"dice": "Dice", "val_dice": "validation Dice", "f1": "F1"}
"""Names for people of metrics; others have the name of their key."""


@dataclass(frozen=True)
class RunRow:
    """What the list shows of one run."""

    path: str
    verb: str = ""
    state: str = "broken"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores of the result, or counts of what was made. The first one ranks the run if it is a score."""
    hours: float | None = None
    """[h] Wall time of all starts whose end is recorded."""
    gpu_hours: float | None = None
    """[h] The same times the GPUs of each start; None where an earlier version did not record them."""
    has_all_hours: bool = True
    """False after a start that was killed: no record says how long it ran."""
    starts: int = 0
    date: str = ""
    """Last start, ISO 8601."""
    code: str = ""
    note: str = ""
    """Why the run is not complete."""

    @property
    def best(self) -> float | None:
        """The score that ranks the run, None for a run without scores."""
        score = next(iter(self.metrics.values()), None)
        return score if isinstance(score, float) else None


def main(argv: Sequence[str]) -> int:
    """List runs. 0: done; 3: a run.json cannot be read. Raises ConfigError for flags, InputError for folders."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return EXIT_DONE
    arguments = _parse_arguments(argv)

    rows = list_runs(arguments.folders or [_DEFAULT_FOLDER])
    rows = sort_rows((row for row in rows if _is_chosen(row, arguments)), arguments.sort)

    if arguments.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n")
    else:
        sys.stdout.write("\n".join(format_table(rows)) + "\n")

    if arguments.html is not None:
        files.write_text(arguments.html, render_page(rows))
        log.info("runs: wrote %s", arguments.html)
    return EXIT_FAILURES if any(row.state == "broken" for row in rows) else EXIT_DONE


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors, as those of every verb."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"runs cannot run: {message}\n{HELP}")


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--verb", action="append", choices=list(VERBS))
    parser.add_argument("--state", action="append", choices=_STATES)
    parser.add_argument("--sort", default="date", choices=list(_SORT_KEYS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", type=Path)
    # Folders may stand before and after flags.
    arguments = parser.parse_intermixed_args(argv)

    # The page would replace a record or a result that is named by mistake.
    if arguments.html is not None and arguments.html.suffix.lower() != ".html":
        raise ConfigError(f"--html {arguments.html} is not named as a page; give a name that ends in .html")
    return arguments


def _is_chosen(row: RunRow, arguments: argparse.Namespace) -> bool:
    # The verb in a record that cannot be read is unknown, and its fault must be seen.
    if row.state == "broken":
        return True
    is_of_verb = not arguments.verb or row.verb in arguments.verb
    return is_of_verb and (not arguments.state or row.state in arguments.state)


# --- Finding and reading ---


def list_runs(folders: Iterable[Path]) -> list[RunRow]:
    """The runs in and below `folders`, each once. Raises InputError for a folder that does not exist."""
    rows: dict[Path, RunRow] = {}
    for folder in folders:
        if not folder.is_dir():
            fault = "is not a folder" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {fault}; give the folder that holds your runs: hpc-neuro runs FOLDER")
        for row in _walk_runs(folder):
            # Folders that were given may lie in one another.
            rows.setdefault(Path(row.path).resolve(), row)
    return list(rows.values())


def _walk_runs(root: Path) -> Iterator[RunRow]:
    errors: list[OSError] = []

    for folder, names, file_names in os.walk(root, onerror=errors.append):
        # A folder in the place of a record is a fault that is listed.
        row = read_row(Path(folder)) if RECORD in (*file_names, *names) else None
        if row is not None:
            yield row

        # The folder of a stage may hold millions of files, and no other run: shares of a job array are one run with it.
        if row is not None and row.verb in STAGES:
            names.clear()
        # Before the shares are gathered, they are all there is.
        elif row is None and SHARES in names:
            names[:] = [SHARES]
        else:
            names[:] = [name for name in names if not name.startswith(".") and not name.endswith(".zarr")]

    for error in errors:
        note = f"the folder cannot be read ({error.strerror}); ask its owner for access"
        yield RunRow(_show_path(error.filename), note=note)


def read_row(folder: Path) -> RunRow:
    """The row of the run in `folder`; one in the state `broken` that says why, if its record cannot be read."""
    try:
        record = run_folder.read_record(folder, REMAKE)
        holder = folder_lock.describe_holder(folder)
        state, note = _judge_state(record, holder)
        starts = record.get("starts", [])
        seconds = _measure_seconds(folder, record, is_running=holder is not None)

        return RunRow(
            path=_show_path(folder),
            verb=record["verb"],
            state=state,
            metrics=_read_metrics(folder, record),
            hours=sum(seconds.values()) / 3600 if seconds else None,
            gpu_hours=_sum_gpu_hours(record, seconds),
            has_all_hours=len(seconds) == len(starts),
            starts=len(starts),
            date=starts[-1] if starts else "",
            code=record.get("code", ""),
            note=_join_lines(note),
        )
    except InputError as error:
        return RunRow(_show_path(folder), note=_join_lines(str(error)))


def _judge_state(record: Mapping[str, Any], holder: str | None) -> tuple[str, str]:
    """State and note of a run. holder: who works in its folder."""
    code, failures = record.get("exit"), record.get("failures", [])
    if holder is not None:
        return "running", holder
    if code == EXIT_DONE:
        return "complete", ""

    if code == EXIT_STOPPED or str(code).startswith(KeyboardInterrupt.__name__):
        return "stopped", "by a signal or the time limit"
    # A process that ends in any other way records when.
    if code is None and record.get("end") is None:
        return "stopped", "killed: no end is recorded"

    if code == EXIT_FAILURES and failures:
        return "failed", f"{files.format_count(len(failures), 'failure')}, the first: {failures[0]}"
    if code is None:
        return "failed", "ended before it was finished; log.txt says why"
    return "failed", f"exit code {code}" if isinstance(code, int) else code


def _measure_seconds(folder: Path, record: Mapping[str, Any], is_running: bool) -> dict[int, float]:
    """[s] Wall time of each start whose end is known, by its index."""
    # Records are matched from their ends: those of earlier versions lack the first stops.
    end = dt.datetime.now(dt.UTC).isoformat() if is_running else record.get("end")
    starts = [_parse_time(text, folder) for text in reversed(record.get("starts", []))]
    stops = [text and _parse_time(text, folder) for text in reversed([*record.get("stops", []), end])]
    pairs = enumerate(zip(starts, stops, strict=False), start=1)
    return {len(starts) - number: (stop - start).total_seconds() for number, (start, stop) in pairs if stop}


def _sum_gpu_hours(record: Mapping[str, Any], seconds: Mapping[int, float]) -> float | None:
    """[h] Wall time of the starts times their GPUs."""
    gpus: list[int] = record.get("gpus", [])
    if not seconds or len(gpus) != len(record.get("starts", [])):
        return None
    return sum(gpus[index] * duration for index, duration in seconds.items()) / 3600


def _parse_time(text: str, folder: Path) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(text).astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise InputError(f"{folder / RECORD} holds {text!r} where a time is expected; {REMAKE}") from None


def _read_metrics(folder: Path, record: Mapping[str, Any]) -> dict[str, float]:
    """Scores of a run that has some, else counts of what it made; {} before there are any."""
    summary = record.get("summary", {})
    if record["verb"] == "train":
        return _read_best_validation(folder, record)

    # The summary of `evaluate` holds the means of all methods, that of `demo` is those means.
    means = summary.get("mean", summary)
    scores = means.get("model") if isinstance(means, dict) else None
    if isinstance(scores, dict):
        # The key of F1 names the tolerance; the first one is that of the whole tree.
        keys = {"dice": "dice", "f1": next((key for key in scores if key.startswith("f1_")), "")}
        return {name: float(scores[key]) for name, key in keys.items() if _is_score(scores.get(key))}

    return {name: count for name, count in summary.items() if type(count) is int and name != "seconds"}


def _read_best_validation(folder: Path, record: Mapping[str, Any]) -> dict[str, float]:
    """The best validation score of a training, and its step. Raises InputError for a config of another form."""
    checkpoint = record["config"].get("checkpoint")
    metric = checkpoint.get("metric") if isinstance(checkpoint, dict) else None
    if not isinstance(metric, str):
        raise InputError(f"{folder / RECORD} names no checkpoint.metric in its config; {REMAKE}")

    # Only a run that is complete has a summary. Every step has a row, and parsing all of them takes seconds.
    lines = metric_rows.read_lines(folder / "metrics.jsonl")
    rows = metric_rows.list_rows(line for line in lines if b'"val"' in line)

    # Step 0 is the untrained student.
    scores = [
        (float(row[metric]), int(row["step"]))
        for row in rows
        if row.get("kind") == "val" and row["step"] > 0 and _is_score(row.get(metric))
    ]
    if not scores:
        return {}

    # Of equal scores, the training keeps the first as its best.
    score, step = max(scores, key=lambda pair: pair[0])
    return {f"val_{metric.removesuffix('_best')}": score, "step": step}


def _is_score(value: object) -> bool:
    """Whether a value of JSON is a number that a score can have."""
    return isinstance(value, (int, float)) and 0 <= value <= 1


# --- Sorting ---

_SORT_KEYS: dict[str, Callable[[RunRow], Any]] = {
    "date": lambda row: row.date,
    "best": lambda row: row.best,
    "hours": lambda row: row.hours,
    "verb": lambda row: row.verb,
    "state": lambda row: row.state,
    "code": lambda row: row.code,
    "path": lambda row: run_folder.natural_key(row.path),
}
_LARGEST_FIRST = {"date", "best", "hours"}


def sort_rows(rows: Iterable[RunRow], key: str) -> list[RunRow]:
    """Rows by one of `_SORT_KEYS`, equal ones by path; rows without a value are last."""
    value = _SORT_KEYS[key]
    by_path = sorted(rows, key=_SORT_KEYS["path"])
    ranked = [row for row in by_path if value(row) not in (None, "")]
    others = [row for row in by_path if value(row) in (None, "")]
    return sorted(ranked, key=value, reverse=key in _LARGEST_FIRST) + others


# --- Output ---

_COLUMNS = (
    # The first column of a page stays in view.
    Column("path", numeric=False, wrap=True),
    Column("verb", numeric=False),
    Column("state", numeric=False),
    Column("result", "sorted by the Dice of the model", wrap=True),
    Column("hours", "wall time of all starts; + after a start that was killed, whose time no record has"),
    Column("GPU hours", "the same times the GPUs of each start; empty for runs of versions that did not record them"),
    Column("starts"),
    Column("date (UTC)", "of the last start", numeric=False),
    Column("code", "version of the package and its commit", numeric=False, wrap=True),
    Column("note", "why the run is not complete", numeric=False, wrap=True),
)


def format_table(rows: Sequence[RunRow]) -> list[str]:
    """Lines of a table with aligned columns, under their headings."""
    if not rows:
        return ["no runs to list"]
    table = [[column.title for column in _COLUMNS], *([cell.text for cell in _list_cells(row)] for row in rows)]
    widths = [max(len(texts[i]) for texts in table) for i in range(len(_COLUMNS))]

    lines = []
    for texts in table:
        parts = [
            text.rjust(width) if column.title in ("hours", "GPU hours", "starts") else text.ljust(width)
            for text, width, column in zip(texts, widths, _COLUMNS, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def render_page(rows: Sequence[RunRow]) -> str:
    """One HTML page, which loads nothing from elsewhere. Absolute paths begin at their common folder."""
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in _STATES if state in states)
    subtitle = f"{files.format_count(len(rows), 'run')}{': ' if counts else ''}{counts}"

    # The common part of long paths would take half of the page.
    cells = [_list_cells(row) for row in rows]
    paths = [Path(row.path) for row in rows]
    if len(rows) > 1 and all(path.is_absolute() for path in paths):
        top = os.path.commonpath(paths)
        subtitle += f" \N{MIDDLE DOT} paths from {top}"
        for row_cells, path in zip(cells, paths, strict=True):
            row_cells[0] = Cell(str(path.relative_to(top)))

    # A machine without a GPU has no GPU hours.
    has_gpu_hours = any(row.gpu_hours for row in rows)
    shown = [column for column in _COLUMNS if has_gpu_hours or column.title != "GPU hours"]
    if not has_gpu_hours:
        cells = [[cell for cell, column in zip(c, _COLUMNS, strict=True) if column in shown] for c in cells]
    table = html.table(*html.drop_empty_columns(shown, cells)) if rows else html.paragraph("No runs to list.")
    return html.render_page("Run folders", subtitle, [("Runs", table)])


def _list_cells(row: RunRow) -> list[Cell]:
    """The cells of a row, in the order of `_COLUMNS`."""
    metrics = [
        f"{_LABELS.get(name, name)} {value:.4f}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in row.metrics.items()
    ]
    hours = "" if row.hours is None else f"{row.hours:.2f}{'' if row.has_all_hours else '+'}"
    # 2026-11-30T06:24:03+00:00, in UTC as recorded.
    date = row.date[:16].replace("T", " ")

    return [
        Cell(row.path),
        Cell(row.verb),
        Cell(row.state),
        Cell(", ".join(metrics), row.best),
        Cell(hours, row.hours),
        Cell("" if row.gpu_hours is None else f"{row.gpu_hours:.2f}", row.gpu_hours),
        Cell(str(row.starts) if row.starts else "", float(row.starts)),
        Cell(date),
        Cell(row.code),
        Cell(row.note),
    ]


def _show_path(path: str | Path) -> str:
    """A path as text; bytes that are no UTF-8, which no terminal and no page takes, as escapes."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _join_lines(text: str) -> str:
    """A message on one line, as a table needs it."""
    return " ".join(text.split())
