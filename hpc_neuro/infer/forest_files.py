"""The files of the trees of a large volume, written by all ranks: byte for byte those that one process would write.

Each step leaves a file in the volume's folder of OUT/strands, with which the next start resumes:

    order (per volume) -> order.npz         write_batch (per batch) -> items_N.npz, and files of single trees
    plan (per file) -> NAME.ranges.npy      write_run (per stretches and batches of a file) -> NAME.run_K
    write_range, hash_range (per stretch of a file) -> NAME.range_K, NAME.sum_K
    finish (per volume) -> the files in their places

Trees are numbered as in one process, so the trees of a batch lie scattered over the files of all trees. Ranks therefore
write their texts batch by batch, and gather each stretch of a file from the batches (see core/sorted_parts.py).
"""

from __future__ import annotations

import csv
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology, sorted_parts
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.sorted_parts import Items, Stream
from hpc_neuro.data import swc
from hpc_neuro.data.swc import forest as swc_forest
from hpc_neuro.infer import proofread, super_blocks
from hpc_neuro.infer.proofread import BlockSums, DoubtfulPlace, ForestLabels, NeuronScore, NodeConfidence
from hpc_neuro.infer.trees import (
    Floats,
    PredictionEntry,
    VolumeTrees,
    list_comments,
    read_contacts,
    save_arrays,
    write_single_tree,
)
from hpc_neuro.tracing import Contact

log = logging.getLogger(__name__)
Ints = NDArray[np.int64]
LoadViews = Callable[[Tree, int], Floats]
"""[K, N] confidence in mirrored views of the trees of a batch, of that number."""
_FILES = {
    "swc": "swc/{}.swc",
    "voxel": "swc/{}.voxel.swc",
    "marked": "proofread/{}.swc",
    "confidence": "proofread/{}.confidence.csv",
    "places": "proofread/{}.csv",
    "neurons": "proofread/{}.neurons.csv",
}
"""Name of a stream -> its file, relative to `out`."""
_NO_INTS = np.zeros(0, dtype=np.int64)
_EMPTY_STREAMS = {
    **dict.fromkeys(("swc", "voxel", "marked", "confidence"), Items([_NO_INTS], [])),
    "places": Items([np.zeros(0), _NO_INTS, _NO_INTS], []),
    "neurons": Items([np.zeros(0), _NO_INTS], []),
}
_EMPTY_FACTS: dict[str, NDArray[Any]] = {
    "cable": np.zeros(0),
    "score": np.zeros(0),
    "blocks": np.zeros((0, 3), dtype=np.int64),
    "sums": np.zeros((0, 4)),
    "places": np.array(0),
    "somas": np.array([0, 0]),
}
"""What a batch without trees adds to the files."""
STREAMS = tuple(_FILES)
"""Names of the files that ranks write together."""


@dataclass(frozen=True)
class Order:
    """Where the trees of B batches stand in the files. What is kept of each tree lies in arrays beside it."""

    starts: Ints
    """[B + 1] the trees before each batch."""
    first_batch: Ints
    """[1] the batch whose first tree is tree 1; -1 without trees."""

    @property
    def batches(self) -> int:
        """B."""
        return len(self.starts) - 1

    @property
    def trees(self) -> int:
        """Trees of all batches."""
        return int(self.starts[-1])


def order(trees: VolumeTrees) -> None:
    """Number the trees of all batches as one process does: in the order of the roots, or longest first."""
    summaries = [super_blocks.read_summary(trees, batch) for batch in range(super_blocks.count_batches(trees))]
    nodes = np.concatenate([np.zeros(0, dtype=np.int64), *(summary.sizes for summary in summaries)])
    places = np.concatenate([np.zeros(0), *(summary.places for summary in summaries)])

    # Equal trees stay in the order of the batches.
    sequence = np.argsort(places, kind="stable")
    starts = np.cumsum([0, *(len(summary.sizes) for summary in summaries)])
    numbers, first_ids = np.empty(len(nodes), dtype=np.int64), np.empty(len(nodes), dtype=np.int64)
    numbers[sequence] = np.arange(1, len(nodes) + 1)

    first_batch = int(np.searchsorted(starts, sequence[0], side="right")) - 1 if len(nodes) else -1
    if len(nodes):
        # The first tree has rows of its own, for readers that want a soma.
        rows = nodes[sequence]
        rows[0] = swc_forest.count_first_rows(_load_first_tree(trees, first_batch))
        first_ids[sequence] = np.cumsum(rows) - rows + 1

    trees.begin_files()
    files.write_npy(trees.scratch / "order_numbers.npy", numbers)
    files.write_npy(trees.scratch / "order_ids.npy", first_ids)
    save_arrays(trees.order_path, Order(starts, np.array([first_batch])))
    log.info("%s: %d trees, %d nodes", trees.volume.source.id, len(nodes), nodes.sum())


