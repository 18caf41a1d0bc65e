"""Repair of SWC files whose meaning is open: each decision is one stated rule, and each change is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import zyx_from_xyz
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.standardize import standardize
from hpc_neuro.data.swc.structure import fill_bad_radii, find_cycles
from hpc_neuro.data.swc.table import SwcTable, parse

Roots = Literal["join", "keep", "largest"]
_MOST_TOLD = 5  # changes of one kind told one by one
_HARMLESS = {  # what writing anew settles, kind of finding -> change
    "BOM": "byte-order mark removed",
    "encoding": "written as ASCII",
    "line ends": "line ends made plain",
    "commas": "commas between columns made blanks",
    "float ids": "ids written as whole numbers",
    "extra columns": "columns after the seventh dropped",
    "decimal comma": "decimal commas made points",
    "header": "header line made a comment",
}


@dataclass(frozen=True)
class RepairResult:
    """A repaired tree, z y x in the file's unit, and what was changed, by line where there is one."""

    tree: Tree
    changes: tuple[str, ...]
    comments: tuple[str, ...]
    """The file's own comment lines."""


def fix(path: Path | str, roots: Roots = "join") -> RepairResult:
    """Read any SWC text and make one usable tree of it.

    Lines that are no node are dropped. A node without a place is dropped and its children hang on its parent. Of a
    repeated id the later rows become nodes of their own; children mean the last row of that id above them. A parent
    that is missing makes a root; of a cycle the first node becomes a root. Several roots: `join` hangs each further
    tree on the nearest node of what is joined already (turning it so that it grows from there), `keep` leaves them,
    `largest` keeps the tree of the greatest length. A single tree grows from its soma. Radii, types and soma points
    become as `write` needs them.
    Raises InputError for a file without any node.
    """
    table = parse(Path(path))
    changes = _parse_changes(table)
    table = _placed(table, changes)
    if not len(table):
        raise InputError(f"{path} holds no node, nothing can be repaired; export the tree again")
    above = _parents(table, changes)
    firsts = find_cycles(above)
    above[firsts] = -1
    _tell(
        changes,
        [f"line {table.line[i]}: node {table.id[i]} was its own ancestor, now a root" for i in firsts],
        "cycles",
    )
    made = morphology.build_tree(zyx_from_xyz(table.xyz), above, table.radius, table.type)
    if not np.array_equal(morphology.order_parents_first(above), np.arange(len(above))):
        changes.append("nodes sorted, parents first")
    tree = Tree(made.points, fill_bad_radii(made), made.parents, made.types)
    if count := int((made.radii != tree.radii).sum()):
        changes.append(f"{count} radii that were not above 0, now the parent's")
    tree = _rooted_at_soma(_one_root(tree, roots, changes), changes)
    tree, more = standardize(tree)
    return RepairResult(tree, (*changes, *more), table.comments)


def split_components(tree: Tree) -> list[Tree]:
    """The separate trees of a forest, longest cable first."""
    return sorted(morphology.split_components(tree), key=morphology.length, reverse=True)


def _parse_changes(table: SwcTable) -> list[str]:
    changes = [_HARMLESS[k] for k in dict.fromkeys(f.kind for f in table.findings) if k in _HARMLESS]
    dropped = [f"line {f.line} dropped, {f.text}" for f in table.findings if f.kind in ("text", "columns", "id")]
    _tell(changes, dropped, "lines dropped")
    return changes


def _placed(table: SwcTable, changes: list[str]) -> SwcTable:
    """Without the nodes whose coordinates are no numbers; their children hang on their parents."""
    lost = np.asarray(~np.isfinite(table.xyz).all(axis=1))
    if not lost.any():
        return table
    parent = dict(zip(table.id[lost].tolist(), table.parent[lost].tolist(), strict=True))
    above = table.parent.copy()
    for i, up in enumerate(above.tolist()):
        seen: set[int] = set()
        while up in parent and up not in seen:
            seen.add(up)
            up = parent[up]
        above[i] = -1 if up in seen else up
    _tell(
        changes, [f"line {n} dropped, its coordinates are no numbers" for n in table.line[lost].tolist()], "such lines"
    )
    moved = SwcTable(table.line, table.id, table.type, table.xyz, table.radius, above, table.comments, table.findings)
    return moved.take(~lost)


