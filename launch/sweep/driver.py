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

from hpc_neuro.core import files
from hpc_neuro.core.constants import EXIT_HARDWARE, EXIT_NETWORK, EXIT_STOPPED
from hpc_neuro.core.metric_rows import MetricRow
from hpc_neuro.core.schema import InputError
from hpc_neuro.search import asha, trial
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import Point
from hpc_neuro.search.study import Study
from hpc_neuro.search.trial import ENDED_STATES, Attempt, State, Trial
from launch.executors import Executor, JobState

log = logging.getLogger("hpc_neuro.sweep")
_REPEATED = (EXIT_HARDWARE, EXIT_NETWORK, EXIT_STOPPED)
"""Exit codes of trials that are submitted again."""
_FIRST_SIGNAL = 128
"""Exit codes above this are signals."""
_MAX_PAUSE = 6
"""[polls] The pause between two looks grows to this while nothing happens."""
_MAX_UNANSWERED = 30
"""Looks in a row that the scheduler may leave without an answer."""

WriteTrial = Callable[[Path, int, Point], None]
"""Writes a trial's configs: (folder, number, values)."""


def make_trial_command(folder: Path) -> list[str]:
    """The command of a trial's job."""
    return [sys.executable, "-m", "launch.sweep.trial", str(folder)]


