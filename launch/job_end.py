"""Why a start of a job ended, whether the job is requeued, and the record of it.

    python -m launch.job_end FOLDER OUT RANKS MAX_REQUEUE SIGNAL_SECONDS CODE     last line of every batch script

| what happened                       | reason                                  | requeued |
| ---                                 | ---                                     | ---      |
| all ranks ended with 0              | finished                                | no       |
| saved and stopped on a signal       | time limit, preemption, signal          | yes      |
| a rank fell silent, others failed   | node failure                            | yes      |
| a device or a file system failed    | hardware fault                          | a few times |
| a rank failed by itself             | crash, out of memory, bad input, ...    | no       |

A start of a job is named JOB.RESTARTS and has a folder FOLDER/starts/JOB.RESTARTS, in which every rank leaves a note,
`rank_N.json`, when its process has ended, and touches `alive_N` while it runs (see `launch.supervise`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_FAILURES, EXIT_HARDWARE, EXIT_NETWORK, EXIT_STOPPED
from hpc_neuro.core.schema import InputError
from launch import slurm

ENDS_FILE = "ends.json"
"""Record of the ends of all starts, in the folder of a job."""
WARNING = "SIGUSR2"
"""Signal that Slurm is asked to send `signal_seconds` before the end of a job."""
SUPERSEDED = "superseded by a later start"
"""Event of a rank whose folder another start has taken over."""
REQUEUE_LIMIT = "requeue limit"
"""Event of a rank whose job has been requeued more often than allowed."""

HARDWARE_FAULT = "hardware fault"
"""How the reason begins for a start that failing hardware ended."""
HARDWARE_BUDGET = 3
"""How often a job is requeued after hardware faults: a node that fails again and again must not hold the queue."""

_SRUN_KILLED = (9, 137)
"""Exit codes of srun after SIGKILL."""
_SILENCE_SECONDS = 10.0
"""[s] A rank that gave a sign of life this long after another failed was alive then."""
_CANCELLED_EXIT = 143
"""Exit code of a cancelled start: 128 + SIGTERM."""
_LIMITED_STATES = ("RUNNING", "SUSPENDED", "TIMEOUT")
"""States of a job whose EndTime is the end of its time limit."""
_FAILURE_REASONS = {
    EXIT_BAD_INPUT: "bad input or config",
    EXIT_FAILURES: "finished with failures that are listed",
    -9: "killed, most likely out of memory",
}

RankNote = Mapping[str, Any]
"""What a rank leaves: `code`, `words` (signals and events, in order), `host`, and `stop_reason` where it is certain."""


@with_config(ConfigDict(extra="allow"))
class _NoteForm(TypedDict):
    code: int
    words: list[str]


@with_config(ConfigDict(extra="allow"))
class _EndForm(TypedDict):
    start: str
    reason: str
    put_back: bool
    at: str


@dataclass(frozen=True)
class Verdict:
    """How a start ended."""

    reason: str
    exit: int
    resumable: bool = False


@dataclass(frozen=True)
class JobRecord:
    """Where the ends of a job's starts are recorded."""

    folder: Path
    """OUT/launch, or the folder of an array's share below it."""
    out: Path
    """Run folder of the verb."""

    @property
    def ends_file(self) -> Path:
        """File of all ends."""
        return self.folder / ENDS_FILE

    def start_folder(self, start: str) -> Path:
        """Folder of one start."""
        return self.folder / "starts" / start

    def read_ends(self) -> list[dict[str, Any]]:
        """Read the ends that are recorded so far."""
        path = self.ends_file
        # A list that cannot be read is replaced: a job must not fail because of the record of earlier jobs.
        with contextlib.suppress(InputError):
            return list(map(dict, files.read_json(path, "", list[_EndForm])))
        return []

    def write_end(self, start: str, reason: str, code: int, is_requeued: bool) -> None:
        """Record the end of a start, here and in the run's own record where it has one."""
        end = {
            "start": start,
            "reason": reason,
            "exit": code,
            "put_back": is_requeued,
            "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
        # A start is judged again when requeueing it fails: the later entry replaces the earlier.
        ends = [*(e for e in self.read_ends() if e["start"] != start), end]
        files.write_json(self.ends_file, ends)

        # Without a readable record the next start says what to do.
        with contextlib.suppress(InputError):
            record = run_folder.read_record(self.out, "")
            files.write_json(self.out / run_folder.RECORD, record | {"ends": ends})


def read_job_id(env: Mapping[str, str]) -> str:
    """Slurm's id of the job of this environment, ARRAY_INDEX in an array."""
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def write_rank_note(
    start: Path, rank: int, code: int, events: Sequence[str], host: str = "", stop_reason: str | None = None
) -> None:
    """Leave a rank's note in the folder of its start.

    code: exit code of its process, minus the signal's number for a signal. events: the signals it was sent and what
    else happened, in order. stop_reason: what Slurm said about the job when the first signal came.
    """
    note = {"code": code, "words": list(events), "host": host, "stop_reason": stop_reason}
    files.write_json(start / f"rank_{rank}.json", note)


def judge_start(
    notes: Mapping[int, RankNote], silent: Sequence[int], ranks: int, code: int, job: Mapping[str, str]
) -> Verdict:
    """Decide from all ranks why a start ended.

    notes: rank -> its note. silent: ranks without one that fell silent before the others failed. code: srun's exit
    code. job: what scontrol says of it; {} without Slurm.
    """
    events = {event for note in notes.values() for event in note["words"]}
    # A code that follows a signal is how the process stopped, not what stopped it.
    failures = {
        rank: int(note["code"])
        for rank, note in notes.items()
        if note["code"] not in (0, EXIT_STOPPED) and not note["words"]
    }

    # What a person or Slurm decided comes before what the ranks report.
    if job.get("JobState", "").startswith("CANCELLED"):
        return Verdict("cancelled", _CANCELLED_EXIT)
    if SUPERSEDED in events:
        return Verdict(SUPERSEDED, 1)
    if REQUEUE_LIMIT in events:
        return Verdict(REQUEUE_LIMIT, EXIT_STOPPED)
    # Ranks that lost their peers fail too, so a silent rank explains the failures of others.
    if silent and (failures or events):
        return Verdict(_explain_silence(silent), EXIT_STOPPED, True)
    if failures:
        return _find_hardware_fault(failures, notes) or _judge_failures(failures, ranks)
    # No rank failed by itself: all that are left saved and stopped.
    if any(note["code"] for note in notes.values()):
        return Verdict(_explain_stop(notes, job), EXIT_STOPPED, True)
    if len(notes) == ranks:
        return Verdict("finished", 0)

    # A rank left no note although none fell silent before a failure.
    missing = sorted(set(range(ranks)) - set(notes))
    # A bug would have left a note: srun loses a node, and kills what is left of the step at once.
    has_several_nodes = job.get("NumNodes", "1") != "1"
    if code in _SRUN_KILLED and has_several_nodes and job.get("JobState") != "OUT_OF_MEMORY":
        return Verdict("node failure or a kill from outside", EXIT_STOPPED, True)

    return Verdict(f"rank {_join(missing)} ended without a word (exit code {code} of srun)", code or 1)


def _find_hardware_fault(failures: Mapping[int, int], notes: Mapping[int, RankNote]) -> Verdict | None:
    """The verdict of a start that failing hardware ended; None where a rank's own failure ended it."""
    # The network also fails for the peers of a rank that crashed, which is then the cause.
    code = EXIT_HARDWARE if EXIT_HARDWARE in failures.values() else EXIT_NETWORK
    if code == EXIT_NETWORK and set(failures.values()) != {EXIT_NETWORK}:
        return None

    places = [
        f"rank {rank} on {notes[rank].get('host') or 'its node'}" for rank in sorted(failures) if failures[rank] == code
    ]
    part = "device or file system" if code == EXIT_HARDWARE else "network between ranks"
    return Verdict(f"{HARDWARE_FAULT} ({part}, {', '.join(places)}; the log names it)", code, True)


def _judge_failures(failures: Mapping[int, int], ranks: int) -> Verdict:
    """Name the rank whose failure caused the others: killed ones first, those that only lost their peers last."""
    rank = min(failures, key=lambda r: (failures[r] >= 0, failures[r] == EXIT_NETWORK, r))
    code = failures[rank]
    reason = _FAILURE_REASONS.get(code, f"crash (exit code {code})")
    return Verdict(f"{reason}, rank {rank}" if ranks > 1 else reason, code)


def _explain_stop(notes: Mapping[int, RankNote], job: Mapping[str, str]) -> str:
    """Why a job that saved and stopped was told to. job: what scontrol says of it now."""
    if reason := _known_stop_reason(notes.values()):
        return reason
    if reason := explain_signal(job):
        return reason

    first_signals = _first_events(notes.values())
    # Slurm has requeued the job already, and its times are those of the next start.
    if _is_leaving(job):
        return _explain_requeue(first_signals)
    if not first_signals:
        # Nobody sent a signal: the verb's own clock stopped it.
        return "time limit"

    return "signal " + ", ".join(sorted(s for s in first_signals if s.startswith("SIG")))


def explain_signal(job: Mapping[str, str]) -> str | None:
    """Why Slurm sends a job a signal, from what scontrol says of it at that time; None where that does not tell.

    job: fields of scontrol, and `signal_seconds`.
    """
    if job.get("PreemptTime", "None") not in ("None", "Unknown", ""):
        return "preemption"
    # Of a job that was cancelled, requeued or robbed of a node, EndTime is not the end of its limit.
    if job.get("JobState") not in _LIMITED_STATES:
        return None

    # Slurm may send the warning up to a minute early, and ranks need a moment to react.
    seconds_left = _seconds_until(job.get("EndTime", ""))
    if seconds_left is not None and seconds_left < float(job.get("signal_seconds", 0)) + 30:
        return "time limit"

    return None


def _is_leaving(job: Mapping[str, str]) -> bool:
    """Whether a job is in the queue again, or about to be: its times are then those of its next start."""
    state = job.get("JobState", "")
    return state in ("PENDING", "REQUEUED", "REQUEUE_HOLD") or "COMPLETING" in state


def _explain_requeue(first_signals: set[str]) -> str:
    """Why a job is in the queue again, when scontrol has forgotten it: a requeue by hand comes without a warning."""
    if WARNING in first_signals:
        return "time limit, or preemption after a warning"
    return "put back by an administrator or by preemption"


def _known_stop_reason(notes: Iterable[RankNote]) -> str | None:
    """What a rank learned from Slurm when the signal came, before a requeue could wipe it out."""
    return next((note["stop_reason"] for note in notes if note.get("stop_reason")), None)


def _first_events(notes: Iterable[RankNote]) -> set[str]:
    return {str(note["words"][0]) for note in notes if note["words"]}


def _seconds_until(moment: str) -> float | None:
    """[s] From now to a time of scontrol's; None for `Unknown`."""
    try:
        return (dt.datetime.fromisoformat(moment) - dt.datetime.now()).total_seconds()
    except ValueError:
        return None


def settle_start(record: JobRecord, start: str, ranks: int, code: int, max_requeue: int, signal_seconds: int) -> int:
    """Judge a start whose ranks have all ended, record its end, requeue the job if it is to go on.

    Returns the exit code of the job.
    """
    job = start.rpartition(".")[0]
    is_on_slurm = not job.startswith("local-")
    folder = record.start_folder(start)

    # Without Slurm nothing waits for the other ranks, so rank 0 gets here as soon as its own process has ended.
    _await_notes(folder, ranks, 3.0 if is_on_slurm else 60.0)
    notes = _read_notes(folder, ranks)
    facts = {**slurm.read_job(job), "signal_seconds": str(signal_seconds)} if is_on_slurm else {}
    verdict = judge_start(notes, _find_silent_ranks(folder, ranks, notes), ranks, code, facts)

    # Without a queue nothing can be requeued; a budget keeps a job from cycling for ever.
    obstacle = _find_obstacle(verdict, record, start, max_requeue) if is_on_slurm else "no queue here"
    is_requeued = verdict.resumable and obstacle is None
    reason = verdict.reason
    if verdict.resumable and not is_requeued:
        reason += f"; not put back: {obstacle}"

    # The record comes first: scontrol requeue kills this process.
    record.write_end(start, reason, verdict.exit, is_requeued)

    # Slurm requeues by itself after a preemption or a node failure; here the job still runs.
    if is_requeued and facts.get("JobState") == "RUNNING":
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if result.returncode:
            record.write_end(start, f"{reason}; could not be put back: {result.stderr.strip()}", verdict.exit, False)

    return verdict.exit


def _find_obstacle(verdict: Verdict, record: JobRecord, start: str, max_requeue: int) -> str | None:
    """Why a job on Slurm that could go on is not requeued; None where it may be."""
    job, _, restarts = start.rpartition(".")
    if int(restarts) >= max_requeue:
        return f"that was done {files.format_count(int(restarts), 'time')}"
    if not verdict.reason.startswith(HARDWARE_FAULT):
        return None

    earlier = [end for end in record.read_ends() if end["start"].rpartition(".")[0] == job and end["start"] != start]
    faults = sum(end["reason"].startswith(HARDWARE_FAULT) for end in earlier)
    if faults < HARDWARE_BUDGET:
        return None
    return f"hardware failed {files.format_count(faults, 'time')} before; report the node, and submit again"


def close_earlier_starts(record: JobRecord, start: str) -> bool:
    """Record the ends of starts before this one that could not do it themselves.

    Returns True when there was one: its ranks may still be running.
    """
    # Starts have a folder as soon as rank 0 begins, and an entry only when they ended in good order.
    recorded = {end["start"] for end in record.read_ends()}
    begun = sorted((record.folder / "starts").glob("*/start.json"), key=lambda path: path.stat().st_mtime)
    unfinished = [path.parent for path in begun if path.parent.name not in recorded and path.parent.name != start]

    for folder in unfinished:
        reason = _explain_unfinished_start(folder)
        job = folder.name.rpartition(".")[0]
        is_requeued = job == start.rpartition(".")[0]
        # Another job of the same folder was not requeued: it was cancelled, and submitted again by hand.
        if not is_requeued and not job.startswith("local-"):
            state = slurm.read_job(job).get("JobState", "")
            reason = "cancelled" if state.startswith("CANCELLED") else reason

        record.write_end(folder.name, reason, EXIT_STOPPED, is_requeued)

    return bool(unfinished)


def _explain_unfinished_start(start: Path) -> str:
    """Why a start ended whose batch script died before it could record that, from the notes of its ranks."""
    # Only the files that the ranks left tell how many there were.
    traces = [*start.glob("alive_*"), *start.glob("rank_*.json")]
    ranks = 1 + max((int(path.stem.split("_")[1]) for path in traces), default=0)
    notes = _read_notes(start, ranks)
    first_signals = _first_events(notes.values())
    if not first_signals & {WARNING, "SIGTERM"}:
        return "node failure or kill: no word was left"
    if reason := _known_stop_reason(notes.values()):
        return reason

    # When a node fails, Slurm sends the ranks of the other nodes a signal, as it does before it requeues a job.
    silent = _find_silent_ranks(start, ranks, notes)
    return _explain_silence(silent) if silent else _explain_requeue(first_signals)


def _explain_silence(silent: Sequence[int]) -> str:
    return f"node failure (rank {_join(sorted(silent))} fell silent)"


def _read_notes(start: Path, ranks: int) -> dict[int, RankNote]:
    """Read the notes of the ranks that left one."""
    # A rank that was killed leaves no note.
    notes = dict[int, RankNote]()
    for rank in range(ranks):
        with contextlib.suppress(InputError):
            notes[rank] = dict(files.read_json(start / f"rank_{rank}.json", "", _NoteForm))
    return notes


def _find_silent_ranks(start: Path, ranks: int, notes: Mapping[int, RankNote]) -> list[int]:
    """Ranks without a note whose last sign of life is not later than the first failure of the others."""
    # A rank without a note may be lost, or killed by srun because another failed.
    failure_times = [(start / f"rank_{rank}.json").stat().st_mtime for rank, note in notes.items() if note["code"]]
    if not failure_times:
        return []

    deadline = min(failure_times) + _SILENCE_SECONDS
    signs = {rank: start / f"alive_{rank}" for rank in range(ranks) if rank not in notes}
    return [rank for rank, path in signs.items() if not path.exists() or path.stat().st_mtime < deadline]


def is_any_rank_lost(start: Path, ranks: int, seconds: float = 5.0) -> bool:
    """Whether a rank neither leaves a note nor gives a sign of life for so long: srun may wait for it to the end."""
    # A rank that has not begun yet is not lost.
    before = _read_signs_of_life(start, ranks)
    if not before:
        return False

    time.sleep(seconds)
    return bool(before.items() & _read_signs_of_life(start, ranks).items())


def _read_signs_of_life(start: Path, ranks: int) -> dict[int, float]:
    """Time of the last sign of life of each rank that has begun and left no note."""
    without_note = [rank for rank in range(ranks) if not (start / f"rank_{rank}.json").exists()]
    signs = {rank: start / f"alive_{rank}" for rank in without_note}
    return {rank: path.stat().st_mtime for rank, path in signs.items() if path.exists()}


def _await_notes(start: Path, ranks: int, seconds: float) -> None:
    """Give the other ranks time to leave their notes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and len(list(start.glob("rank_*.json"))) < ranks:
        time.sleep(0.1)


def _join(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def main(words: Sequence[str]) -> int:
    """Settle the start of the job that this process runs in; see the top of the file."""
    folder, out, ranks, max_requeue, signal_seconds, code = words
    start = f"{read_job_id(os.environ)}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    record = JobRecord(Path(folder), Path(out))
    return settle_start(record, start, int(ranks), int(code), int(max_requeue), int(signal_seconds))


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.exit(exit_code if exit_code >= 0 else 128 - exit_code)
