"""Where a person should look first: a score for each neuron, and the doubtful places, worst first, without any truth.

OUT/proofread/ID.csv                 places, ranked
OUT/proofread/ID.neurons.csv         neurons, least sure first
OUT/proofread/ID.blocks.csv          blocks of the image, least sure first
OUT/proofread/ID.swc                 the trees in um; a doubtful node has type 7, others keep theirs
OUT/proofread/ID.confidence.csv      confidence of each node of swc/ID.swc, by its id; with mirrored views also
                                     their disagreement and the mean of all views
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

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import swc

_RED = "void main() { emitRGB(vec3(toNormalized(getDataValue()), 0.0, 0.0)); }"  # over the image
KINDS = ("csv", "neurons.csv", "blocks.csv", "swc", "confidence.csv", "neuroglancer.json")
"""Endings of what is written of a volume."""
DOUBTFUL = 7  # SWC type: the last of those left to the user
_BORDER = 3.0  # [voxel] an end this near to the border of the volume leaves it, and is no doubt
_TURN = 75.0  # [degree] a path that turns more than this within `_ARM` may have changed to another neuron
_ARM = 6.0  # [voxel] before and behind a turn


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sure:
    """What is known of the nodes of a tree without any truth."""

    confidence: Floats  # [N] see tracing.confidence
    views: Floats  # [K, N] the same in K mirrored views; none were looked at: K is 0
    low: float  # an edge below it was bridged
    threshold: float

    @property
    def disagreement(self) -> Floats | None:
        """[N] mean over the mirrored views of how far the confidence is from that in the plain one, 0 to 1."""
        return np.abs(self.views - self.confidence).mean(axis=0) if len(self.views) else None

    @property
    def mean(self) -> Floats:
        """[N] mean over all views."""
        return np.asarray(np.vstack([self.confidence, self.views]).mean(axis=0))

    @property
    def lowest(self) -> Floats:
        """[N] lowest of all views."""
        return np.asarray(np.vstack([self.confidence, self.views]).min(axis=0))


@dataclass(frozen=True)
class Place:
    """One place to look at."""

    rank: int
    kind: str  # gap, faint, unsteady, turn or end
    z: float  # [voxel]
    y: float
    x: float
    doubt: float  # 0 to 1: one minus the lowest confidence of the place, or the disagreement where that is larger
    disagreement: float | None  # of mirrored views, 0 to 1; none: not looked at
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
    disagreement: float | None  # by cable


@dataclass(frozen=True)
class BlockScore:
    """How sure the cable in one block of the image is."""

    block: str  # z_y_x, as blocks/ID/z_y_x.json
    score: float  # as of a neuron
    mean: float
    cable_um: float
    disagreement: float | None


def places(tree: Tree, known: Sure, shape: Shape, size: VoxelSize) -> list[Place]:
    """The doubtful places of trees in voxels, worst first: by doubt times the square root of the cable behind.

    A gap is a run of edges below `low` (it was bridged), a faint stretch one below `threshold`, an unsteady one is
    below that in a mirrored view only, a turn is a bend of more than 75 degrees; an end counts where the neurite is
    still bright.
    """
    sure, low, threshold, apart = known.confidence, known.low, known.threshold, known.disagreement
    um = morphology.scale_tree(tree, size)
    step = morphology.edge_lengths(um)
    below = step.copy()
    for node in range(len(tree) - 1, -1, -1):
        if tree.parents[node] >= 0:
            below[tree.parents[node]] += below[node]
    neuron, numbers = morphology.label_components(tree) + 1, swc.node_ids(tree)
    found = []

    def add(kind: str, node: int, doubt: float) -> None:
        z, y, x = (round(float(v), 2) for v in tree.points[node])
        behind, off = round(float(below[node]), 2), None if apart is None else round(float(apart[node]), 4)
        doubt = round(max(doubt, off or 0.0), 4)
        found.append(Place(0, kind, z, y, x, doubt, off, behind, int(neuron[node]), int(numbers[node])))

    kinds = np.where(sure < low, 3, np.where(sure < threshold, 2, np.where(known.lowest < threshold, 1, 0)))
    for run in _runs(tree, kinds):
        worst = int(run[known.lowest[run].argmin()])
        kind = ("unsteady", "faint", "gap")[kinds[worst] - 1]
        add(kind, worst, 0.0 if kind == "unsteady" else float(1 - sure[run].min()))
    for node in _turns(tree):
        add("turn", node, 0.5)
    rim = np.minimum(tree.points, np.array(shape) - 1 - tree.points).min(axis=1)
    for node in morphology.tips(tree).tolist():
        if rim[node] > _BORDER and sure[node] >= max(threshold, 0.5 * (1 + threshold)):
            add("end", node, float(sure[node] - threshold) / 2)
    found.sort(key=lambda p: (-p.doubt * (1 + p.cable_um) ** 0.5, p.node))
    return [replace(place, rank=i) for i, place in enumerate(found, start=1)]


def neurons(tree: Tree, known: Sure, size: VoxelSize) -> list[Neuron]:
    """A score for each tree of a forest in voxels, least sure first."""
    of, step = morphology.label_components(tree), _cable(tree, size)
    weak = (tree.parents >= 0) & (known.confidence < known.low)
    gaps = np.bincount([of[run[0]] for run in _runs(tree, weak.astype(np.int64))], minlength=len(tree.roots))
    broken = np.bincount(of, weights=step * weak)
    scores = _scores(step, known, of)
    found = [
        Neuron(i, score, mean, cable, int(gaps[i - 1]), round(float(broken[i - 1]), 2), apart)
        for i, (score, mean, cable, apart) in enumerate(scores, start=1)
    ]
    return sorted(found, key=lambda n: (n.score, n.neuron))


def by_block(tree: Tree, known: Sure, block: Shape, size: VoxelSize) -> list[BlockScore]:
    """A score for each block of `block` voxels that holds cable, least sure first."""
    places = np.rint(tree.points).astype(np.int64).clip(0) // np.array(block)
    indices, of = np.unique(places, axis=0, return_inverse=True)
    scores = zip(indices.tolist(), _scores(_cable(tree, size), known, of.ravel()), strict=True)
    found = [BlockScore("_".join(map(str, index)), *score) for index, score in scores if score[2] > 0]
    return sorted(found, key=lambda b: (b.score, b.block))


def _cable(tree: Tree, size: VoxelSize) -> Floats:
    """[N] um from each node to its parent; 0 for roots."""
    return np.where(tree.parents >= 0, morphology.edge_lengths(morphology.scale_tree(tree, size)), 0.0)


def _scores(step: Floats, known: Sure, of: NDArray[np.int64]) -> list[tuple[float, float, float, float | None]]:
    """For each group of nodes (`of` [N]): share of the cable that is as sure as the threshold, mean confidence, cable,
    mean disagreement."""
    cable, apart = np.bincount(of, weights=step), known.disagreement

    def mean(values: Floats) -> list[float]:
        each = np.bincount(of, weights=step * values) / np.maximum(cable, 1e-9)
        return [round(value, 4) for value in each.tolist()]

    score, sure = mean((known.confidence >= known.threshold).astype(np.float64)), mean(known.confidence)
    off = [None] * len(cable) if apart is None else mean(apart)
    return list(zip(score, sure, np.round(cable, 2).tolist(), off, strict=True))


def write(
    out: Path, name: str, tree: Tree, known: Sure, shape: Shape, size: VoxelSize, block: Shape
) -> tuple[list[Place], list[Neuron]]:
    """Write all six files of a volume; what is in the first two tables."""
    folder = out / "proofread"
    found, scores = places(tree, known, shape, size), neurons(tree, known, size)
    blocks = by_block(tree, known, block, size)
    for path, kind, rows in (
        (f"{name}.csv", Place, found),
        (f"{name}.neurons.csv", Neuron, scores),
        (f"{name}.blocks.csv", BlockScore, blocks),
    ):
        files.write_text(folder / path, _table([asdict(row) for row in rows], list(kind.__dataclass_fields__)))
    columns = {"confidence": known.confidence}
    if (apart := known.disagreement) is not None:
        columns |= {"disagreement": apart, "mean": known.mean}
    lines = zip(*(np.round(column, 4).tolist() for column in columns.values()), strict=True)
    numbers = swc.node_ids(tree).tolist()
    nodes = [dict(zip(("node", *columns), (i, *line), strict=True)) for i, line in zip(numbers, lines, strict=True)]
    files.write_text(folder / f"{name}.confidence.csv", _table(nodes, ["node", *columns]))
    types = np.where(_in_section(tree, known.lowest < known.threshold), DOUBTFUL, tree.types)
    marked = morphology.scale_tree(replace(tree, types=types), size)
    about = [f"type {DOUBTFUL}: somewhere less sure than {known.threshold:g}"]
    swc.write(folder / f"{name}.swc", marked, unit="um", voxel_size=size, comments=about)
    files.write_json(folder / f"{name}.neuroglancer.json", neuroglancer(name, found, shape, size))
    return found, scores


def tables(out: Path, name: str) -> tuple[Path, Path]:
    """Where the tables of places and of neurons of a volume are."""
    return out / "proofread" / f"{name}.csv", out / "proofread" / f"{name}.neurons.csv"


def neuroglancer(
    name: str, found: Sequence[Place], shape: Shape, size: VoxelSize, base: str = "http://HOST"
) -> dict[str, Any]:
    """A state that shows the probability, the mask and the places; base: where OUT is served (`infer serve`)."""
    url = f"zarr3://{base}/{name}.ome.zarr/"
    points = [
        {"type": "point", "id": str(p.rank), "point": [p.z, p.y, p.x], "description": f"{p.kind}, doubt {p.doubt:.2f}"}
        for p in found
    ]
    return {
        "dimensions": {axis: [v * 1e-6, "m"] for axis, v in zip("zyx", size, strict=True)},
        "displayDimensions": ["x", "y", "z"],
        "position": [found[0].z, found[0].y, found[0].x] if found else [n / 2 for n in shape],
        "layers": [
            {"type": "image", "name": "probability", "source": url, "shader": _RED, "blend": "additive", "opacity": 1},
            {"type": "segmentation", "name": "mask", "source": f"{url}labels/mask/", "visible": False},
            {"type": "annotation", "name": "doubtful places", "source": "local://annotations", "annotations": points},
        ],
    }


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
    order = np.argsort(label, kind="stable")
    order = order[np.searchsorted(label[order], 0) :]
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if len(order) else []


def _turns(tree: Tree) -> list[int]:
    """Inner nodes of unbranched paths where the way turns sharply."""
    step, counts = morphology.edge_lengths(tree), morphology.child_counts(tree)
    child = np.full(len(tree), -1, dtype=np.int64)
    child[tree.parents[tree.parents >= 0]] = np.flatnonzero(tree.parents >= 0)
    nodes = np.flatnonzero((counts == 1) & (tree.parents >= 0))
    ahead, behind, gone, there = nodes.copy(), nodes.copy(), np.zeros(len(nodes)), np.zeros(len(nodes))
    while (on := (gone < _ARM) & (counts[ahead] == 1)).any():
        ahead[on] = child[ahead[on]]
        gone[on] += step[ahead[on]]
    while (on := (there < _ARM) & (tree.parents[behind] >= 0)).any():
        there[on] += step[behind[on]]
        behind[on] = tree.parents[behind[on]]
    a, b = tree.points[nodes] - tree.points[behind], tree.points[ahead] - tree.points[nodes]
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(lengths, 1e-9)
    found = list[int]()
    for node in nodes[(np.minimum(gone, there) >= _ARM) & (cosine < np.cos(np.radians(_TURN)))].tolist():
        if not (found and np.linalg.norm(tree.points[found[-1]] - tree.points[node]) < 2 * _ARM):
            found.append(node)
    return found


def _table(rows: Sequence[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
