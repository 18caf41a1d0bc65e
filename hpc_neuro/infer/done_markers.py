"""Done markers of one volume: which block was written where, with the checksums of its read-back.

They are records of the run folder's journal (data/run_journal.py). A block without one is not done. OUT/journal also
counts how often a task was begun and its process was killed before it ended, and keeps what failed at every try.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Shape
from hpc_neuro.core.record_log import Record
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.task_queue import Task
from hpc_neuro.data.run_journal import BlockMarker, RunJournal, VolumeRecords, name_block, parse_marker


@with_config(ConfigDict(extra="allow"))
class _FailureForm(TypedDict):
    """The record of a block that failed."""

    index: list[int]
    start: list[int]
    error: str


class DoneMarkers:
    """The markers of one volume of a run folder, and the journal of its tasks (core.task_queue.Journal)."""

    def __init__(self, out: Path, name: str, key: str, journal: RunJournal | None = None) -> None:
        """key: hash of all that the probability depends on; markers with another key do not count.

        journal: that of all volumes of a run; None: one of its own.
        """
        self.out, self.name, self.key = out, name, key
        self.journal = journal or RunJournal(out)
        self._sound: dict[str, Record] = {}

    @property
    def _records(self) -> VolumeRecords:
        return self.journal.find(self.name)

    def read(self, index: Shape) -> BlockMarker | None:
        """A block's marker; None when it is missing or has another key. `refresh` first for those of other ranks."""
        record = self._records.blocks.get(name_block(index))
        if record is None or record.key != self.key:
            return None
        # A record of another form is of no block.
        return self._parse(record)

    def has_record(self, index: Shape) -> bool:
        """Whether the journal holds a marker of a block, of whatever key or form."""
        return name_block(index) in self._records.blocks

    def refresh(self) -> None:
        """Read what other processes have appended."""
        self.journal.refresh()

    def write(self, marker: BlockMarker) -> None:
        """Mark a block done."""
        self.journal.append("block", self.name, name_block(marker.index), self.key, asdict(marker))

    def read_all(self, blocks: Iterable[Block]) -> Iterator[BlockMarker]:
        """The markers of those blocks that are done, by any rank."""
        self.refresh()
        for block in blocks:
            if (marker := self.read(block.index)) is not None:
                yield marker

    def list_missing(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks that are not done, by any rank."""
        self.refresh()
        return [block for block in blocks if not self._is_done(name_block(block.index))]

    def is_untouched(self) -> bool:
        """Whether no process that this one knows of has begun anything of the volume."""
        records = self._records
        return not (records.blocks or records.shards or records.begun or records.failures)

    def forget_block(self, index: Shape) -> None:
        """Let a block be written again."""
        self.journal.append("forget_block", self.name, name_block(index), is_urgent=True)

    def forget_faulty(self, shards: Iterable[str]) -> None:
        """Forget the blocks of damaged shards, and all levels: they may be made from other values."""
        faulty = set(shards)
        for record in list(self._records.blocks.values()):
            marker = self._parse(record)
            if marker is None or faulty.intersection(marker.files):
                self.journal.append("forget_block", self.name, record.name)
        self.forget_levels()

    def has_unreadable(self) -> bool:
        """Whether the record of a block or of a shard is of another form; it then is of no block."""
        records = self._records
        return any(self._parse(record) is None for record in records.blocks.values()) or any(
            not isinstance(_parse_body(record), str) for record in records.shards.values()
        )

    def list_shards(self) -> dict[str, int | None]:
        """Shard of a block or level -> its size in bytes; None where that was not recorded. Shards of zeros have no
        file, and are left out."""
        shards = dict[str, int | None]()
        for record in self._records.blocks.values():
            if (marker := self._parse(record)) is not None:
                shards |= {shard: marker.sizes.get(shard) for shard in marker.files}
        return shards | {shard: None for shard, digest in self.read_levels().items() if digest}

    def list_written(self, blocks: Iterable[Block]) -> frozenset[str] | None:
        """The shards of the probability that have a file; None where a block has no marker."""
        markers = [self.read(block.index) for block in blocks]
        if None in markers:
            return None
        return frozenset(
            shard for marker in markers if marker is not None for shard in marker.files if shard.startswith("0/")
        )

    def clear(self) -> None:
        """Forget all that was done, failed or counted."""
        # What was done, or failed, with other settings says nothing about these.
        if not self.is_untouched():
            self.journal.append("forget_volume", self.name, is_urgent=True)

    def count_deaths(self, name: str) -> int:
        """How often a process was killed while it was at a task."""
        return len(self._records.begun.get(name, ()))

    def begin(self, name: str) -> None:
        """Count a task as begun, until `end` or `succeed`."""
        # Counted beforehand, because a task that kills its process cannot report it.
        self.journal.append("begin", self.name, name)

    def end(self, name: str) -> None:
        """The process has outlived a task."""
        self.journal.give_back(self.name, name)

    def succeed(self, name: str) -> None:
        """The process has outlived a task, which is done, and has not failed after all."""
        self.journal.append("done", self.name, name)

    def end_all(self) -> None:
        """All of the volume is done: counts that a kill left between that and `end` mean nothing any more."""
        self.journal.append("forget_begun", self.name)

    def record_failure(self, name: str, facts: Mapping[str, Any], error: str, trace: str, tries: int) -> None:
        """Keep what made a task be left out; `facts` say where it is."""
        # A list of lines keeps the traceback readable in JSON.
        record = {**facts, "tries": tries, "error": error, "traceback": trace.splitlines()}
        self.journal.append("fail", self.name, name, body=record)

    def read_failures(self) -> dict[str, dict[str, Any]]:
        """The records of all tasks that failed at every try, by name."""
        failures = {name: _parse_body(record) for name, record in sorted(self._records.failures.items())}
        # A record of another form says that the task failed, and nothing else.
        return {name: facts if isinstance(facts, dict) else {} for name, facts in failures.items()}

    def read_failed_blocks(self) -> list[dict[str, Any]]:
        """The records of blocks that failed at every try."""
        # The names of blocks begin with a digit, those of other tasks with a letter.
        records = []
        for name, record in self.read_failures().items():
            # A record of another form is left out; its block is missing, and done again by the next start.
            with contextlib.suppress(InputError):
                if name[:1].isdecimal():
                    records.append(dict(files.check_form(record, _FailureForm, name, "")))
        return records

    def read_levels(self) -> dict[str, str]:
        """Checksums of the finished shards of the pyramid; "" for one of zeros, which has no file."""
        checksums = {path: _parse_body(record) for path, record in self._records.shards.items()}
        return {path: checksum for path, checksum in checksums.items() if isinstance(checksum, str)}

    def write_shard(self, path: str, checksum: str) -> None:
        """Mark a shard of the pyramid done."""
        self.journal.append("shard", self.name, path, self.key, checksum)

    def forget_shard(self, path: str) -> None:
        """Let a shard of the pyramid be built again."""
        self.journal.append("forget_shard", self.name, path, is_urgent=True)

    def forget_levels(self) -> None:
        """Let the pyramid be built again."""
        self.journal.append("forget_levels", self.name, is_urgent=True)

    def _is_done(self, name: str) -> bool:
        record = self._records.blocks.get(name)
        if record is None or record.key != self.key:
            return False
        # Parsing takes as long as reading, and is done once for each record.
        if self._sound.get(name) is not record and self._parse(record) is not None:
            self._sound[name] = record
        return self._sound.get(name) is record

    def _parse(self, record: Record) -> BlockMarker | None:
        with contextlib.suppress(ValueError):
            return parse_marker(record)
        return None


def make_block_task(block: Block, volume: str) -> Task[Block]:
    """The task to predict and write one block of a volume."""
    return Task(
        name=name_block(block.index),
        label=f"block {block.index}",
        payload=block,
        group=volume,
        facts={"index": block.index, "start": block.write.start, "stop": block.write.stop},
    )


def _parse_body(record: Record) -> Any:
    """The facts of a record; None for what is no JSON."""
    try:
        return json.loads(record.body)
    except ValueError:
        return None
