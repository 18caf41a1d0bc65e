"""Reproduce a comparison of a paper on its data: does knowledge of 2D photographs help to segment 3D neurons?

    python -m tools.reproduce dineuro DATA OUT       # DINeuro's question on the Janelia set of BigNeuron
    python -m tools.reproduce neurino DATA OUT       # NeurINO's questions on BigNeuron, NeuroFly or CWMBS
    python -m tools.reproduce dineuro DATA OUT --stand-in 6 --quick      # the whole kit on small synthetic data

DATA is where the data were unpacked (docs/reproduce.md says where they are). Steps, each of which is skipped where it
is done; the same command goes on where it was stopped:

    manifest     OUT/manifest.csv: the pairs of an image and a tree, and the split of each neuron
    prepare      OUT/store
    precompute   OUT/cache: features of the teacher, for a study that distils
    study        OUT/study: every setting with every seed, trained, traced and scored on the test neurons
    table        OUT/study/report.html and comparison.csv; the differences from the first setting are printed

With --cluster SITE, prepare and precompute are submitted as jobs: give the same command again when they have ended.
Exit codes are those of the verbs; 75: jobs are at work.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.pipeline import VERBS
from hpc_neuro.search.config import SearchConfig
from tools.reproduce import stand_in
from tools.reproduce.neurons import assign_splits, find_neurons, read_splits, write_manifest

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCORES = ("dice", "hd95_um", "esa", "dsa", "pds")
"""Scores of the table: those of the papers."""
SHAPE: Shape = (48, 128, 128)
"""[voxel] Stacks of a stand-in, unless --shape says otherwise."""
QUICK_KEYS = (
    *("student.size=tiny", "student.depth=1", "teacher.model=random", "teacher.weights=null", "crop.size=[16,32,32]"),
    *("optim.steps=4", "optim.batch=2", "validate.every=4", "validate.crops=2", "checkpoint.every=4"),
    *("engine.dtype=fp32", "tracker.wandb=disabled"),
)
"""Keys of a training of seconds, which shows that the kit runs and nothing else."""
QUICK_STUDY = (
    *("space.seed.choice=[0]", "concurrent=1", "poll=0.5", "draws=100", "evaluate.keys=[pictures=0]"),
    # A student of four steps is sure of nothing.
    "infer.keys=[split=test,page=false,trace.threshold=0.001,trace.root_snap=1000.0]",
)
"""Keys of a study of such trainings."""


@dataclass(frozen=True)
class Paper:
    """What a paper compares, as far as this project can."""

    distils: bool
    """Whether a setting distils, so that a feature cache is wanted."""
    part: str
    """Text in the path of the neurons."""
    voxel_size: str
    """[um] z y x, where the files do not say; "": the files say."""
    published: str
    """What the paper reports."""


PAPERS = {
    "dineuro": Paper(
        distils=True,
        part="janelia",
        voxel_size="0.38 0.38 0.38",
        published="deformable tubular transfer: +4.53 % mean Dice, 3.56 % better mean HD95 (its abstract; the baseline "
        "and the split are not stated there)",
    ),
    "neurino": Paper(
        distils=False,
        part="",
        voxel_size="",
        published="average gains of 2.9 % in ESA, 2.8 % in DSA, 3.8 % in PDS over the best other method on four data "
        "sets (its abstract; with a ConvNeXt, which this project does not have)",
    ),
}
"""By the name of the study's config, configs/search/reproduce_NAME.yaml."""


