"""Verdicts over ranks' ends, and the record of starts that could not say how they ended."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import time
from pathlib import Path

import pytest

from hpc_neuro.core import files
from hpc_neuro.core.constants import EXIT_HARDWARE, EXIT_NETWORK, EXIT_STOPPED
from launch import job_end, slurm
from launch.job_end import JobRecord, judge_start

FINE = {"code": 0, "words": []}
FAILED = {"code": 1, "words": []}
BROKEN, CUT_OFF = ({"code": code, "words": [], "host": "n1"} for code in (EXIT_HARDWARE, EXIT_NETWORK))
SAVED = {"code": EXIT_STOPPED, "words": ["SIGUSR2"]}
TERMINATED = {"code": EXIT_STOPPED, "words": ["SIGTERM", "SIGUSR2"]}
PREEMPTED = SAVED | {"stop_reason": "preemption"}
OUT_OF_TIME = SAVED | {"stop_reason": "time limit"}
RUNNING = {"JobState": "RUNNING", "PreemptTime": "None", "EndTime": "2999-01-01T00:00:00", "signal_seconds": "20"}


def soon(seconds: float) -> str:
    return (dt.datetime.now() + dt.timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    ("notes", "silent", "facts", "reason", "code", "resumable"),
    [
        ({0: FINE, 1: FINE}, [], {}, "finished", 0, False),
        ({0: FAILED, 1: FINE}, [], {}, "crash", 1, False),
        ({0: FAILED, 1: {"code": -9, "words": []}}, [], {}, "most likely out of memory, rank 1", -9, False),
        ({0: {"code": 2, "words": []}, 1: FAILED}, [], {}, "rank 0", 2, False),
        ({0: {"code": 3, "words": []}}, [], {}, "failures that are listed", 3, False),
        ({0: FAILED}, [1], {}, "node failure (rank 1", EXIT_STOPPED, True),
        ({0: FAILED}, [], {}, "crash", 1, False),
        ({0: SAVED, 1: SAVED}, [], {}, "signal SIGUSR2", EXIT_STOPPED, True),
        ({0: SAVED, 1: SAVED}, [], {"EndTime": soon(15)}, "time limit", EXIT_STOPPED, True),
        ({0: {"code": EXIT_STOPPED, "words": []}}, [], {}, "time limit", EXIT_STOPPED, True),
        ({0: SAVED}, [], {"PreemptTime": "2026-01-01T00:00:00"}, "preemption", EXIT_STOPPED, True),
        ({0: SAVED}, [], {"JobState": "PENDING"}, "time limit, or preemption", EXIT_STOPPED, True),
        ({0: PREEMPTED, 1: SAVED}, [], {"JobState": "PENDING"}, "preemption", EXIT_STOPPED, True),
        ({0: OUT_OF_TIME, 1: SAVED}, [], {"JobState": "COMPLETING"}, "time limit", EXIT_STOPPED, True),
        ({0: PREEMPTED}, [], {"JobState": "CANCELLED"}, "cancelled", 143, False),
        ({0: TERMINATED}, [], {"JobState": "PENDING"}, "put back by an administrator", EXIT_STOPPED, True),
        ({0: SAVED}, [], {"JobState": "CANCELLED"}, "cancelled", 143, False),
        ({0: {"code": -15, "words": ["SIGTERM"]}}, [], {}, "signal SIGTERM", EXIT_STOPPED, True),
        ({0: SAVED, 1: FAILED}, [], {}, "crash", 1, False),
        ({0: FAILED, 1: BROKEN}, [], {}, "hardware fault (device or file system, rank 1 on n1", 71, True),
        ({0: CUT_OFF, 1: CUT_OFF}, [], {}, "hardware fault (network between ranks, rank 0", 69, True),
        ({0: CUT_OFF, 1: FAILED}, [], {}, "crash", 1, False),
        ({}, [], {}, "ended without a word", 7, False),
        ({0: FINE}, [1], {"code": 137, "NumNodes": "2"}, "kill from outside", EXIT_STOPPED, True),
        ({0: FINE}, [1], {"code": 137, "NumNodes": "1"}, "ended without a word", 137, False),
        ({}, [], {"code": 137, "NumNodes": "2", "JobState": "OUT_OF_MEMORY"}, "without a word", 137, False),
    ],
)  # fmt: skip
def test_verdicts(notes, silent, facts, reason, code, resumable):
    ranks = max([*notes, *silent, 0]) + 1
    verdict = judge_start(notes, silent, ranks, facts.get("code", 7), RUNNING | facts)
    assert reason in verdict.reason
    assert verdict.reason == reason or reason not in ("preemption", "time limit")
    assert (verdict.exit, verdict.resumable) == (code, resumable)


def test_a_rank_that_beat_after_another_broke_was_not_lost(tmp_path: Path):
    start = tmp_path / "starts" / "local-5.0"
    job_end.write_rank_note(start, 0, 1, [])
    alive = start / "alive_1"
    alive.touch()
    long_after = time.time() + 60
    os.utime(alive, (long_after, long_after))
    assert job_end._find_silent_ranks(start, 2, job_end._read_notes(start, 2)) == []
    os.utime(alive, (long_after - 120, long_after - 120))
    assert job_end._find_silent_ranks(start, 2, job_end._read_notes(start, 2)) == [1]
    alive.unlink()
    assert job_end._find_silent_ranks(start, 2, job_end._read_notes(start, 2)) == [1]


def test_a_rank_is_lost_that_gives_neither_a_sign_nor_a_word(tmp_path: Path, monkeypatch):
    """What happens in between is played while it waits."""

    def meanwhile(step):
        monkeypatch.setattr(job_end.time, "sleep", lambda seconds: step())
        return job_end.is_any_rank_lost(tmp_path, 3)

    (tmp_path / "rank_0.json").touch()
    for rank in (1, 2):
        (tmp_path / f"alive_{rank}").touch()

    def beat(rank: int) -> None:
        os.utime(tmp_path / f"alive_{rank}", (1, 1))

    assert meanwhile(lambda: beat(1))
    assert not meanwhile(lambda: (os.utime(tmp_path / "alive_1", (2, 2)), beat(2)))
    assert not meanwhile(lambda: (os.utime(tmp_path / "alive_1", (3, 3)), (tmp_path / "rank_2.json").touch()))
    assert meanwhile(lambda: None)
    assert meanwhile((tmp_path / "rank_2.json").touch)  # the other one is still missing
    (tmp_path / "alive_1").unlink()
    assert not meanwhile(lambda: pytest.fail("a rank that has not begun yet is not lost"))
    (tmp_path / "rank_1.json").touch()
    assert not meanwhile(lambda: pytest.fail("nobody is missing, so there is nothing to wait for"))


def test_settle_writes_the_reason_into_run_json(tmp_path: Path):
    files.write_json(tmp_path / "run.json", {"verb": "train", "config": {}, "exit": 75})
    folder = tmp_path / "launch"
    for rank in (0, 1):
        job_end.write_rank_note(folder / "starts" / "local-5.0", rank, 75, ["SIGTERM"])
    assert job_end.settle_start(JobRecord(folder, tmp_path), "local-5.0", 2, 0, 3, 20) == EXIT_STOPPED
    (end,) = files.read_json(tmp_path / "run.json", "")["ends"]
    assert "SIGTERM" in end["reason"]
    assert "no queue here" in end["reason"]
    assert end["put_back"] is False


def test_a_start_that_left_no_word_is_recorded_by_the_next(tmp_path: Path):
    files.write_json(tmp_path / "starts" / "9.0" / "start.json", {})
    files.write_json(tmp_path / "starts" / "9.1" / "start.json", {})
    assert job_end.close_earlier_starts(JobRecord(tmp_path, tmp_path / "out"), "9.1") is True
    (end,) = files.read_json(tmp_path / job_end.ENDS_FILE, "")
    assert end["start"] == "9.0"
    assert "node failure" in end["reason"]
    assert job_end.close_earlier_starts(JobRecord(tmp_path, tmp_path / "out"), "9.1") is False  # known by now


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["SIGUSR2", "SIGTERM"], "time limit"),
        (["SIGTERM"], "administrator"),
        (["superseded by a later start"], "node failure"),
    ],
)
def test_the_next_start_reads_why_the_last_one_stopped(tmp_path: Path, words: list[str], reason: str):
    files.write_json(tmp_path / "starts" / "local-5.0" / "start.json", {})
    job_end.write_rank_note(tmp_path / "starts" / "local-5.0", 0, 75, words)
    assert job_end.close_earlier_starts(JobRecord(tmp_path, tmp_path / "out"), "local-5.1")
    (end,) = files.read_json(tmp_path / job_end.ENDS_FILE, "")
    assert reason in end["reason"]


def test_a_signal_after_a_node_failed_is_no_requeue_by_hand(tmp_path: Path):
    """Slurm ends the ranks of the other nodes with the signal that it also sends before it requeues a job."""
    start = tmp_path / "starts" / "9.0"
    files.write_json(start / "start.json", {})
    for rank in (0, 1):
        (start / f"alive_{rank}").touch()
    job_end.write_rank_note(start, 0, 75, ["SIGTERM"])
    assert job_end._explain_unfinished_start(start) == "node failure (rank 1 fell silent)"
    job_end.write_rank_note(start, 1, 75, ["SIGTERM"])
    assert "administrator" in job_end._explain_unfinished_start(start)


def test_the_next_start_knows_what_slurm_said_when_the_signal_came(tmp_path: Path):
    start = tmp_path / "starts" / "9.0"
    files.write_json(start / "start.json", {})
    job_end.write_rank_note(start, 0, 75, ["SIGUSR2"], stop_reason="preemption")
    assert job_end.close_earlier_starts(JobRecord(tmp_path, tmp_path / "out"), "9.1")
    (end,) = files.read_json(tmp_path / job_end.ENDS_FILE, "")
    assert (end["reason"], end["put_back"]) == ("preemption", True)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00", "EndTime": "2026-01-01T00:00:30"}, "preemption"),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": soon(20)}, "time limit"),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": soon(3600)}, None),
        ({"JobState": "PENDING", "PreemptTime": "None", "EndTime": soon(-5)}, None),
        ({"JobState": "CANCELLED", "PreemptTime": "None", "EndTime": soon(-1)}, None),
        ({"JobState": "NODE_FAIL", "PreemptTime": "None", "EndTime": soon(-1)}, None),
        ({"JobState": "RUNNING", "EndTime": "Unknown"}, None),
    ],
)
def test_what_slurm_says_when_it_sends_a_signal(job: dict[str, str], reason: str | None):
    assert job_end.explain_signal(job | {"signal_seconds": "20"}) == reason


def test_a_job_that_was_cancelled_and_sent_again_by_hand_was_not_put_back(tmp_path: Path, monkeypatch):
    states = {"7": {"JobState": "CANCELLED"}, "8": {}}
    monkeypatch.setattr(slurm, "read_job", states.__getitem__)  # what scontrol says
    for key in ("7.0", "8.0"):
        files.write_json(tmp_path / "starts" / key / "start.json", {})
        job_end.write_rank_note(tmp_path / "starts" / key, 0, -15, ["SIGTERM"])
    job_end.close_earlier_starts(JobRecord(tmp_path, tmp_path / "out"), "9.0")
    ends = {end["start"]: end for end in files.read_json(tmp_path / job_end.ENDS_FILE, "")}
    assert ends["7.0"]["reason"] == "cancelled"
    assert "preemption" in ends["8.0"]["reason"]
    assert not ends["7.0"]["put_back"]
    assert not ends["8.0"]["put_back"]


def test_hardware_faults_are_put_back_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_end.slurm, "read_job", lambda job: RUNNING)
    requeued = []
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(job_end.subprocess, "run", lambda words, **_: requeued.append(words[-1]) or done)
    record = JobRecord(tmp_path / "launch", tmp_path)

    for restart in range(job_end.HARDWARE_BUDGET + 1):
        start = f"7.{restart}"
        job_end.write_rank_note(record.start_folder(start), 0, EXIT_HARDWARE, [], "n1")
        assert job_end.settle_start(record, start, 1, EXIT_HARDWARE, 10, 20) == EXIT_HARDWARE

    assert requeued == ["7"] * job_end.HARDWARE_BUDGET
    *earlier, last = record.read_ends()
    assert all(end["put_back"] for end in earlier)
    assert "rank 0 on n1" in earlier[0]["reason"]
    assert last["put_back"] is False
    assert "not put back: hardware failed 3 times before" in last["reason"]
