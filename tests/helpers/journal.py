"""What the journal of a run folder of `infer` says, and harm to its lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_neuro.core.record_log import Record, decode
from hpc_neuro.data.run_journal import JOURNAL, RunJournal


def open_journal(out: Path) -> RunJournal:
    """The journal as another process would read it now."""
    journal = RunJournal(out)
    journal.refresh()
    return journal


def list_blocks(out: Path, volume: str) -> list[str]:
    """The names of the blocks that are done."""
    return sorted(open_journal(out).find(volume).blocks)


def list_begun(out: Path, volume: str) -> list[str]:
    """The tasks that were begun and not ended."""
    return sorted(open_journal(out).find(volume).begun)


def list_all_begun(out: Path) -> list[tuple[str, str]]:
    """The same of all volumes."""
    journal = open_journal(out)
    return [(volume, name) for volume in journal.list_volumes() for name in sorted(journal.find(volume).begun)]


def read_failures(out: Path, volume: str) -> dict[str, Any]:
    """Task -> why it was left out."""
    return {name: json.loads(record.body) for name, record in open_journal(out).find(volume).failures.items()}


def list_times(out: Path) -> dict[tuple[str, str], float]:
    """When each block was marked done."""
    journal = open_journal(out)
    volumes = journal.list_volumes()
    return {(volume, name): record.time for volume in volumes for name, record in journal.find(volume).blocks.items()}


def list_logs(out: Path) -> list[Path]:
    return sorted(path for path in (out / JOURNAL).iterdir() if not path.name.startswith("."))


def change_lines(out: Path, is_meant: Callable[[Record], bool], change: Callable[[bytes, Record], bytes]) -> int:
    """Replace the lines of all logs that are meant; how many there were."""
    count = 0
    for path in list_logs(out):
        lines = []
        for line in path.read_bytes().splitlines(keepends=True):
            record = decode(line, path.name)
            if record is not None and is_meant(record):
                count += 1
                lines.append(change(line, record))
            else:
                lines.append(line)
        path.write_bytes(b"".join(lines))
    return count


def is_block(volume: str, name: str) -> Callable[[Record], bool]:
    return lambda record: (record.kind, record.group, record.name) == ("block", volume, name)


def drop_block(out: Path, volume: str = "a", name: str = "0_0_0") -> None:
    """Lose the record of a block."""
    assert change_lines(out, is_block(volume, name), lambda line, record: b"")


def spoil_block(out: Path, volume: str = "a", name: str = "0_0_0") -> None:
    """Change a bit of the record of a block."""

    def flip(line: bytes, record: Record) -> bytes:
        half = len(line) // 2
        return line[:half] + bytes([line[half] ^ 1]) + line[half + 1 :]

    assert change_lines(out, is_block(volume, name), flip)


def edit_block(out: Path, volume: str, name: str, **facts: object) -> None:
    """Give the record of a block other facts, with the checksum of these."""

    def edit(line: bytes, record: Record) -> bytes:
        return record._replace(body=json.dumps({**json.loads(record.body), **facts}).encode()).encode()

    assert change_lines(out, is_block(volume, name), edit)
