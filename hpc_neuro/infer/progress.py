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
"""[s] A log gets one progress line this often."""


class WindowProgress:
    """Counts windows; shows their rate and when the rest will be done, as a bar on a terminal, else as log lines."""

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        """label: of what; total: windows to predict, as known so far."""
        self.label, self.total, self.done = label, total, 0
        self.waited = {"reading": 0.0, "student": 0.0, "writing": 0.0}
        """[s] What this process waited for."""
        self._show, self._started_at = show, time.monotonic()
        self._logged_at = self._started_at

        # A bar in a log file would be one endless line.
        self._bar = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, unit="window", dynamic_ncols=True, leave=False)

    def __enter__(self) -> WindowProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, windows: int) -> None:
        """Count windows as done."""
        self.done += windows
        if self._bar is not None:
            self._bar.update(windows)

        # A log without a bar must still show that the run goes on.
        now = time.monotonic()
        if self._show and self._bar is None and now - self._logged_at >= _SECONDS_PER_LINE:
            self._logged_at = now
            log.info("%s", self.describe(now - self._started_at))

    def skip(self, windows: int) -> None:
        """Count windows as not needed."""
        self.expect(-windows)

    def expect(self, windows: int) -> None:
        """Count more windows as to be done."""
        self.total += windows
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def describe(self, seconds: float) -> str:
        """`cell: 40/100 windows, 8.0 windows/s, done at 14:05:31 (8 s left), waiting: reading 1 %, student 99 %`."""
        rate = self.done / max(seconds, 1e-9)

        # Before the first window the rate is zero.
        seconds_left = max(self.total - self.done, 0) / max(rate, 1e-9)

        # A rate near zero would lead beyond the last year that datetime knows.
        end = dt.datetime.now() + dt.timedelta(seconds=min(seconds_left, 1e9))

        text = (
            f"{self.label}: {self.done}/{self.total} windows, {rate:.3g} windows/s, "
            f"done {end.strftime('%a %H:%M:%S')} ({seconds_left:.0f} s left)"
        )

        # Mirrored views count no waits.
        return text + (f", waiting: {self.describe_waits()}" if any(self.waited.values()) else "")

    def describe_waits(self) -> str:
        """`reading 1 %, student 98 %, writing 1 %`: what the time of this process went to."""
        total = max(sum(self.waited.values()), 1e-9)
        return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in self.waited.items())
