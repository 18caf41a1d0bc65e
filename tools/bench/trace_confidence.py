"""Is the confidence of `trace` the chance of being right? Reliability before and after calibration.

    python -m tools.bench.trace_confidence STORE... [--model none] [--only ID ...] [--copies NAME ...]

Neurons are traced as they are and from the degraded copies of tools.bench.trace_warnings. A piece of cable is right
within 4 voxels of gold. Platt's scaling is fitted on all domains but one and judged on that one; a domain is what
stands before the first underscore of an id. Each stack weighs the same. The calibration error is the mean difference of
the predicted and the true share over tenths of the predicted one; `constant` predicts the mean share of the other
domains for all cable. The last line is JSON, with the scaling that is fitted on all domains.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from hpc_neuro.core import morphology
from hpc_neuro.core.constants import TOLERANCE_VOX
from hpc_neuro.core.schema import InputError
from hpc_neuro.evaluate.confidence import judge_cable
from hpc_neuro.trace_stacks.calibration import calibrate, compute_log_odds
from hpc_neuro.trace_stacks.config import NO_MODEL
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.tracer import trace_image
from tools.bench.trace_warnings import COPIES, Degrade, Neuron, list_neurons

_CELLS = 50
"""Equal parts of the confidence in which the cable of a stack is added up."""
_TENTHS = 10
_RIDGE = 1e-4
"""Weight of the squared slope, which keeps it finite where all cable is right."""
Floats = NDArray[np.float64]
Scale = Callable[[Floats], Floats]
"""Confidence -> chance of being right."""


@dataclass(frozen=True)
class JudgedStack:
    """The cable of one traced stack by its confidence, as shares of all of it."""

    neuron: str
    copy: str
    confidence: Floats
    """[cells] Mean confidence."""
    share: Floats
    """[cells] Share of the cable."""
    right: Floats
    """[cells] Share of the cable that is in the cell and right."""

    @property
    def domain(self) -> str:
        """What the neuron is one of."""
        return self.neuron.split("_")[0]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--model", default=NO_MODEL)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--copies", nargs="+", default=["as it is", "noise", "blur"], choices=list(COPIES))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    predictor = None if args.model == NO_MODEL else StackPredictor(Path(args.model))
    stacks = []
    for neuron in (neuron for path in args.stores for neuron in list_neurons(path)):
        for name in args.copies if not args.only or neuron.id in args.only else ():
            stack = judge_stack(neuron, name, COPIES[name], predictor)
            if stack is not None:
                stacks.append(stack)
                print(f"{neuron.id:>12} {name:>8} right {stack.right.sum():.3f}", flush=True)

    for low in range(_TENTHS):
        print(_format_tenth(stacks, low))

    errors = compare_scales(stacks)
    for name, error in errors.items():
        print(f"{name:>10}: calibration error {error:.3f}")

    intercept, slope = fit_scale(stacks)
    print(json.dumps({"errors": errors, "intercept": intercept, "slope": slope}))
    return 0


def judge_stack(neuron: Neuron, name: str, degrade: Degrade, predictor: StackPredictor | None) -> JudgedStack | None:
    """Trace a copy of a neuron and compare its cable with gold; None without a tree."""
    image, gold, size = degrade(neuron.read(), neuron.tree, neuron.size)
    z, y, x = image.shape
    roots = neuron.list_roots(gold, (z, y, x))

    try:
        trace = trace_image(lambda box: image[box.slices], (z, y, x), size, roots=roots, predictor=predictor)
    except InputError as error:
        logging.warning("%s, %s: %s", neuron.id, name, error)
        return None

    cable = judge_cable(morphology.concatenate_trees(trace.trees), trace.confidence, gold, TOLERANCE_VOX)
    if not cable.lengths.sum() > 0:
        return None

    weights = cable.lengths / cable.lengths.sum()
    cells = np.minimum((cable.confidence * _CELLS).astype(np.int64), _CELLS - 1)
    share, sums, right = (
        np.bincount(cells, part, _CELLS).astype(np.float64)
        for part in (weights, weights * cable.confidence, weights * cable.is_right)
    )
    return JudgedStack(neuron.id, name, sums / np.maximum(share, 1e-12), share, right)


def fit_scale(stacks: Sequence[JudgedStack]) -> tuple[float, float]:
    """Intercept and slope of Platt's scaling, by the likelihood of all cable."""
    odds = compute_log_odds(np.concatenate([stack.confidence for stack in stacks]))
    right = np.concatenate([stack.right for stack in stacks])
    wrong = np.concatenate([stack.share for stack in stacks]) - right

    def loss(numbers: Floats) -> float:
        logits = numbers[0] + numbers[1] * odds
        both = right * np.logaddexp(0, -logits) + wrong * np.logaddexp(0, logits)
        return float(both.sum() / len(stacks) + _RIDGE * numbers[1] ** 2)

    intercept, slope = minimize(loss, np.zeros(2)).x.tolist()
    return round(intercept, 3), round(slope, 3)


def compare_scales(stacks: Sequence[JudgedStack]) -> dict[str, float]:
    """Calibration error of the plain confidence, and of scales that have not seen the domain they are judged on."""
    scaled, constant = list[Floats](), list[Floats]()
    for stack in stacks:
        others = [other for other in stacks if other.domain != stack.domain]
        if not others:
            raise SystemExit("a scale is judged on a domain that it has not seen; give neurons of several domains")
        scaled.append(calibrate(stack.confidence, *fit_scale(others)))
        constant.append(np.full(_CELLS, float(np.mean([other.right.sum() for other in others]))))

    plain = [stack.confidence for stack in stacks]
    scales = {"plain": plain, "calibrated": scaled, "constant": constant}
    return {name: round(measure_error(stacks, chances), 4) for name, chances in scales.items()}


def measure_error(stacks: Sequence[JudgedStack], chances: Sequence[Floats]) -> float:
    """Mean difference of predicted and true share over tenths of the prediction, by cable; stacks weigh the same."""
    differences = np.zeros(_TENTHS)
    for stack, chance in zip(stacks, chances, strict=True):
        tenths = np.minimum((chance * _TENTHS).astype(np.int64), _TENTHS - 1)
        differences += np.bincount(tenths, stack.share * chance - stack.right, _TENTHS)
    return float(np.abs(differences).sum() / len(stacks))


def _format_tenth(stacks: Sequence[JudgedStack], low: int) -> str:
    """A row of the reliability table."""
    cells = slice(low * _CELLS // _TENTHS, (low + 1) * _CELLS // _TENTHS)
    share = sum(float(stack.share[cells].sum()) for stack in stacks)
    if not share:
        return f"{low / _TENTHS:.1f} no cable"

    right = sum(float(stack.right[cells].sum()) for stack in stacks) / share
    mean = sum(float((stack.share * stack.confidence)[cells].sum()) for stack in stacks) / share
    part = share / len(stacks)
    return f"{low / _TENTHS:.1f} share of the cable {part:.3f} confidence {mean:.2f} right {right:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
