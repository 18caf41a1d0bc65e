"""What the 2D teacher is worth to a student: trainings that differ in what they take from it, on neurons held out.

    python -m tools.bench.transfer STUDY --store STORE --out OUT [--teacher teacher.model=bundled8 ...] [--only ID ...]
                                   [--arms ARM ...] [--neurons N ...] [--seeds 0 1] [--steps 120]
                                   [--crop 16 96 96] [--batch 2]

STUDY is one of

    controls      transfer by the rule `average` against three students that know nothing of photographs: from random
                  weights, from random weights in the teacher's form (`untrained`), from the teacher's weights in random
                  order within each tensor (`shuffled`); and against the student without a transformer
    labels        `average`, `untrained` and `shuffled` with 1, 2 and 4 neurons to train on
    distillation  transfer alone, with distillation of the teacher, and with distillation of its untrained copy
    tubes         transfer with no tubes on features, straight ones, and deformable ones

Every neuron of STORE (or those of --only) is held out in turn, for every seed. N of the others are drawn to train on,
and one more, never trained on, chooses the threshold by its best Dice. All trainings of a neuron and seed see the same
crops in the same order, for the same number of steps. Each is a run of `hpc-neuro train`, so that rates, averaging of
weights and augmentation are those of its defaults; transferred weights, and those of `untrained` and `shuffled`, learn
at the same rates. STORE holds volumes of one contrast (`prepare`).

Printed: Dice, clDice, average precision, and F1 of the cable at 4 voxels with and without links along the image, with
95 % intervals over neurons; then the difference of each training to the first one of the study with the same neurons:
interval, p of a sign-flip test over neurons, p after Holm's correction for the study, and the neurons that a difference
of 0.01 needs. OUT keeps a file for each training; the same command goes on where it was. OUT/STUDY.json and
OUT/STUDY.csv hold all of it. Last line: JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import INDEX, Store
from hpc_neuro.metrics.statistics import (
    Interval,
    correct_for_many,
    count_neurons_needed,
    crossed_interval,
    mean_interval,
    sign_flip_test,
)
from hpc_neuro.models.config import StudentConfig, TeacherConfig
from hpc_neuro.models.student import load_student
from hpc_neuro.models.teacher import Teacher, load_teacher, make_untrained_copy
from hpc_neuro.models.tensor_names import fit_config
from hpc_neuro.teacher.card import write_copy
from tools.bench.held_out import (
    METRICS,
    StudentLogits,
    Windows,
    average_over_seeds,
    format_interval,
    format_scores,
    read_training,
    require_names,
    run_bench,
    score_held_out,
)

EFFECT = 0.01
"""Difference whose needed number of neurons is printed."""


@dataclass(frozen=True)
class Arm:
    """What a training takes from the teacher."""

    keys: tuple[str, ...]
    """Of `hpc-neuro train`."""
    distilled: str = ""
    """Whose features are distilled: `teacher`, `untrained`, or nobody's."""


ARMS = {
    "average": Arm(("transfer.rule=average",)),
    "untrained": Arm(("transfer.rule=untrained",)),
    "shuffled": Arm(("transfer.rule=shuffled",)),
    "scratch": Arm(("transfer.rule=scratch",)),
    "convolutions": Arm(("transfer.rule=scratch", "student.transformer=false")),
    "distilled": Arm(("transfer.rule=average", "distill.axes=deformable"), "teacher"),
    "distilled_untrained": Arm(("transfer.rule=average", "distill.axes=deformable"), "untrained"),
    "straight_tubes": Arm(("transfer.rule=average", "student.tubes.kind=straight")),
    "deformable_tubes": Arm(("transfer.rule=average", "student.tubes.kind=deformable")),
}

STUDIES = {
    "controls": ("average", "untrained", "shuffled", "scratch", "convolutions"),
    "labels": ("average", "untrained", "shuffled"),
    "distillation": ("average", "distilled", "distilled_untrained"),
    "tubes": ("average", "straight_tubes", "deformable_tubes"),
}
"""Study -> its arms; the others are compared with the first."""


