"""Where the jobs of a sweep run: one small interface, one file per place.

Each job is a command in a folder, wrapped by a few lines of shell that leave, beside its log, the command's exit code:

    FOLDER/NAME.log    NAME.exit (whole or absent)    NAME.job (who runs it)

so that a driver that was not there when the job ended learns how it ended, without accounting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

KILLED = None
"""The exit code of a job that ended without leaving one."""


@dataclass(frozen=True)
class JobState:
    """Where a job stands."""

    kind: Literal["queued", "running", "ended"]
    code: int | None = KILLED  # of one that ended: its exit code, above 128 for a signal


class Executor(Protocol):
    """A place where jobs run."""

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Start `command` as a job whose files are FOLDER/NAME.*; its id. Raises InputError when it is refused."""

    def find(self, folder: Path, name: str) -> str | None:
        """The id of a job that was submitted for FOLDER/NAME though its submitter died before noting it, else None."""

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """The state of every job of `jobs` (id -> FOLDER/NAME), in one call. Raises InputError when nobody answers."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """Ask jobs to end; those that already did are passed over."""


def exit_code(base: Path) -> int | None:
    """What FOLDER/NAME.exit says, None while it is not there."""
    path = beside(base, "exit")
    return int(path.read_text(encoding="utf-8")) if path.exists() else None


def beside(base: Path, ending: str) -> Path:
    """FOLDER/NAME.ending."""
    return base.with_name(f"{base.name}.{ending}")
