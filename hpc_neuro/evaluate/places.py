"""Are the places that `proofread` lists worth a look? Their hit rate, by kind, against that of random places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core.morphology import Tree, edge_lengths, resample_tree
from hpc_neuro.data.store import Store
from hpc_neuro.evaluate.predictions import PredictionFolder
from hpc_neuro.metrics.metric import divide
from hpc_neuro.metrics.segments import SegmentIndex
from hpc_neuro.report import html
from hpc_neuro.report.html import Cell, Column

Points = NDArray[np.float64]

ALL = "all"
"""All listed places together."""
_REACH = 8.0
"""[voxel] A person who looks at a place sees so far around it."""
_RANDOM_PLACES = 2000
"""Places drawn on a tree, by cable."""


@dataclass(frozen=True)
class HitCount:
    """How often a tree is wrong near places of one kind. Counts of several neurons add up."""

    places: int = 0
    hits: int = 0
    """Places with a fault of the tree nearby: false cable or missed cable."""
    false_cable: int = 0
    """Places with traced cable nearby that is not in gold."""
    missed_cable: int = 0
    """Places with gold cable nearby that was not traced."""
    expected: float = 0.0
    """Hits of as many places drawn at random on the same trees."""

    def __add__(self, other: HitCount) -> HitCount:
        return HitCount(
            self.places + other.places,
            self.hits + other.hits,
            self.false_cable + other.false_cable,
            self.missed_cable + other.missed_cable,
            self.expected + other.expected,
        )

    @property
    def rate(self) -> float:
        """Share of the places with a fault nearby; 0 without places."""
        return divide(self.hits, self.places, empty=0.0)

    @property
    def base_rate(self) -> float:
        """The rate of random places on the same trees; 0 without places."""
        return divide(self.expected, self.places, empty=0.0)


def count_hits(
    places: Mapping[str, Points], tree: Tree, gold: Tree, tolerance: float, reach: float = _REACH
) -> dict[str, HitCount]:
    """Hits of places by kind and of all places, with those expected of random places on the tree. All in voxels.

    places: kind -> [N, 3] z y x. Cable is wrong where it lies farther than `tolerance` from the other tree. A place is
    a hit where such cable of either tree is within `reach`.
    """
    false_cable, missed_cable = _select_far(tree, gold, tolerance), _select_far(gold, tree, tolerance)

    points = dict(places)
    points[ALL] = np.concatenate([np.zeros((0, 3)), *places.values()])
    base = _count(_draw_places(tree), false_cable, missed_cable, reach).rate
    counts = {kind: _count(own, false_cable, missed_cable, reach) for kind, own in points.items()}
    return {kind: replace(count, expected=base * count.places) for kind, count in counts.items()}


def _draw_places(tree: Tree) -> Points:
    """[N, 3] places on a tree, each stretch of cable as likely as any other of its length."""
    fine = resample_tree(tree, 1.0)
    lengths = edge_lengths(fine)[fine.edges[:, 0]]
    if not lengths.sum() > 0:
        return np.zeros((0, 3))

    # A fixed seed: the base rate of a tree is the same in every run.
    drawn = np.random.default_rng(0).choice(len(lengths), size=_RANDOM_PLACES, p=lengths / lengths.sum())
    return np.asarray(fine.points[fine.edges[drawn]].mean(axis=1))


def add_counts(parts: Sequence[Mapping[str, HitCount]]) -> dict[str, HitCount]:
    """The counts of several neurons together, the most frequent kinds first, then all places."""
    total: dict[str, HitCount] = {}
    for part in parts:
        for kind, count in part.items():
            total[kind] = total.get(kind, HitCount()) + count
    kinds = sorted(total.keys() - {ALL}, key=lambda kind: (-total[kind].places, kind))
    return {kind: total[kind] for kind in (*kinds, ALL) if kind in total}


def measure_hits(store: Store, ids: Sequence[str], model: PredictionFolder, tolerance: float) -> dict[str, HitCount]:
    """The counts over all volumes with places to proofread; {} where there are none. tolerance: [voxel]."""
    parts = []
    for volume in (store[i] for i in ids):
        if places := model.read_places(volume.id):
            tree = model.read(volume.id, volume.shape).tree
            parts.append(count_hits(places, tree, volume.tree(), tolerance))
    return add_counts(parts)


def build_json(counts: Mapping[str, HitCount]) -> dict[str, Any]:
    """Kind -> its counts and rates."""
    return {
        kind: {**asdict(count), "rate": round(count.rate, 4), "base_rate": round(count.base_rate, 4)}
        for kind, count in counts.items()
    }


def render_section(counts: Mapping[str, HitCount], tolerance: float) -> str:
    """The table and what it means."""
    text = html.paragraph(
        f"A place is a hit where the tree is wrong within {_REACH:g} voxels of it: traced cable farther than "
        f"{tolerance:g} voxels from gold, or gold cable that was not traced. The base rate is that of places "
        "drawn at random on the same trees, by cable: a list is worth its reading where its rate is well above it.",
        "small",
    )
    columns = [
        Column("Kind", numeric=False),
        *map(Column, ("Places", "Hit rate", "Base rate", "False cable", "Missed cable")),
    ]
    rows = []
    for kind, count in counts.items():
        faults = [divide(part, count.places, empty=0.0) for part in (count.false_cable, count.missed_cable)]
        shares = [count.rate, count.base_rate, *faults]
        cells = [Cell(html.format_number(share, 2), share) for share in shares]
        rows.append([Cell(kind), Cell(str(count.places), count.places), *cells])
    return text + html.table(columns, rows)


def _select_far(tree: Tree, other: Tree, tolerance: float) -> Points:
    """[N, 3] the middles of pieces of at most a voxel of a tree that are far from another one."""
    fine = resample_tree(tree, 1.0)
    middles: Points = fine.points[fine.edges].mean(axis=1).reshape(-1, 3)
    if not len(other) or not len(middles):
        return middles
    return np.asarray(middles[SegmentIndex(other).query(middles) > tolerance])


def _count(points: Points, false_cable: Points, missed_cable: Points, reach: float) -> HitCount:
    near_false, near_missed = (_is_near(points, cable, reach) for cable in (false_cable, missed_cable))
    return HitCount(len(points), int((near_false | near_missed).sum()), int(near_false.sum()), int(near_missed.sum()))


def _is_near(points: Points, cable: Points, reach: float) -> NDArray[np.bool_]:
    if not len(points) or not len(cable):
        return np.zeros(len(points), dtype=bool)
    return np.asarray(cKDTree(cable).query(points, distance_upper_bound=reach)[0] <= reach)