def read_order(trees: VolumeTrees) -> Order:
    """What `order` kept."""
    with np.load(trees.order_path) as arrays:
        return Order(**arrays)


def list_batches_to_write(trees: VolumeTrees) -> list[int]:
    """The batches whose texts are missing."""
    if not _is_ordered(trees):
        return []
    kept = trees.list_kept()
    return [n for n in range(read_order(trees).batches) if sorted_parts.name_part(n) not in kept]


def write_batch(trees: VolumeTrees, batch: int, load_views: LoadViews) -> None:
    """Write the files of the single trees of a batch, and keep what it adds to the files of all trees."""
    source, cfg = trees.volume.source, trees.cfg.trace
    forest, volume_order = trees.load_batch(batch), read_order(trees)
    # All pieces of a batch may be too short to be trees.
    if not len(forest):
        sorted_parts.write_part(trees.scratch, batch, _EMPTY_STREAMS, _EMPTY_FACTS)
        return

    plain = super_blocks.read_confidence(trees, batch)
    numbers, labels = _label_batch(trees, volume_order, batch, forest)
    views = load_views(forest, batch)
    confidence = NodeConfidence(plain, views, cfg.floor, cfg.threshold)
    contacts = read_contacts(super_blocks.contacts_path(trees, batch))
    single_trees = morphology.split_components(forest)
    facts = _write_single_trees(trees, single_trees, numbers) if _has_own_files(trees, volume_order) else {}
    block = trees.volume.tiling.write
    write_texts(
        trees.scratch,
        batch,
        forest,
        numbers,
        labels,
        confidence,
        source.shape,
        source.voxel_size,
        block,
        contacts,
        facts,
    )


