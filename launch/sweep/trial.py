"""A trial at work: `python -m launch.sweep.trial FOLDER` runs the verbs of its recipe in turn, in one process.

Every rank of a trial runs this and reads the same files, so all have the same values. Several ranks train and end; the
job then runs this again in one task, for the verbs that follow. Verbs that are complete pass at once, so a trial that
is submitted again continues where it was. Exit codes are those of the verbs; 75 also when the folder is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from hpc_neuro.pipeline import STAGES
from launch.supervise import RankPlace

_PATIENCE = 60.0
"""[s] An earlier job that was killed may take this long to release the folder."""


def main(words: Sequence[str]) -> int:
    """Run the trial of a folder; its verbs are those that have a YAML file there."""
    if len(words) != 1 or not (Path(words[0]) / "train.yaml").is_file():
        sys.stderr.write(
            "usage: python -m launch.sweep.trial FOLDER, where FOLDER holds train.yaml, as `launch sweep` makes\n"
        )
        return EXIT_BAD_INPUT

    # Two processes in one folder would spoil its files: the first rank holds a lock.
    folder = Path(words[0])
    ranks = join_ranks(folder)
    is_first_rank = os.environ.get("RANK", "0") == "0"

    with lock_folder(folder) if is_first_rank else contextlib.nullcontext(True) as is_locked:
        if not is_locked:
            sys.stderr.write(f"{folder} is at work in another process\n")
            return EXIT_STOPPED
        return _run_verbs(folder, ranks)


def _run_verbs(folder: Path, ranks: int) -> int:
    """Run the verbs of a recipe until one fails; with several ranks, those that all ranks share."""
    for verb in STAGES.values():
        config = folder / f"{verb.name}.yaml"
        # The job starts this module again in one task for the verbs that all ranks do not share.
        if not config.exists() or (ranks > 1 and verb.ranks != "torch"):
            continue
        code = cli.main([verb.name, str(config)])
        if code:
            return code

    return EXIT_DONE


@contextlib.contextmanager
def lock_folder(folder: Path, patience: float = _PATIENCE) -> Iterator[bool]:
    """Lock a trial's folder; the lock goes with the process. Yields False when another keeps it for `patience` s."""
    with (folder / "lock").open("a") as handle:
        yield _acquire_lock(handle.fileno(), patience)


def _acquire_lock(file: int, patience: float) -> bool:
    deadline = time.monotonic() + patience

    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def join_ranks(folder: Path) -> int:
    """Under srun with several tasks, set the variables that torch.distributed reads. Returns the number of ranks."""
    env = os.environ
    if "WORLD_SIZE" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        place = RankPlace.from_environment()
        env.update(place.agree_on_address(folder / f"ranks_{place.start}.json"))
    return int(env.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
