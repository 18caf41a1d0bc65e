"""Send the offline Weights & Biases runs of a folder from a node that has internet.

    python tools/sync_wandb.py runs/search/learning_rate [--dry-run] [--watch 600] [--project P] [--entity E]

FOLDER is a run folder, a study or anything above: every OUT/wandb/offline-run-* below it is found. The files of one run
(a requeue begins a new one) are sent in the order they were made, and the server merges them, as they carry one id; all
trials of a study carry the study's name as their group (`tracker.group`). What has been sent whole is not sent again;
online runs that could not finish are sent, too. Exit codes: 0 all sent, 1 some could not be, 2 nothing to send there.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_SYNCED = ".synced"  # what `wandb sync` leaves beside the file of a run that it has sent


def find(folder: Path, again: bool = False) -> dict[str, list[Path]]:
    """Folders of runs not sent yet (`again`: of all), by run id, the oldest first."""
    runs: dict[str, list[Path]] = collections.defaultdict(list)
    for file in folder.rglob("wandb/*run-*-*/*.wandb"):
        sent = file.with_name(file.name + _SYNCED)
        if file.parent.is_symlink() or (sent.exists() and not again and sent.stat().st_mtime >= file.stat().st_mtime):
            continue
        runs[file.parent.name.rpartition("-")[2]].append(file.parent)
    return {run: sorted(folders, key=lambda f: f.name.partition("run-")[2]) for run, folders in sorted(runs.items())}


def command(folders: Sequence[Path], asked: argparse.Namespace) -> list[str]:
    """The call that sends one run."""
    words = [shutil.which("wandb") or str(Path(sys.executable).with_name("wandb")), "sync", "--include-online"]
    words += ["--include-synced"] if asked.again else []
    words += ["--project", asked.project] if asked.project else []
    words += ["--entity", asked.entity] if asked.entity else []
    return [*words, *map(str, folders)]


def sync(asked: argparse.Namespace) -> tuple[int, int]:
    """Send what is there; (runs sent, runs that could not be)."""
    sent, failed = 0, 0
    for run, folders in find(asked.folder, asked.again).items():
        files = f"{len(folders)} file{'s' if len(folders) > 1 else ''}"
        if asked.dry_run:
            sys.stdout.write(f"{run}: {files}, {folders[0].parent.parent}\n")
            continue
        done = subprocess.run(
            command(folders, asked), capture_output=True, text=True, timeout=asked.patience, check=False
        )
        if done.returncode:
            failed += 1
            sys.stdout.write(f"{run}: not sent: {(done.stderr.strip() or done.stdout.strip())[-300:]}\n")
        else:
            sent += 1
            sys.stdout.write(f"{run}: sent, {files}\n")
        sys.stdout.flush()
    return sent, failed


def main(argv: Sequence[str] | None = None) -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--project", help="instead of the project the runs carry")
    parser.add_argument("--entity", help="team or user they belong to")
    parser.add_argument("--again", action="store_true", help="also what has been sent before")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="go on, looking this often, until interrupted")
    parser.add_argument("--patience", type=float, default=1800, metavar="SECONDS", help="longest time for one run")
    asked = parser.parse_args(argv)
    if not find(asked.folder, again=True):
        sys.stderr.write(
            f"{asked.folder} holds no Weights & Biases runs (OUT/wandb/offline-run-*); give a run folder or a study\n"
        )
        return 2
    while True:
        sent, failed = sync(asked)
        if asked.watch is None:
            if not asked.dry_run:
                sys.stdout.write(f"{sent} runs sent, {failed} not\n")
            return 1 if failed else 0
        time.sleep(asked.watch)


if __name__ == "__main__":
    sys.exit(main())
