"""Whose cable: the rooted neuron among neighbors that touch and cross it, traced with and without the contact rule.

    python -m tools.bench.contacts [--seeds 20 40] [--ratios 0.2 0.4 0.6 0.75 0.9] [--neurons 2 3 4 6 8 12]

A synthetic neuron (hpc_neuro.data.synthetic) shares its volume with neighbors that are dimmer by the ratio. Each
neighbor is moved so that it meets a neuron that is there already: it crosses it, or touches it with a tip. The seed
chooses one of the numbers of neurons, so all numbers occur at every ratio. A mask at 0.3 of Otsu's threshold is traced
from the root of the first neuron, without and with the rule (trace.contacts), and compared with that neuron at 4
voxels. Mean and worst over the crowds of a ratio, then of a number of neurons; the last line is JSON.

With --verb the foreground is that of `trace` (hpc_neuro.data.foreground) in place of the mask. The weights of the rule
were fitted to seeds from 100.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, concatenate_trees, length, select_nodes, tips
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.metrics.cable import CableMatch, match_cable
from hpc_neuro.tracing import TraceConfig, trace

VOXEL: VoxelSize = (1.0, 0.33, 0.33)
"""[um]"""
SHAPE: Shape = (48, 224, 224)
"""[voxel]"""
_TOLERANCE = 4.0
"""[voxel]"""
_ROOT_CLEARANCE = 24.0
"""[fine voxel] No neighbor comes this close to the root: whose neuron is meant would be open."""
_LEAST_CABLE = 100.0
"""[fine voxel] Shorter neighbors are drawn again."""
_TIP_SHARE = 0.4
"""Share of the neighbors that touch with a tip; the others cross."""
_APART = (0.7, 1.4)
"""[sum of the radii] Distance of the two centerlines at a contact."""
_LEVEL = 0.3
"""[Otsu's threshold] A mask that shows dim neighbors: that of a network, rather than Otsu's own."""
_DRAWS = 200
"""Attempts to place a neighbor."""


def main() -> None:
    """Print a row for each ratio, without and with the rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, default=(20, 40), help="first, and one after the last")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.75, 0.9])
    parser.add_argument("--neurons", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12])
    parser.add_argument(
        "--verb", action="store_true", help="trace as the verb does, rather than a mask at 0.3 of Otsu's"
    )
    args = parser.parse_args()

    outcomes = list[Outcome]()
    for ratio in args.ratios:
        for seed in range(*args.seeds):
            neurons = args.neurons[seed % len(args.neurons)]
            crowd = grow_crowd(seed, neurons)
            outcomes += [
                Outcome(ratio, neurons, name, match)
                for name, match in compare_rule(crowd, ratio, seed, args.verb).items()
            ]
        print_rows(summarize([outcome for outcome in outcomes if outcome.ratio == ratio], by_neurons=False))

    print("by the number of neurons")
    by_neurons = summarize(outcomes, by_neurons=True)
    print_rows(by_neurons)
    print(json.dumps({"by_ratio": summarize(outcomes, by_neurons=False), "by_neurons": by_neurons}))


class Outcome(NamedTuple):
    """The rooted neuron of one crowd."""

    ratio: float
    neurons: int
    rule: str
    match: CableMatch


