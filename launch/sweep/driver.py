"""The driver of a sweep: asks the study, keeps jobs going, stops losers, and can be killed at any moment.

Each change is in a trial's record before it is acted upon, so that a new driver finds what the old one was doing:

    asked for, no folder           the folder is made
    about to be submitted          the job is looked for; found it is watched, else it is submitted
    running, stopping              watched on
    ended, the study not told      told
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_neuro.core.schema import InputError
from hpc_neuro.search import asha, trial
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import Point
from hpc_neuro.search.study import Study
from hpc_neuro.search.trial import FINAL, Attempt, State, Trial
from launch.executors import Executor, JobState

log = logging.getLogger("hpc_neuro.sweep")
RESUMABLE = 75
_SIGNAL = 128  # exit codes above this are signals
_LONGEST = 6  # times `poll`, while nothing happens
_UNANSWERED = 30  # polls in a row
Write = Callable[[Path, int, Point], None]


def command(folder: Path) -> list[str]:
    """What a trial's job runs."""
    return [sys.executable, "-m", "launch.sweep.trial", str(folder)]


class Driver:
    """One study, its trials and their jobs."""

    def __init__(
        self,
        cfg: SearchConfig,
        steps: int,
        write: Write,
        executor: Executor,
        command: Callable[[Path], Sequence[str]] = command,
    ) -> None:
        """steps: of a training; write: puts a trial's configs into its folder (folder, number, values)."""
        self.cfg, self.write, self.executor, self.command = cfg, write, executor, command
        self.study = Study(cfg)
        self.rungs = asha.rungs(cfg.asha, steps) if cfg.asha else []
        self.trials = {t.number: t for t in trial.load_all(cfg.out)}
        self._sizes: dict[int, int] = {}
        self._adopt()

    def run(self, stop: Callable[[], bool] = lambda: False, sleep: Callable[[float], None] = time.sleep) -> bool:
        """Until every trial has ended (True), or `stop` says so (False; trials run on)."""
        pause, unanswered = self.cfg.poll, 0
        while not stop():
            try:
                happened = self.step()
                unanswered = 0
            except InputError as error:  # a scheduler that does not answer now and then is nothing unusual
                unanswered += 1
                if unanswered >= _UNANSWERED:
                    raise
                log.warning("sweep: %s; asking again", error)
                happened = False
            if self.finished:
                return True
            pause = self.cfg.poll if happened else min(_LONGEST * self.cfg.poll, 1.25 * pause)
            sleep(pause)
        return False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return len(self.trials) >= self.study.planned and all(t.state in FINAL for t in self.trials.values())

    def step(self) -> bool:
        """Look at every job once, then fill the queue. True when anything changed."""
        before = {n: (t.state, len(t.attempts), t.step) for n, t in self.trials.items()}
        active = [t for t in self.trials.values() if t.job is not None]
        states = self.executor.poll({str(t.job): t.folder / t.attempt for t in active})
        for t in active:
            state = states[str(t.job)]
            self._judge(t)
            if state.kind == "ended":
                self._settle(t, state)
        self._stop_losers()
        self._fill()
        return before != {n: (t.state, len(t.attempts), t.step) for n, t in self.trials.items()}

    def cancel_all(self) -> int:
        """Ask every job to end; how many there were. Their trials are sent again when the sweep goes on."""
        jobs = [str(t.job) for t in self.trials.values() if t.job is not None]
        self.executor.cancel(jobs)
        return len(jobs)

    def _adopt(self) -> None:
        """Take over what an earlier driver left."""
        for number, values in self.study.asked().items():
            if number not in self.trials:
                self._make(number, values)
        for t in self.trials.values():
            if t.state in FINAL:
                self.study.tell(t.number, t.state, t.value, t.rungs)
            elif t.state in ("running", "stopping") and t.attempts[-1].job is None:
                t.attempts[-1].job = self.executor.find(t.folder, t.attempt)
                if t.attempts[-1].job is None:
                    t.attempts.pop()
                    t.state = "waiting"
                t.save()
        if running := [t.number for t in self.trials.values() if t.job is not None]:
            log.info("sweep: going on with %d trials; attached to %s", len(self.trials), _numbers(running))

    def _make(self, number: int, values: Point) -> Trial:
        t = Trial(number, values, trial.folder_of(self.cfg.out, number).absolute())
        t.folder.mkdir(parents=True, exist_ok=True)
        self.write(t.folder, number, values)
        t.save()
        self.trials[number] = t
        return t

    def _fill(self) -> None:
        """Submit until `concurrent` trials are queued or at work."""
        free = self.cfg.concurrent - sum(t.job is not None for t in self.trials.values())
        waiting = [t for t in self.trials.values() if t.state == "waiting"]
        while free > 0:
            if waiting:
                t = waiting.pop(0)
            else:
                asked = self.study.ask()
                if asked is None:
                    return
                t = self._make(*asked)
            t.attempts.append(Attempt(submitted=time.time()))
            t.state = "running"
            t.save()  # from here on a new driver looks for the job
            t.attempts[-1].job = self.executor.submit(self.command(t.folder), t.folder, t.attempt)
            t.save()
            log.info("sweep: trial %d, job %s: %s", t.number, t.job, t.values)
            free -= 1

    def _judge(self, t: Trial) -> None:
        """Note the rungs that a trial has reached, each once; mark it when it is not among the best there."""
        path = t.folder / trial.METRICS
        size = path.stat().st_size if path.exists() else 0
        if size == self._sizes.get(t.number):
            return
        self._sizes[t.number] = size
        rows = trial.rows(path)
        t.step = max((r["step"] for r in rows), default=0)
        cfg = self.cfg.asha
        for rung in self.rungs if cfg is not None and t.state == "running" else ():
            value = trial.at_rung(rows, cfg.key or self.cfg.objective.key, rung) if cfg else None
            if value is None or rung in t.rungs or cfg is None:
                continue
            others = [o.rungs[rung] for o in self.trials.values() if rung in o.rungs]
            t.rungs[rung] = value
            if not asha.goes_on(value, others, cfg, cfg.goal or self.cfg.objective.goal):
                t.state, t.note = "stopping", f"{value:.4g} at step {rung} is not among the best of {len(others) + 1}"
                log.info("sweep: trial %d is stopped: %s", t.number, t.note)
                break
        t.save()

    def _stop_losers(self) -> None:
        """Cancel what is to be stopped; asked again at each step, as a cancelled job may have been missed by a kill."""
        self.executor.cancel([str(t.job) for t in self.trials.values() if t.state == "stopping" and t.job is not None])

    def _settle(self, t: Trial, state: JobState) -> None:
        """A job has ended: what becomes of its trial."""
        last, code = t.attempts[-1], state.code
        last.ended = time.time()
        last.reason = _reason(code)
        if code == 0:
            t.value = trial.outcome(t.folder, self.cfg.objective)
            if t.value is None:
                self._end(t, "failed", f"it left no {self.cfg.objective.key}")
            else:
                self._end(t, "done", "")
        elif t.state == "stopping":
            self._end(t, "pruned", t.note)
        elif code is not None and code != RESUMABLE and code <= _SIGNAL:
            self._end(t, "failed", f"{last.reason}, see {t.folder / t.attempt}.log")
        elif len(t.attempts) > self.cfg.requeue:
            self._end(t, "failed", f"{last.reason}, {len(t.attempts)} times")
        else:
            t.state = "waiting"
            t.save()
            log.warning("sweep: trial %d: %s; it is sent again", t.number, last.reason)

    def _end(self, t: Trial, state: State, note: str) -> None:
        t.state, t.note = state, note
        t.save()
        self.study.tell(t.number, state, t.value, t.rungs)
        value = "" if t.value is None else f" {self.cfg.objective.key} {t.value:.4g}"
        log.info("sweep: trial %d %s%s%s", t.number, state, value, f": {note}" if note else "")


def _reason(code: int | None) -> str:
    if code is None:
        return "killed (no exit code was left)"
    if code == 0:
        return "finished"
    if code == RESUMABLE:
        return "stopped by a signal or the clock"
    return f"signal {code - _SIGNAL}" if code > _SIGNAL else f"exit code {code}"


def _numbers(found: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(found)))