class SweepDriver:
    """One study, its trials and their jobs."""

    def __init__(
        self,
        cfg: SearchConfig,
        steps: int,
        write_trial: WriteTrial,
        executor: Executor,
        make_command: Callable[[Path], Sequence[str]] = make_trial_command,
    ) -> None:
        """steps: optimizer steps of a trial."""
        self.cfg, self.write_trial, self.executor, self.make_command = cfg, write_trial, executor, make_command
        self.study = Study(cfg)
        self.rungs = asha.list_rungs(cfg.asha, steps) if cfg.asha else []
        self.trials = {t.number: t for t in trial.load_trials(cfg.out)}
        self._metric_sizes: dict[int, int] = {}
        self._take_over()

    def run(self, stop: Callable[[], bool] = lambda: False, sleep: Callable[[float], None] = time.sleep) -> bool:
        """Run until every trial has ended (True), or until `stop` returns True (False; trials run on)."""
        pause, unanswered = self.cfg.poll, 0

        while not stop():
            try:
                has_changed = self.step()
                unanswered = 0
            except InputError as error:
                # A scheduler fails to answer now and then.
                unanswered += 1
                if unanswered >= _MAX_UNANSWERED:
                    raise
                log.warning("sweep: %s; asking again", error)
                has_changed = False

            if self.is_finished:
                return True

            pause = self.cfg.poll if has_changed else min(_MAX_PAUSE * self.cfg.poll, 1.25 * pause)
            sleep(pause)

        return False

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.trials) >= self.study.trial_count and all(t.state in ENDED_STATES for t in self.trials.values())

    def step(self) -> bool:
        """Look at every job once, then fill the queue. True when anything changed."""
        # One question to the scheduler for all jobs.
        before = self._summarize()

        active = [t for t in self.trials.values() if t.job is not None]
        states = self.executor.poll({str(t.job): t.folder / t.attempt_name for t in active})

        for t in active:
            state = states[str(t.job)]
            # A trial that has ended may have passed rungs since the last look.
            self._judge_rungs(t)
            if state.kind == "ended":
                self._settle(t, state)

        self._stop_losers()
        self._fill_queue()
        return before != self._summarize()

    def cancel_all(self) -> int:
        """Ask every job to end; returns their number. Their trials are submitted again when the sweep goes on."""
        jobs = [str(t.job) for t in self.trials.values() if t.job is not None]
        self.executor.cancel(jobs)
        return len(jobs)

    def _summarize(self) -> dict[int, tuple[State, int, int]]:
        """What counts as a change: state, attempts and step of every trial."""
        return {number: (t.state, len(t.attempts), t.step) for number, t in self.trials.items()}

    def _take_over(self) -> None:
        """Take over what an earlier driver left."""
        for number, values in self.study.read_points().items():
            if number not in self.trials:
                self._make_trial(number, values)

        # The old driver may have been killed between any two of its steps.
        for t in self.trials.values():
            if t.state in ENDED_STATES:
                self.study.tell(t.number, t.state, t.value, t.rungs)
            elif t.state in ("running", "stopping") and t.attempts[-1].job is None:
                self._find_job(t)

        running = [t.number for t in self.trials.values() if t.job is not None]
        if running:
            numbers = ", ".join(map(str, sorted(running)))
            trials = files.format_count(len(self.trials), "trial")
            log.info("sweep: going on with %s; attached to %s", trials, numbers)

    def _find_job(self, t: Trial) -> None:
        """Look for the job that was about to be submitted; without one the trial waits again."""
        t.attempts[-1].job = self.executor.find(t.folder, t.attempt_name)
        if t.attempts[-1].job is None:
            t.attempts.pop()
            t.state = "waiting"
        t.save()

    def _make_trial(self, number: int, values: Point) -> Trial:
        t = Trial(number, values, trial.trial_folder(self.cfg.out, number).absolute())
        t.folder.mkdir(parents=True, exist_ok=True)
        self.write_trial(t.folder, number, values)
        t.save()
        self.trials[number] = t
        return t

    def _fill_queue(self) -> None:
        """Submit trials until `concurrent` of them are queued or running."""
        # Trials that were interrupted come before new ones.
        free = self.cfg.concurrent - sum(t.job is not None for t in self.trials.values())
        waiting = [t for t in self.trials.values() if t.state == "waiting"]

        for _ in range(free):
            t = waiting.pop(0) if waiting else self._ask_for_trial()
            if t is None:
                return
            self._submit(t)

    def _ask_for_trial(self) -> Trial | None:
        """The next trial of the study, None when all have been asked for."""
        proposal = self.study.ask()
        return None if proposal is None else self._make_trial(*proposal)

    def _submit(self, t: Trial) -> None:
        t.attempts.append(Attempt(submitted=time.time()))
        t.state = "running"
        # From here on, a new driver looks for the job.
        t.save()
        t.attempts[-1].job = self.executor.submit(self.make_command(t.folder), t.folder, t.attempt_name)
        t.save()
        log.info("sweep: trial %d, job %s: %s", t.number, t.job, t.values)

    def _judge_rungs(self, t: Trial) -> None:
        """Note the rungs that a trial has reached, each once; mark it for stopping when it is not promoted there."""
        path = t.folder / trial.METRICS_FILE
        size = path.stat().st_size if path.exists() else 0
        if size == self._metric_sizes.get(t.number):
            return

        # Only files that have grown are read.
        self._metric_sizes[t.number] = size

        rows = trial.read_metric_rows(path)
        t.step = max((row["step"] for row in rows), default=0)

        for rung in self.rungs if t.state == "running" else ():
            if not self._pass_rung(t, rung, rows):
                t.state = "stopping"
                log.info("sweep: trial %d is stopped: %s", t.number, t.note)
                break

        t.save()

    def _pass_rung(self, t: Trial, rung: int, rows: list[MetricRow]) -> bool:
        """Note the value at a rung that a trial has just reached; False, with a note why, when it is not promoted."""
        cfg = self.cfg.asha
        assert cfg is not None
        value = trial.find_value_at(rows, self.cfg.objective.key, rung)
        if value is None or rung in t.rungs:
            return True

        # Asynchronous: judged against those that came before, without waiting for others.
        others = [other.rungs[rung] for other in self.trials.values() if rung in other.rungs]
        t.rungs[rung] = value
        if asha.is_promoted(value, others, cfg, self.cfg.objective.goal):
            return True

        t.note = f"{value:.4g} at step {rung} is not among the best of {len(others) + 1}"
        return False

    def _stop_losers(self) -> None:
        """Cancel what is to be stopped, again at each step: a driver may have been killed before it did so."""
        self.executor.cancel([str(t.job) for t in self.trials.values() if t.state == "stopping" and t.job is not None])

    def _settle(self, t: Trial, state: JobState) -> None:
        """Decide what becomes of a trial whose job has ended."""
        # An exit code from 1 to 127 is a failure of the trial itself, and repeating it would not help, unless the trial
        # was stopped or hardware failed under it.
        last, code = t.attempts[-1], state.code
        last.ended = time.time()
        last.reason = _explain_exit(code)
        is_own_failure = code is not None and code not in _REPEATED and code <= _FIRST_SIGNAL

        if code == 0:
            t.value = trial.read_objective(t.folder, self.cfg.objective)
            if t.value is None:
                self._end(t, "failed", f"it left no {self.cfg.objective.key}")
            else:
                self._end(t, "done", "")
        # Cancelled by this driver, whatever its exit code.
        elif t.state == "stopping":
            self._end(t, "pruned", t.note)
        elif is_own_failure:
            self._end(t, "failed", f"{last.reason}, see {t.folder / t.attempt_name}.log")
        elif len(t.attempts) > self.cfg.requeue:
            self._end(t, "failed", f"{last.reason}, {files.format_count(len(t.attempts), 'time')}")
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


def _explain_exit(code: int | None) -> str:
    if code is None:
        return "killed (no exit code was left)"
    if code == 0:
        return "finished"
    if code == EXIT_STOPPED:
        return "stopped by a signal or the clock"
    if code in (EXIT_HARDWARE, EXIT_NETWORK):
        return "hardware fault"

    return f"signal {code - _FIRST_SIGNAL}" if code > _FIRST_SIGNAL else f"exit code {code}"
