"""The trees of a large volume, traced in super-blocks by all ranks (see tracing/super_blocks.py).

Each step leaves a file in the volume's folder of OUT/strands, with which the next start resumes:

    trace_lines (per super-block) -> lines_Z_Y_X.npz    link (per super-block) -> links_Z_Y_X.npz
    group (per volume) -> groups.npz
    finish (per batch of pieces) -> trees_N.npz, contacts_N.json            then forest_files.py
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology, stop_signals
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.infer.trees import Floats, VolumeTrees, log_contacts, save_arrays
from hpc_neuro.tracing import measure_confidence
from hpc_neuro.tracing.super_blocks import (
    PieceGroups,
    SuperBlockLines,
    SuperBlockLinks,
    finish_batch,
    group_pieces,
    link_super_block,
    list_blocks_of,
    list_super_blocks,
    trace_super_block,
)

log = logging.getLogger(__name__)
Ints = NDArray[np.int64]
_BATCH_BYTES, _VOXEL_BYTES = 50 << 20, 500
"""[bytes] Memory that finishing a batch takes, and for each voxel of its pieces besides; measured on straight lines."""


def list_super_blocks_to_trace(trees: VolumeTrees) -> list[Box]:
    """The super-blocks of a large volume whose lines are missing."""
    if not needs_groups(trees):
        return []
    kept = trees.list_kept()
    return [core for core in _list_cores(trees) if _lines_path(trees, core).name not in kept]


def trace_lines(trees: VolumeTrees, core: Box) -> None:
    """Trace one super-block and keep its lines. InputError for a root off all foreground."""
    grid, cfg = trees.open_grid(), trees.cfg.trace
    blocks = list_blocks_of(core, grid.shape, grid.voxel_size, cfg)
    skeletons = {box: skeleton for box in blocks if (skeleton := trees.load_skeleton(box)) is not None}

    lines = trace_super_block(
        skeletons,
        grid.read_probability,
        grid.shape,
        core,
        grid.voxel_size,
        roots=grid.roots,
        cfg=cfg,
        image=grid.read_image,
    )
    save_arrays(_lines_path(trees, core), lines)


def needs_groups(trees: VolumeTrees) -> bool:
    """Whether the pieces of a large volume are still to be joined over its super-blocks."""
    return _is_in_parts(trees) and not _groups_path(trees).exists()


def list_super_blocks_to_link(trees: VolumeTrees) -> list[int]:
    """The super-blocks, by their place in the list of all, whose links are missing."""
    if not needs_groups(trees):
        return []
    kept = trees.list_kept()
    return [number for number, core in enumerate(_list_cores(trees)) if _links_path(trees, core).name not in kept]


def link(trees: VolumeTrees, number: int) -> None:
    """Find what joins the pieces of one super-block to those of its neighbors, and keep it."""
    grid, cores = trees.open_grid(), _list_cores(trees)

    def load(number: int) -> SuperBlockLines | None:
        stop_signals.check()
        return read_lines(_lines_path(trees, cores[number]))

    roots, cfg = grid.roots, trees.cfg.trace
    links = link_super_block(load, number, cores, grid.shape, grid.voxel_size, roots=roots, cfg=cfg)
    save_arrays(_links_path(trees, cores[number]), links)


def group(trees: VolumeTrees) -> None:
    """Join the pieces of all super-blocks. InputError for two roots at one place."""
    load, count = _make_links_reader(trees), len(_list_cores(trees))
    groups = group_pieces(load, count, roots=trees.open_grid().roots, cfg=trees.cfg.trace)
    log_memory(trees.volume.source.id, int(groups.largest[0]), _read_memory())
    save_arrays(_groups_path(trees), groups)


def log_memory(name: str, voxels: int, available: int) -> None:
    """State the memory that the largest batch of a volume will take on one rank. available: [bytes] of a node."""
    needed = _BATCH_BYTES + _VOXEL_BYTES * voxels
    facts = name, voxels, files.format_bytes(needed)
    log.info("%s: the largest group of pieces has %d voxels of centerlines, about %s of memory on one rank", *facts)
    if needed > available:
        log.warning(
            "%s: this is more than the %s of this node; if a rank is killed there, give `roots` or a higher "
            "`trace.threshold`, which keep groups small, or run the same command on nodes with more memory",
            name,
            files.format_bytes(available),
        )


def _read_memory() -> int:
    """[bytes] Memory of this node."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def list_batches_to_finish(trees: VolumeTrees) -> list[int]:
    """The batches of pieces whose trees are missing."""
    if not _is_in_parts(trees):
        return []
    kept, batches = trees.list_kept(), range(_load_groups(trees).batches)
    return [batch for batch in batches if trees.batch_path(batch).name not in kept]


