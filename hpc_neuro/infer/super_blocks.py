"""The trees of a large volume, traced in super-blocks by all ranks (see tracing/super_blocks.py).

Each step leaves a file in the volume's folder of OUT/strands, with which the next start resumes:

    trace (per super-block) -> lines_Z_Y_X.npz    group (per volume) -> groups.npz
    finish (per batch of pieces) -> trees_N.npz, contacts_N.json            collect (per volume) -> forest.npz
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from hpc_neuro.core import files, morphology, stop_signals
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.infer.trees import VolumeTrees, open_probability, read_contacts, save_arrays
from hpc_neuro.tracing import TracedVolume
from hpc_neuro.tracing.super_blocks import (
    PieceGroups,
    SuperBlockLines,
    collect_trees,
    finish_batch,
    group_pieces,
    list_blocks_of,
    list_super_blocks,
    trace_super_block,
)


def list_super_blocks_to_trace(trees: VolumeTrees) -> list[Box]:
    """The super-blocks of a large volume whose lines are missing."""
    if not _is_in_parts(trees) or _groups_path(trees).exists():
        return []
    return [core for core in _list_cores(trees) if not _lines_path(trees, core).exists()]


def trace_lines(trees: VolumeTrees, core: Box) -> None:
    """Trace one super-block and keep its lines. InputError for a root off all foreground."""
    source, cfg = trees.volume.source, trees.cfg.trace
    blocks = list_blocks_of(core, source.shape, source.voxel_size, cfg)
    skeletons = {box: skeleton for box in blocks if (skeleton := trees.load_skeleton(box)) is not None}

    lines = trace_super_block(
        skeletons,
        open_probability(trees.volume.folder),
        source.shape,
        core,
        source.voxel_size,
        roots=source.roots,
        cfg=cfg,
        image=stop_signals.stop_on_request(source.read),
    )
    save_arrays(_lines_path(trees, core), lines)


def needs_groups(trees: VolumeTrees) -> bool:
    """Whether the pieces of a large volume are still to be joined over its super-blocks."""
    return _is_in_parts(trees) and not _groups_path(trees).exists()


def group(trees: VolumeTrees) -> None:
    """Join the pieces of all super-blocks. InputError for two roots at one place."""
    source, cores = trees.volume.source, _list_cores(trees)

    def load(number: int) -> SuperBlockLines | None:
        stop_signals.check()
        return read_lines(_lines_path(trees, cores[number]))

    groups = group_pieces(load, cores, source.shape, roots=source.roots, cfg=trees.cfg.trace)
    save_arrays(_groups_path(trees), groups)


def list_batches_to_finish(trees: VolumeTrees) -> list[int]:
    """The batches of pieces whose trees are missing."""
    if not _is_in_parts(trees):
        return []
    batches = range(_load_groups(trees).batches)
    return [batch for batch in batches if not _trees_path(trees, batch).exists()]


def finish(trees: VolumeTrees, batch: int) -> None:
    """Make the trees of a batch of pieces and keep them."""
    source, cores = trees.volume.source, _list_cores(trees)
    traced = finish_batch(
        lambda number: read_lines(_lines_path(trees, cores[number])),
        _load_groups(trees),
        batch,
        open_probability(trees.volume.folder),
        source.shape,
        source.voxel_size,
        roots=source.roots,
        cfg=trees.cfg.trace,
        image=stop_signals.stop_on_request(source.read),
    )

    # The trees come last: with them the batch counts as finished.
    files.write_json(_contacts_path(trees, batch), [asdict(contact) for contact in traced.contacts])
    save_arrays(_trees_path(trees, batch), morphology.concatenate_trees(traced.trees))


def collect(trees: VolumeTrees) -> TracedVolume:
    """The trees of all batches."""
    groups = _load_groups(trees)
    return collect_trees([_load_batch(trees, batch) for batch in range(groups.batches)], groups)


def is_large(trees: VolumeTrees) -> bool:
    """Whether a volume has more than one super-block."""
    return len(_list_cores(trees)) > 1


def _is_in_parts(trees: VolumeTrees) -> bool:
    return trees.needs_tracing() and is_large(trees)


def _list_cores(trees: VolumeTrees) -> list[Box]:
    return list_super_blocks(trees.volume.source.shape, trees.cfg.trace)


def read_lines(path: Path) -> SuperBlockLines | None:
    """The lines that `save_arrays` wrote; None where a super-block has none."""
    with np.load(path) as arrays:
        return SuperBlockLines(**arrays) if arrays.files else None


def _load_groups(trees: VolumeTrees) -> PieceGroups:
    with np.load(_groups_path(trees)) as arrays:
        return PieceGroups(**arrays)


def _load_batch(trees: VolumeTrees, batch: int) -> TracedVolume:
    with np.load(_trees_path(trees, batch)) as arrays:
        forest = Tree(**arrays)
    return TracedVolume(morphology.split_components(forest), read_contacts(_contacts_path(trees, batch)))


def _lines_path(trees: VolumeTrees, core: Box) -> Path:
    return trees.scratch / f"lines_{'_'.join(map(str, core.start))}.npz"


def _groups_path(trees: VolumeTrees) -> Path:
    return trees.scratch / "groups.npz"


def _trees_path(trees: VolumeTrees, batch: int) -> Path:
    return trees.scratch / f"trees_{batch}.npz"


def _contacts_path(trees: VolumeTrees, batch: int) -> Path:
    return trees.scratch / f"contacts_{batch}.json"
