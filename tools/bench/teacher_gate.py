"""Whether a 2D teacher is worth anything on the volumes of a store, in seconds, before a training uses it.

    python -m tools.bench.teacher_gate --store STORE [--volumes ID ...] [--teacher bundled bundled8 random ...]

For every teacher and volume, and for the teacher's untrained copy (random weights, the same positions):

probe     R^2 of a ridge regression from one token's features to the share of neurite in its 4 x 4 parts, fitted on one
          part of the volume and scored on another, both ways. `pixels` regresses from the 4 x 4 means of the pixels.
shift     cosine of position-free features, f(slice) - f(black), of the same pixels in shifted tiles, on neurite tokens
position  share of the features' variance that the place of a token in the tile explains alone

A teacher passes on a volume when its probe is at least 0.03 above that of its untrained copy and its shift is at least
0.8. A teacher is a name of `teacher.model`, or NAME=WEIGHTS with a file or folder of weights.
Exit code: 0 at least one teacher passes on every volume, 3 none does, 2 bad input. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.data.store import Store
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute.gate import Figures, Judgment, judge_teacher


def main(argv: Sequence[str]) -> int:
    """Print a row for each teacher and volume, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="the folder that `hpc-neuro prepare` wrote")
    parser.add_argument("--volumes", nargs="+", help="ids; none: all volumes of the store")
    parser.add_argument("--teacher", nargs="+", default=["bundled", "bundled8"])
    parser.add_argument("--layer", type=int, default=-1, help="the teacher's block; negative ones count from the end")
    parser.add_argument("--seed", type=int, default=0, help="of the tiles and of the untrained copy")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    try:
        result = judge_all(args.store, args.volumes, args.teacher, args.layer, args.seed)
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_INPUT

    sys.stdout.write(json.dumps(result) + "\n")
    return EXIT_DONE if any(entry["passes"] for entry in result["teachers"].values()) else EXIT_FAILURES


def judge_all(
    folder: Path, volumes: Sequence[str] | None, teachers: Sequence[str], layer: int = -1, seed: int = 0
) -> dict[str, Any]:
    """Judge every teacher on every volume, with a printed row each. Raises InputError and ConfigError."""
    store = Store(folder)
    names = list(volumes or store.ids)
    unknown = [name for name in names if name not in store.ids]
    if unknown:
        raise InputError(
            f"{folder} has no volume {', '.join(unknown)}; name some of {', '.join(store.ids)} with --volumes"
        )

    sys.stdout.write(f"{'teacher':12} {'volume':12} {'':9} {'probe':>7} {'shift':>7} {'position':>9}\n")
    result: dict[str, Any] = {"layer": layer, "seed": seed, "volumes": names, "teachers": {}}
    for text in teachers:
        start = time.monotonic()
        teacher = load_teacher(_parse_teacher(text))
        judgments = []
        for name in names:
            judgments.append(judge_teacher(teacher, store[name], layer, seed))
            sys.stdout.write("\n".join(describe(text, judgments[-1])) + "\n")

        result["teachers"][text] = {
            "passes": all(judgment.passes for judgment in judgments),
            "seconds": round(time.monotonic() - start, 1),
            "volumes": {
                j.volume: {
                    "trained": asdict(j.teacher),
                    "untrained": asdict(j.untrained),
                    "pixels": j.pixels,
                    "gain": j.gain,
                    "passes": j.passes,
                }
                for j in judgments
            },
        }
    return result


def describe(teacher: str, judgment: Judgment) -> list[str]:
    """The rows of the table: the teacher, its untrained copy, the pixels, and the verdict."""
    start = f"{teacher:12} {judgment.volume:12}"
    verdict = "passes" if judgment.passes else "fails"
    return [
        f"{start} {'trained':9} {_format(judgment.teacher)}   {verdict}, gain {judgment.gain:+.3f}",
        f"{start} {'untrained':9} {_format(judgment.untrained)}",
        f"{start} {'pixels':9} {judgment.pixels:7.3f}",
    ]


def _format(figures: Figures) -> str:
    return f"{figures.probe:7.3f} {figures.shift:7.3f} {figures.position:9.3f}"


def _parse_teacher(text: str) -> TeacherConfig:
    """NAME, or NAME=WEIGHTS."""
    name, _, weights = text.partition("=")
    return load(TeacherConfig, None, [f"model={name}", *([f"weights={weights}"] if weights else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
