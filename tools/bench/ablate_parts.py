"""What each part of a trained student is worth: Dice with the part taken out, on whole volumes.

    python -m tools.bench.ablate_parts RUN [--store FOLDER] [--volumes ID ...] [--margin 16]

RUN is a folder that `train` wrote. The volumes are those of the store's `test` split unless named; each is cut to the
box around its tree, `margin` voxels wider. Ablations:

    whole             the student as it is
    no tokens         the transformer adds nothing to the coarsest features
    no convolutions   the decoder sees the tokens alone
    z flipped         the transformer gets its tokens in reversed order along z, and its output is turned back

Dice is given at the threshold that training chose and at the best threshold of the volume itself (oracle). The ratio of
predicted to true volume shows whether a difference is one of width. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import Store
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import Student, load_student

THRESHOLDS = np.arange(0.05, 1.0, 0.05)
Scores = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `hpc-neuro train` wrote")
    parser.add_argument("--store", type=Path, help="folder that `prepare` wrote; default: the one beside RUN")
    parser.add_argument("--volumes", nargs="*", help="volumes to score_mask; default: the test split")
    parser.add_argument("--margin", type=int, default=16, help="[voxel] around the box of the tree")
    parser.add_argument("--weights", choices=("best", "last"), default="best")
    args = parser.parse_args(argv)

    student, saved = load_student(args.run / "weights" / args.weights)
    store = Store(args.store or args.run.parent / "store")
    volumes = args.volumes or list(store.split("test"))
    if not volumes:
        raise InputError(f"{store.path} has no test split; name volumes with --volumes, of {', '.join(store.ids)}")

    result: dict[str, dict[str, Scores]] = {}
    for volume in volumes:
        image, mask = read_box(store, volume, args.margin)
        result[volume] = {}
        for name, ablate in ABLATIONS.items():
            with ablate(student):
                probability = sliding_window.predict(student, image, tuple(saved["window"]), 0.25, batch=4)
            scores = score_mask(probability, mask, float(saved.get("threshold", 0.5)))
            result[volume][name] = scores
            print(format_row(volume, name, scores), flush=True)

    means = {
        name: {key: float(np.mean([result[v][name][key] for v in volumes])) for key in result[volumes[0]][name]}
        for name in result[volumes[0]]
    }
    for name, scores in means.items():
        print(format_row("mean", name, scores))
    print(json.dumps({"volumes": result, "mean": means}))
    return 0


def format_row(volume: str, ablation: str, scores: Scores) -> str:
    """A line of the table."""
    return f"{volume:<16} {ablation:<16} " + "  ".join(f"{key} {value:.3f}" for key, value in scores.items())


def read_box(store: Store, volume: str, margin: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The normalized image and the mask around a volume's tree, each [Z, Y, X]."""
    entry = store[volume]
    points = entry.points("skeleton")

    start = np.maximum(points.min(axis=0) - margin, 0)
    stop = np.minimum(points.max(axis=0) + 1 + margin, entry.shape)
    (z0, y0, x0), (z1, y1, x1) = start.tolist(), stop.tolist()

    box = Box((z0, y0, x0), (z1, y1, x1))
    return entry.normalized_image(box), entry.mask(box)


def score_mask(probability: NDArray[np.float32], mask: NDArray[np.uint8], threshold: float) -> Scores:
    """Scores over the labeled voxels of one volume."""
    labeled = mask != UNLABELED
    values, truth = probability[labeled], mask[labeled] == 1
    dice = {float(level): measure_dice(values, truth, level) for level in THRESHOLDS}
    best = max(dice, key=lambda level: dice[level])

    return {
        "dice": measure_dice(values, truth, threshold),
        "oracle_dice": dice[best],
        "oracle_threshold": best,
        "average_precision": measure_average_precision(values, truth),
        "volume_ratio": float((values >= threshold).sum() / truth.sum()),
    }


def measure_dice(values: NDArray[np.float32], truth: NDArray[np.bool_], threshold: float) -> float:
    """Dice of `values >= threshold` against the truth."""

    predicted = values >= threshold
    return float(2 * (predicted & truth).sum() / max(predicted.sum() + truth.sum(), 1))


def measure_average_precision(values: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve, as the mean precision at the rank of each true voxel."""
    order = np.argsort(-values, kind="stable")
    hits = truth[order]

    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


@contextlib.contextmanager
def keep_whole(student: Student) -> Iterator[None]:
    """Leave the student as it is."""
    yield


@contextlib.contextmanager
def zero_tokens(student: Student) -> Iterator[None]:
    """The transformer adds nothing to the coarsest features."""
    with _hook(student.token_gain, lambda module, inputs, output: torch.zeros_like(output)):
        yield


@contextlib.contextmanager
def zero_convolutions(student: Student) -> Iterator[None]:
    """The encoder's features are zero, for the decoder and for the tokens alike."""
    with _hook(student.encoder, lambda module, inputs, output: [torch.zeros_like(level) for level in output]):
        yield


@contextlib.contextmanager
def flip_z(student: Student) -> Iterator[None]:
    """The transformer sees its tokens in reversed order along z."""
    assert student.vit is not None

    before = student.vit.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(2), *inputs[1:]))
    with _hook(student.vit, lambda module, inputs, output: _flip_maps(output)):
        yield
    before.remove()


def _flip_maps(output: tuple[Tensor, dict[int, Tensor]]) -> tuple[Tensor, dict[int, Tensor]]:
    last, maps = output
    return last.flip(2), {layer: tokens.flip(2) for layer, tokens in maps.items()}


@contextlib.contextmanager
def _hook(module: nn.Module, change: Callable[..., Any]) -> Iterator[None]:
    """Pass the module's output through `change`."""
    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


ABLATIONS = {
    "whole": keep_whole,
    "no tokens": zero_tokens,
    "no convolutions": zero_convolutions,
    "z flipped": flip_z,
}


if __name__ == "__main__":
    raise SystemExit(main())
