"""Progress by windows: a block may take minutes, and a volume may be one block."""

from __future__ import annotations

import datetime as dt
import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)
_SECONDS_PER_LINE = 10.0


class Meter:
    """Counts windows and says their rate and when the rest will be done: a bar on a terminal, else lines in the log."""

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        self.label, self.total, self.done = label, total, 0
        self.waited = {"reading": 0.0, "student": 0.0, "writing": 0.0}  # [s] what this process waited for
        self._show, self._begun = show, time.monotonic()
        self._said = self._begun
        self._bar = (
            tqdm(desc=label, total=total, unit="window", dynamic_ncols=True, leave=False)
            if show and sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, windows: int) -> None:
        """So many windows are done."""
        self.done += windows
        if self._bar is not None:
            self._bar.update(windows)
        now = time.monotonic()
        if self._show and self._bar is None and now - self._said >= _SECONDS_PER_LINE:
            self._said = now
            log.info("%s", self.line(now - self._begun))

    def skip(self, windows: int) -> None:
        """So many windows need not be looked at."""
        self.expect(-windows)

    def expect(self, windows: int) -> None:
        """So many windows more are to be looked at."""
        self.total += windows
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def line(self, seconds: float) -> str:
        """`cell: 40/100 windows, 8.0 windows/s, done at 14:05:31 (8 s left), waiting: reading 1 %, student 99 %`."""
        rate = self.done / max(seconds, 1e-9)
        left = max(self.total - self.done, 0) / max(rate, 1e-9)
        at = (dt.datetime.now() + dt.timedelta(seconds=min(left, 1e9))).strftime("%a %H:%M:%S")
        text = f"{self.label}: {self.done}/{self.total} windows, {rate:.3g} windows/s, done {at} ({left:.0f} s left)"
        return text + (f", waiting: {self.shares()}" if any(self.waited.values()) else "")

    def shares(self) -> str:
        """`reading 1 %, student 98 %, writing 1 %`: what the time of this process went to."""
        whole = max(sum(self.waited.values()), 1e-9)
        return ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in self.waited.items())
