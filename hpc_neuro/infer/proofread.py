"""What a person should look at first: a score for each neuron, and the doubtful places, worst first, without any truth.

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
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import swc
from hpc_neuro.tracing import Contact

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FILE_KINDS = ("csv", "neurons.csv", "blocks.csv", "swc", "confidence.csv", "neuroglancer.json")
"""Endings of the files of a volume."""
DOUBTFUL_TYPE = 7
"""SWC type of a doubtful node: the last of those left to the user."""
SHOWN_PLACES = 10_000
"""Places in the state for Neuroglancer, the worst first: a browser draws no more."""
_BORDER = 3.0
"""[voxel] An end this near to the border of the volume leaves it, and is not doubtful."""
_TURN_DEGREES = 75.0
"""[degree] A path that turns more than this within `_TURN_ARM` may have changed to another neuron."""
_TURN_ARM = 6.0
"""[voxel] Cable before and behind a turn over which its direction is measured."""
_TURN_DOUBT = 0.5
"""Doubt of a turn, whatever its confidence."""
_RED_SHADER = "void main() { emitRGB(vec3(toNormalized(getDataValue()), 0.0, 0.0)); }"
"""Shader of the probability, which lies over the image."""


@dataclass(frozen=True)
class NodeConfidence:
    """How sure the nodes of a tree are, without any truth."""

    plain: Floats
    """[N] See tracing.measure_confidence."""
    views: Floats
    """[K, N] The same in K mirrored views."""
    low: float
    """An edge below it was bridged."""
    threshold: float
    """From it an edge is sure."""

    @property
    def disagreement(self) -> Floats | None:
        """[N] Mean over the mirrored views of how far the confidence is from the plain one, 0 to 1; None without."""
        return np.abs(self.views - self.plain).mean(axis=0) if len(self.views) else None

    @property
    def mean(self) -> Floats:
        """[N] Mean over all views."""
        return np.asarray(np.vstack([self.plain, self.views]).mean(axis=0))

    @property
    def lowest(self) -> Floats:
        """[N] Lowest of all views."""
        return np.asarray(np.vstack([self.plain, self.views]).min(axis=0))


@dataclass(frozen=True)
class DoubtfulPlace:
    """One place to look at. The fields are the columns of ID.csv."""

    rank: int
    kind: str
    """gap, faint, unsteady, turn, end, contact or touch."""
    z: float
    """[voxel]"""
    y: float
    x: float
    doubt: float
    """0 to 1: one minus the lowest confidence of the place, or the disagreement where that is larger."""
    disagreement: float | None
    """Of mirrored views, 0 to 1; None without them."""
    cable_um: float
    """[um] The cable behind the place, which would be lost or gained."""
    neuron: int
    """From 1, as swc/ID/0001.swc."""
    node: int
    """SWC id in swc/ID.swc."""


@dataclass(frozen=True)
class NeuronScore:
    """How sure a whole tree is. The fields are the columns of ID.neurons.csv."""

    neuron: int
    score: float
    """Share of the cable that is as sure as the threshold."""
    mean: float
    """Confidence, by cable."""
    cable_um: float
    gaps: int
    gap_um: float
    disagreement: float | None
    """By cable."""
    node: int
    """SWC id of its root in swc/ID.swc, in which the rows of a tree follow one another."""


@dataclass(frozen=True)
class BlockScore:
    """How sure the cable in one block of the image is. The fields are the columns of ID.blocks.csv."""

    block: str
    """z_y_x, as blocks/ID/z_y_x.json."""
    score: float
    """As of a neuron."""
    mean: float
    cable_um: float
    disagreement: float | None


@dataclass(frozen=True)
class ForestLabels:
    """How the files of a volume name the trees and nodes of a forest."""

    neurons: Ints
    """[T] number of each tree, from 1."""
    nodes: Ints
    """[N] SWC id of each node in swc/ID.swc."""

    @classmethod
    def of_volume(cls, tree: Tree) -> ForestLabels:
        """Those of all trees of a volume."""
        return cls(np.arange(len(tree.roots)) + 1, np.asarray(swc.node_ids(tree)))


@dataclass(frozen=True)
class _ScoredForest:
    """Trees in voxels with their confidence, and what is measured of them once."""

    tree: Tree
    confidence: NodeConfidence
    voxel_size: VoxelSize
    labels: ForestLabels

    @cached_property
    def edge_um(self) -> Floats:
        """[N] um from each node to its parent; 0 for roots."""
        lengths = morphology.edge_lengths(morphology.scale_tree(self.tree, self.voxel_size))
        return np.where(self.tree.parents >= 0, lengths, 0.0)

    @cached_property
    def cable_behind_um(self) -> Floats:
        """[N] um of cable behind each node, its own edge included."""
        cable = morphology.edge_lengths(morphology.scale_tree(self.tree, self.voxel_size)).copy()
        # Parents come before their children, so one pass from the end suffices.
        for node in range(len(self.tree) - 1, -1, -1):
            if self.tree.parents[node] >= 0:
                cable[self.tree.parents[node]] += cable[node]
        return cable

    @cached_property
    def tree_of(self) -> Ints:
        """[N] which of the forest's trees each node belongs to, from 0."""
        return morphology.label_components(self.tree)

    def make_place(self, kind: str, node: int, doubt: float) -> DoubtfulPlace:
        """A place, not ranked yet."""
        z, y, x = (round(float(coordinate), 2) for coordinate in self.tree.points[node])
        disagreement = self.confidence.disagreement
        own_disagreement = None if disagreement is None else round(float(disagreement[node]), 4)

        # The rank depends on all places, and is set once they are sorted.
        return DoubtfulPlace(
            rank=0,
            kind=kind,
            z=z,
            y=y,
            x=x,
            # Where views disagree a place is doubtful, however sure the plain view is.
            doubt=round(max(doubt, own_disagreement or 0.0), 4),
            disagreement=own_disagreement,
            cable_um=round(float(self.cable_behind_um[node]), 2),
            neuron=int(self.labels.neurons[self.tree_of[node]]),
            node=int(self.labels.nodes[node]),
        )


