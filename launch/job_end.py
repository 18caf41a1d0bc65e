"""Why a start of a job ended, whether the job goes back to the queue, and the record of it.

python -m launch.job_end FOLDER OUT RANKS MAX_REQUEUE SIGNAL_SECONDS CODE     last line of every batch script

what happened                         reason          back to the queue
all ranks ended with 0                finished        no
saved and stopped on a signal         time limit, preemption, signal     yes
a rank fell silent, others broke      node failure    yes
a rank broke by itself                crash, out of memory, bad input, failures      no
"""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_neuro.core import files
from launch.slurm import fields

if TYPE_CHECKING:
    from launch.supervise import Place

RESUMABLE = 75
ENDS = "ends.json"
WARNING = "SIGUSR2"  # what Slurm is asked to send `signal_seconds` before the end
_KILLED = (9, 137)  # exit codes of srun after SIGKILL
_SILENT = 10.0  # [s] a rank that beat this long after another broke was alive then
_NAMES = {
    2: "bad input or config",
    3: "finished with failures that are listed",
    -9: "killed, most likely out of memory",
}


@dataclass(frozen=True)
class Verdict:
    """How a start ended."""

    reason: str
    exit: int
    resumable: bool = False


def job_id(env: Mapping[str, str]) -> str:
    """Slurm's id of this job, ARRAY_INDEX in an array."""
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def note_rank(start: Path, place: Place, code: int, words: Sequence[str]) -> None:
    """Rank's end: exit code of its child (minus the signal's number for a signal) and the signals it was sent."""
    files.write_json(start / f"rank_{place.rank}.json", {"code": code, "words": list(words), "host": place.host})


def judge(
    notes: Mapping[int, Mapping[str, Any]], silent: Sequence[int], ranks: int, code: int, job: Mapping[str, str]
) -> Verdict:
    """The verdict over all ranks.

    notes: rank -> its note. silent: ranks without one that fell silent before the others broke. code: srun's exit code.
    job: what scontrol says of it; {} without Slurm.
    """
    words = {w for note in notes.values() for w in note["words"]}
    broke = {r: int(n["code"]) for r, n in notes.items() if n["code"] not in (0, RESUMABLE) and not n["words"]}
    if job.get("JobState", "").startswith("CANCELLED"):
        return Verdict("cancelled", 143)
    if "superseded by a later start" in words:
        return Verdict("superseded by a later start", 1)
    if "requeue limit" in words:
        return Verdict("requeue limit", RESUMABLE)
    if silent and (broke or words):
        return Verdict(f"node failure (rank {', '.join(map(str, sorted(silent)))} fell silent)", RESUMABLE, True)
    if broke:
        rank = min(broke, key=lambda r: (broke[r] >= 0, r))  # one that was killed is the cause of what others say
        name = _NAMES.get(broke[rank], f"crash (exit code {broke[rank]})")
        return Verdict(f"{name}, rank {rank}" if ranks > 1 else name, broke[rank])
    if any(n["code"] for n in notes.values()):
        first = {str(note["words"][0]) for note in notes.values() if note["words"]}
        return Verdict(_why_stopped(first, job), RESUMABLE, True)
    if len(notes) == ranks:
        return Verdict("finished", 0)
    missing = sorted(set(range(ranks)) - set(notes))
    if code in _KILLED and job.get("NumNodes", "1") != "1" and job.get("JobState") != "OUT_OF_MEMORY":
        # a bug's end would have been noted: srun loses a node, and kills what is left of the step at once
        return Verdict("node failure or a kill from outside", RESUMABLE, True)
    return Verdict(f"rank {', '.join(map(str, missing))} ended without a word (exit code {code} of srun)", code or 1)


def _why_stopped(first: set[str], job: Mapping[str, str]) -> str:
    """Of a job that saved and stopped; `first`: what each rank was sent first, job: what scontrol says of it."""
    if job.get("PreemptTime", "None") not in ("None", "Unknown", ""):
        return "preemption"
    if job.get("JobState") in ("PENDING", "REQUEUED", "REQUEUE_HOLD") or "COMPLETING" in job.get("JobState", ""):
        return _why_put_back(first)
    if not first:
        return "time limit"  # the verb's own clock
    left = _seconds_left(job)
    if left is not None and left < float(job.get("signal_seconds", 0)) + 30:
        return "time limit"
    return "signal " + ", ".join(sorted(w for w in first if w.startswith("SIG")))


def _why_put_back(first: set[str]) -> str:
    """Of a job that is in the queue again, when scontrol has forgotten why: a requeue by hand comes without warning."""
    if WARNING in first:
        return "time limit, or preemption after a warning"
    return "put back by an administrator or by preemption"


def _seconds_left(job: Mapping[str, str]) -> float | None:
    end = job.get("EndTime", "")
    try:
        return (dt.datetime.fromisoformat(end) - dt.datetime.now()).total_seconds()
    except ValueError:
        return None


