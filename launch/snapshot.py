"""A copy of the code beside a queued job, so that later edits cannot change what it will run."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpc_neuro import files, runs

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hpc_neuro", "launch")


def snapshot(folder: Path) -> Path:
    """Copy both packages to `folder`, unless they are there, and return it; goes first on a job's PYTHONPATH."""
    if folder.exists():
        return folder.resolve()
    with files.atomic(folder) as part:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, part / package, ignore=shutil.ignore_patterns("__pycache__"))
        (part / runs.VERSION_FILE).write_text(runs.code_version() + "\n", encoding="utf-8")
    return folder.resolve()