def find_places(
    tree: Tree,
    confidence: NodeConfidence,
    shape: Shape,
    voxel_size: VoxelSize,
    contacts: Sequence[Contact] = (),
    labels: ForestLabels | None = None,
) -> list[DoubtfulPlace]:
    """The doubtful places of trees in voxels, worst first: by doubt times the square root of the cable behind.

    `labels`: names of the trees and nodes; none: the trees are all of a volume.

    A gap is a run of edges below `low` (it was bridged), a faint stretch one below `threshold`, an unsteady one is
    below that in a mirrored view only, a turn is a bend of more than 75 degrees; an end counts where the neurite is
    still bright; a contact is where the tracer cut a neighbor off, whose cable it states; a touch is
    where it kept cable that may be a neighbor's.
    """
    forest = _ScoredForest(tree, confidence, voxel_size, labels or ForestLabels.of_volume(tree))
    places = [
        *_find_weak_stretches(forest),
        *_find_turns(forest),
        *_find_bright_ends(forest, shape),
        *_list_contacts(forest, contacts),
    ]

    # The node breaks ties, so that runs agree.
    places.sort(key=lambda place: (-weigh_place(place), place.node))
    return [replace(place, rank=rank) for rank, place in enumerate(places, start=1)]


def weigh_place(place: DoubtfulPlace) -> float:
    """How much a place matters: the square root keeps long cable from hiding doubt."""
    return place.doubt * math.sqrt(1 + place.cable_um)


