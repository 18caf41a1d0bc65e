"""What jobs are doing, for people: one view of all their logs, states and steps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import slurm
from launch.jobs import Job, State, poll

_OVER = ("done", "failed", "cancelled", "lost")


def follow(jobs: Sequence[Job], poller: slurm.Poller, say: Callable[[str], object] = sys.stdout.write) -> int:
    """Say new lines of all ranks' logs and each change of state until all jobs are over. 0 when all are done."""
    tails = [Tails(job) for job in jobs]

    def lines(seconds: float) -> None:
        """New lines, also while the next question to Slurm is far off."""
        until = time.monotonic() + seconds
        while True:
            for tail in tails:
                for line in tail.new():
                    say(line + "\n")
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(1.0, left))

    poller.sleep = lines
    last: dict[str, State] = {}
    while True:
        now = poll(jobs, poller)
        lines(0)
        for job in jobs:
            if last.get(job.id) != now[job.id]:
                say(f"[{job.verb}{job.share and ' ' + job.share}] {line_of(job, now[job.id])}\n")
        last = now
        if all(s in _OVER for s in now.values()):
            return 0 if all(s == "done" for s in now.values()) else 1


def line_of(job: Job, state: State) -> str:
    """One line about a job: id, state, step, and why it ended."""
    words = [f"job {job.id}: {state}"]
    if step := last_step(job.out):
        words.append(step)
    if end := job.end():
        words.append(f"{end['reason']}{', put back' if end['put_back'] else ''} ({end['at']})")
    return "; ".join(words)


def last_step(out: Path) -> str:
    """`step 40, loss 0.93` of a training, empty for what has no steps."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written
        if row.get("kind") == "train":
            return (
                f"step {row['step']}, loss {row['loss']:.4f}" if row.get("loss") is not None else f"step {row['step']}"
            )
    return ""


class Tails:
    """New lines of the logs of one job's ranks; submitit's own remarks are left out."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._read: dict[Path, int] = {}

    def files(self) -> list[Path]:
        """Logs of all ranks, by rank."""
        folder = self.job.out / "launch" / "logs"
        found = [p for end in ("out", "err") for p in folder.glob(f"{self.job.id}_*_log.{end}")]
        return sorted(found, key=lambda p: (int(p.name.split("_")[-2]), p.name))

    def new(self) -> list[str]:
        """Whole lines that were written since the last call, each with verb and rank before it."""
        lines = []
        for path in self.files():
            with path.open("rb") as handle:
                handle.seek(self._read.get(path, 0))
                text = handle.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            rank = path.name.split("_")[-2]
            name = f"[{self.job.verb}{self.job.share and ' ' + self.job.share} {rank}] "
            lines += [
                name + line.split("\r")[-1]
                for line in whole.decode("utf-8", "replace").splitlines()
                if line.strip() and not line.startswith("submitit ")
            ]
        return lines
