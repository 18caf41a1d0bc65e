"""A copy of the code beside a queued job, so that later edits cannot change what it will run."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

from hpc_neuro.core import files, run_folder

log = logging.getLogger("hpc_neuro.launch")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hpc_neuro", "launch")


def snapshot(folder: Path, keep: bool = False) -> Path:
    """Copy both packages to `folder` and return it; goes first on a job's PYTHONPATH.

    Where a copy of other code is there, from an earlier start, this one goes beside it (`folder`.2), for jobs may still
    run the other; with `keep` the copy that is there is taken, and that it differs is said.
    """
    number, target, own = 1, folder, _digest(ROOT)
    while target.exists() and not keep and _digest(target) != own:
        number += 1
        target = folder.with_name(f"{folder.name}.{number}")
    if target.exists():
        if keep and _digest(target) != own:
            held = (target / run_folder.VERSION_FILE).read_text(encoding="utf-8").strip()
            log.warning("the code copied into %s (%s) is run, which is not the present one", target, held)
        return target.resolve()
    if number > 1:
        log.info("the code has changed since the last start: the present one is copied to %s and run", target)
    with files.atomic(target) as part:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, part / package, ignore=shutil.ignore_patterns("__pycache__"))
        (part / run_folder.VERSION_FILE).write_text(run_folder.code_version() + "\n", encoding="utf-8")
    return target.resolve()


def _digest(folder: Path) -> str:
    """Of the names and bytes of the packages' files."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((folder / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
