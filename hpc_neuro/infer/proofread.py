"""Where a person should look first: a score for each neuron, and the doubtful places, worst first, without any truth.

OUT/proofread/ID.csv                 places, ranked
OUT/proofread/ID.neurons.csv         neurons, least sure first
OUT/proofread/ID.swc                 the trees in um; a doubtful node has type 7, others keep theirs
OUT/proofread/ID.confidence.csv      confidence of each node of swc/ID.swc, in its order
OUT/proofread/ID.neuroglancer.json   a state for Neuroglancer with the places as points
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro import files, morphology
from hpc_neuro.data import swc
from hpc_neuro.geometry import Shape, VoxelSize
from hpc_neuro.morphology import Tree

DOUBTFUL = 7  # SWC type: the last of those left to the user
_BORDER = 3.0  # [voxel] an end this near to the border of the volume leaves it, and is no doubt
_TURN = 75.0  # [degree] a path that turns more than this within `_ARM` may have changed to another neuron
_ARM = 6.0  # [voxel] before and behind a turn


@dataclass(frozen=True)
class Place:
    """One place to look at."""

    rank: int
    kind: str  # gap, faint, turn or end
    z: float  # [voxel]
    y: float
    x: float
    doubt: float  # 0 to 1: one minus the lowest confidence of the place
    cable_um: float  # what would be lost or gained: the cable behind it
    neuron: int  # from 1, as swc/ID/0001.swc
    node: int  # SWC id in swc/ID.swc


@dataclass(frozen=True)
class Neuron:
    """How sure a whole tree is."""

    neuron: int
    score: float  # share of the cable that is as sure as the threshold
    mean: float  # confidence, by cable
    cable_um: float
    gaps: int
    gap_um: float


def places(
    tree: Tree, sure: NDArray[np.float64], low: float, threshold: float, shape: Shape, size: VoxelSize
) -> list[Place]:
    """The doubtful places of trees in voxels, worst first: by doubt times the square root of the cable behind.

    `sure` is the confidence of each node. A gap is a run of edges below `low` (it was bridged), a faint stretch one
    below `threshold`, a turn a bend of more than 75 degrees; an end counts where the neurite is still bright.
    """
    um = morphology.scaled(tree, size)
    step = morphology.edge_lengths(um)
    below = step.copy()
    for node in range(len(tree) - 1, -1, -1):
        if tree.parents[node] >= 0:
            below[tree.parents[node]] += below[node]
    neuron = _neurons(tree)
    found = []

    def add(kind: str, node: int, doubt: float) -> None:
        z, y, x = (round(float(v), 2) for v in tree.points[node])
        behind = round(float(below[node]), 2)
        found.append(Place(0, kind, z, y, x, round(doubt, 4), behind, int(neuron[node]), node + 1))

    kinds = np.where(sure < low, 2, np.where(sure < threshold, 1, 0))
    for run in _runs(tree, kinds):
        worst = int(run[sure[run].argmin()])
        add("gap" if kinds[worst] == 2 else "faint", worst, float(1 - sure[worst]))
    for node in _turns(tree):
        add("turn", node, 0.5)
    rim = np.minimum(tree.points, np.array(shape) - 1 - tree.points).min(axis=1)
    for node in morphology.tips(tree).tolist():
        if rim[node] > _BORDER and sure[node] >= max(threshold, 0.5 * (1 + threshold)):
            add("end", node, float(sure[node] - threshold) / 2)
    found.sort(key=lambda p: (-p.doubt * (1 + p.cable_um) ** 0.5, p.node))
    return [replace(place, rank=i) for i, place in enumerate(found, start=1)]


def neurons(tree: Tree, sure: NDArray[np.float64], low: float, threshold: float, size: VoxelSize) -> list[Neuron]:
    """A score for each tree of a forest in voxels, least sure first."""
    step, of = morphology.edge_lengths(morphology.scaled(tree, size)), _neurons(tree)
    found = []
    for number in range(1, int(of.max(initial=0)) + 1):
        mine = (of == number) & (tree.parents >= 0)
        cable, weak = float(step[mine].sum()), mine & (sure < low)
        whole = max(cable, 1e-9)
        gaps = sum(1 for run in _runs(tree, np.where(weak, 1, 0)))
        score, mean = step[mine & (sure >= threshold)].sum() / whole, (step * sure)[mine].sum() / whole
        gap = float(step[weak].sum())
        found.append(Neuron(number, round(score, 4), round(mean, 4), round(cable, 2), gaps, round(gap, 2)))
    return sorted(found, key=lambda n: (n.score, n.neuron))


def write(
    out: Path, name: str, tree: Tree, sure: NDArray[np.float64], low: float, threshold: float, shape: Shape,
    size: VoxelSize,
) -> tuple[list[Place], list[Neuron]]:  # fmt: skip
    """Write all five files of a volume; what is in the tables."""
    folder = out / "proofread"
    found, scores = places(tree, sure, low, threshold, shape, size), neurons(tree, sure, low, threshold, size)
    files.write_text(folder / f"{name}.csv", _table([asdict(p) for p in found], list(Place.__dataclass_fields__)))
    rows = [asdict(n) for n in scores]
    files.write_text(folder / f"{name}.neurons.csv", _table(rows, list(Neuron.__dataclass_fields__)))
    nodes = [{"node": i, "confidence": round(float(c), 4)} for i, c in enumerate(sure, start=1)]
    files.write_text(folder / f"{name}.confidence.csv", _table(nodes, ["node", "confidence"]))
    types = np.where(_in_section(tree, sure < threshold), DOUBTFUL, tree.types)
    marked = morphology.scaled(replace(tree, types=types), size)
    about = [f"type {DOUBTFUL}: somewhere less sure than {threshold:g}"]
    swc.write(folder / f"{name}.swc", marked, unit="um", voxel_size=size, comments=about)
    files.write_json(folder / f"{name}.neuroglancer.json", neuroglancer(name, found, shape, size))
    return found, scores


def tables(out: Path, name: str) -> tuple[Path, Path]:
    """Where the tables of places and of neurons of a volume are."""
    return out / "proofread" / f"{name}.csv", out / "proofread" / f"{name}.neurons.csv"


def neuroglancer(name: str, found: Sequence[Place], shape: Shape, size: VoxelSize) -> dict[str, Any]:
    """A state that shows the probability, the mask and the places; replace HOST by where OUT is served."""
    url = f"zarr3://HOST/{name}.ome.zarr/"
    points = [
        {"type": "point", "id": str(p.rank), "point": [p.z, p.y, p.x], "description": f"{p.kind}, doubt {p.doubt:.2f}"}
        for p in found
    ]
    return {
        "dimensions": {axis: [v * 1e-6, "m"] for axis, v in zip("zyx", size, strict=True)},
        "position": [found[0].z, found[0].y, found[0].x] if found else [n / 2 for n in shape],
        "layers": [
            {"type": "image", "name": "probability", "source": url},
            {"type": "segmentation", "name": "mask", "source": f"{url}labels/mask/"},
            {"type": "annotation", "name": "doubtful places", "source": "local://annotations", "annotations": points},
        ],
    }


def _neurons(tree: Tree) -> NDArray[np.int64]:
    """[N] number of each node's tree, from 1."""
    found = np.zeros(len(tree), dtype=np.int64)
    count = 0
    for node, parent in enumerate(tree.parents.tolist()):
        if parent < 0:
            count += 1
        found[node] = count if parent < 0 else found[parent]
    return found


