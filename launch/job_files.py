"""Files that a queued job will read: a snapshot of the code, its secrets, and the pickle of its task.

They lie in the run folder for hours before the job starts, so later edits of the code must not reach them, and nobody
else may change what will run under this user's name, or read its secrets.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.constants import EXIT_BAD_INPUT
from hpc_neuro.core.schema import InputError

log = logging.getLogger("hpc_neuro.launch")
ROOT = Path(__file__).resolve().parent.parent
"""Folder of the packages that are running."""
PACKAGES = ("hpc_neuro", "launch")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def snapshot_code(folder: Path, keep: bool = False) -> Path:
    """Copy both packages to `folder` and return it; it goes first on a job's PYTHONPATH.

    Where `folder` holds other code, from an earlier start, the copy goes beside it (`folder`.2), for jobs may still run
    the other; with `keep` the code in `folder` is taken, and a warning says that it differs.
    """
    # Submitting unchanged code again needs no second copy.
    digest = _hash_packages(ROOT)
    number, target = 1, folder

    while target.exists() and not keep and _hash_packages(target) != digest:
        number += 1
        target = folder.with_name(f"{folder.name}.{number}")

    if target.exists():
        if keep and _hash_packages(target) != digest:
            version = (target / run_folder.VERSION_FILE).read_text(encoding="utf-8").strip()
            log.warning("the code copied into %s (%s) is run, which is not the present one", target, version)
        return target.resolve()

    if number > 1:
        log.info("the code has changed since the last start: the present one is copied to %s and run", target)

    # A job must never see half a copy.
    with files.atomic(target) as part:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, part / package, ignore=shutil.ignore_patterns("__pycache__"))
        (part / run_folder.VERSION_FILE).write_text(run_folder.code_version() + "\n", encoding="utf-8")

    return target.resolve()


def _hash_packages(folder: Path) -> str:
    """Hex SHA-256 of the names and bytes of the packages' files."""
    digest = hashlib.sha256()

    for package in PACKAGES:
        for path in sorted((folder / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())

    return digest.hexdigest()


def write_private_text(path: Path, text: str) -> None:
    """Write a text atomically into a file that its owner alone can read, at no moment readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    # The mode is given when the file is created: to restrict it later would leave a moment.
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_protected_folder(folder: Path) -> None:
    """Create a folder that only its owner can write into, below a folder of the same kind.

    Raises InputError when either exists and others can write into it: they could replace what a job will load.
    """
    folder.parent.parent.mkdir(parents=True, exist_ok=True)

    # Who can write into a folder can replace the files and folders in it.
    for path in (folder.parent, folder):
        with protect_new_files():
            path.mkdir(exist_ok=True)
        if path.stat().st_mode & _WRITABLE_BY_OTHERS:
            raise InputError(
                f"others can write into {path} and so change what the job will run; "
                f"`chmod go-w {files.quote_path(path)}`, then submit again"
            )


@contextlib.contextmanager
def protect_new_files() -> Iterator[None]:
    """Let files that are created meanwhile, by this process and its children, be writable by their owner alone."""
    # The jobs started meanwhile inherit this umask; `RankTask` restores the user's.
    umask = read_umask()
    os.umask(umask | _WRITABLE_BY_OTHERS)

    try:
        yield
    finally:
        os.umask(umask)


def read_umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def refuse_writable_pickle(logs: Path) -> str:
    """A line of a batch script that ends the job when others can change the pickle it is about to load."""
    # submitit names the pickle after the job, or after array and index.
    job = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    pickle = f"{shlex.quote(str(logs))}/${{job:-$SLURM_JOB_ID}}_submitted.pkl"
    return (
        f"job={job}; writable=$(find {shlex.quote(str(logs))} {pickle} -maxdepth 0 -perm /022 2>/dev/null); "
        'if [ -n "$writable" ]; then echo "launch: others can write into" $writable "and so change what this job runs; '
        f'chmod go-w it, then submit again" >&2; exit {EXIT_BAD_INPUT}; fi'
    )
