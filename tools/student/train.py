"""Train the student that ships in the package: synthetic scenes first, then real neurons beside them.

    python -m tools.student.train --out OUT [--gold FOLDER] [--pairs MANIFEST ...] [--store STORE ...]
                                  [--scenes N] [--steps FIRST SECOND] [--workers N] [--export FOLDER]

Steps, each of which is skipped where it is done; the same command goes on where it was stopped:

    scenes      N synthetic stacks and their trees (tools/student/domain.py); --gold: SWC files that lend their shapes
    prepare     their store, and one of each MANIFEST of real pairs (as `hpc-neuro prepare manifest=`)
    first       FIRST steps on the scenes alone. What it scores on real neurons is of a student that saw none.
    second      SECOND steps from there on scenes, pairs and the volumes of each prepared STORE
    export      --export: the weights in float16, ready for the package, and their card
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from tools.student.card import export_weights
from tools.student.scenes import MANIFEST, join_stores, write_scenes

log = logging.getLogger(__name__)

_PREPARE = ("contrast=local", "misaligned=warn")
"""Settings of all stores. Local contrast makes stacks of any brightness, haze and noise alike."""
RECIPE = (
    "student.transformer=false",
    "student.patch=[4,8,8]",
    "transfer.rule=scratch",
    "distill=null",
    "crop.size=[24,96,96]",
    "crop.uniform=0.25",
    "crop.volumes=size",
    "optim.batch=4",
    # What local contrast takes away need not be simulated.
    "augment.background=0",
    "augment.contrast=0.1",
    "augment.gamma=0.3",
    "augment.noise=0.3",
    "augment.specks=0",
    "validate.every=500",
    "validate.crops=48",
    "tracker.wandb=disabled",
)
"""Settings of both trainings, besides the defaults."""
_SECOND = ("optim.init_lr=0.5", "seed=1")
"""More settings of the second one."""


def main() -> int:
    """Do the steps that are missing; the exit code of the first verb that fails or is stopped, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gold", type=Path)
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--store", type=Path, nargs="*", default=[])
    parser.add_argument("--scenes", type=int, default=480)
    parser.add_argument("--steps", type=int, nargs=2, default=[6000, 3000], metavar=("FIRST", "SECOND"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        _build_student(args)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


def _build_student(args: argparse.Namespace) -> None:
    out: Path = args.out
    gold = sorted(args.gold.glob("*.swc")) if args.gold else []
    scenes, own_store = out / "scenes", out / "store_scenes"
    write_scenes(scenes, seed=0, count=args.scenes, gold=gold, workers=args.workers)

    # The trees of scenes have the widths that the neurites were painted with.
    _run_verb("prepare", f"manifest={scenes / MANIFEST}", f"out={own_store}", "radius.kind=swc", *_PREPARE)
    stores = [own_store, *args.store]
    for number, manifest in enumerate(args.pairs, start=1):
        store = out / f"store_pairs_{number}"
        _run_verb("prepare", f"manifest={manifest}", f"out={store}", *_PREPARE)
        stores.append(store)

    first, second = args.steps
    _run_verb("train", f"store={own_store}", f"out={out / 'first'}", f"optim.steps={first}", *RECIPE)

    joint = out / "store_all"
    join_stores(joint, stores)
    more = (f"optim.steps={second}", f"init={out / 'first'}", *RECIPE, *_SECOND)
    _run_verb("train", f"store={joint}", f"out={out / 'second'}", *more)

    if args.export:
        export_weights([out / "first", out / "second"], joint, args.export, len(gold))
        log.info("wrote %s", args.export)


def _run_verb(verb: str, *settings: str) -> None:
    """Run a verb of hpc-neuro in a process of its own. Raises CalledProcessError where it does not end with 0."""
    command = [sys.executable, "-m", "hpc_neuro", verb, *settings]
    log.info("hpc-neuro %s", " ".join([verb, *settings]))
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
