"""Fine-tuning on few neurons: from a trained student, from random weights, and the student as it is.

    python -m tools.bench.fine_tune --store STORE --init FOLDER --out OUT [--own ID ...] [--only ID ...]
                                    [--neurons 1 2 5] [--seeds 0 1 2] [--seconds 60] [--crop 16 96 96] [--batch 2]

The neurons of --own are those of one microscope (all of STORE by default). Each, or each of --only, is held out in
turn. For each seed, N neurons are drawn to train on: from --own first, then from the others of STORE. Both starts get
the same network, crops, augmentation, losses (Dice and cross entropy) and CPU seconds of training steps. The rates are
those of `hpc-neuro train`; weights that --init gave learn at its optim.init_lr. One more neuron of --own, the next one,
is never trained on: its best Dice chooses the threshold, also that of the student as it is.

The student of --init must have seen no neuron of STORE. The bundled one has seen all nine of docs/trace.md. STORE has
the contrast of its training (`prepare contrast=local` for the bundled one and those before it).

Printed per number of neurons: Dice, clDice, average precision, and F1 of the cable at 4 voxels with and without links
along the image, and the differences to random weights and to the student as it is, with 95 % intervals over neurons.
OUT keeps a file for each training; the same command goes on where it was. Last line: JSON; the same in
OUT/fine_tune.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import Store
from hpc_neuro.metrics.statistics import mean_interval, paired_difference
from hpc_neuro.models.student import build_student
from hpc_neuro.train.config import OptimConfig
from hpc_neuro.train.optim import lr_at
from hpc_neuro.train.start_weights import InitialStudent, open_initial_student
from tools.bench.held_out import (
    METRICS,
    Scores,
    StudentLogits,
    average_over_seeds,
    describe,
    format_scores,
    read_training,
    require_names,
    run_bench,
    score_held_out,
)
from tools.bench.quality import Budget, Recipe, train

INIT, SCRATCH, AS_IS = "init", "scratch", "as_is"
STARTS = (INIT, SCRATCH)


@dataclass(frozen=True)
class Fold:
    """One training: what is held out, trained on and started from."""

    held_out: str
    validated: str
    """Its best Dice chooses the threshold."""
    trained: tuple[str, ...]
    """None: the student as it is."""
    seed: int
    start: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.held_out}_{len(self.trained)}_{self.seed}_{self.start}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the trainings that are missing, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder that `prepare` wrote")
    parser.add_argument("--init", type=Path, required=True, help="folder of a student")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--own", nargs="+", default=[], help="neurons of one microscope; default: all")
    parser.add_argument("--only", nargs="+", default=[], help="of --own, those to hold out; default: all")
    parser.add_argument("--neurons", type=int, nargs="+", default=[1, 2, 5], help="how many are trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a training")
    parser.add_argument("--crop", type=int, nargs=3, default=(16, 96, 96), help="[voxel] multiples of 16")
    parser.add_argument("--batch", type=int, default=2)
    return run_bench(parser, argv, compare)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score what is missing; the figures of all trainings, printed."""
    store = Store(args.store)
    start = open_initial_student(args.init)
    for name in store.ids:
        start.require_contrast(store[name].contrast)

    z, y, x = args.crop
    budget = Budget(crop=(z, y, x), batch=args.batch, seconds=args.seconds)

    scores: Scores = {}
    for fold in choose_folds(list(store.ids), args.own, args.only, args.neurons, args.seeds):
        result = train_and_score(store, fold, start, budget, args.out)
        label = AS_IS if fold.start == AS_IS else f"{fold.start}, {len(fold.trained)}"
        for metric in METRICS:
            scores.setdefault(label, {}).setdefault(metric, {}).setdefault(fold.held_out, []).append(result[metric])

    facts = summarize(scores, args.neurons)
    print("\n".join(describe(facts)))
    facts |= {"seconds": args.seconds, "init": start.digest, "seeds": args.seeds}
    files.write_json(args.out / "fine_tune.json", facts)
    return facts


