"""Rows of metrics.jsonl: what a kill tears at the end is left out, and damage before a row is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.core.metric_rows import find_damaged_line, list_rows, parse_row, read_lines
from hpc_neuro.core.schema import InputError

GOOD = b'{"step": 1, "kind": "train", "loss": 0.5}'
BAD = [
    b"",
    b'{"step": 1',
    b'{"step": "x", "kind": "train"}',
    b'{"step": true}',
    b'{"step": 1.5}',
    b'{"step": 2, "kind": 3}',
    b"[1]",
    b"null",
    b'{"step": 2, "kind": "\xff"}',
    b"[" * 200_000,
    b'{"step": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:24]))
def test_what_is_no_row(line: bytes) -> None:
    assert parse_row(line) is None
    assert list_rows([GOOD, line]) == [{"step": 1, "kind": "train", "loss": 0.5}]
    assert find_damaged_line([GOOD, line, line]) is None
    assert find_damaged_line([GOOD, line, GOOD]) == 2


def test_lines_of_a_file(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + b"\n" + BAD[1])
    assert read_lines(tmp_path / "metrics.jsonl") == [GOOD, BAD[1]]
    with pytest.raises(InputError, match="cannot be read .Is a directory.; move it away"):
        read_lines(tmp_path)
