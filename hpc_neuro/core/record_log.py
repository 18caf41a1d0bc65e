"""A folder of append-only logs: each process appends records to a file of its own, and every process reads all files.

    FOLDER/000002_4f1c09aa.log           a log: one record per line, with the CRC-32 of the rest of its line
    FOLDER/000002_0003_of_0512_4f1c09aa.log     a log of one share of a job array
    FOLDER/000005_all_9b02d1e7.log       all that the logs of generations before 5 held, written whole

The number in front is the generation: that of a start is one higher than all in the folder. A record counts once its
line is whole, newline included. A process that was killed leaves at most one line without an end, which is no record:
what it was about is done again. A whole line with another checksum was damaged later, and is counted.

A line is handed to the operating system at once (`write`), so that a killed process loses none. `fsync` follows at most
every SYNC_SECONDS: a node that loses power loses the records of that time, and the work of a lost record is done again.
A record that takes others back is on the disk before `append` returns, since what it takes back is changed next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hpc_neuro.core import files

SYNC_SECONDS = 5.0
"""[s] Longest time in which records of a process that goes on appending are not flushed to the disk."""
MAX_LOGS = 8
"""Logs in a folder above which it pays to write them as one: a start opens each."""
GAVE_BACK = "gave_back"
"""Kind of a record, and ending of a log: its process gave back all that it held. On a full disk it cannot write so."""
_NAME = re.compile(r"(?P<generation>\d{6,})_(?:all_|(?P<share>\d+_of_\d+)_)?[0-9a-f]{8}\.log")


class Record(NamedTuple):
    """One line of a log. All fields but the body are short texts without tabs or line ends."""

    kind: str
    group: str
    name: str
    key: str
    time: float
    """[s] Since 1970, by the clock of the process that wrote it."""
    body: bytes
    """JSON; empty for a record without facts."""
    generation: int
    """Of the log; a log that holds all that was before its generation has records of the one before."""
    log: str
    """Name of the file that it stands in."""

    def encode(self) -> bytes:
        """The line."""
        fields = (self.kind, self.group, self.name, self.key, f"{self.time:.3f}")
        rest = b"\t".join([*(field.encode() for field in fields), self.body])
        return b"%08x\t%s\n" % (zlib.crc32(rest), rest)


class DamagedLine(NamedTuple):
    """A line whose checksum is not that of its bytes."""

    log: str
    number: int
    """From 1; 0: a line that an earlier call has read over."""


class RecordLog:
    """The logs of one folder: read those of all processes, append to that of this one."""

    def __init__(self, folder: Path, share: tuple[int, int] | None = None, generation: int | None = None) -> None:
        """share: (i, n) of a job array: logs of the other n - 1 are not read, as their items are others.

        generation: of this start; None: one above all in the folder.
        """
        self.folder = folder
        self.damaged: list[DamagedLine] = []
        """Lines that were read and did not have their checksum."""
        self._share = "" if share is None else f"{share[0]:04d}_of_{share[1]:04d}"
        self.generation = self._find_generation() if generation is None else generation
        self._own = folder / self._make_name(self.generation, self._share)
        self._offsets: dict[str, int] = {}
        self._lock = threading.RLock()
        self._handle: int | None = None
        self._size, self._synced_at, self._is_dirty = 0, 0.0, False

    def __del__(self) -> None:
        # What a test or a script did not close; without the flush that may raise.
        with contextlib.suppress(OSError, AttributeError):
            if self._handle is not None:
                os.close(self._handle)

    def read_new(self) -> Iterator[Record]:
        """The records of other processes that were not read before, log by log, earlier generations first.

        Logs of earlier generations are read once: their processes have ended, unless they are of other shares.
        """
        for path in self.list_logs():
            name = _strip(path.name)
            is_ended = name in self._offsets and _generation(name) < self.generation and "_of_" not in name
            if name != self._own.name and not is_ended:
                yield from self._read(path, name)

    def list_logs(self) -> list[Path]:
        """The logs that count for this process, in the order of their generations."""
        names = _list_names(self.folder)
        whole = max((_generation(name) for name in names if "_all_" in name), default=0)
        count = self._share.partition("_of_")[2]

        # Shares of one number divide the items among them, so none has a word on those of another.
        def is_foreign(name: str) -> bool:
            share = _parse(name)["share"] or ""
            return bool(count) and share.endswith(f"_of_{count}") and share != self._share

        kept = [name for name in names if _generation(name) >= whole and not is_foreign(name)]
        return [self.folder / name for name in sorted(kept, key=lambda name: (_generation_of_records(name), name))]

    def append(
        self, kind: str, group: str, name: str = "", key: str = "", body: Any = None, is_urgent: bool = False
    ) -> Record:
        """Append a record; is_urgent: it is on the disk when this returns. Raises OSError, with nothing appended."""
        content = b"" if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        record = Record(kind, group, name, key, round(time.time(), 3), content, self.generation, self._own.name)
        with self._lock:
            handle = self._open_own()
            self._write(handle, record.encode())
            if is_urgent or time.monotonic() - self._synced_at > SYNC_SECONDS:
                self._sync(handle)
        return record

    def close(self) -> None:
        """Flush what was appended. The next `append` opens the log again."""
        with self._lock:
            if self._handle is None:
                return
            handle, self._handle = self._handle, None
            try:
                if self._is_dirty:
                    self._sync(handle)
            finally:
                os.close(handle)

    def note_given_back(self) -> None:
        """Say that this process holds nothing any more, where the disk has no room for a line: in the log's name."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            self._own.rename(self._own.with_name(f"{self._own.name}.{GAVE_BACK}"))

    def replace_all(self, records: Iterable[Record], generation: int) -> None:
        """Write `records` as the only log, in place of those of earlier generations. No other process may append."""
        path = self.folder / self._make_name(generation, "all")
        with files.atomic(path) as part, part.open("wb") as file:
            file.writelines(record.encode() for record in records)
        self._offsets[path.name] = path.stat().st_size

        # A kill before this leaves logs that are older than one that holds all, and do not count.
        for name in _list_names(self.folder):
            if _generation(name) < generation:
                (self.folder / name).unlink(missing_ok=True)

    def _read(self, path: Path, name: str) -> Iterator[Record]:
        # Another program may have put a FIFO there, which would be waited for.
        files.require_regular_file(path, "a log of the journal")
        offset = self._offsets.get(name, 0)
        is_first, number = offset == 0, 0
        try:
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    # Its process is at it, or was killed there.
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    number += 1
                    record = decode(line, name)
                    if record is None:
                        self.damaged.append(DamagedLine(name, number if is_first else 0))
                    else:
                        yield record
        # Written as one with others meanwhile.
        except FileNotFoundError:
            return
        self._offsets[name] = offset
        if path.name != name:
            yield Record(GAVE_BACK, "", "", "", 0.0, b"", _generation(name), name)

    def _find_generation(self) -> int:
        return max(map(_generation, _list_names(self.folder)), default=0) + 1

    def _make_name(self, generation: int, tag: str) -> str:
        return f"{generation:06d}_{tag + '_' if tag else ''}{uuid.uuid4().hex[:8]}.log"

    def _open_own(self) -> int:
        if self._handle is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            try:
                self._handle = os.open(self._own, flags, 0o644)
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self._own, flags, 0o644)
            self._size = os.fstat(self._handle).st_size
            self._synced_at = time.monotonic()
        return self._handle

    def _write(self, handle: int, line: bytes) -> None:
        """Append a line whole or not at all."""
        self._is_dirty = True
        try:
            written = os.write(handle, line)
            # A disk that is nearly full takes a part; the next call says why.
            while written < len(line):
                written += os.write(handle, line[written:])
        except OSError:
            os.ftruncate(handle, self._size)
            raise
        self._size += len(line)

    def _sync(self, handle: int) -> None:
        os.fsync(handle)
        self._synced_at, self._is_dirty = time.monotonic(), False


def _list_names(folder: Path) -> list[str]:
    """The file names of all logs of a folder."""
    try:
        return sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(_strip(path.name)))
    except FileNotFoundError:
        return []


def _strip(name: str) -> str:
    return name.removesuffix(f".{GAVE_BACK}")


def _parse(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(_strip(name))
    if match is None:
        raise ValueError(f"{name} is not the name of a log")
    return match


def _generation(name: str) -> int:
    return int(_parse(name)["generation"])


def _generation_of_records(name: str) -> int:
    # What a log holds in place of others is older than what its own generation appends.
    return _generation(name) - ("_all_" in name)


def decode(line: bytes, log: str) -> Record | None:
    """A line as a record; None when its checksum, or its form, is another."""
    checksum, _, rest = line[:-1].partition(b"\t")
    try:
        if int(checksum, 16) != zlib.crc32(rest):
            return None
        kind, group, name, key, at, body = rest.split(b"\t", 5)
        # Kinds, groups and keys repeat in each line, and are kept once.
        return Record(
            sys.intern(kind.decode()),
            sys.intern(group.decode()),
            name.decode(),
            sys.intern(key.decode()),
            float(at),
            body,
            _generation_of_records(log),
            log,
        )
    except ValueError:
        return None