def choose_folds(
    ids: Sequence[str], own: Sequence[str], only: Sequence[str], numbers: Sequence[int], seeds: Sequence[int]
) -> list[Fold]:
    """All trainings. Raises InputError for a name that is not there, and for a store that is too small."""
    require_names("--own", own, ids)
    own = own or ids

    if unknown := sorted(set(only) - set(own)):
        raise InputError(f"--only: {', '.join(unknown)} is not one of --own, which are {', '.join(own)}")
    if len(own) < 2 or min(numbers) < 1 or max(numbers) > len(ids) - 2:
        raise InputError(
            f"--own names {len(own)} of {len(ids)} neurons, and --neurons asks for {', '.join(map(str, numbers))} to "
            f"train on; one of --own is held out and one chooses the threshold, so at least 2 and at most "
            f"{max(0, len(ids) - 2)} are possible"
        )

    folds = []
    for held_out in only or own:
        validated = own[(own.index(held_out) + 1) % len(own)]
        folds.append(Fold(held_out, validated, (), 0, AS_IS))
        for seed in seeds:
            generator = np.random.default_rng(seed)
            # Neurons of the own microscope come first.
            own_order = generator.permutation([name for name in own if name not in (held_out, validated)])
            other_order = generator.permutation([name for name in ids if name not in own])
            drawn = tuple(str(name) for name in (*own_order, *other_order))
            folds += [Fold(held_out, validated, drawn[:number], seed, start) for number in numbers for start in STARTS]
    return folds


def train_and_score(store: Store, fold: Fold, start: InitialStudent, budget: Budget, out: Path) -> dict[str, Any]:
    """The scores of one training, from its file where it has been done."""
    path = out / "trainings" / f"{fold.name}.json"
    facts = {
        "store": str(store.path.resolve()),
        "trained": list(fold.trained),
        "init": start.digest,
        "crop": list(budget.crop),
        "batch": budget.batch,
        "seconds": budget.seconds,
    }
    if (earlier := read_training(path, facts)) is not None:
        return earlier

    torch.manual_seed(fold.seed)
    recipe = build_recipe(start, fold.start)
    steps = 0
    if fold.trained:
        steps = train(recipe, store, fold.trained, fold.seed, budget)

    scores = score_held_out(recipe.network, store, fold.held_out, fold.validated, budget)
    result = {"settings": facts, "steps": steps, **scores}
    files.write_json(path, result)
    print(f"{fold.name:<24} {steps:6d} steps  threshold {scores['threshold']:.2f}  {format_scores(scores)}", flush=True)
    return result


def build_recipe(start: InitialStudent, kind: str) -> Recipe:
    """The student of `start`, with its weights or with random ones, at the rates of `hpc-neuro train`."""
    network = StudentLogits(build_student(start.cfg))
    optim = OptimConfig(steps=1000)

    rate = optim.lr
    if kind != SCRATCH:
        network.student.load_state_dict(start.values)
        rate *= optim.init_lr

    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=optim.weight_decay)
    return Recipe(network, optimizer, lambda share: lr_at(min(int(share * optim.steps), optim.steps - 1), optim))


def summarize(scores: Scores, numbers: Sequence[int]) -> dict[str, Any]:
    """Means over seeds per neuron, with intervals over neurons, and the differences that matter."""
    mean = {
        label: {metric: asdict(mean_interval(average_over_seeds(values))) for metric, values in metrics.items()}
        for label, metrics in scores.items()
    }

    difference = {}
    for number in numbers:
        for other in (f"{SCRATCH}, {number}", AS_IS):
            first, second = scores[f"{INIT}, {number}"], scores[other]
            difference[f"{INIT}, {number} - {other}"] = {
                metric: asdict(paired_difference(average_over_seeds(first[metric]), average_over_seeds(second[metric])))
                for metric in METRICS
            }
    return {"scores": scores, "mean": mean, "difference": difference}


if __name__ == "__main__":
    raise SystemExit(main())
