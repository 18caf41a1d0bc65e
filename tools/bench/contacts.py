"""Whose cable: the rooted neuron among neighbors that touch and cross it, traced with and without the contact rule.

    python -m tools.bench.contacts [--seeds 20 40] [--ratios 0.2 0.4 0.6 0.75 0.9] [--neurons 2 3 4 6 8 12]

A synthetic neuron (hpc_neuro.data.synthetic) shares its volume with neighbors that are dimmer by the ratio. Each
neighbor is moved so that it meets a neuron that is there already: it crosses it, or touches it with a tip. The seed
chooses one of the numbers of neurons, so all numbers occur at every ratio. A mask at 0.3 of Otsu's threshold is traced
from the root of the first neuron, without and with the rule (trace.contacts), and compared with that neuron at 4
voxels. Last line: JSON with the means over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, concatenate_trees, length, select_nodes, tips
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
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, nargs=2, default=(20, 40), help="first, and one after the last")
    ask.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.75, 0.9])
    ask.add_argument("--neurons", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12])
    args = ask.parse_args()

    rows = []
    print(f"{'ratio':>6} {'rule':>6} {'precision':>9} {'recall':>9}")
    for ratio in args.ratios:
        scores: dict[str, list[CableMatch]] = {"off": [], "on": []}
        for seed in range(*args.seeds):
            crowd = grow_crowd(seed, args.neurons[seed % len(args.neurons)])
            for name, match in compare_rule(crowd, ratio, seed).items():
                scores[name].append(match)

        for name, matches in scores.items():
            precision, recall = (float(np.mean([getattr(m, key) for m in matches])) for key in ("precision", "recall"))
            rows.append({"ratio": ratio, "rule": name, "precision": round(precision, 4), "recall": round(recall, 4)})
            print(f"{ratio:6} {name:>6} {precision:9.3f} {recall:9.3f}", flush=True)
    print(json.dumps(rows))


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


def render_crowd(crowd: Sequence[Tree], ratio: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The image of a crowd whose neighbors have `ratio` of the brightness, and the mask of it."""
    # Breaks and fragments are what `tools.bench.links` measures.
    light = Microscope(gap_every=1e9, fragments=0)
    labeling = [1.0] + [ratio] * (len(crowd) - 1)
    image = render_stack(concatenate_trees(crowd), SHAPE, VOXEL, light, seed, labeling=labeling).astype(np.float32)

    smooth = gaussian_filter(image, 0.7)
    return image, smooth > _LEVEL * threshold_otsu(smooth)


def compare_rule(crowd: Sequence[Tree], ratio: float, seed: int) -> dict[str, CableMatch]:
    """The rooted neuron traced from a crowd without the rule and with it."""
    gold = crowd[0]
    z, y, x = gold.points[0].tolist()
    image, mask = render_crowd(crowd, ratio, seed)

    matches = {}
    for name, rule in (("off", False), ("on", True)):
        (tree,) = trace(mask, VOXEL, roots=[(z, y, x)], cfg=TraceConfig(contacts=rule), image=image)
        matches[name] = match_cable(tree, gold, _TOLERANCE)
    return matches


if __name__ == "__main__":
    main()