@dataclass(frozen=True)
class Trial:
    """One training, and the neurons it is scored and judged on."""

    arm: str
    held_out: str
    validated: str
    trained: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.held_out}_{len(self.trained)}_{self.seed}_{self.arm}"

    @property
    def fold(self) -> str:
        """Of its store: other arms have the same."""
        return f"{self.held_out}_{len(self.trained)}_{self.seed}"

    @property
    def label(self) -> str:
        """Of its row in the table."""
        return f"{self.arm}, {len(self.trained)}"


@dataclass(frozen=True)
class Bench:
    """What all trainings share."""

    store: Store
    out: Path
    teacher_keys: tuple[str, ...]
    """Of TeacherConfig, with the prefix `teacher.`."""
    teacher: Teacher
    windows: Windows
    batch: int
    steps: int
    student_keys: tuple[str, ...]
    """Of StudentConfig, with the prefix `student.`: the form that the teacher fits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do the trainings that are missing, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--store", type=Path, required=True, help="folder that `prepare` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", nargs="+", default=["teacher.model=bundled8"], help="keys of the teacher")
    parser.add_argument("--only", nargs="+", default=[], help="hold out these only (the others are still trained on)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these only; others are compared with the first")
    parser.add_argument("--neurons", type=int, nargs="+", help="how many are trained on; 1 2 4 for `labels`, else 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--crop", type=int, nargs=3, default=(16, 96, 96), help="[voxel] multiples of the patch")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--patch", type=int, nargs=3, default=(4, 8, 8), help="[voxel] block of one token")
    return run_bench(parser, argv, compare)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score what is missing; the figures of all trainings, printed and written."""
    store = Store(args.store)
    numbers = args.neurons or ([1, 2, 4] if args.study == "labels" else [1])
    arms = args.arms or STUDIES[args.study]
    trials = plan_trials(store.ids, args.only, arms, numbers, args.seeds)
    bench = open_bench(store, args)

    # Source of features -> keys of the teacher and of its cache.
    sources = sorted({ARMS[arm].distilled for arm in arms} - {""})
    distilled = {source: cache_features(bench, source) for source in sources}

    rows = []
    for number, trial in enumerate(trials, 1):
        result = train_and_score(bench, trial, distilled)
        rows.append({"arm": trial.arm, "neurons": len(trial.trained), "neuron": trial.held_out, "seed": trial.seed})
        rows[-1] |= {"threshold": result["threshold"]} | {metric: result[metric] for metric in METRICS}
        print(f"{number}/{len(trials)}  {trial.name:<32} {format_scores(result)}", flush=True)

    facts = summarize(trials, rows)
    print("\n".join(describe(facts)))
    files.write_text(args.out / f"{args.study}.csv", format_rows(rows))
    facts |= {"teacher": bench.teacher.identity, "steps": args.steps, "batch": args.batch, "crop": list(args.crop)}
    files.write_json(args.out / f"{args.study}.json", facts)
    return facts


def open_bench(store: Store, args: argparse.Namespace) -> Bench:
    """The teacher, and a student of its form. Raises ConfigError and InputError for keys that do not fit."""
    prefix = "teacher."
    if wrong := [key for key in args.teacher if not key.startswith(prefix)]:
        raise InputError(f"--teacher {wrong[0]} is no key of a teacher; give such as teacher.model=bundled8")
    teacher = load_teacher(schema.load(TeacherConfig, None, [key.removeprefix(prefix) for key in args.teacher]))

    # Students from random weights have the form of those that the teacher fits.
    form = schema.to_plain(fit_config(StudentConfig(patch=tuple(args.patch)), teacher))
    plain = schema.to_plain(StudentConfig())
    student_keys = [f"student.{key}={json.dumps(value)}" for key, value in form.items() if value != plain[key]]

    z, y, x = args.crop
    windows = Windows(crop=(z, y, x))
    return Bench(store, args.out, tuple(args.teacher), teacher, windows, args.batch, args.steps, tuple(student_keys))


