"""What the records of an inference mean together."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.run_journal import JOURNAL, RunJournal, read_journal, require_current_form
from hpc_neuro.infer.done_markers import DoneMarkers


def reopen(out: Path) -> RunJournal:
    journal = RunJournal(out)
    journal.refresh()
    return journal


def test_a_task_that_was_begun_and_not_ended_is_a_death(tmp_path: Path) -> None:
    for _ in range(2):
        RunJournal(tmp_path).append("begin", "a", "x")
    assert len(reopen(tmp_path).find("a").begun["x"]) == 2
    RunJournal(tmp_path).append("begin", "a", "x")
    reopen(tmp_path).append("end", "a", "x")
    assert not reopen(tmp_path).find("a").begun


def test_a_task_that_ends_well_has_not_failed(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path)
    journal.append("begin", "a", "x")
    journal.append("fail", "a", "x", body={"error": "bad"})
    assert "x" in reopen(tmp_path).find("a").failures
    journal.append("done", "a", "x")
    records = reopen(tmp_path).find("a")
    assert not records.failures
    assert not records.begun


def test_what_is_forgotten_is_what_was_before(tmp_path: Path) -> None:
    """Records of other ranks of the same start are newer than what its first rank forgets, whatever the clocks say."""
    old = RunJournal(tmp_path)
    old.append("block", "a", "0_0_0")
    old.append("block", "a", "0_0_1")
    main = reopen(tmp_path)
    rank = RunJournal(tmp_path, generation=main.log.generation)
    rank.append("block", "a", "0_0_0", key="new")
    main.append("forget_block", "a", "0_0_0", is_urgent=True)
    main.append("forget_block", "a", "0_0_1", is_urgent=True)
    for journal in (reopen(tmp_path), main):
        journal.refresh()
        assert {name: record.key for name, record in journal.find("a").blocks.items()} == {"0_0_0": "new"}


def test_one_log_says_what_many_said(tmp_path: Path) -> None:
    for number in range(20):
        journal = RunJournal(tmp_path)
        journal.append("begin", "a", f"task {number}")
        journal.append("block", "a", f"0_0_{number}", body={"n": number})
        journal.append("shard", "b", f"1/c/0/0/{number}", body="")
        journal.append("fail", "b", f"x {number}", body={"error": ""})
        if number % 2:
            journal.append("done", "a", f"task {number}")

    def list_all(journal: RunJournal) -> list[tuple[str, str, str, bytes]]:
        volumes = [journal.find(name) for name in journal.list_volumes()]
        return sorted((r.group, r.kind, r.name, r.body) for volume in volumes for r in volume.list_all())

    before = list_all(reopen(tmp_path))
    assert len(before) == 10 + 60
    journal = reopen(tmp_path)
    journal.compact()
    assert len(list((tmp_path / JOURNAL).iterdir())) == 1
    assert list_all(reopen(tmp_path)) == before
    journal.append("block", "a", "new")
    journal.finish()
    assert len(list((tmp_path / JOURNAL).iterdir())) == 1
    assert len(list_all(reopen(tmp_path))) == len(before) + 1


def test_a_full_disk_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = RunJournal(tmp_path)
    for name in ("x", "y"):
        journal.append("begin", "a", name)

    def fail(handle: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(os, "write", fail)
        for name in ("x", "y"):
            journal.give_back("a", name)
    assert not journal.find("a").begun
    assert not reopen(tmp_path).find("a").begun


def test_a_damaged_line_is_refused_by_readers(tmp_path: Path) -> None:
    RunJournal(tmp_path).append("block", "a", "0_0_0")
    (path,) = (tmp_path / JOURNAL).iterdir()
    path.write_bytes(path.read_bytes().replace(b"0_0_0", b"0_0_1"))
    with pytest.raises(InputError, match=r"line 1 does not have the checksum .* mend it"):
        read_journal(tmp_path, "mend it")


def test_a_folder_of_an_older_form_is_refused(tmp_path: Path) -> None:
    require_current_form(tmp_path)
    marker = tmp_path / "blocks" / "a" / "0_0_0.json"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    with pytest.raises(InputError, match=r"older version, .* run `hpc-neuro infer` again, or give another `out`"):
        require_current_form(tmp_path)


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path)
    journal.log.append("renew", "a", "0_0_0")
    with pytest.raises(InputError, match=r"a record of the kind 'renew', which this version does not know"):
        reopen(tmp_path)


def test_a_log_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """A FIFO would be waited for."""
    RunJournal(tmp_path).append("begin", "a", "x")
    os.mkfifo(tmp_path / JOURNAL / "000001_0123abcd.log")
    with pytest.raises(InputError, match="is no regular file"):
        reopen(tmp_path)
    (tmp_path / JOURNAL / "000001_0123abcd.log").unlink()
    assert reopen(tmp_path).find("a").begun


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"5"])
def test_facts_of_another_form_are_of_nothing(tmp_path: Path, body: bytes) -> None:
    """The checksum of such a line is right: another program wrote it."""
    journal = RunJournal(tmp_path)
    for kind in ("shard", "fail"):
        record = journal.log.append(kind, "a", "x")
        log = tmp_path / JOURNAL / record.log
        *lines, last = log.read_bytes().splitlines(keepends=True)
        assert last == record.encode()
        log.write_bytes(b"".join([*lines, record._replace(body=body).encode()]))

    markers = DoneMarkers(tmp_path, "a", "key")
    assert markers.has_unreadable()
    assert markers.read_levels() == {}
    assert markers.read_failures() == {"x": {}}
    assert markers.read_failed_blocks() == []
