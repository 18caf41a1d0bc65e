"""Send the offline Weights & Biases runs of a folder from a node that has internet.

    python tools/sync_wandb.py runs/search/learning_rate [--dry-run] [--watch 600] [--project P] [--entity E]

FOLDER is a run folder, a study or any folder above: every OUT/wandb/offline-run-* below it is found. The files of one
run (a requeue begins a new one) are sent in the order in which they were made, and the server merges them, because they
carry one id; all trials of a study carry the study's name as their group (`tracker.group`). What has been sent whole is
not sent again; online runs that could not finish are sent, too. Exit codes: 0 all sent, 1 some could not be sent, 2
nothing to send there.
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

_SENT_SUFFIX = ".synced"
"""Suffix of the file that `wandb sync` leaves beside the file of a run that it has sent."""


def find_runs(folder: Path, again: bool = False) -> dict[str, list[Path]]:
    """Folders of runs that are not sent yet (`again`: of all), by run id, the oldest first."""
    runs: dict[str, list[Path]] = collections.defaultdict(list)
    for file in folder.rglob("wandb/*run-*-*/*.wandb"):
        # `latest-run` is a link.
        if file.parent.is_symlink():
            continue
        if again or not _is_sent(file):
            run_id = file.parent.name.rpartition("-")[2]
            runs[run_id].append(file.parent)

    # Folder names contain the time of the start.
    return {run: sorted(folders, key=lambda f: f.name.partition("run-")[2]) for run, folders in sorted(runs.items())}


def _is_sent(file: Path) -> bool:
    """Whether a run's file was sent after it was last written."""
    mark = file.with_name(file.name + _SENT_SUFFIX)
    return mark.exists() and mark.stat().st_mtime >= file.stat().st_mtime


def build_command(folders: Sequence[Path], args: argparse.Namespace) -> list[str]:
    """The `wandb` call that sends one run."""
    # Beside this Python when the environment is not activated.
    words = [shutil.which("wandb") or str(Path(sys.executable).with_name("wandb")), "sync", "--include-online"]
    if args.again:
        words.append("--include-synced")
    if args.project:
        words += ["--project", args.project]
    if args.entity:
        words += ["--entity", args.entity]
    return [*words, *map(str, folders)]


def send_runs(args: argparse.Namespace) -> tuple[int, int]:
    """Send what is there. Returns (runs sent, runs that could not be sent)."""
    sent, failed = 0, 0
    for run, folders in find_runs(args.folder, args.again).items():
        count = f"{len(folders)} file{'s' if len(folders) > 1 else ''}"
        if args.dry_run:
            sys.stdout.write(f"{run}: {count}, {folders[0].parent.parent}\n")
            continue

        process = subprocess.run(
            build_command(folders, args), capture_output=True, text=True, timeout=args.patience, check=False
        )
        if process.returncode:
            failed += 1
            reason = process.stderr.strip() or process.stdout.strip()
            sys.stdout.write(f"{run}: not sent: {reason[-300:]}\n")
        else:
            sent += 1
            sys.stdout.write(f"{run}: sent, {count}\n")

        # A log shows each run when it is sent.
        sys.stdout.flush()
    return sent, failed


def main(argv: Sequence[str] | None = None) -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--project", help="instead of the project that the runs carry")
    parser.add_argument("--entity", help="team or user that owns the runs")
    parser.add_argument("--again", action="store_true", help="also what has been sent before")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="repeat at this interval until interrupted")
    parser.add_argument("--patience", type=float, default=1800, metavar="SECONDS", help="longest time for one run")
    args = parser.parse_args(argv)

    if not find_runs(args.folder, again=True):
        sys.stderr.write(
            f"{args.folder} holds no Weights & Biases runs (OUT/wandb/offline-run-*); give a run folder or a study\n"
        )
        return 2

    while True:
        sent, failed = send_runs(args)
        if args.watch is None:
            if not args.dry_run:
                sys.stdout.write(f"{sent} runs sent, {failed} not\n")
            return 1 if failed else 0
        time.sleep(args.watch)


if __name__ == "__main__":
    sys.exit(main())