def write_texts(
    folder: Path,
    batch: int,
    forest: Tree,
    numbers: Ints,
    labels: ForestLabels,
    confidence: NodeConfidence,
    shape: Shape,
    voxel_size: VoxelSize,
    block: Shape,
    contacts: Sequence[Contact] = (),
    facts: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write what the trees of a batch, of `numbers` [T], add to the files of all trees. `facts` are kept with it."""
    places = proofread.find_places(forest, confidence, shape, voxel_size, contacts, labels)
    neurons = proofread.score_neurons(forest, confidence, voxel_size, labels)
    blocks = proofread.measure_blocks(forest, confidence, block, voxel_size)

    trees = morphology.split_components(forest)
    marked = morphology.split_components(proofread.mark_doubtful(forest, confidence))
    streams = {
        "swc": _format_trees([morphology.scale_tree(tree, voxel_size) for tree in trees], numbers, labels),
        "voxel": _format_trees(trees, numbers, labels),
        "marked": _format_trees([morphology.scale_tree(tree, voxel_size) for tree in marked], numbers, labels),
        "confidence": _group_lines(proofread.format_confidence(confidence, labels), trees, numbers),
        "places": _make_place_items(places),
        "neurons": _make_neuron_items(neurons),
    }
    own_facts: dict[str, NDArray[Any]] = {
        "cable": np.array([neuron.cable_um for neuron in neurons]),
        "score": np.array([neuron.score for neuron in neurons]),
        "blocks": blocks.indices,
        "sums": blocks.sums,
        "places": np.array(len(places)),
        "somas": np.array([_count_other_somas(part, numbers) for part in (trees, marked)]),
        "first marked": marked[0].types,
    }
    sorted_parts.write_part(folder, batch, streams, own_facts | dict(facts or {}))


def list_streams_to_plan(trees: VolumeTrees) -> list[str]:
    """The files whose lines are not in order."""
    if not _has_trees(trees):
        return []
    return [name for name in STREAMS if not sorted_parts.is_planned(trees.scratch, _make_stream(trees, name))]


def plan(trees: VolumeTrees, name: str) -> None:
    """Put the lines of one file in order, and make it in its whole size."""
    volume_order = read_order(trees)
    stream = replace(_make_stream(trees, name), header=_format_header(trees, volume_order, name).encode())
    sorted_parts.plan_stream(trees.scratch, volume_order.batches, stream)


def list_runs_to_write(trees: VolumeTrees) -> list[tuple[str, int]]:
    """The runs that are missing: copies of what many batches have of many stretches of a file."""
    return _list_missing(trees, sorted_parts.list_missing_runs)


def write_run(trees: VolumeTrees, name: str, number: int) -> None:
    """Write one run."""
    sorted_parts.write_run(trees.scratch, _make_stream(trees, name), number)


def list_ranges_to_write(trees: VolumeTrees) -> list[tuple[str, int]]:
    """The stretches of files that are missing."""
    return _list_missing(trees, sorted_parts.list_missing_ranges)


def write_range(trees: VolumeTrees, name: str, number: int) -> None:
    """Write one stretch of a file."""
    sorted_parts.write_range(trees.scratch, _make_stream(trees, name), number)


def list_ranges_to_hash(trees: VolumeTrees) -> list[tuple[str, int]]:
    """The stretches of files that are not hashed."""
    return _list_missing(trees, sorted_parts.list_missing_sums)


def hash_range(trees: VolumeTrees, name: str, number: int) -> None:
    """Hash one stretch of a file."""
    sorted_parts.hash_range(trees.scratch, _make_stream(trees, name), number)


def finish(trees: VolumeTrees) -> tuple[PredictionEntry, dict[str, str]]:
    """Move the files to their places; what the entry says of the trees, and the checksum of each file."""
    out, name, volume_order = trees.cfg.out, trees.volume.source.id, read_order(trees)
    # A volume may hold no neurite, and a tree of no nodes is no SWC.
    if not volume_order.trees:
        return {"trees": 0}, {}

    checksums = dict[str, str]()
    for stream_name, file in _FILES.items():
        checksums[file.format(name)] = sorted_parts.finish_stream(trees.scratch, _make_stream(trees, stream_name))

    facts = [sorted_parts.read_facts(trees.scratch, batch) for batch in range(volume_order.batches)]
    _write_small_tables(trees, facts)
    for kind in ("blocks.csv", "neuroglancer.json"):
        checksums[f"proofread/{name}.{kind}"] = files.checksum(out / "proofread" / f"{name}.{kind}")
    for part in facts:
        checksums |= dict(
            zip(part.get("files", np.zeros(0)).tolist(), part.get("digests", np.zeros(0)).tolist(), strict=True)
        )

    scores, cables = (np.concatenate([part[key] for part in facts]).tolist() for key in ("score", "cable"))
    entry = trees.describe_trees(
        volume_order.trees, sum(int(part["places"]) for part in facts), proofread.average_score(scores, cables)
    )
    return entry, checksums


def _write_small_tables(trees: VolumeTrees, facts: Sequence[Mapping[str, NDArray[Any]]]) -> None:
    """Write the table of blocks, which follows the volume and not its trees, and the state for Neuroglancer."""
    source, folder = trees.volume.source, trees.cfg.out / "proofread"
    blocks = proofread.add_blocks([BlockSums(part["blocks"], part["sums"]) for part in facts])
    text = proofread.format_head(proofread.BlockScore) + "".join(proofread.format_rows(proofread.score_blocks(blocks)))
    files.write_text(folder / f"{source.id}.blocks.csv", text)

    with (folder / f"{source.id}.csv").open(encoding="utf-8") as file:
        rows = list(itertools.islice(csv.DictReader(file), proofread.SHOWN_PLACES))
    state = proofread.build_neuroglancer_state(source.id, [*map(_parse_place, rows)], source.shape, source.voxel_size)
    files.write_json(folder / f"{source.id}.neuroglancer.json", state)


def _parse_place(row: Mapping[str, str]) -> DoubtfulPlace:
    """A place from its line in the table."""
    return DoubtfulPlace(
        rank=int(row["rank"]),
        kind=row["kind"],
        z=float(row["z"]),
        y=float(row["y"]),
        x=float(row["x"]),
        doubt=float(row["doubt"]),
        disagreement=float(row["disagreement"]) if row["disagreement"] else None,
        cable_um=float(row["cable_um"]),
        neuron=int(row["neuron"]),
        node=int(row["node"]),
    )


def _label_batch(trees: VolumeTrees, volume_order: Order, batch: int, forest: Tree) -> tuple[Ints, ForestLabels]:
    """[T] the numbers of the trees of a batch, and their labels."""
    first, stop = volume_order.starts[batch : batch + 2].tolist()
    numbers, first_ids = (
        files.read_npy_rows(trees.scratch / f"order_{name}.npy", first, stop) for name in ("numbers", "ids")
    )

    tree_of = morphology.label_components(forest)
    firsts = np.searchsorted(tree_of, np.arange(len(numbers)))
    nodes = first_ids[tree_of] + np.arange(len(forest)) - firsts[tree_of]
    if numbers[0] == 1:
        is_first = tree_of == 0
        nodes[is_first] = swc.node_ids(morphology.select_nodes(forest, is_first))
    return numbers, ForestLabels(numbers, nodes)


def _format_trees(forest: Sequence[Tree], numbers: Ints, labels: ForestLabels) -> Items:
    """The rows of each tree in the file of all."""
    texts, node = list[bytes](), 0
    for tree, number in zip(forest, numbers.tolist(), strict=True):
        if number == 1:
            text = swc_forest.format_first_tree(tree)
        else:
            text = swc_forest.format_further_tree(tree, int(labels.nodes[node]))
        texts.append(text.encode())
        node += len(tree)
    return Items([numbers], texts)


def _group_lines(lines: Sequence[str], forest: Sequence[Tree], numbers: Ints) -> Items:
    """The lines of the nodes of each tree."""
    ends = np.cumsum([0, *map(len, forest)]).tolist()
    return Items([numbers], ["".join(lines[begin:end]).encode() for begin, end in itertools.pairwise(ends)])


def _make_place_items(places: Sequence[DoubtfulPlace]) -> Items:
    weights = np.array([-proofread.weigh_place(place) for place in places], dtype=np.float64)
    nodes = np.array([place.node for place in places], dtype=np.int64)
    # The rank among all places comes before each line.
    lines = [line.partition(",")[2].encode() for line in proofread.format_rows(places)]
    return Items([weights, nodes, np.arange(len(places))], lines)


def _make_neuron_items(neurons: Sequence[NeuronScore]) -> Items:
    scores, numbers = np.array([n.score for n in neurons]), np.array([n.neuron for n in neurons], dtype=np.int64)
    return Items([scores, numbers], [line.encode() for line in proofread.format_rows(neurons)])


def _count_other_somas(forest: Sequence[Tree], numbers: Ints) -> int:
    """Trees other than the first with a soma."""
    pairs = zip(forest, numbers.tolist(), strict=True)
    return sum(swc_forest.has_soma(tree) for tree, number in pairs if number > 1)


def _has_own_files(trees: VolumeTrees, volume_order: Order) -> bool:
    # A single tree would only repeat the file of all.
    return 1 < volume_order.trees <= trees.cfg.tree_files


def _write_single_trees(trees: VolumeTrees, forest: Sequence[Tree], numbers: Ints) -> dict[str, NDArray[Any]]:
    """Write each tree to files of its own; their names and checksums."""
    out, paths = trees.cfg.out, list[Path]()
    for tree, number in zip(forest, numbers.tolist(), strict=True):
        paths += write_single_tree(out, number, tree, trees.volume.source)

    # Taken from the disk, so that any later change of a file is noticed.
    digests = [files.checksum(path) for path in paths]
    return {"files": np.array([path.relative_to(out).as_posix() for path in paths]), "digests": np.array(digests)}


def _format_header(trees: VolumeTrees, volume_order: Order, name: str) -> str:
    """What stands in a file before its first tree or place."""
    source, cfg = trees.volume.source, trees.cfg.trace
    views = np.zeros((len(trees.cfg.flips), 0))
    confidence = NodeConfidence(np.zeros(0), views, cfg.floor, cfg.threshold)
    if name == "confidence":
        return proofread.format_confidence_head(confidence)
    if name in ("places", "neurons"):
        return proofread.format_head(DoubtfulPlace if name == "places" else NeuronScore)

    facts = [sorted_parts.read_facts(trees.scratch, batch) for batch in range(volume_order.batches)]
    first_batch = int(volume_order.first_batch[0])
    first, comments = _load_first_tree(trees, first_batch), list_comments(source)
    if name == "marked":
        first, comments = (
            replace(first, types=facts[first_batch]["first marked"].astype(np.int64)),
            [proofread.describe_marks(confidence)],
        )
    somas = sum(int(part["somas"][int(name == "marked")]) for part in facts)
    return swc_forest.format_forest_header(
        first,
        volume_order.trees,
        somas,
        unit="voxel" if name == "voxel" else "um",
        voxel_size=source.voxel_size,
        comments=comments,
    )


def _load_first_tree(trees: VolumeTrees, first_batch: int) -> Tree:
    return morphology.split_components(trees.load_batch(first_batch))[0]


def _make_stream(trees: VolumeTrees, name: str) -> Stream:
    """One file, without its header, which only `plan` needs."""
    return Stream(name, trees.cfg.out / _FILES[name].format(trees.volume.source.id), is_ranked=name == "places")


def _list_missing(trees: VolumeTrees, list_numbers: Callable[[Path, Stream], list[int]]) -> list[tuple[str, int]]:
    if not _has_trees(trees):
        return []
    return [(name, n) for name in STREAMS for n in list_numbers(trees.scratch, _make_stream(trees, name))]


def _has_trees(trees: VolumeTrees) -> bool:
    return _is_ordered(trees) and read_order(trees).trees > 0


def _is_ordered(trees: VolumeTrees) -> bool:
    # A kill may leave part of what is removed at the end.
    return trees.order_path.exists() and trees.read_entry() is None
