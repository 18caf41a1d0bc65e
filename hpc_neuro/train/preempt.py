"""Stopping on request: the handler only remembers, all ranks agree at the step boundary, the loop saves."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)
EXIT_CODE = 75  # EX_TEMPFAIL: asked to stop, state saved, the same command goes on
_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preemption:
    """Watches for a request to stop while it is entered: SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C, or the time that is up.

    A second Ctrl-C ends the process at once. Outside the main thread Python takes no signals: only the clock counts.
    """

    def __init__(self, margin: float, walltime: float = 0.0) -> None:
        """margin: [s] how long before the end to stop: a Slurm job's (SLURM_JOB_END_TIME) or in `walltime` [min].

        The earlier end counts; walltime 0: only Slurm's.
        """
        self.reason = ""
        self._old: dict[int, Any] = {}
        slurm = os.environ.get("SLURM_JOB_END_TIME", "")
        ends = [float(slurm)] if slurm.isdigit() else []
        ends += [time.time() + 60 * walltime] if walltime else []
        self._deadline = min(ends, default=float("inf")) - margin

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._remember) for number in _WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.reason = signal.Signals(number).name

    def agreed(self, *also: bool) -> list[bool]:
        """[any rank was asked to stop, each of `also` holds on any rank]: the same on all; all call this each step."""
        if not self.reason and time.time() > self._deadline:
            self.reason = "the end of the time limit"
        flags = torch.tensor([bool(self.reason), *also], dtype=torch.int64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # on the CPU: the accelerator's queue is not waited for
        return [bool(flag) for flag in flags]