def summarize(outcomes: Sequence[Outcome], by_neurons: bool) -> list[dict[str, Any]]:
    """Mean and worst precision and recall for each ratio, or each number of neurons, and rule."""
    groups: dict[tuple[float, str], list[CableMatch]] = {}
    for outcome in outcomes:
        key = outcome.neurons if by_neurons else outcome.ratio
        groups.setdefault((key, outcome.rule), []).append(outcome.match)

    rows = []
    for (key, rule), matches in groups.items():
        row: dict[str, Any] = {"neurons" if by_neurons else "ratio": key, "rule": rule, "crowds": len(matches)}
        for name in ("precision", "recall"):
            values = [float(getattr(match, name)) for match in matches]
            row[name], row[f"worst_{name}"] = round(float(np.mean(values)), 4), round(min(values), 4)
        rows.append(row)
    return sorted(rows, key=lambda row: (row.get("ratio", row.get("neurons")), row["rule"]))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each row, mean and worst."""
    for row in rows:
        key = f"ratio {row['ratio']:<5}" if "ratio" in row else f"{row['neurons']:>3} neurons"
        print(
            f"{key:>11} rule {row['rule']:>3}  precision {row['precision']:.3f} (worst {row['worst_precision']:.3f})  "
            f"recall {row['recall']:.3f} (worst {row['worst_recall']:.3f})  {row['crowds']} crowds",
            flush=True,
        )


def grow_crowd(seed: int, neurons: int) -> list[Tree]:
    """The rooted neuron and its neighbors, in voxels; a function of its arguments."""
    form = TreeForm(cable=120.0)
    crowd = [grow_random_tree(1000 * seed, SHAPE, VOXEL, replace(form, soma=0.0))]
    rng = np.random.default_rng([seed, neurons])

    for number in range(1, neurons):
        for draw in range(_DRAWS):
            tree = grow_random_tree(1000 * seed + number + 100 * draw, SHAPE, VOXEL, form)
            placed = _place_neighbor(tree, crowd, rng)
            if placed is not None:
                crowd.append(placed)
                break
        else:
            raise RuntimeError(f"neighbor {number} of seed {seed} has no place after {_DRAWS} draws")
    return crowd


def _place_neighbor(tree: Tree, crowd: Sequence[Tree], rng: np.random.Generator) -> Tree | None:
    """A tree moved so that it meets one of a crowd, cut at the border; None when it is too short or at the root."""
    # Half of the neighbors meet the rooted neuron itself.
    other = crowd[0] if rng.random() < 0.5 else crowd[int(rng.integers(len(crowd)))]
    ends, inner = tips(tree), np.arange(len(tree) // 10, len(tree))
    node = int(rng.choice(ends if rng.random() < _TIP_SHARE else inner))
    place = int(rng.integers(1, len(other)))

    # Membranes touch: the centerlines lie about the sum of the radii apart, in any direction.
    away = rng.normal(size=3)
    away *= rng.uniform(*_APART) * (tree.radii[node] + other.radii[place]) / np.linalg.norm(away)
    scale = np.asarray(VOXEL) / VOXEL[1]
    moved = replace(tree, points=tree.points + other.points[place] - tree.points[node] + away / scale)

    inside = np.all((moved.points >= 0) & (moved.points <= np.array(SHAPE) - 1), axis=1)
    part = _select_part(moved, inside, node)
    if part is None or length(_scale(part, scale)) < _LEAST_CABLE:
        return None

    away_from_root = np.linalg.norm((part.points - crowd[0].points[0]) * scale, axis=1)
    return part if away_from_root.min() > _ROOT_CLEARANCE else None


def _select_part(tree: Tree, inside: NDArray[np.bool_], node: int) -> Tree | None:
    """The connected part of a tree `inside` that holds a node; None where the node is outside."""
    if not inside[node]:
        return None

    # Edges to nodes outside are cut, and the top node of each part identifies it.
    top = np.arange(len(tree))
    for i, parent in enumerate(tree.parents.tolist()):
        if parent >= 0 and inside[i] and inside[parent]:
            top[i] = top[parent]
    return select_nodes(tree, inside & (top == top[node]))


def _scale(tree: Tree, scale: NDArray[np.float64]) -> Tree:
    return replace(tree, points=tree.points * scale)


def render_crowd(crowd: Sequence[Tree], ratio: float, seed: int) -> NDArray[np.float32]:
    """The image of a crowd whose neighbors have `ratio` of the brightness."""
    # Breaks and fragments are what `tools.bench.links` measures.
    light = Microscope(gap_every=1e9, fragments=0)
    labeling = [1.0] + [ratio] * (len(crowd) - 1)
    return render_stack(concatenate_trees(crowd), SHAPE, VOXEL, light, seed, labeling=labeling).astype(np.float32)


def compare_rule(crowd: Sequence[Tree], ratio: float, seed: int, is_verb: bool = False) -> dict[str, CableMatch]:
    """The rooted neuron traced from a crowd without the rule and with it."""
    gold = crowd[0]
    z, y, x = gold.points[0].tolist()
    image = render_crowd(crowd, ratio, seed)
    if is_verb:
        foreground = measure_foreground(lambda box: image[box.slices], SHAPE)
        probability = foreground.probability(Box.whole(SHAPE))
    else:
        smooth = gaussian_filter(image, 0.7)
        probability = smooth > _LEVEL * threshold_otsu(smooth)

    matches = {}
    for name, rule in (("off", False), ("on", True)):
        (tree,) = trace(probability, VOXEL, roots=[(z, y, x)], cfg=TraceConfig(contacts=rule), image=image)
        matches[name] = match_cable(tree, gold, _TOLERANCE)
    return matches


if __name__ == "__main__":
    main()
