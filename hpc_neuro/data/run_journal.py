"""OUT/journal: what all processes of `infer` have done in a run folder, as records in append-only logs.

    begin, end      a task was taken in hand; its process survived it
    done            a task ended well
    block           a block was written, or skipped with the evidence
    shard           a shard of the pyramid was built: the SHA-256 of its bytes, "" where all is zero and no file is
    fail            a task failed at every try: the error and its traceback
    forget_...      earlier records do not hold any more

A block or shard without a record was never written. See core/record_log.py for the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.record_log import GAVE_BACK, MAX_LOGS, DamagedLine, Record, RecordLog
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.task_queue import FULL_DISK

JOURNAL = "journal"
"""Folder of a run folder of `infer`."""
_OLD_MARKERS = "blocks/*/[0-9]*_*_*.json"
"""Files that versions before the journal wrote."""


@dataclass(frozen=True)
class EmptyEvidence:
    """Why a block was, or would have been, skipped: its brightest cell is not above the level."""

    brightest: float
    """Normalized brightness."""
    level: float
    """The setting `empty_level`."""


@dataclass(frozen=True)
class BlockMarker:
    """One finished block."""

    index: Shape
    start: Shape
    """[voxel] First voxel of the block."""
    files: dict[str, str]
    """Shard below ID.ome.zarr -> SHA-256 of its bytes; a shard of zeros has no file."""
    sha256: str
    """Of the probability, 0 to 255; "" for a skipped block."""
    foreground: int = 0
    """[voxel] Above the threshold."""
    seconds: float = 0.0
    """[s] From the wait for its voxels to its probability."""
    skipped: EmptyEvidence | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """[bytes] Of the same shards as `files`: compared at every start, where reading all of them would take long."""
    proof: EmptyEvidence | None = None
    """Set where the block was predicted to prove the rule, although it could have been skipped."""

    @property
    def contradicts_rule(self) -> bool:
        """Whether skipping this block would have lost foreground."""
        return self.proof is not None and self.foreground > 0


# Building an adapter takes far longer than validating with it.
_MARKER = TypeAdapter(BlockMarker)


@dataclass
class VolumeRecords:
    """The records of one volume that hold."""

    blocks: dict[str, Record] = field(default_factory=dict)
    """By the name of the block."""
    shards: dict[str, Record] = field(default_factory=dict)
    """Of the pyramid, by path below ID.ome.zarr."""
    begun: dict[str, list[Record]] = field(default_factory=dict)
    """Task -> a record for each time that it was begun and not ended."""
    failures: dict[str, Record] = field(default_factory=dict)
    """Tasks that were left out."""

    def list_all(self) -> Iterator[Record]:
        """All records, as they would be written anew."""
        for records in (self.blocks, self.shards, self.failures):
            yield from records.values()
        for begun in self.begun.values():
            yield from begun


class RunJournal:
    """The records of a run folder. A process that only appends reads nothing."""

    def __init__(self, out: Path, share: tuple[int, int] | None = None, generation: int | None = None) -> None:
        """share, generation: see RecordLog; all ranks of a job are of one generation."""
        self.log = RecordLog(out / JOURNAL, share, generation)
        self._volumes: dict[str, VolumeRecords] = {}
        self._is_read = False

    @property
    def damaged_lines(self) -> list[DamagedLine]:
        """The lines that were damaged after they were written; what they recorded is unknown."""
        return self.log.damaged

    def refresh(self) -> None:
        """Read what other processes have appended since the last call."""
        self._is_read = True
        for record in self.log.read_new():
            self._apply(record)

    def list_volumes(self) -> list[str]:
        """The volumes of which there are records."""
        self._require_read()
        return sorted(name for name, records in self._volumes.items() if any(records.list_all()))

    def find(self, volume: str) -> VolumeRecords:
        """The records of a volume."""
        self._require_read()
        return self._volumes.setdefault(volume, VolumeRecords())

    def append(
        self, kind: str, volume: str, name: str = "", key: str = "", body: Any = None, is_urgent: bool = False
    ) -> None:
        """Append a record of this process. Raises OSError; nothing is appended then."""
        self._apply(self.log.append(kind, volume, name, key, body, is_urgent))

    def give_back(self, volume: str, name: str) -> None:
        """Record that the process survived a task. On a full disk the name of the log says so."""
        try:
            self.append("end", volume, name)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self.log.note_given_back()
            self._apply(Record("end", volume, name, "", 0.0, b"", self.log.generation, ""))

    def close(self) -> None:
        """Flush what this process has appended."""
        self.log.close()

    def forget_damage(self) -> None:
        """Drop damaged lines, and all levels: nobody knows whether they belong to the blocks. No other may append."""
        for records in self._volumes.values():
            records.shards.clear()
        self._write_anew(self.log.generation)
        self.damaged_lines.clear()

    def compact(self) -> None:
        """Write all logs of earlier generations as one, if it pays. No other process may append."""
        self.refresh()
        if len(self.log.list_logs()) > MAX_LOGS and not self.damaged_lines:
            self._write_anew(self.log.generation)

    def finish(self) -> None:
        """Write all logs, that of this process included, as one. No process may append any more."""
        self.refresh()
        self.close()
        if len(self.log.list_logs()) > 1 and not self.damaged_lines:
            self._write_anew(self.log.generation + 1)

    def _write_anew(self, generation: int) -> None:
        records = (record for volume in self._volumes.values() for record in volume.list_all())
        self.log.replace_all(records, generation)

    def _require_read(self) -> None:
        if not self._is_read:
            self.refresh()

    def _apply(self, record: Record) -> None:
        if record.kind == GAVE_BACK:
            self._end_all_of(record.log)
            return
        if record.kind not in _RULES:
            raise InputError(
                f"{self.log.folder / record.log} holds a record of the kind {record.kind[:40]!r}, which this version "
                f"does not know; go on with the version that wrote it, or remove {self.log.folder.parent}"
            )
        # The name becomes that of files, also of such that are removed.
        if not files.is_plain_name(record.group):
            raise InputError(
                f"{self.log.folder / record.log} holds a record of the volume {record.group[:40]!a}, which `infer` "
                f"cannot have written; remove {files.quote_path(self.log.folder.parent)}, or give another `out`"
            )
        volume = self._volumes.setdefault(record.group, VolumeRecords())
        _RULES[record.kind](volume, record)

    def _end_all_of(self, log: str) -> None:
        for volume in self._volumes.values():
            kept = {name: [r for r in begun if r.log != log] for name, begun in volume.begun.items()}
            volume.begun = {name: begun for name, begun in kept.items() if begun}


def _add_block(volume: VolumeRecords, record: Record) -> None:
    # A worker that was taken for dead may end a block after the one that took it over.
    previous = volume.blocks.get(record.name)
    if previous is None or (previous.generation, previous.time) <= (record.generation, record.time):
        volume.blocks[record.name] = record


def _add_shard(volume: VolumeRecords, record: Record) -> None:
    volume.shards[record.name] = record


def _begin(volume: VolumeRecords, record: Record) -> None:
    volume.begun.setdefault(record.name, []).append(record)


def _end(volume: VolumeRecords, record: Record) -> None:
    volume.begun.pop(record.name, None)


def _succeed(volume: VolumeRecords, record: Record) -> None:
    _end(volume, record)
    volume.failures.pop(record.name, None)


def _fail(volume: VolumeRecords, record: Record) -> None:
    volume.failures[record.name] = record


def _forget_block(volume: VolumeRecords, record: Record) -> None:
    _forget(volume.blocks, record, [record.name])


def _forget_shard(volume: VolumeRecords, record: Record) -> None:
    _forget(volume.shards, record, [record.name])


def _forget_levels(volume: VolumeRecords, record: Record) -> None:
    _forget(volume.shards, record, tuple(volume.shards))


def _forget_begun(volume: VolumeRecords, record: Record) -> None:
    volume.begun.clear()


def _forget_volume(volume: VolumeRecords, record: Record) -> None:
    for records in (volume.blocks, volume.shards, volume.failures):
        _forget(records, record, tuple(records))
    volume.begun.clear()


def _forget(records: dict[str, Record], forget: Record, names: Iterable[str]) -> None:
    """Remove what was recorded before: in an earlier generation, or earlier in the same log.

    Records of other processes of the same generation are newer, whatever the clocks of their nodes say.
    """
    for name in names:
        record = records.get(name)
        if record is not None and (record.generation < forget.generation or record.log == forget.log):
            del records[name]


_RULES: dict[str, Callable[[VolumeRecords, Record], None]] = {
    "begin": _begin,
    "end": _end,
    "done": _succeed,
    "block": _add_block,
    "shard": _add_shard,
    "fail": _fail,
    "forget_block": _forget_block,
    "forget_shard": _forget_shard,
    "forget_levels": _forget_levels,
    "forget_begun": _forget_begun,
    "forget_volume": _forget_volume,
}
"""Kind of a record -> what it changes."""


def name_block(index: Shape) -> str:
    """A block's name in the run folder."""
    return "_".join(map(str, index))