def _parents(table: SwcTable, changes: list[str]) -> NDArray[np.int64]:
    """Row of each node's parent; -1 for roots. Identical rows are dropped by hanging nothing on them."""
    rows: dict[int, list[int]] = {}
    for i, number in enumerate(table.id.tolist()):
        rows.setdefault(number, []).append(i)
    again = [i for group in rows.values() for i in group[1:]]
    _tell(
        changes, [f"line {table.line[i]}: id {table.id[i]} again, now a node of its own" for i in sorted(again)], "ids"
    )
    above = np.full(len(table), -1, dtype=np.int64)
    dangling: list[str] = []
    for i, up in enumerate(table.parent.tolist()):
        group = rows.get(up)
        if group is None:
            if up > 0 or (up == 0 and min(rows) < 0):
                dangling.append(
                    f"line {table.line[i]}: parent {up} is not in the file, node {table.id[i]} is now a root"
                )
            continue
        before = [j for j in group if j < i] if len(group) > 1 else group
        above[i] = before[-1] if before else group[0]
    _tell(changes, dangling, "parents missing")
    return above


def _one_root(tree: Tree, roots: Roots, changes: list[str]) -> Tree:
    count = len(tree.roots)
    if count == 1 or roots == "keep":
        return tree
    if roots == "largest":
        kept = split_components(tree)[0]
        changes.append(f"{count - 1} smaller trees dropped with {len(tree) - len(kept)} of {len(tree)} nodes")
        return kept
    return _joined(tree, changes)


def _rooted_at_soma(tree: Tree, changes: list[str]) -> Tree:
    """A single tree turned so that it grows from its one soma, where that stands further out."""
    soma = tree.types == 1
    tops = np.flatnonzero(soma & ~((tree.parents >= 0) & soma[tree.parents]))  # where a group of soma points begins
    if len(tree.roots) != 1 or len(tops) != 1 or tree.parents[tops[0]] < 0:
        return tree
    parents = tree.parents.copy()
    _turn(parents, int(tops[0]), -1)
    changes.append("the tree turned so that its soma is the root")
    return morphology.build_tree(tree.points, parents, tree.radii, tree.types)


def _joined(tree: Tree, changes: list[str]) -> Tree:
    """Every further tree hung on the nearest joined node, nearest trees first (Prim's rule over whole trees)."""
    owner, parents = morphology.label_components(tree), tree.parents.copy()
    waiting = owner != 0
    distance, nearest = _nearest(tree.points[~waiting], tree.points)
    nearest = np.flatnonzero(~waiting)[nearest]
    told: list[str] = []
    while waiting.any():
        candidates = np.flatnonzero(waiting)
        node = int(candidates[np.argmin(distance[candidates])])
        mine = np.flatnonzero(owner == owner[node])
        _turn(parents, node, int(nearest[node]))
        told.append(f"a tree of {len(mine)} nodes joined by an edge of length {distance[node]:.4g}")
        waiting[mine] = False
        rest = np.flatnonzero(waiting)
        if len(rest):
            closer, which = _nearest(tree.points[mine], tree.points[rest])
            better = closer < distance[rest]
            distance[rest[better]] = closer[better]
            nearest[rest[better]] = mine[which[better]]
    _tell(changes, told, "trees joined")
    return morphology.build_tree(tree.points, parents, tree.radii, tree.types)


def _nearest(
    targets: NDArray[np.float64], points: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to, and index of, the target nearest to each point."""
    distance, index = cKDTree(targets).query(points)
    return np.asarray(distance), np.asarray(index, dtype=np.int64)


def _turn(parents: NDArray[np.int64], node: int, onto: int) -> None:
    """Make `node` the root of its tree by turning the edges above it, and hang it on `onto`."""
    while node >= 0:
        above = int(parents[node])
        parents[node] = onto
        onto, node = node, above


def _tell(changes: list[str], told: Sequence[str], kind: str) -> None:
    changes += told[:_MOST_TOLD]
    if len(told) > _MOST_TOLD:
        changes.append(f"... and {len(told) - _MOST_TOLD} more {kind}")