def _in_section(tree: Tree, at: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N] whether any node of the unbranched section of each is so; an SWC section has one type."""
    counts, section = morphology.child_counts(tree), np.arange(len(tree))
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0 and counts[parent] == 1:
            section[node] = section[parent]
    return np.isin(section, section[at])


def _runs(tree: Tree, kinds: NDArray[np.integer[Any]]) -> list[NDArray[np.int64]]:
    """Connected nodes of one kind other than 0."""
    label = np.full(len(tree), -1, dtype=np.int64)
    for node, parent in enumerate(tree.parents.tolist()):
        if kinds[node]:
            label[node] = label[parent] if parent >= 0 and kinds[parent] == kinds[node] else node
    return [np.flatnonzero(label == first) for first in np.unique(label[label >= 0])]


def _turns(tree: Tree) -> list[int]:
    """Inner nodes of unbranched paths where the way turns sharply."""
    step, counts = morphology.edge_lengths(tree), morphology.child_counts(tree)
    child = np.full(len(tree), -1, dtype=np.int64)
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            child[parent] = node
    least, found = np.cos(np.radians(_TURN)), list[int]()
    for node in np.flatnonzero((counts == 1) & (tree.parents >= 0)).tolist():
        ahead, behind, gone = node, node, 0.0
        while gone < _ARM and counts[ahead] == 1:
            ahead = int(child[ahead])
            gone += step[ahead]
        there = 0.0
        while there < _ARM and tree.parents[behind] >= 0:
            there += step[behind]
            behind = int(tree.parents[behind])
        if min(gone, there) < _ARM:
            continue
        a, b = tree.points[node] - tree.points[behind], tree.points[ahead] - tree.points[node]
        cosine = float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-9))
        if cosine < least and not (found and np.linalg.norm(tree.points[found[-1]] - tree.points[node]) < 2 * _ARM):
            found.append(node)
    return found


def _table(rows: Sequence[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
