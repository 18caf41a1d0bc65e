"""Whether 2D teachers are worth anything on the volumes of a store, side by side, before a training uses them.

    python -m tools.bench.teacher_gate --store STORE [--volumes ID ...] [--teacher bundled bundled8 random ...]

For every teacher and volume, and for the teacher's untrained copies (random weights, the same positions), in the mean
over some samples of tiles:

probe     R^2 of a ridge regression from one token's features to the share of neurite in its 4 x 4 parts, fitted on one
          part of the volume and scored on another, both ways. `pixels` regresses from the 4 x 4 means of the pixels.
shift     cosine of position-free features, f(slice) - f(black), of the same pixels in shifted tiles, on neurite tokens
position  share of the features' variance that the place of a token in the tile explains alone

A teacher passes on a volume when its probe is at least 0.03 above that of its untrained copies and its shift is at
least 0.8, both in the mean; behind +- stands the standard error of the gain over samples and copies. A teacher is a
name of `teacher.model`, or NAME=WEIGHTS with a file or folder of weights. `hpc-neuro doctor teacher=NAME store=STORE`
judges one teacher in the same way.
Exit code: 0 at least one teacher passes on every volume, 3 none does, 2 bad input. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.data.store import Store
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute.config import COPIES, SAMPLES
from hpc_neuro.precompute.gate_table import HEADER, TeacherGate


def main(argv: Sequence[str]) -> int:
    """Print rows for each teacher and volume, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="the folder that `hpc-neuro prepare` wrote")
    parser.add_argument("--volumes", nargs="+", help="ids; none: all volumes of the store")
    parser.add_argument("--teacher", nargs="+", default=["bundled", "bundled8"])
    parser.add_argument("--layer", type=int, default=-1, help="the teacher's block; negative ones count from the end")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample of tiles and the first untrained copy")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples of tiles (default %(default)s)")
    parser.add_argument("--copies", type=int, default=COPIES, help="untrained copies (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    try:
        result = judge_all(args.store, args.volumes, args.teacher, args.layer, args.seed, (args.samples, args.copies))
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_INPUT

    sys.stdout.write(json.dumps(result) + "\n")
    return EXIT_DONE if any(entry["passes"] for entry in result["teachers"].values()) else EXIT_FAILURES


def judge_all(
    folder: Path,
    volumes: Sequence[str] | None,
    teachers: Sequence[str],
    layer: int = -1,
    seed: int = 0,
    counts: tuple[int, int] = (SAMPLES, COPIES),
) -> dict[str, Any]:
    """Judge every teacher on every volume, with printed rows each. Raises InputError and ConfigError.

    counts: samples of tiles and untrained copies.
    """
    store = Store(folder)
    names = list(volumes or store.ids)
    _write(HEADER)

    result: dict[str, Any] = {"layer": layer, "seed": seed, "counts": counts, "volumes": names, "teachers": {}}
    for text in teachers:
        start = time.monotonic()
        teacher = load_teacher(_parse_teacher(text))
        verdict = TeacherGate(teacher, text, store, _write, layer, seed, *counts).judge(names)
        result["teachers"][text] = {"seconds": round(time.monotonic() - start, 1), **verdict.to_json()}
    return result


def _write(text: str) -> None:
    print(text, flush=True)


def _parse_teacher(text: str) -> TeacherConfig:
    """NAME, or NAME=WEIGHTS."""
    name, _, weights = text.partition("=")
    return load(TeacherConfig, None, [f"model={name}", *([f"weights={weights}"] if weights else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