def plan_trials(
    ids: Sequence[str], only: Sequence[str], arms: Sequence[str], numbers: Sequence[int], seeds: Sequence[int]
) -> list[Trial]:
    """All trainings, so that a part of the list is balanced over arms. Raises InputError for what the store lacks."""
    require_names("--only", only, ids)
    if min(numbers) < 1 or max(numbers) > len(ids) - 2:
        raise InputError(
            f"--neurons asks for {', '.join(map(str, numbers))} of {len(ids)} neurons to train on; one is held out "
            f"and one chooses the threshold, so at least 1 and at most {max(0, len(ids) - 2)} are possible"
        )

    trials = []
    for seed in seeds:
        for held_out in only or ids:
            validated = ids[(ids.index(held_out) + 1) % len(ids)]
            others = [name for name in ids if name not in (held_out, validated)]
            drawn = [str(name) for name in np.random.default_rng([seed, ids.index(held_out)]).permutation(others)]
            trials += [
                Trial(arm, held_out, validated, tuple(drawn[:number]), seed) for number in numbers for arm in arms
            ]
    return trials


def train_and_score(bench: Bench, trial: Trial, distilled: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The scores of one training, from its file where it has been done."""
    path = bench.out / "trainings" / f"{trial.name}.json"
    facts = {
        "store": str(bench.store.path.resolve()),
        "trained": list(trial.trained),
        "teacher": bench.teacher.identity["sha256"],
        "crop": list(bench.windows.crop),
        "batch": bench.batch,
        "steps": bench.steps,
        "student": list(bench.student_keys),
        "arm": list(ARMS[trial.arm].keys),
    }
    if (earlier := read_training(path, facts)) is not None:
        return earlier

    folder = bench.out / "runs" / trial.name
    train(bench, trial, distilled.get(ARMS[trial.arm].distilled, ()), folder)

    student, _ = load_student(folder / "weights" / "last")
    scores = score_held_out(StudentLogits(student), bench.store, trial.held_out, trial.validated, bench.windows)
    result = {"settings": facts, **scores}
    files.write_json(path, result)
    # The scores are what is wanted of it; checkpoints of all trainings would fill the disk.
    shutil.rmtree(folder)
    return result


def train(bench: Bench, trial: Trial, distilled: Sequence[str], folder: Path) -> None:
    """One `hpc-neuro train`, with the teacher and the cache of the keys `distilled` if there are any.

    Raises InputError with the end of its output where it fails.
    """
    arm = ARMS[trial.arm]
    keys = [
        f"store={link_store(bench, trial)}",
        f"out={folder}",
        *(distilled or (*bench.teacher_keys, "distill=null")),
        *bench.student_keys,
        *arm.keys,
        f"crop.size={list(bench.windows.crop)}",
        f"optim.batch={bench.batch}",
        f"optim.steps={bench.steps}",
        f"validate.every={bench.steps}",
        "validate.crops=4",
        "validate.volumes=false",
        "checkpoint.every=0",
        "tracker.wandb=disabled",
        f"seed={trial.seed}",
    ]
    _run_verb("train", keys)


def link_store(bench: Bench, trial: Trial) -> Path:
    """A store with the splits of a trial, whose volumes are links to those of the bench's store."""
    folder = bench.out / "stores" / trial.fold
    index = files.read_json(bench.store.path / INDEX, "prepare the store again")
    splits = {trial.validated: "val"} | dict.fromkeys(trial.trained, "train")
    for name, entry in index["volumes"].items():
        entry["split"] = splits.get(name, "test")
    index["splits"] = {
        split: [name for name, entry in index["volumes"].items() if entry["split"] == split]
        for split in index["splits"]
    }

    folder.mkdir(parents=True, exist_ok=True)
    for name in bench.store.ids:
        link = folder / bench.store.file(name).name
        if not link.exists():
            link.symlink_to(bench.store.file(name).resolve())
    files.write_json(folder / INDEX, index)
    return folder


def cache_features(bench: Bench, source: str) -> tuple[str, ...]:
    """The features of all volumes by the teacher or by its untrained copy, unless they are there: keys of `train`."""
    keys = bench.teacher_keys
    if source == "untrained":
        copy = bench.out / "untrained_copy"
        write_copy(copy, make_untrained_copy(bench.teacher))
        keys = ("teacher.model=trained", f"teacher.weights={copy}")

    folder = bench.out / f"cache_{source}"
    everything = Trial("", bench.store.ids[0], bench.store.ids[0], tuple(bench.store.ids), 0)
    _run_verb("precompute", [f"store={link_store(bench, everything)}", f"out={folder}", *keys, "gate=skip"])
    return (*keys, f"cache={folder}")


def _run_verb(verb: str, keys: Sequence[str]) -> None:
    command = [sys.executable, "-m", "hpc_neuro", verb, *keys]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if process.returncode:
        end = " ".join((process.stderr or process.stdout).split())[-600:]
        raise InputError(f"`hpc-neuro {verb} {' '.join(keys)}` ended with exit code {process.returncode}: {end}")


def summarize(trials: Sequence[Trial], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means per row of the table with intervals over neurons, and the differences to the study's first arm."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        for metric in METRICS:
            neurons = scores.setdefault(trial.label, {}).setdefault(metric, {})
            neurons.setdefault(trial.held_out, []).append(float(row[metric]))

    mean = {
        label: {metric: asdict(mean_interval(average_over_seeds(values))) for metric, values in metrics.items()}
        for label, metrics in scores.items()
    }
    first = trials[0].arm
    pairs = [(label, f"{first}, {label.rpartition(', ')[2]}") for label in scores if label.rpartition(", ")[0] != first]
    return {
        "mean": mean,
        "difference": {
            metric: compare_arms(pairs, {label: scores[label][metric] for label in scores}) for metric in METRICS
        },
    }


def compare_arms(
    pairs: Sequence[tuple[str, str]], scores: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, dict[str, Any]]:
    """How much less each label scores than its base, with the statistics of the study's family of comparisons."""
    differences = {}
    for label, base in pairs:
        # [seeds, neurons]
        values = np.array(list(scores[base].values())).T - np.array(list(scores[label].values())).T
        differences[f"{base} - {label}"] = {
            **asdict(crossed_interval(values)),
            "p": sign_flip_test(values),
            "neurons_needed": count_neurons_needed(values, EFFECT),
        }

    corrected = correct_for_many([row["p"] for row in differences.values()])
    for row, p in zip(differences.values(), corrected, strict=True):
        row["p_holm"] = p
    return differences


def describe(facts: Mapping[str, Any]) -> Iterator[str]:
    """The tables for people."""
    yield f"{'':<26}" + "".join(f"{metric:>26}" for metric in METRICS)
    for label, metrics in facts["mean"].items():
        yield f"{label:<26}" + "".join(f"{format_interval(Interval(**metrics[m])):>26}" for m in METRICS)
    yield ""
    yield f"{'difference':<36}{'':<20}{'mean [95 %]':>26}{'p':>8}{'Holm':>8}{'neurons for 0.01':>18}"
    for metric, rows in facts["difference"].items():
        for label, row in rows.items():
            interval = format_interval(Interval(row["mean"], row["low"], row["high"], row["n"]))
            needed = "" if row["neurons_needed"] is None else str(row["neurons_needed"])
            yield f"{label:<36}{metric:<20}{interval:>26}{row['p']:>8.3f}{row['p_holm']:>8.3f}{needed:>18}"


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per training, as CSV."""
    with io.StringIO(newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
        return out.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
