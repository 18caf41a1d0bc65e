"""Rows of metrics.jsonl: one JSON object per line, which a kill may tear."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import InputError

MetricRow = dict[str, Any]
"""One line of metrics.jsonl: `step`, `kind`, and what was measured."""


def parse_row(line: bytes) -> MetricRow | None:
    """One line as a row; None for a torn line, and for one that is no object with a whole number as its `step`."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    # In Python, true is a whole number.
    is_row = isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("kind", ""), str)
    return row if is_row else None


def read_lines(path: Path) -> list[bytes]:
    """The lines of metrics.jsonl; [] where there is no such file. Raises InputError for what is no file."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); move it away") from None


def list_rows(lines: Iterable[bytes]) -> list[MetricRow]:
    """The whole rows among lines."""
    return [row for row in map(parse_row, lines) if row is not None]


def find_damaged_line(lines: list[bytes]) -> int | None:
    """Number, from 1, of a line that is no row although rows follow: a kill tears the last lines only. None: none."""
    rows = [parse_row(line) is not None for line in lines]
    last = max((number for number, is_row in enumerate(rows, start=1) if is_row), default=0)
    return next((number for number, is_row in enumerate(rows[:last], start=1) if not is_row), None)
