"""The file that `write` makes of many trees, tree by tree: each may be formatted by another process.

`write` gives the first tree the soma of the file, and makes the somas of all others plain nodes. So the rows of a tree
depend on the others only by its place and by its first id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.swc.header import Unit
from hpc_neuro.data.swc.standardize import SOMA, UNDEFINED, describe_other_somas, standardize
from hpc_neuro.data.swc.writer import add_nodes, format_header, format_rows


def count_first_rows(tree: Tree) -> int:
    """Rows of the first tree of a file; each other one has a row for each node."""
    return len(add_nodes(_require_standard(tree))[0])


def format_first_tree(tree: Tree) -> str:
    """The rows of the first tree of a file, with the nodes that `write` adds to it."""
    return format_rows(add_nodes(_require_standard(tree))[0])


def format_further_tree(tree: Tree, first_id: int) -> str:
    """The rows of another tree, whose root has the id `first_id`."""
    return format_rows(_require_standard(_without_soma(tree)), first_id)


def format_forest_header(
    first: Tree,
    trees: int,
    other_somas: int,
    *,
    unit: Unit,
    voxel_size: VoxelSize | None,
    comments: Sequence[str] = (),
) -> str:
    """The header of a file of `trees` trees, of which `first` is the first and `other_somas` others have a soma."""
    _, added = add_nodes(_require_standard(first))
    changes = [describe_other_somas(other_somas)] if other_somas else []
    return format_header(trees, unit, voxel_size, changes, added, comments)


def has_soma(tree: Tree) -> bool:
    """Whether the root of a tree is a soma."""
    return bool(tree.types[0] == SOMA)


def _without_soma(tree: Tree) -> Tree:
    if not has_soma(tree):
        return tree
    types = tree.types.copy()
    types[0] = UNDEFINED
    return replace(tree, types=types)


def _require_standard(tree: Tree) -> Tree:
    """ValueError for a tree that `write` would change: what changes is counted over all trees of a file."""
    standard, changes = standardize(tree)
    if changes:
        raise ValueError(f"a tree is not as all readers take it ({'; '.join(changes)}); write it as one file")
    return standard