def parse_marker(record: Record) -> BlockMarker:
    """The marker in the record of a block. Raises ValueError for one of another form."""
    marker: BlockMarker = _MARKER.validate_json(record.body)
    if name_block(marker.index) != record.name:
        raise ValueError(f"the record of block {record.name} is of block {name_block(marker.index)}")
    place = "/".join(("c", *map(str, marker.index)))
    labels = [name for name in marker.files if re.fullmatch(rf"labels/[a-z]+/0/{place}", name)]
    if marker.files.keys() - labels - {f"0/{place}"}:
        raise ValueError(f"the record of block {record.name} names files of other blocks")
    # A shard of zeros has no file, and any other has one.
    if bool(labels) != (marker.foreground > 0):
        raise ValueError(f"the record of block {record.name} names another number of files than it wrote")
    return marker


def read_journal(out: Path, hint: str) -> RunJournal:
    """The journal of a run folder. Raises InputError for a damaged one and for a folder of an older form."""
    require_current_form(out)
    journal = RunJournal(out)
    journal.refresh()
    if journal.damaged_lines:
        line = journal.damaged_lines[0]
        raise InputError(f"{out / JOURNAL / line.log}: {describe_damage(line)}; {hint}")
    return journal


def read_markers(journal: RunJournal, volume: str, hint: str) -> list[BlockMarker]:
    """The markers of all finished blocks of a volume. Raises InputError, which ends with `hint`."""
    markers = []
    for record in journal.find(volume).blocks.values():
        try:
            markers.append(parse_marker(record))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "it"
            raise InputError(
                f"{journal.log.folder / record.log}: the record of block {record.name} of {volume} is not of the form "
                f"it was written in ({where}: {fault['msg'].lower()}); {hint}"
            ) from None
        except ValueError as error:
            raise InputError(f"{journal.log.folder / record.log}: {error}; {hint}") from None
    return sorted(markers, key=lambda marker: marker.index)


def describe_damage(line: DamagedLine) -> str:
    """What is wrong with a line, for people."""
    place = f"line {line.number}" if line.number else "a line"
    return f"{place} does not have the checksum that it was written with"


def require_current_form(out: Path) -> None:
    """Raise InputError for a run folder with a done marker per block, which versions before the journal wrote."""
    if marker := next(out.glob(_OLD_MARKERS), None):
        raise InputError(
            f"{marker} is a done marker of an older version, and this one keeps {out / JOURNAL} instead: it cannot go "
            f"on from {out}; remove {files.quote_path(out)} and run `hpc-neuro infer` again, or give another `out`"
        )
