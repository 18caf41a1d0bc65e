"""What `trace` makes of neurons whose tree is known: without a network, with students, and from Otsu's mask.

    python -m tools.bench.trace_stacks STORE... [--models none bundled RUN ...] [--only ID ...] [--without-links]

Every method gets the same tracer, and the same root where the store has one; without a root all trees are compared.
Otsu's mask is that of the raw image. One row for each neuron and method, then the means; the last line is JSON. Dice is
that of the mask before tracing; the cable is compared at 4 voxels. Seconds are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.constants import TOLERANCE_VOX, UNLABELED
from hpc_neuro.core.geometry import Box, Point
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.evaluate.predictions import OtsuMask
from hpc_neuro.metrics import list_metrics
from hpc_neuro.metrics.metric import Comparison, tolerance_key
from hpc_neuro.trace_stacks.config import NO_MODEL
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.sanity import list_warnings
from hpc_neuro.trace_stacks.tracer import trace_image
from hpc_neuro.tracing import TraceConfig, trace

OTSU = "otsu"
KEYS = (*(tolerance_key(name, TOLERANCE_VOX) for name in ("f1", "precision", "recall")), "esa", "tips")
"""Metrics of the table, besides Dice."""
Row = dict[str, float]


class Outcome(NamedTuple):
    """What a method made of one neuron."""

    tree: Tree
    dice: float
    seconds: float
    warnings: int


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--models", nargs="+", default=[NO_MODEL])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--without-links", action="store_true", help="bridge no gaps along the image")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    cfg = TraceConfig(signal_gap=0.0) if args.without_links else TraceConfig()
    methods: dict[str, Callable[[StoredVolume], Outcome]] = {OTSU: lambda volume: _trace_otsu(volume, cfg)}
    for model in args.models:
        methods[model] = _prepare_trace(model, cfg)

    table: dict[str, dict[str, Row]] = {name: {} for name in methods}
    for path in args.stores:
        for volume in Store(path):
            if args.only and volume.id not in args.only:
                continue

            gold = volume.tree()
            tips = len(morphology.tips(gold))
            for name, method in methods.items():
                outcome = method(volume)
                row = _score_outcome(volume, outcome)
                table[name][volume.id] = row
                print(_format_row(volume.id, name, row, tips), flush=True)

    keys = next(iter(next(iter(table.values())).values()))
    means = {
        name: {key: float(np.mean([r[key] for r in rows.values()])) for key in keys} for name, rows in table.items()
    }
    for name, row in means.items():
        print(_format_row("mean", name, row, None))
    print(json.dumps({"neurons": table, "mean": means}))
    return 0


def _prepare_trace(model: str, cfg: TraceConfig) -> Callable[[StoredVolume], Outcome]:
    predictor = None if model == NO_MODEL else StackPredictor(Path(model))

    def run(volume: StoredVolume) -> Outcome:
        started_at = time.process_time()
        result = trace_image(
            volume.image,
            volume.shape,
            volume.voxel_size,
            roots=_list_roots(volume),
            cfg=cfg,
            predictor=predictor,
            label=volume.id,
        )
        seconds = time.process_time() - started_at

        probability = result.probability or measure_foreground(volume.image, volume.shape).probability
        mask = np.asarray(probability(Box.whole(volume.shape)), dtype=np.uint8) >= 128
        warnings = list_warnings(result.figures, result.foreground.is_inverted, predictor is not None)
        return Outcome(morphology.concatenate_trees(result.trees), _measure_dice(volume, mask), seconds, len(warnings))

    return run


def _list_roots(volume: StoredVolume) -> list[Point]:
    return [] if volume.root is None else [volume.root]


def _trace_otsu(volume: StoredVolume, cfg: TraceConfig) -> Outcome:
    started_at = time.process_time()
    whole = Box.whole(volume.shape)
    mask = OtsuMask(volume).mask(whole)

    try:
        trees = trace(mask, volume.voxel_size, roots=_list_roots(volume), cfg=cfg, image=volume.normalized_image(whole))
    except InputError as error:
        logging.warning("%s: %s: %s; counts as a miss", volume.id, OTSU, error)
        trees = []
    seconds = time.process_time() - started_at
    return Outcome(morphology.concatenate_trees(trees), _measure_dice(volume, mask), seconds, 0)


def _measure_dice(volume: StoredVolume, mask: NDArray[np.bool_]) -> float:
    gold = volume.mask(Box.whole(volume.shape))
    is_labeled = gold != UNLABELED

    truth = (gold == 1) & is_labeled
    predicted = mask & is_labeled
    return float(2 * np.count_nonzero(truth & predicted) / max(truth.sum() + predicted.sum(), 1))


def _score_outcome(volume: StoredVolume, outcome: Outcome) -> Row:
    comparison = Comparison(
        predicted_mask=volume.mask,
        gold_mask=volume.mask,
        predicted_tree=outcome.tree,
        gold_tree=volume.tree(),
        shape=volume.shape,
        voxel_size=volume.voxel_size,
        root=volume.root,
        tolerance_vox=TOLERANCE_VOX,
        tolerance_um=None,
    )

    row = {metric.key: float(metric.compute(comparison)) for metric in list_metrics() if metric.key in KEYS}
    return {"dice": outcome.dice, **row, "seconds": outcome.seconds, "warnings": outcome.warnings}


def _format_row(name: str, method: str, row: dict[str, Any], gold_tips: int | None) -> str:
    tips = f"{row['tips']:.0f}" + ("" if gold_tips is None else f"/{gold_tips}")
    numbers = " ".join(f"{key} {row[key]:.3f}" for key in row if key not in ("tips", "seconds", "warnings"))
    return f"{name:>16} {method:>28} {numbers} tips {tips:>9} {row['seconds']:6.1f} s, {row['warnings']:.0f} warnings"


if __name__ == "__main__":
    raise SystemExit(main())
