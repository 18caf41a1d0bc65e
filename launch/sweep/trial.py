"""A trial at work: `python -m launch.sweep.trial FOLDER` runs the verbs of its recipe in turn, in one process.

Every rank of a trial runs this and reads the same files, so all have the same values. Several ranks train and end; the
job then runs this again in one task, for the verbs that follow. Verbs that are complete pass at once, so a trial that
is sent again goes on where it was. Exit codes as of the verbs; 75 also when the folder is taken.
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
from hpc_neuro.pipeline import STAGES
from launch.supervise import Place

_PATIENCE = 60.0  # [s] an earlier job that was killed may take this long to let go of the folder
_BUSY = 75


def main(words: Sequence[str]) -> int:
    """Run the trial of a folder; its verbs are those that have a YAML file there."""
    if len(words) != 1 or not (Path(words[0]) / "train.yaml").is_file():
        sys.stderr.write(
            "usage: python -m launch.sweep.trial FOLDER, where FOLDER holds train.yaml, as `launch sweep` makes\n"
        )
        return 2
    folder = Path(words[0])
    ranks = join_ranks(folder)
    with only_one(folder) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext(True) as ours:
        if not ours:
            sys.stderr.write(f"{folder} is at work in another process\n")
            return _BUSY
        for verb in STAGES.values():
            config = folder / f"{verb.name}.yaml"
            if not config.exists() or (ranks > 1 and verb.ranks != "torch"):
                continue
            code = cli.main([verb.name, str(config)])
            if code:
                return code
    return 0


@contextlib.contextmanager
def only_one(folder: Path, patience: float = _PATIENCE) -> Iterator[bool]:
    """Be alone in a trial's folder; the lock goes with the process. False when another one keeps it for `patience`."""
    with (folder / "lock").open("a") as handle:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    yield False
                    return
                time.sleep(0.2)
        yield True


def join_ranks(folder: Path) -> int:
    """Under srun with several tasks: tell torch.distributed who this is and where ranks meet; their number."""
    env = os.environ
    if "WORLD_SIZE" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        place = Place.here()
        env.update(place.meet(folder / f"ranks_{place.key}.json"))
    return int(env.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
