"""Writing SWC so that NeuroM, MorphIO, navis and swcgeom open it in silence and measure the same tree.

Those readers want a soma at the root, and two of them leave out the edge from soma to neurite. So each neurite gets a
node at the soma's own place, and a tree without a soma gets one at its root: of zero length, listed in the header, and
taken out again by `read`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.standardize import standardize

Unit = Literal["um", "voxel"]
_ADDED = "added:"
_DECIMALS = 6


@dataclass(frozen=True)
class SwcHeader:
    """What the header of a file says about its coordinates; None where it is silent."""

    unit: Unit | None
    voxel_size: VoxelSize | None


def write(
    path: Path | str,
    tree: Tree,
    *,
    unit: Unit = "um",
    voxel_size: VoxelSize | None = None,
    comments: Sequence[str] = (),
) -> None:
    """Write a tree (z y x, in `unit`) as SWC, whole or not at all.

    Parents stand first, ids run from 1, a root's parent is -1, types are 0 to 7, radii finite and above 0, coordinates
    rounded to 1e-6. Several roots stay several trees in the file, which the header says (some readers take one tree
    only: `swc fix` joins or splits them). What had to change for all that is in the header too, and the `voxel_size`
    (um, z y x).
    Raises InputError for a tree without nodes or with coordinates that are no numbers.
    """
    path = Path(path)
    if not len(tree):
        raise InputError(f"{path} is not written: the tree has no node")
    if not np.isfinite(tree.points).all():
        raise InputError(f"{path} is not written: the tree has coordinates that are no numbers")
    kept, changes = standardize(tree)
    full, added = _with_stems(kept)
    lines = [*_header(kept, unit, voxel_size, [*changes], added), *(f"# {c}" for c in _one_line(comments))]
    lines.append("# id type x y z radius parent")
    files.write_text(path, "\n".join(lines) + "\n" + _rows(full))


def node_ids(tree: Tree) -> NDArray[np.int64]:
    """[N] id that each node of `tree` has in the file that `write` makes of it: nodes it adds are counted, too.

    Raises InputError for a tree with a soma of several points, which `write` makes one.
    """
    kept, _ = standardize(tree)
    if len(kept) != len(tree):
        raise InputError(
            f"{len(tree) - len(kept)} points of the tree's soma have no id of their own; make it one point"
        )
    full, added = _with_stems(kept)
    return np.setdiff1d(np.arange(len(full)), added) + 1


def parse_header(comments: Sequence[str]) -> SwcHeader:
    """Unit and voxel size as `write` states them in the comment lines of a file."""
    unit: Unit | None = None
    size: VoxelSize | None = None
    for line in comments:
        if line.startswith("unit: um"):
            unit = "um"
        elif line.startswith("unit: voxel"):
            unit = "voxel"
        elif found := re.fullmatch(r"voxel size um z y x: (\S+) (\S+) (\S+)", line):
            z, y, x = (float(v) for v in found.groups())
            size = (z, y, x)
    return SwcHeader(unit, size)


def drop_added_nodes(tree: Tree, comments: Sequence[str]) -> Tree:
    """The tree without the nodes its header lists as added, where they still are what they were."""
    listed = next((c.removeprefix(_ADDED) for c in comments if c.startswith(_ADDED)), None)
    if listed is None:
        return tree
    numbers = np.array([int(n) - 1 for n in re.findall(r"\d+", listed)], dtype=np.int64)
    numbers = numbers[numbers < len(tree)]
    up, edge = tree.parents, np.flatnonzero(tree.parents >= 0)
    joined = np.zeros(len(tree), dtype=bool)  # at the same place as its parent
    joined[edge] = np.all(tree.points[edge] == tree.points[up[edge]], axis=1)
    children = np.bincount(up[edge], minlength=len(tree))
    meets = np.bincount(up[edge], weights=joined[edge], minlength=len(tree))  # children at the node's own place
    # a soma that stands for none has one child, the true root; a neurite's first node sits at its soma
    soma = (up < 0) & (children == 1) & (meets == 1)
    stem = joined & (up >= 0) & (up[up] < 0)
    drop = np.zeros(len(tree), dtype=bool)
    drop[numbers] = (soma | stem)[numbers]
    return _without(tree, drop)


def _without(tree: Tree, drop: NDArray[np.bool_]) -> Tree:
    up = tree.parents.copy()
    for _ in range(2):  # an added node hangs on a root or on another added node at most
        above = np.where(up >= 0, up, 0)
        up = np.where((up >= 0) & drop[above], tree.parents[above], up)
    keep = ~drop
    index = np.cumsum(keep) - 1
    up = up[keep]
    return Tree(tree.points[keep], tree.radii[keep], np.where(up >= 0, index[up], -1), tree.types[keep])


def _with_stems(tree: Tree) -> tuple[Tree, NDArray[np.int64]]:
    """The tree with a soma at the first root and a node at the soma's place before each neurite; their new indices."""
    root = 0
    if tree.types[root] != 1:
        points, radii = np.insert(tree.points, 0, tree.points[0], 0), np.insert(tree.radii, 0, tree.radii[0])
        parents = np.insert(np.where(tree.parents >= 0, tree.parents + 1, -1), 0, -1)
        parents[1] = 0
        return Tree(points, radii, parents, np.insert(tree.types, 0, 1)), np.array([0])
    stems = np.flatnonzero(tree.parents == root)
    stems = stems[np.any(tree.points[stems] != tree.points[root], axis=1)]
    if not len(stems):
        return tree, np.zeros(0, np.int64)
    index = np.arange(len(tree)) + np.searchsorted(stems, np.arange(len(tree)), side="right")
    parents = np.where(tree.parents >= 0, index[tree.parents], -1)
    parents[stems] = index[stems] - 1
    at = stems  # np.insert counts places in the old array
    full = Tree(
        np.insert(tree.points, at, tree.points[root], 0),
        np.insert(tree.radii, at, tree.radii[stems]),
        np.insert(parents, at, index[root]),
        np.insert(tree.types, at, tree.types[stems]),
    )
    return full, index[stems] - 1