def settle(folder: Path, out: Path, key: str, ranks: int, code: int, max_requeue: int, signal_seconds: int) -> int:
    """Judge a start whose ranks have all ended, record it, put the job back if it is to go on; the exit code."""
    start = folder / "starts" / key
    job, _, restarts = key.rpartition(".")
    on_slurm = not job.startswith("local-")
    _await_ranks(start, ranks, 60.0 if not on_slurm else 3.0)
    notes = _notes(start, ranks)
    facts = {**show(job), "signal_seconds": str(signal_seconds)} if on_slurm else {}
    verdict = judge(notes, _silent(start, ranks, notes), ranks, code, facts)
    back = verdict.resumable and on_slurm and int(restarts) < max_requeue
    reason = verdict.reason
    if verdict.resumable and not back:
        reason += f"; not put back: {'no queue here' if not on_slurm else f'that was done {restarts} times'}"
    _record(folder, out, key, reason, verdict.exit, back)
    if back and facts.get("JobState") == "RUNNING":
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if done.returncode:
            _record(folder, out, key, f"{reason}; could not be put back: {done.stderr.strip()}", verdict.exit, False)
    return verdict.exit


def close_earlier(folder: Path, out: Path, key: str) -> bool:
    """Record the end of starts that could not do it themselves. True when the last one may still be running."""
    known = {end["start"] for end in _ends(folder)}
    begun = sorted((folder / "starts").glob("*/start.json"), key=lambda p: p.stat().st_mtime)
    unfinished = [p for p in begun if p.parent.name not in known and p.parent.name != key]
    for path in unfinished:
        notes = [files.read_json(file, "written by a rank") for file in path.parent.glob("rank_*.json")]
        said = {str(note["words"][0]) for note in notes if note["words"]}
        reason = _why_put_back(said) if said & {WARNING, "SIGTERM"} else "node failure or kill: no word was left"
        job = path.parent.name.rpartition(".")[0]
        back = job == key.rpartition(".")[0]
        if not back and not job.startswith("local-") and show(job).get("JobState", "").startswith("CANCELLED"):
            reason = "cancelled"  # and sent again by hand
        _record(folder, out, path.parent.name, reason, RESUMABLE, back)
    return bool(unfinished)


def show(job: str) -> dict[str, str]:
    """What scontrol knows of a job, by field; {} when it does not know it (any more)."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False)
    return fields(done.stdout.splitlines()[0]) if done.returncode == 0 and done.stdout.strip() else {}


def _ends(folder: Path) -> list[dict[str, Any]]:
    path = folder / ENDS
    return list(files.read_json(path, f"remove {path}")) if path.exists() else []


def _record(folder: Path, out: Path, start: str, reason: str, code: int, back: bool) -> None:
    """Into FOLDER/ends.json, and into the run's own record where it has one."""
    end = {
        "start": start,
        "reason": reason,
        "exit": code,
        "put_back": back,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    ends = [*(e for e in _ends(folder) if e["start"] != start), end]
    files.write_json(folder / ENDS, ends)
    run = out / "run.json"
    if run.exists():
        files.write_json(run, files.read_json(run, f"remove {run}") | {"ends": ends})


def _notes(start: Path, ranks: int) -> dict[int, dict[str, Any]]:
    found = {r: start / f"rank_{r}.json" for r in range(ranks)}
    return {r: files.read_json(p, "written by a rank") for r, p in found.items() if p.exists()}


def _silent(start: Path, ranks: int, notes: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Ranks that left no note and whose last sign of life is not later than when the first of the others broke."""
    broke = [(start / f"rank_{r}.json").stat().st_mtime for r, n in notes.items() if n["code"]]
    if not broke:
        return []
    beats = {r: start / f"alive_{r}" for r in range(ranks) if r not in notes}
    return [r for r, p in beats.items() if not p.exists() or p.stat().st_mtime < min(broke) + _SILENT]


def lost(start: Path, ranks: int, seconds: float = 5.0) -> bool:
    """Whether a rank neither leaves a note nor gives a sign of life for so long: srun may wait for it to the end."""

    def signs() -> dict[int, float]:
        """Last sign of life of each rank without a note."""
        noted = {r for r in range(ranks) if (start / f"rank_{r}.json").exists()}
        beats = {r: start / f"alive_{r}" for r in range(ranks) if r not in noted}
        return {r: p.stat().st_mtime for r, p in beats.items() if p.exists()}  # one that never began is not lost

    before = signs()
    if not before:
        return False
    time.sleep(seconds)
    return bool(before.items() & signs().items())


def _await_ranks(start: Path, ranks: int, seconds: float) -> None:
    """Give the other ranks time to leave their notes; without Slurm nobody else waits for them."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and len(list(start.glob("rank_*.json"))) < ranks:
        time.sleep(0.1)


def main(words: Sequence[str]) -> int:
    """See the top of the file."""
    folder, out, ranks, max_requeue, signal_seconds, code = words
    key = f"{job_id(os.environ)}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return settle(Path(folder), Path(out), key, int(ranks), int(code), int(max_requeue), int(signal_seconds))


if __name__ == "__main__":
    found = main(sys.argv[1:])
    sys.exit(found if found >= 0 else 128 - found)