def score_neurons(
    tree: Tree, confidence: NodeConfidence, voxel_size: VoxelSize, labels: ForestLabels | None = None
) -> list[NeuronScore]:
    """A score for each tree of a forest in voxels, least sure first. `labels`: as in `find_places`."""
    forest = _ScoredForest(tree, confidence, voxel_size, labels or ForestLabels.of_volume(tree))
    tree_of = forest.tree_of

    # A gap is a run of bridged edges.
    is_bridged = (tree.parents >= 0) & (confidence.plain < confidence.low)
    runs = _find_runs(tree, is_bridged.astype(np.int64))
    gaps = np.bincount([tree_of[run[0]] for run in runs], minlength=len(tree.roots)).tolist()
    gap_um = np.bincount(tree_of, weights=forest.edge_um * is_bridged).tolist()
    neurons, roots = forest.labels.neurons.tolist(), forest.labels.nodes[tree.roots].tolist()

    scores = [
        NeuronScore(neuron, score, mean, cable, gap_count, round(bridged, 2), disagreement, root)
        for neuron, root, gap_count, bridged, (score, mean, cable, disagreement) in zip(
            neurons, roots, gaps, gap_um, _score_groups(_measure_groups(forest, tree_of)), strict=True
        )
    ]
    return sorted(scores, key=lambda neuron: (neuron.score, neuron.neuron))


class BlockSums(NamedTuple):
    """What the scores of B blocks are made of; those of several forests add up."""

    indices: Ints
    """[B, 3]"""
    sums: Floats
    """[B, 4] see `_measure_groups`."""


