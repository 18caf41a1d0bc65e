"""Append-only logs: nothing that was appended is lost, and nothing counts that is not whole."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from hpc_neuro.core import record_log
from hpc_neuro.core.record_log import Record, RecordLog


def read(folder: Path, **keys: object) -> list[Record]:
    return list(RecordLog(folder, **keys).read_new())


def names(records: list[Record]) -> list[str]:
    return [record.name for record in records]


def test_what_one_process_appends_another_reads_once(tmp_path: Path) -> None:
    writer = RecordLog(tmp_path / "logs")
    reader = RecordLog(tmp_path / "logs", generation=writer.generation)
    assert list(reader.read_new()) == []
    writer.append("block", "volume é", "0_0_1", "key", {"text": "tab\tand\nline"})
    (record,) = reader.read_new()
    assert (record.kind, record.group, record.name, record.key) == ("block", "volume é", "0_0_1", "key")
    assert record.body == b'{"text":"tab\\tand\\nline"}'
    writer.append("end", "a", "x")
    assert names(list(reader.read_new())) == ["x"]
    assert list(reader.read_new()) == []
    assert list(writer.read_new()) == [], "a process knows what it appended itself"


def test_only_new_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = RecordLog(tmp_path, generation=1), RecordLog(tmp_path, generation=1)
    for number in range(100):
        writer.append("end", "a", str(number))
    assert len(list(reader.read_new())) == 100
    decoded = list[bytes]()
    decode = record_log.decode
    monkeypatch.setattr(record_log, "decode", lambda line, log: decoded.append(line) or decode(line, log))
    writer.append("end", "a", "new")
    assert names(list(reader.read_new())) == ["new"]
    assert len(decoded) == 1


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_no_record(tmp_path: Path, cut: int) -> None:
    log = RecordLog(tmp_path)
    for name in ("one", "two"):
        log.append("block", "a", name, "key", [1, 2, 3])
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - cut)
    reader = RecordLog(tmp_path)
    assert names(list(reader.read_new())) == ["one"]
    assert not reader.damaged, "its process was killed, and the item is done again"


def test_a_line_that_is_half_there_is_read_when_it_is_whole(tmp_path: Path) -> None:
    log = RecordLog(tmp_path)
    log.append("block", "a", "one")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    reader = RecordLog(tmp_path, generation=1)
    path.write_bytes(whole[:-5])
    assert list(reader.read_new()) == []
    path.write_bytes(whole)
    assert names(list(reader.read_new())) == ["one"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    log = RecordLog(tmp_path)
    for name in ("one", "two", "three"):
        log.append("block", "a", name, "key", {"n": 1})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    second = range(whole.index(b"\n") + 1, whole.index(b"three") - 20)
    for position in second:
        data = bytearray(whole)
        data[position] ^= 0x11
        path.write_bytes(bytes(data))
        reader = RecordLog(tmp_path)
        records = names(list(reader.read_new()))
        assert records[0] == "one"
        assert "two" not in records
        assert reader.damaged


def test_logs_of_later_starts_come_later(tmp_path: Path) -> None:
    for number in range(3):
        log = RecordLog(tmp_path)
        assert log.generation == number + 1
        log.append("block", "a", str(number))
    assert names(read(tmp_path)) == ["0", "1", "2"]


def test_shares_read_no_logs_of_one_another(tmp_path: Path) -> None:
    for share in (None, (0, 4), (1, 4), (1, 2)):
        RecordLog(tmp_path, share).append("block", "a", str(share))
    assert sorted(names(read(tmp_path, share=(1, 4)))) == sorted(["None", "(1, 4)", "(1, 2)"])
    assert len(read(tmp_path)) == 4


def test_all_logs_become_one_and_a_kill_in_the_middle_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        RecordLog(tmp_path).append("block", "a", str(number))
    log = RecordLog(tmp_path)
    records = list(log.read_new())
    with monkeypatch.context() as context:
        # The old logs stay, as after a kill between the new log and their removal.
        context.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        log.replace_all(records[1:], log.generation)
    assert len(list(tmp_path.glob("*.log"))) == 6
    assert names(read(tmp_path)) == ["1", "2", "3", "4"], "logs that a later one replaces do not count"

    later = RecordLog(tmp_path)
    later.append("block", "a", "new")
    later.replace_all(records, later.generation)
    assert len(list(tmp_path.glob("*.log"))) == 2
    assert names(read(tmp_path)) == ["0", "1", "2", "3", "4", "new"]
    assert [record.generation for record in read(tmp_path)] == [6] * 5 + [7], "what was before is older"


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        log = RecordLog(tmp_path)
        for number in range(50):
            log.append("block", "a", str(number))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(read(tmp_path)) == 50


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RecordLog(tmp_path)
    log.append("block", "a", "one")
    write = os.write

    def write_half(handle: int, line: bytes) -> int:
        if len(line) < 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, line[: len(line) - 10])

    with monkeypatch.context() as context:
        context.setattr(os, "write", write_half)
        with pytest.raises(OSError, match="No space left"):
            log.append("block", "a", "two")
    log.append("block", "a", "three")
    reader = RecordLog(tmp_path)
    assert names(list(reader.read_new())) == ["one", "three"]
    assert not reader.damaged


def test_records_are_flushed_within_seconds_and_urgent_ones_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes, now = list[int](), 100.0
    monkeypatch.setattr(os, "fsync", flushes.append)
    monkeypatch.setattr(record_log.time, "monotonic", lambda: now)
    log = RecordLog(tmp_path)
    for _ in range(10):
        log.append("end", "a")
    assert not flushes
    now += record_log.SYNC_SECONDS + 1
    log.append("end", "a")
    log.append("end", "a")
    assert len(flushes) == 1
    log.append("forget_block", "a", is_urgent=True)
    assert len(flushes) == 2
    log.append("end", "a")
    log.close()
    assert len(flushes) == 3