def main(argv: list[str] | None = None) -> int:
    """Do the steps that are missing; the exit code of the first one that does not end with 0."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        return reproduce(args)
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"reproduce: {error}\n")
        return EXIT_BAD_INPUT
    except subprocess.CalledProcessError as error:
        return int(error.returncode)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", choices=list(PAPERS))
    parser.add_argument("data", type=Path, help="folder of the unpacked data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", help="text in the path of the neurons to use (default: that of the paper's data set)")
    parser.add_argument("--tree", default="*sorted.swc", help="gold tree, where a folder has several (%(default)s)")
    parser.add_argument("--voxel-size", metavar="'Z Y X'", help="[um] where the files do not say")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold", type=int, default=0, help="the fold that is the test split (default 0)")
    parser.add_argument("--splits", type=Path, metavar="CSV", help="columns id, split; instead of folds")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="weights of fetch-teacher; none: the hub")
    parser.add_argument("--cluster", metavar="SITE", help="submit to Slurm; a name in configs/cluster, or a YAML file")
    parser.add_argument("--stand-in", type=int, metavar="N", help="write N synthetic neurons into DATA first")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("Z", "Y", "X"), help="of a stand-in")
    parser.add_argument(
        "--quick", action="store_true", help="trainings of seconds with one seed: shows that the kit runs"
    )
    args = parser.parse_args(argv)

    if args.folds < 3 or not 0 <= args.fold < args.folds:
        parser.error(
            f"--folds {args.folds} --fold {args.fold}: want at least 3 folds, and a fold from 0 to their number - 1"
        )
    return args


def reproduce(args: argparse.Namespace) -> int:
    """The steps in order; the exit code. Raises InputError, ConfigError and CalledProcessError."""
    paper, out = PAPERS[args.paper], args.out.absolute()
    if args.stand_in:
        write = stand_in.write_bigneuron if args.paper == "dineuro" else stand_in.write_pairs
        write(args.data, args.stand_in, tuple(args.shape))

    make_manifest(args, paper, out)

    if not run_verb("prepare", out / "store", [f"manifest={out / 'manifest.csv'}"], args.cluster):
        return EXIT_STOPPED

    teacher = list_teacher_keys(args)
    if paper.distils:
        keys = [f"store={out / 'store'}", "gate=report", *teacher]
        if not run_verb("precompute", out / "cache", keys, args.cluster):
            return EXIT_STOPPED

    code = run_study(args, paper, out, teacher)
    if code == EXIT_DONE:
        sys.stdout.write(
            "\n".join([*format_table(out / "study" / "comparison.csv"), f"published: {paper.published}"]) + "\n"
        )
    return code


def make_manifest(args: argparse.Namespace, paper: Paper, out: Path) -> None:
    """Write OUT/manifest.csv. Raises InputError."""
    neurons = find_neurons(args.data, paper.part if args.part is None else args.part, args.tree)
    names = [neuron.id for neuron in neurons]
    splits = read_splits(args.splits, names) if args.splits else assign_splits(names, args.folds, args.fold)

    size = args.voxel_size or paper.voxel_size or (" ".join(map(str, stand_in.VOXEL_SIZE)) if args.stand_in else "")
    write_manifest(out / "manifest.csv", neurons, splits, size)

    counts = {split: list(splits.values()).count(split) for split in ("train", "val", "test")}
    log.info("manifest: %s: %s", files.format_count(len(names), "neuron"), counts)


def list_teacher_keys(args: argparse.Namespace) -> list[str]:
    """Keys of the teacher for precompute."""
    if args.quick:
        return ["teacher.model=random"]

    cfg = load(VERBS["train"].load_config_class(), CONFIGS / "train" / f"reproduce_{args.paper}.yaml")
    weights = [f"teacher.weights={args.teacher.absolute()}"] if args.teacher else []
    return [f"teacher.model={cfg.teacher.model}", *weights]


def run_verb(verb: str, out: Path, keys: list[str], cluster: str | None) -> bool:
    """Run a verb here, or submit it; whether its result is there. Raises CalledProcessError."""
    if cluster is None:
        _run_module(["hpc_neuro", verb, f"out={out}", *keys])
        return True

    if (out / run_folder.RECORD).exists() and run_folder.read_record(out, "remove it").get("exit") == EXIT_DONE:
        return True
    _run_module(["launch", verb, f"out={out}", *keys, "--cluster", cluster])
    log.info("%s is submitted; `python -m launch status %s` follows it. Then give the same command again", verb, out)
    return False


def run_study(args: argparse.Namespace, paper: Paper, out: Path, teacher: list[str]) -> int:
    """Run the study's trials, or go on with them; the exit code. Raises CalledProcessError."""
    path = CONFIGS / "search" / f"reproduce_{args.paper}.yaml"
    cfg = load(SearchConfig, path)
    keys = [f"store={out / 'store'}", f"cache={out / 'cache'}" if paper.distils else "cache=null"]
    keys += QUICK_KEYS if args.quick else [key for key in teacher if key.startswith("teacher.weights=")]

    words = [f"out={out / 'study'}", f"train.config={CONFIGS / 'train' / f'reproduce_{args.paper}.yaml'}"]
    words.append("train.keys=[" + ",".join(f'"{key}"' for key in [*cfg.train.keys, *keys]) + "]")
    if args.quick:
        words += QUICK_STUDY

    on = ["--on", "slurm", "--cluster", args.cluster] if args.cluster else []
    return _run_module(["launch", "sweep", str(path), *words, *on])


def format_table(path: Path) -> list[str]:
    """Means of the scores over seeds and neurons, a line for each setting."""
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))

    # The settings stand before the seed.
    names = list(rows[0])
    dimensions = names[: names.index("seed")]

    settings: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        settings.setdefault(", ".join(row[name] for name in dimensions), []).append(row)

    width = max(map(len, settings))
    lines = [" ".join([f"{'':{width}}", *(f"{score:>9}" for score in SCORES), "  scores"])]
    for setting, members in settings.items():
        means = [statistics.fmean(float(row[score]) for row in members) for score in SCORES]
        lines.append(" ".join([f"{setting:{width}}", *(f"{mean:9.4g}" for mean in means), f"{len(members):8}"]))
    return lines


def _run_module(words: list[str]) -> int:
    """Run a module of the project in a process of its own. Raises CalledProcessError where it does not end with 0."""
    log.info("python -m %s", " ".join(words))
    return subprocess.run([sys.executable, "-m", *words], check=True).returncode


if __name__ == "__main__":
    sys.exit(main())