def measure_blocks(tree: Tree, confidence: NodeConfidence, block: Shape, voxel_size: VoxelSize) -> BlockSums:
    """The sums of each block of `block` voxels that holds a node."""
    # The names of trees and nodes play no part.
    labels = ForestLabels(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    forest = _ScoredForest(tree, confidence, voxel_size, labels)

    # A point may lie a little before the center of the first voxel.
    block_of_node = np.rint(tree.points).astype(np.int64).clip(0) // np.array(block)
    indices, group_of = np.unique(block_of_node, axis=0, return_inverse=True)
    return BlockSums(indices, _measure_groups(forest, group_of.ravel()))


def add_blocks(parts: Sequence[BlockSums]) -> BlockSums:
    """The sums of several forests in one."""
    rows, sums = np.concatenate([part.indices for part in parts]), np.concatenate([part.sums for part in parts])
    indices, group_of = np.unique(rows, axis=0, return_inverse=True)
    columns = [np.bincount(group_of.ravel(), weights=column) for column in sums.T]
    return BlockSums(indices, np.stack(columns, axis=1))


def score_blocks(blocks: BlockSums) -> list[BlockScore]:
    """A score for each block that holds cable, least sure first."""
    scores = list[BlockScore]()
    for index, values in zip(blocks.indices.tolist(), _score_groups(blocks.sums), strict=True):
        score = BlockScore("_".join(map(str, index)), *values)

        # A block that holds no more than a root has no cable to be sure of.
        if score.cable_um > 0:
            scores.append(score)
    return sorted(scores, key=lambda score: (score.score, score.block))


def average_score(scores: Sequence[float], cables: Sequence[float]) -> float:
    """Share of the cable of all neurons that is as sure as the threshold."""
    # A sum without rounding does not depend on the order of the neurons.
    sure = math.fsum(score * cable for score, cable in zip(scores, cables, strict=True))
    return round(sure / max(math.fsum(cables), 1e-9), 4)


def write_tables(
    out: Path,
    name: str,
    tree: Tree,
    confidence: NodeConfidence,
    shape: Shape,
    voxel_size: VoxelSize,
    block: Shape,
    contacts: Sequence[Contact] = (),
) -> tuple[list[DoubtfulPlace], list[NeuronScore]]:
    """Write all six files of a volume; what is in the first two tables."""
    folder = out / "proofread"
    labels = ForestLabels.of_volume(tree)
    places = find_places(tree, confidence, shape, voxel_size, contacts, labels)
    neurons = score_neurons(tree, confidence, voxel_size, labels)
    blocks = score_blocks(measure_blocks(tree, confidence, block, voxel_size))

    for path, kind, rows in (
        (folder / f"{name}.csv", DoubtfulPlace, places),
        (folder / f"{name}.neurons.csv", NeuronScore, neurons),
        (folder / f"{name}.blocks.csv", BlockScore, blocks),
    ):
        files.write_text(path, format_head(kind) + "".join(format_rows(rows)))

    table = format_confidence_head(confidence) + "".join(format_confidence(confidence, labels))
    files.write_text(folder / f"{name}.confidence.csv", table)

    marked = morphology.scale_tree(mark_doubtful(tree, confidence), voxel_size)
    comments = [describe_marks(confidence)]
    swc.write(folder / f"{name}.swc", marked, unit="um", voxel_size=voxel_size, comments=comments)

    state = build_neuroglancer_state(name, places[:SHOWN_PLACES], shape, voxel_size)
    files.write_json(folder / f"{name}.neuroglancer.json", state)
    return places, neurons


def mark_doubtful(tree: Tree, confidence: NodeConfidence) -> Tree:
    """The trees with type 7 wherever a section holds a doubtful node."""
    # An SWC section has one type, so a doubtful node marks all of its section.
    is_doubtful = _spread_over_sections(tree, confidence.lowest < confidence.threshold)
    return replace(tree, types=np.where(is_doubtful, DOUBTFUL_TYPE, tree.types))


def describe_marks(confidence: NodeConfidence) -> str:
    """What the type of doubtful nodes means, for the header of their file."""
    return f"type {DOUBTFUL_TYPE}: somewhere less sure than {confidence.threshold:g}"


def table_paths(out: Path, name: str) -> tuple[Path, Path]:
    """Where the tables of places and of neurons of a volume are."""
    return out / "proofread" / f"{name}.csv", out / "proofread" / f"{name}.neurons.csv"


def build_neuroglancer_state(
    name: str, places: Sequence[DoubtfulPlace], shape: Shape, voxel_size: VoxelSize, base: str = "http://HOST"
) -> dict[str, Any]:
    """A state that shows the probability, the mask and the places; base: where OUT is served (`infer serve`)."""
    url = f"zarr3://{base}/{name}.ome.zarr/"
    center = [size / 2 for size in shape]

    # Places are kept inside the state, so that it needs no further file.
    points = [
        {
            "type": "point",
            "id": str(place.rank),
            "point": [place.z, place.y, place.x],
            "description": f"{place.kind}, doubt {place.doubt:.2f}",
        }
        for place in places
    ]

    return {
        # Neuroglancer takes meters.
        "dimensions": {axis: [size * 1e-6, "m"] for axis, size in zip("zyx", voxel_size, strict=True)},
        # Arrays are z y x, and x points to the right on a screen.
        "displayDimensions": ["x", "y", "z"],
        # The worst place is where a person begins.
        "position": [places[0].z, places[0].y, places[0].x] if places else center,
        "layers": [
            {
                "type": "image",
                "name": "probability",
                "source": url,
                "shader": _RED_SHADER,
                # Added to the layer below, which so stays visible.
                "blend": "additive",
                "opacity": 1,
            },
            # Hidden at first, because it covers the probability.
            {"type": "segmentation", "name": "mask", "source": f"{url}labels/mask/", "visible": False},
            {"type": "annotation", "name": "doubtful places", "source": "local://annotations", "annotations": points},
        ],
    }


def _find_weak_stretches(forest: _ScoredForest) -> Iterator[DoubtfulPlace]:
    """A place for each run of gap, faint or unsteady edges, at its least sure node."""
    confidence = forest.confidence
    lowest = confidence.lowest

    # Later kinds replace earlier ones: the most serious one names an edge.
    kinds = np.zeros(len(forest.tree), dtype=np.int64)
    kinds[lowest < confidence.threshold] = 1
    kinds[confidence.plain < confidence.threshold] = 2
    kinds[confidence.plain < confidence.low] = 3

    for run in _find_runs(forest.tree, kinds):
        worst = int(run[lowest[run].argmin()])
        kind = ("unsteady", "faint", "gap")[kinds[worst] - 1]
        # The doubt of an unsteady place is the disagreement alone.
        doubt = 0.0 if kind == "unsteady" else float(1 - confidence.plain[run].min())
        yield forest.make_place(kind, worst, doubt)


def _find_bright_ends(forest: _ScoredForest, shape: Shape) -> Iterator[DoubtfulPlace]:
    """A place for each tip inside the volume whose neurite is still bright: it may go on."""
    tree, confidence = forest.tree, forest.confidence
    threshold = confidence.threshold

    # A neurite that leaves the volume ends there rightly.
    distance_to_border = np.minimum(tree.points, np.array(shape) - 1 - tree.points).min(axis=1)

    # A neurite that fades has ended; one that is still bright may go on.
    is_bright = confidence.plain >= max(threshold, 0.5 * (1 + threshold))

    for node in morphology.tips(tree).tolist():
        if distance_to_border[node] > _BORDER and is_bright[node]:
            yield forest.make_place("end", node, float(confidence.plain[node] - threshold) / 2)


def _list_contacts(forest: _ScoredForest, contacts: Sequence[Contact]) -> Iterator[DoubtfulPlace]:
    """A place for each contact, at the node of the tree that is nearest to it."""
    if not contacts:
        return
    positions = np.array([contact.position for contact in contacts])
    nodes = np.asarray(cKDTree(forest.tree.points).query(positions)[1]).tolist()

    for contact, node in zip(contacts, nodes, strict=True):
        # What was cut off is no longer part of the tree, but it is what a wrong cut costs.
        place = forest.make_place("contact" if contact.is_cut else "touch", node, 2 * (1 - contact.certainty))
        yield replace(place, cable_um=round(contact.cable_um, 2))


def _find_turns(forest: _ScoredForest) -> Iterator[DoubtfulPlace]:
    """A place for each sharp bend of an unbranched path; of bends of a tree that lie close together the first."""
    tree = forest.tree
    last_turn = None

    # One bend is sharp at several neighboring nodes, and one look suffices.
    for node in _list_sharp_nodes(tree):
        is_other = last_turn is None or forest.tree_of[last_turn] != forest.tree_of[node]
        if is_other or np.linalg.norm(tree.points[last_turn] - tree.points[node]) >= 2 * _TURN_ARM:
            last_turn = node
            yield forest.make_place("turn", node, _TURN_DOUBT)


def _list_sharp_nodes(tree: Tree) -> list[int]:
    """Inner nodes of unbranched paths whose direction changes by more than `_TURN_DEGREES` within `_TURN_ARM`."""
    length, counts = morphology.edge_lengths(tree), morphology.child_counts(tree)

    # Walks pass nodes with one child only, so it does not matter which child a branch point keeps.
    child = np.full(len(tree), -1, dtype=np.int64)
    child[tree.parents[tree.parents >= 0]] = np.flatnonzero(tree.parents >= 0)
    nodes = np.flatnonzero((counts == 1) & (tree.parents >= 0))

    # All nodes walk along their paths at once, away from the root ...
    ahead, reach_ahead = nodes.copy(), np.zeros(len(nodes))
    while (walks := (reach_ahead < _TURN_ARM) & (counts[ahead] == 1)).any():
        ahead[walks] = child[ahead[walks]]
        reach_ahead[walks] += length[ahead[walks]]

    # ... and towards it.
    behind, reach_behind = nodes.copy(), np.zeros(len(nodes))
    while (walks := (reach_behind < _TURN_ARM) & (tree.parents[behind] >= 0)).any():
        reach_behind[walks] += length[behind[walks]]
        behind[walks] = tree.parents[behind[walks]]

    # Chords over an arm are steadier than single edges, which follow the voxels.
    arriving = tree.points[nodes] - tree.points[behind]
    leaving = tree.points[ahead] - tree.points[nodes]

    norms = np.linalg.norm(arriving, axis=1) * np.linalg.norm(leaving, axis=1)
    cosine = (arriving * leaving).sum(axis=1) / np.maximum(norms, 1e-9)

    # Near an end an arm is too short to have a direction.
    has_arms = np.minimum(reach_ahead, reach_behind) >= _TURN_ARM
    sharp: list[int] = nodes[has_arms & (cosine < np.cos(np.radians(_TURN_DEGREES)))].tolist()
    return sharp


def _measure_groups(forest: _ScoredForest, group_of: Ints) -> Floats:
    """[G, 4] for each group of nodes (`group_of` [N]): cable in um, and the sums by cable of what is as sure as the
    threshold, of the confidence and of the disagreement (NaN without mirrored views)."""
    confidence, edge_um = forest.confidence, forest.edge_um
    disagreement = confidence.disagreement

    # Weighted by cable, so that a densely sampled stretch counts no more than another.
    columns = [
        np.bincount(group_of, weights=weights)
        for weights in (
            edge_um,
            edge_um * (confidence.plain >= confidence.threshold),
            edge_um * confidence.plain,
            np.full(len(edge_um), np.nan) if disagreement is None else edge_um * disagreement,
        )
    ]
    return np.stack(columns, axis=1)


def _score_groups(sums: Floats) -> list[tuple[float, float, float, float | None]]:
    """For each group of [G, 4] sums: share of the cable that is as sure as the threshold, mean confidence, cable in
    um, mean disagreement."""
    cable = sums[:, 0]
    score, mean, disagreement = (
        [round(value, 4) for value in (column / np.maximum(cable, 1e-9)).tolist()] for column in sums[:, 1:].T
    )
    views = [None if math.isnan(value) else value for value in disagreement]
    return list(zip(score, mean, np.round(cable, 2).tolist(), views, strict=True))


def format_confidence_head(confidence: NodeConfidence) -> str:
    """The first line of ID.confidence.csv."""
    # Without mirrored views the further columns would repeat the first one or say nothing.
    columns = ["node", "confidence", *(("disagreement", "mean") if len(confidence.views) else ())]
    return ",".join(columns) + "\n"


def format_confidence(confidence: NodeConfidence, labels: ForestLabels) -> list[str]:
    """A line of ID.confidence.csv for each node."""
    columns = [confidence.plain]
    if confidence.disagreement is not None:
        columns += [confidence.disagreement, confidence.mean]

    # Four digits tell stored levels apart, of which there are 256.
    rounded = [np.round(column, 4).tolist() for column in columns]
    return [",".join(map(repr, row)) + "\n" for row in zip(labels.nodes.tolist(), *rounded, strict=True)]


def _spread_over_sections(tree: Tree, marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N] whether any node of the unbranched section of each is marked; an SWC section has one type."""
    counts, section = morphology.child_counts(tree), np.arange(len(tree))

    # Parents come before their children, so the section that is copied is final.
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0 and counts[parent] == 1:
            section[node] = section[parent]
    return np.isin(section, section[marked])


def _find_runs(tree: Tree, kinds: NDArray[np.integer[Any]]) -> list[Ints]:
    """Connected nodes of one kind other than 0."""
    label = np.full(len(tree), -1, dtype=np.int64)

    # Parents come before their children, so a run is named by its first node.
    for node, parent in enumerate(tree.parents.tolist()):
        if kinds[node]:
            label[node] = label[parent] if parent >= 0 and kinds[parent] == kinds[node] else node

    # One sort gathers all runs, where a search for each label would cost a pass each.
    order = np.argsort(label, kind="stable")
    order = order[np.searchsorted(label[order], 0) :]
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if len(order) else []


def format_head(kind: type[Any]) -> str:
    """The first line of a table of DoubtfulPlace, NeuronScore or BlockScore."""
    return ",".join(kind.__dataclass_fields__) + "\n"


def format_rows(rows: Sequence[Any]) -> list[str]:
    """A line of a table for each of its rows."""
    text = io.StringIO()
    # The csv module would end lines with CR LF.
    csv.writer(text, lineterminator="\n").writerows(asdict(row).values() for row in rows)
    return text.getvalue().splitlines(keepends=True)