def finish(trees: VolumeTrees, batch: int) -> None:
    """Make the trees of a batch of pieces and keep them."""
    source, grid, cores, groups = trees.volume.source, trees.open_grid(), _list_cores(trees), _load_groups(trees)
    traced = finish_batch(
        lambda number: read_lines(_lines_path(trees, cores[number])),
        groups.list_members(batch, _make_links_reader(trees)),
        groups,
        batch,
        grid.read_probability,
        grid.shape,
        grid.voxel_size,
        roots=grid.roots,
        cfg=trees.cfg.trace,
        image=grid.read_image,
    )
    traced = trees.move_back(traced)

    # The trees come last: with them the batch counts as finished.
    log_contacts(source.id, traced)
    files.write_json(contacts_path(trees, batch), [asdict(contact) for contact in traced.contacts])
    numbers = np.flatnonzero(groups.root_batch == batch)
    forest = morphology.concatenate_trees(traced.trees)
    # Measured now, while this process has the shards around: who writes the trees reads none.
    confidence = measure_confidence(forest, trees.read_probability, source.shape) if len(forest) else np.zeros(0)
    packed = BatchTrees.pack(forest, traced.trees, confidence, numbers if source.roots else None)
    save_arrays(trees.batch_path(batch), packed)


@dataclass(frozen=True)
class BatchTrees(Tree):
    """The T trees of a batch, how sure they are, and where they stand among all trees of the volume."""

    confidence: Floats
    """[N] of each node."""
    sizes: Ints
    """[T] nodes."""
    places: Floats
    """[T] what trees are ordered by: the number of the root, or without roots minus the cable."""

    @classmethod
    def pack(cls, forest: Tree, trees: Sequence[Tree], confidence: Floats, roots: Ints | None) -> BatchTrees:
        """Trees, and the `forest` of them, in the order of their `roots` [T], or longest first."""
        places = [-morphology.length(tree) for tree in trees] if roots is None else roots.tolist()
        sizes = np.array([len(tree) for tree in trees], dtype=np.int64)
        order = np.array(places, dtype=np.float64)
        return cls(forest.points, forest.radii, forest.parents, forest.types, confidence, sizes, order)


@dataclass(frozen=True)
class BatchSummary:
    """What the order of the trees needs to know of a batch; see BatchTrees."""

    sizes: Ints
    places: Floats


def read_summary(trees: VolumeTrees, batch: int) -> BatchSummary:
    """The summary of a finished batch; its nodes are not read."""
    with np.load(trees.batch_path(batch)) as arrays:
        return BatchSummary(arrays["sizes"], arrays["places"])


def read_confidence(trees: VolumeTrees, batch: int) -> Floats:
    """[N] the confidence of the nodes of a finished batch."""
    with np.load(trees.batch_path(batch)) as arrays:
        return np.asarray(arrays["confidence"])


def count_batches(trees: VolumeTrees) -> int:
    """The number of batches of a volume whose pieces are joined."""
    return _load_groups(trees).batches


def _is_in_parts(trees: VolumeTrees) -> bool:
    return trees.is_large and trees.needs_tracing()


def _list_cores(trees: VolumeTrees) -> list[Box]:
    return list_super_blocks(trees.traced_shape, trees.cfg.trace)


def read_lines(path: Path) -> SuperBlockLines | None:
    """The lines that `save_arrays` wrote; None where a super-block has none."""
    with np.load(path) as arrays:
        return SuperBlockLines(**arrays) if arrays.files else None


def _make_links_reader(trees: VolumeTrees) -> Callable[[int], SuperBlockLinks | None]:
    """Reads the links of a super-block by its place in the list of all; None where it has no lines."""
    cores = _list_cores(trees)

    def read(number: int) -> SuperBlockLinks | None:
        stop_signals.check()
        with np.load(_links_path(trees, cores[number])) as arrays:
            return SuperBlockLinks(**arrays) if arrays.files else None

    return read


def _load_groups(trees: VolumeTrees) -> PieceGroups:
    with np.load(_groups_path(trees)) as arrays:
        return PieceGroups(**arrays)


def _lines_path(trees: VolumeTrees, core: Box) -> Path:
    return trees.scratch / f"lines_{'_'.join(map(str, core.start))}.npz"


def _links_path(trees: VolumeTrees, core: Box) -> Path:
    return trees.scratch / f"links_{'_'.join(map(str, core.start))}.npz"


def _groups_path(trees: VolumeTrees) -> Path:
    return trees.scratch / "groups.npz"


def contacts_path(trees: VolumeTrees, batch: int) -> Path:
    """Where the contacts of a batch are."""
    return trees.scratch / f"contacts_{batch}.json"
