"""Stopping on request: a signal handler sets a flag, and the program ends at its next safe point.

Slurm sends SIGTERM, SIGUSR1 or SIGUSR2 before a time limit or a preemption. The command line runs every verb as
`resumable`, which notes these signals. Loops of a verb call `check` between two items, or draw their items from
`until_stopped`, or read through `stop_on_request`: each raises `Stopped` where nothing is half done. Work in hand is
given back on the way out. The exit code is EXIT_STOPPED, which the launcher takes for "queue the same command again".
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

from hpc_neuro.core.constants import EXIT_STOPPED

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_POLL_SECONDS = 0.2


class Stopped(SystemExit):
    """Raised at a safe point after a request to stop. Ends the process with EXIT_STOPPED unless a verb catches it."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.reason = reason


class StopSignals:
    """Notes requests to stop while it is entered: SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C, or the end of the time limit.

        with StopSignals() as stop:
            for item in items:
                stop.check()
                process(item)

    A second Ctrl-C ends the process at once. Python delivers signals to the main thread only: elsewhere no handler is
    installed, and only the clock counts. Inside another one, a request that the outer one noted counts too, and what
    the inner one noted counts for the outer one afterwards: a verb that runs other verbs stops with them.
    """

    def __init__(self, margin: float | None = None, walltime: float = 0.0) -> None:
        """margin: [s] how long before the end of the Slurm job (SLURM_JOB_END_TIME) or of `walltime` [min] to stop.

        The earlier end counts; walltime 0: only Slurm's. margin None: the clock does not count.
        """
        self.reason = ""
        self._old_handlers: dict[int, Any] = {}
        self._deadline = float("inf") if margin is None else _job_end(walltime) - margin
        self._is_left = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._old_handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        self.reason = self.reason or next((outer.reason for outer in _entered if outer.reason), "")
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left.set()
        _entered.remove(self)
        for outer in _entered:
            outer.reason = outer.reason or self.reason
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    @property
    def is_requested(self) -> bool:
        """Whether this process was asked to stop, or its time is up."""
        if not self.reason and time.time() > self._deadline:
            self.reason = "the end of the time limit"
        return bool(self.reason)

    def check(self) -> None:
        """Raise Stopped when this process was asked to stop."""
        if self.is_requested:
            raise Stopped(self.reason)

    @contextlib.contextmanager
    def call_on_request(self, callback: Callable[[], None]) -> Iterator[None]:
        """Meanwhile, a request to stop calls `callback` soon, from a thread: also while the main thread is busy."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait_for_request, name="stop signals", daemon=True)
            self._thread.start()
        self._callbacks.append(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)

    def _wait_for_request(self) -> None:
        # The handler runs inside the main thread, so it may not take a lock: the flag is polled instead.
        while not self._is_left.wait(_POLL_SECONDS):
            if self.is_requested:
                for callback in tuple(self._callbacks):
                    callback()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.reason = signal.Signals(number).name


_entered: list[StopSignals] = []


def check() -> None:
    """Raise Stopped when the verb that is running was asked to stop."""
    for stop in tuple(_entered):
        stop.check()


def is_requested() -> bool:
    """Whether the verb that is running was asked to stop."""
    return any(stop.is_requested for stop in tuple(_entered))


@contextlib.contextmanager
def call_on_request(callback: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, a request to stop the running verb calls `callback` soon, from a thread."""
    with _entered[-1].call_on_request(callback) if _entered else contextlib.nullcontext():
        yield


def until_stopped(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`; raise Stopped before the next one when the verb that is running was asked to stop."""
    for item in items:
        check()
        yield item


def stop_on_request(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, such as the reading of a box, which first raises Stopped when the verb was asked to stop."""

    @functools.wraps(function)
    def call_unless_stopped(*args: P.args, **kwargs: P.kwargs) -> T:
        check()
        return function(*args, **kwargs)

    return call_unless_stopped


def resumable(verb: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a verb's `run`: stop signals are noted while it runs, and Stopped becomes its exit code EXIT_STOPPED."""

    def decorate(run: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(run)
        def run_until_stopped(*args: P.args, **kwargs: P.kwargs) -> int:
            with StopSignals():
                try:
                    return run(*args, **kwargs)
                except Stopped as error:
                    log.warning("%s: stopped by %s; the same command resumes it", verb, error.reason)
                    return EXIT_STOPPED

        return run_until_stopped

    return decorate


def ignore_signals() -> None:
    """Ignore all further requests to stop: this process has done its work and ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _job_end(walltime: float) -> float:
    """Unix time at which the Slurm job, or `walltime` minutes from now, ends; infinity when neither is known."""
    slurm = os.environ.get("SLURM_JOB_END_TIME", "")
    ends = [float(slurm)] if slurm.isdecimal() else []
    if walltime:
        ends.append(time.time() + 60 * walltime)
    return min(ends, default=float("inf"))
