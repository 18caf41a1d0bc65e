"""Writing SWC so that NeuroM, MorphIO, navis and swcgeom open it without a warning and measure the same tree.

Those readers want a soma at the root, and two of them leave out the edge from soma to neurite. So each neurite gets a
node at the soma's own place, and a tree without a soma gets one at its root. The added nodes have length zero, are
listed in the header, and are removed again by `read`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.header import COLUMNS, WRITTEN_BY, SwcComment, Unit, find_other_columns, states_other
from hpc_neuro.data.swc.standardize import SOMA, standardize

_ADDED = "added:"
"""Begin of the header line that lists the ids of added nodes."""
_DECIMALS = 6
"""Digits after the point of coordinates and radii."""
_SOURCE = "source:"
"""Begin of a comment line that holds for the file that a tree was made from, and no longer for the tree."""
_OWN_LINES = (
    "transform:",
    "voxel size um z y x:",
    "roots:",
    _ADDED,
    "the added nodes have length 0",
)
"""Begins of the header lines that `write` makes after those of the program and the unit."""


def write(
    path: Path | str,
    tree: Tree,
    *,
    unit: Unit = "um",
    voxel_size: VoxelSize | None = None,
    comments: Sequence[str] = (),
) -> None:
    """Write a tree (z y x, in `unit`) as SWC, whole or not at all.

    Parents come first, ids run from 1, a root's parent is -1, types are 0 to 7, radii finite and above 0, coordinates
    rounded to 1e-6. Several roots stay several trees in the file, and the header counts them (some readers take one
    tree only: `swc fix` joins or splits them). The header also lists what had to change, and the `voxel_size`
    (um, z y x). Comments are kept line by line; one that states another unit, voxel size or order of columns than the
    file's is marked as its source's.
    Raises InputError for a tree without nodes or with coordinates that are no numbers.
    """
    path = Path(path)
    # Refused before anything is written.
    if not len(tree):
        raise InputError(f"{path} is not written: the tree has no node")
    if not np.isfinite(tree.points).all():
        raise InputError(f"{path} is not written: the tree has coordinates that are no numbers")

    # The header speaks of the tree itself; the added nodes come only into the rows.
    standard, changes = standardize(tree)
    full, added = add_nodes(standard)
    header = format_header(len(standard.roots), unit, voxel_size, changes, added, comments)
    files.write_text(path, header + format_rows(full))


def node_ids(tree: Tree) -> NDArray[np.int64]:
    """[N] id that each node of `tree` has in the file that `write` makes of it, with the added nodes counted.

    Raises InputError for a tree with a soma of several points, which `write` makes one.
    """
    # Nodes keep their order, so ids are counted through what is added between them.
    standard, _ = standardize(tree)
    if len(standard) != len(tree):
        raise InputError(
            f"{len(tree) - len(standard)} points of the tree's soma have no id of their own; make it one point"
        )

    full, added = add_nodes(standard)
    return np.setdiff1d(np.arange(len(full)), added) + 1


def drop_added_nodes(tree: Tree, comments: Sequence[SwcComment]) -> Tree:
    """The tree without the nodes its header lists as added, where they still look like added nodes."""
    texts = [comment.text for comment in comments]
    listed = next((text.removeprefix(_ADDED) for text in texts if text.startswith(_ADDED)), None)
    # Another program's comment may begin with the same word.
    if listed is None or not any(text.startswith(WRITTEN_BY) for text in texts):
        return tree
    numbers = np.array([int(n) - 1 for n in re.findall(r"\d+", listed)], dtype=np.int64)
    numbers = numbers[numbers < len(tree)]

    # Edges of length zero, and for each node how many of its children lie at its own place.
    parents, child = tree.parents, np.flatnonzero(tree.parents >= 0)
    at_parent = np.zeros(len(tree), dtype=bool)
    at_parent[child] = np.all(tree.points[child] == tree.points[parents[child]], axis=1)
    children = np.bincount(parents[child], minlength=len(tree))
    children_here = np.bincount(parents[child], weights=at_parent[child], minlength=len(tree))

    # Another program may have edited the file. An added soma has one child, the true root, at its place; an added
    # first node of a neurite lies at its soma.
    is_soma = (parents < 0) & (children == 1) & (children_here == 1)
    is_stem = at_parent & (parents >= 0) & (parents[parents] < 0)
    drop = np.zeros(len(tree), dtype=bool)
    drop[numbers] = (is_soma | is_stem)[numbers]
    return _drop_nodes(tree, drop)


def _drop_nodes(tree: Tree, drop: NDArray[np.bool_]) -> Tree:
    """The tree without some nodes; their parents take over their children."""
    parents = tree.parents.copy()
    # An added node has a root or another added node as its parent, so two steps up are enough.
    for _ in range(2):
        row = np.where(parents >= 0, parents, 0)
        parents = np.where((parents >= 0) & drop[row], tree.parents[row], parents)

    # Indices of the kept nodes in the new tree.
    keep = ~drop
    index = np.cumsum(keep) - 1
    parents = parents[keep]
    return Tree(tree.points[keep], tree.radii[keep], np.where(parents >= 0, index[parents], -1), tree.types[keep])


def add_nodes(tree: Tree) -> tuple[Tree, NDArray[np.int64]]:
    """The tree with the nodes that other readers want, and their indices in it."""
    if tree.types[0] != SOMA:
        return _add_soma(tree), np.array([0])
    return _add_stems(tree)


def _add_soma(tree: Tree) -> Tree:
    """The tree with a soma at the place of the first root."""
    parents = np.insert(np.where(tree.parents >= 0, tree.parents + 1, -1), 0, -1)
    parents[1] = 0
    return Tree(
        np.insert(tree.points, 0, tree.points[0], 0),
        np.insert(tree.radii, 0, tree.radii[0]),
        parents,
        np.insert(tree.types, 0, SOMA),
    )


def _add_stems(tree: Tree) -> tuple[Tree, NDArray[np.int64]]:
    """The tree with a node at the soma's place before each neurite, and the new indices of these nodes."""
    # Children that lie at the soma's place already need no node.
    root = 0
    stems = np.flatnonzero(tree.parents == root)
    stems = stems[np.any(tree.points[stems] != tree.points[root], axis=1)]
    if not len(stems):
        return tree, np.zeros(0, np.int64)

    # New index of each old node: one later for each stem up to it.
    index = np.arange(len(tree)) + np.searchsorted(stems, np.arange(len(tree)), side="right")
    parents = np.where(tree.parents >= 0, index[tree.parents], -1)
    parents[stems] = index[stems] - 1

    # np.insert counts places in the old array.
    full = Tree(
        np.insert(tree.points, stems, tree.points[root], 0),
        np.insert(tree.radii, stems, tree.radii[stems]),
        np.insert(parents, stems, index[root]),
        np.insert(tree.types, stems, tree.types[stems]),
    )
    return full, index[stems] - 1