def _header(
    tree: Tree, unit: Unit, voxel_size: VoxelSize | None, changes: list[str], added: NDArray[np.int64]
) -> list[str]:
    lines = [f"written by hpc_neuro {importlib.metadata.version('hpc_neuro')}"]
    lines.append(f"unit: {unit}" + ("" if unit == "um" else " (array index, the first voxel's centre is 0)"))
    lines.append("transform: none; x y z are column, row, slice of the image, without offset or flip")
    if voxel_size is not None:
        lines.append("voxel size um z y x: " + " ".join(repr(float(v)) for v in voxel_size))
        lines[-2] = (
            f"transform: {'um = voxel index' if unit == 'um' else 'voxel index = um'} "
            + ("* voxel size" if unit == "um" else "/ voxel size")
            + "; x y z are column, row, slice of the image, without offset or flip"
        )
    count = len(tree.roots)
    lines.append("roots: 1" if count == 1 else f"roots: {count}, separate trees, each begins with parent -1")
    lines += [f"changed: {c}" for c in changes]
    if len(added):
        lines.append(f"{_ADDED} " + " ".join(str(int(i) + 1) for i in added))
        lines.append("the added nodes have length 0; they give readers the soma they want and are no part of the tree")
    return [f"# {line}" for line in lines]


def _rows(tree: Tree) -> str:
    """One text line per node."""
    values = np.round(np.concatenate([tree.points[:, ::-1], tree.radii[:, None]], axis=1), _DECIMALS) + 0.0
    values[:, 3] = np.maximum(values[:, 3], 10.0**-_DECIMALS)
    table = np.empty((len(tree), 7), dtype=object)
    table[:, 0] = np.arange(1, len(tree) + 1)
    table[:, 1] = tree.types
    table[:, 2:6] = values
    table[:, 6] = np.where(tree.parents >= 0, tree.parents + 1, -1)
    line = "%d %d %.12g %.12g %.12g %.12g %d\n"
    return (line * len(tree)) % tuple(table.ravel().tolist())


def _one_line(comments: Sequence[str]) -> list[str]:
    return [part.lstrip("# ") for c in comments for part in (c.splitlines() or [""])]
