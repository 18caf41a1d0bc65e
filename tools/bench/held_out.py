"""What the benchmarks of trainings share: scores on a neuron that was held out, files of what is done, tables.

A network is scored on a neuron that it was not trained on. One more neuron, not trained on either, chooses the
threshold by its best Dice. Probabilities are those of MONAI's sliding_window_inference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_neuro.core import files, morphology
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, TOLERANCE_VOX, UNLABELED
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.store import Store
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.metrics.centerline import cldice
from hpc_neuro.metrics.statistics import Interval
from hpc_neuro.tracing import TraceConfig, trace
from tools.bench.ablate_parts import THRESHOLDS, measure_average_precision, measure_dice, read_box

METRICS = ("dice", "cldice", "average_precision", "f1", "f1_without_links")
Scores = dict[str, dict[str, dict[str, list[float]]]]
"""Row of the table -> metric -> neuron -> a value for each seed."""
_MARGIN = 16
"""[voxel] Around a held-out neuron."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a volume is predicted."""

    crop: Shape
    """[voxel] Of a window."""
    device: str = "cpu"


def run_bench(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    compare: Callable[[argparse.Namespace], dict[str, Any]],
) -> int:
    """Run `compare` with the arguments and print its result as JSON; the exit code. Bad input is one sentence."""
    args = parser.parse_args(argv)
    try:
        print(json.dumps(compare(args)))
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_DONE


def require_names(option: str, names: Sequence[str], ids: Sequence[str]) -> None:
    """Raise InputError for a name that the store does not have."""
    if unknown := sorted(set(names) - set(ids)):
        raise InputError(f"{option}: the store has no {', '.join(unknown)}; it has {', '.join(ids)}")


def read_training(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scores of a training that was done; None for one that was not. Raises InputError for other settings."""
    if not path.exists():
        return None
    result: dict[str, Any] = files.read_json(path, f"remove {path}")
    if result["settings"] != settings:
        raise InputError(f"{path} was made with other settings; choose another --out, or remove {path.parent.parent}")
    return result


def score_held_out(
    network: nn.Module, store: Store, held_out: str, validated: str, windows: Windows
) -> dict[str, float]:
    """The threshold that `validated` chooses, and all METRICS of `held_out` at it."""
    threshold = choose_threshold(*predict(network, store, validated, windows))
    probability, mask = predict(network, store, held_out, windows)
    scores = score_mask(probability, mask, threshold) | score_trees(store, held_out, probability, threshold)
    return {"threshold": threshold} | scores


class StudentLogits(nn.Module):
    """A student as a network that gives logits alone."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        """[B, 1, Z, Y, X] -> logits of the same shape."""
        logits: Tensor = self.student(image).logits
        return logits


def predict(
    network: nn.Module, store: Store, volume: str, windows: Windows
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Probability and mask [Z, Y, X] of the box around a neuron."""
    image, mask = read_box(store, volume, _MARGIN)
    network.eval()

    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.from_numpy(image)[None, None], windows.crop, 4, network, 0.25, "gaussian", sw_device=windows.device,
            device="cpu",
        )  # fmt: skip

    assert isinstance(logits, Tensor)
    return logits[0, 0].float().sigmoid().numpy(), mask


def choose_threshold(probability: NDArray[np.float32], mask: NDArray[np.uint8]) -> float:
    """The threshold of the best Dice on a neuron that was not trained on."""
    values, truth = probability[mask != UNLABELED], mask[mask != UNLABELED] == 1
    return float(max(THRESHOLDS, key=lambda level: measure_dice(values, truth, float(level))))


def score_mask(probability: NDArray[np.float32], mask: NDArray[np.uint8], threshold: float) -> dict[str, float]:
    """Dice, clDice and average precision over the labeled voxels."""
    labeled = mask != UNLABELED
    predicted = np.where(labeled, probability >= threshold, False)

    return {
        "dice": measure_dice(probability[labeled], mask[labeled] == 1, threshold),
        "cldice": float(cldice(predicted, np.where(labeled, mask, 0))),
        "average_precision": measure_average_precision(probability[labeled], mask[labeled] == 1),
    }


def score_trees(store: Store, volume: str, probability: NDArray[np.float32], threshold: float) -> dict[str, float]:
    """F1 of the cable, from the root of the gold tree, with and without links along the image."""
    stored = store[volume]
    points = stored.points("skeleton")
    start = np.maximum(points.min(axis=0) - _MARGIN, 0)
    image, _ = read_box(store, volume, _MARGIN)

    gold = stored.tree()
    gold = Tree(gold.points - start, gold.radii, gold.parents, gold.types)
    z, y, x = (float(v) for v in (np.array(stored.root) - start if stored.root is not None else gold.points[0]))

    cfg = TraceConfig(threshold=float(np.clip(threshold, 0.02, 1.0)))
    f1 = {}
    for name, visible in (("f1", image), ("f1_without_links", None)):
        try:
            trees = trace(probability, stored.voxel_size, roots=[(z, y, x)], cfg=cfg, image=visible)
        # A root far from all that was found: the neuron is missed.
        except InputError:
            trees = [morphology.empty_tree()]
        f1[name] = match_cable(morphology.concatenate_trees(trees), gold, TOLERANCE_VOX).f1
    return f1


def average_over_seeds(values: dict[str, list[float]]) -> list[float]:
    """One value per neuron."""
    return [float(np.mean(seeds)) for seeds in values.values()]


def format_scores(scores: Mapping[str, float]) -> str:
    """The metrics of one training, in a line."""
    return "  ".join(f"{metric} {scores[metric]:.3f}" for metric in METRICS)


def describe(facts: Mapping[str, Any]) -> Iterator[str]:
    """The tables for people."""
    yield f"{'':<26}" + "".join(f"{metric:>26}" for metric in METRICS)
    for kind in ("mean", "difference"):
        for name, metrics in facts[kind].items():
            yield f"{name:<26}" + "".join(f"{format_interval(Interval(**metrics[m])):>26}" for m in METRICS)


def format_interval(interval: Interval) -> str:
    """A mean with its interval, where there is one."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
