"""Where the jobs of a sweep run: one small interface, with this machine (`local`) and the schedulers (`cluster`).

Each job is a command in a folder, wrapped by a few lines of shell that leave the command's exit code beside its log:

    FOLDER/NAME.log    NAME.exit (whole or absent)    NAME.job (its id)

so that a driver that was not running when the job ended learns how it ended, without accounting.
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
    code: int | None = KILLED
    """Exit code of a job that ended, above 128 for a signal."""


class Executor(Protocol):
    """A place where jobs run."""

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Start `command` as a job whose files are FOLDER/NAME.*; its id. Raises InputError when it is refused."""

    def find(self, folder: Path, name: str) -> str | None:
        """Find the job that was submitted for FOLDER/NAME though its submitter died before noting it."""

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """State of every job of `jobs` (id -> FOLDER/NAME), in one call. Raises InputError without an answer."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """Ask jobs to end; those that have ended are passed over."""


def make_exit_line(base: str) -> str:
    """The shell line that leaves the last exit code for `read_exit_code`; `base` is FOLDER/NAME, quoted for a shell."""
    return f"code=$?; echo $code > {base}.exit.part && mv {base}.exit.part {base}.exit"


def read_exit_code(base: Path) -> int | None:
    """Read FOLDER/NAME.exit; None while it does not exist, and for one that holds no exit code."""
    # The shell renames it into place, so it is whole, unless the disk was full.
    try:
        text = job_file(base, "exit").read_bytes()[:8].strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else KILLED


def job_file(base: Path, suffix: str) -> Path:
    """FOLDER/NAME.suffix."""
    return base.with_name(f"{base.name}.{suffix}")
