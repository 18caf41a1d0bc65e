"""Every verb is killed at random moments, with a second process beside it; the results are those of quiet runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_neuro.data.run_journal import RunJournal
from tests.faults.kill_verbs import compare, drill


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_killed_verbs_and_second_processes_leave_the_results_of_quiet_runs(tmp_path: Path) -> None:
    facts = drill(tmp_path, kills=int(os.environ.get("HPC_NEURO_DRILL", "6")))
    assert facts.differs == []
    assert facts.kills
    assert not list(tmp_path.glob("killed/*/run.lock"))
    assert not list(tmp_path.glob("killed/**/.*.part"))


def write_journal(run: Path, starts: int, sha256: str = "0" * 64) -> None:
    """Records of two blocks and a shard, appended by one start or by several."""
    blocks = [{"index": [0, 0, x], "start": [0, 0, 8 * x], "files": {}, "sha256": sha256, "seconds": x} for x in (0, 1)]
    journal = RunJournal(run / "infer")
    for number, block in enumerate(blocks):
        journal = RunJournal(run / "infer") if starts > 1 else journal
        journal.append("begin", "a", f"0_0_{number}")
        journal.append("block", "a", f"0_0_{number}", "key", {**block, "seconds": starts})
        journal.append("done", "a", f"0_0_{number}")
    journal.append("shard", "a", "1/c/0/0/0", "key", "1" * 64)
    journal.close()


def test_journals_are_compared_by_what_they_say(tmp_path: Path) -> None:
    for name, starts, sha256 in (("quiet", 1, "0" * 64), ("killed", 2, "0" * 64), ("other", 1, "2" * 64)):
        write_journal(tmp_path / name, starts, sha256)
    assert compare(tmp_path / "quiet", tmp_path / "killed") == []
    assert compare(tmp_path / "quiet", tmp_path / "other") == ["infer/journal"]
    journal = RunJournal(tmp_path / "killed" / "infer")
    journal.append("begin", "a", "0_0_1")
    journal.close()
    assert compare(tmp_path / "quiet", tmp_path / "killed") == ["infer/journal"]