def format_header(
    trees: int,
    unit: Unit,
    voxel_size: VoxelSize | None,
    changes: Sequence[str],
    added: NDArray[np.int64],
    comments: Sequence[str],
) -> str:
    """The header of a file: what `write` states of it, the comments, and the names of the columns."""
    lines = _build_header(trees, unit, voxel_size, changes, added)
    lines += [*_settle_comments(comments, unit, voxel_size), " ".join(COLUMNS)]
    return "".join(f"# {line}\n" for line in lines)


def _build_header(
    trees: int, unit: Unit, voxel_size: VoxelSize | None, changes: Sequence[str], added: NDArray[np.int64]
) -> list[str]:
    """Header lines, without their #."""
    lines = [f"{WRITTEN_BY} {importlib.metadata.version('hpc_neuro')}"]
    lines.append(f"unit: {unit}" + (" (array index, the first voxel's center is 0)" if unit == "voxel" else ""))

    # How coordinates relate to the image; with a voxel size, how to get to the other unit.
    axes = "x y z are column, row, slice of the image, without offset or flip"
    if voxel_size is None:
        lines.append(f"transform: none; {axes}")
    else:
        formula = "voxel index = um / voxel size" if unit == "voxel" else "um = voxel index * voxel size"
        lines.append(f"transform: {formula}; {axes}")
        lines.append("voxel size um z y x: " + " ".join(repr(float(v)) for v in voxel_size))

    # Several trees in one file are unusual, so their number is stated.
    lines.append("roots: 1" if trees == 1 else f"roots: {trees}, separate trees, each begins with parent -1")
    lines += [f"changed: {change}" for change in changes]
    if len(added):
        lines.append(f"{_ADDED} " + " ".join(str(int(i) + 1) for i in added))
        lines.append("the added nodes have length 0; they give readers the soma they want and are no part of the tree")
    return lines


def format_rows(tree: Tree, first_id: int = 1) -> str:
    """One text line per node, with ids from `first_id` on."""
    # Adding 0 turns -0 into 0; the smallest radius that survives rounding stays above 0.
    values = np.round(np.concatenate([tree.points[:, ::-1], tree.radii[:, None]], axis=1), _DECIMALS) + 0.0
    values[:, 3] = np.maximum(values[:, 3], 10.0**-_DECIMALS)

    table = np.empty((len(tree), 7), dtype=object)
    table[:, 0] = np.arange(first_id, first_id + len(tree))
    table[:, 1] = tree.types
    table[:, 2:6] = values
    table[:, 6] = np.where(tree.parents >= 0, tree.parents + first_id, -1)

    # One format string for the whole table: formatting row by row is much slower.
    line = "%d %d %.12g %.12g %.12g %.12g %d\n"
    return (line * len(tree)) % tuple(table.ravel().tolist())


def _settle_comments(comments: Sequence[str], unit: Unit, voxel_size: VoxelSize | None) -> list[str]:
    """Comments as single lines without their own #, as they may stand in a header with this unit and voxel size."""
    lines = [part.lstrip("# ").rstrip() for comment in comments for part in (comment.splitlines() or [""])]
    # What an earlier `write` stated is stated anew: the program, the unit in the line after it, and the rest.
    own = [number for number, line in enumerate(lines) if line.startswith(WRITTEN_BY)]
    if own:
        dropped = {*own, *(number + 1 for number in own)}
        lines = [line for n, line in enumerate(lines) if n not in dropped and not line.startswith(_OWN_LINES)]

    settled = []
    for line in lines:
        is_other = states_other(line, unit, voxel_size) or find_other_columns(line) or line.startswith(_ADDED)
        settled.append(f"{_SOURCE} {line}" if is_other else line)
    return [line for line in settled if line != " ".join(COLUMNS)]
