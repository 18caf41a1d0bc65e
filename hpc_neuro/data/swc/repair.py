"""Repair of SWC files whose meaning is open: each decision follows one stated rule, and each change is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.files import format_count
from hpc_neuro.core.geometry import zyx_from_xyz
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.standardize import standardize
from hpc_neuro.data.swc.structure import (
    LARGEST_INT,
    ROOT,
    drop_repeated_rows,
    fill_bad_radii,
    find_cycles,
    find_far_nodes,
)
from hpc_neuro.data.swc.table import UNREADABLE, SwcTable, parse

Roots = Literal["join", "keep", "largest"]

_MAX_LISTED = 5
"""Changes of one kind that are reported one by one; one more counts the rest."""

# Kind of finding -> change, for what is settled by writing the file anew.
_REWRITTEN = {
    "BOM": "byte-order mark removed",
    "encoding": "written as ASCII",
    "line ends": "line ends made plain",
    "commas": "commas between columns made blanks",
    "blanks": "other blanks made plain",
    "float ids": "ids written as whole numbers",
    "extra columns": "columns after the seventh dropped",
    "decimal comma": "decimal commas made points",
    "semicolon decimals": "semicolons between columns made blanks, decimal commas made points",
    "column names": "columns put in the order of SWC, by the names in the header",
    "header": "header line made a comment",
}


@dataclass(frozen=True)
class RepairResult:
    """A repaired tree, z y x in the file's unit, and what was changed, by line where there is one."""

    tree: Tree
    changes: tuple[str, ...]
    comments: tuple[str, ...]
    """The file's own comment lines, without what stands behind nodes."""


def fix(path: Path | str, roots: Roots = "join") -> RepairResult:
    """Read any SWC text and make one usable tree of it.

    Lines that are no node are dropped, and lines that repeat an earlier one. Columns that the header names in another
    order are put in order. A node without a place is dropped and its parent takes over its children. Of a
    repeated id the later rows become nodes of their own; children mean the last row of that id above them. A node whose
    parent is missing becomes a root; of a cycle the first node becomes a root. Several roots: `join` connects each
    further tree to the nearest node of what is joined already (turning it so that it grows from there), `keep` leaves
    them, `largest` keeps the tree of the greatest length. A single tree grows from its soma. Radii, types and soma
    points become as `write` needs them.
    Raises InputError for a file without any node.
    """
    # Rows: which lines are nodes, and which of them have a place.
    table = parse(Path(path), by_header=True)
    if fault := next((f for f in table.findings if f.kind in UNREADABLE), None):
        raise InputError(f"{path} cannot be repaired, as no rule tells the columns apart: {fault}")
    changes = _list_rewritten(table)
    table, more = _drop_unplaced(table)
    changes += more
    table, repeats = drop_repeated_rows(table)
    changes += [f"line {f.line} dropped: {f.text}" for f in repeats if f.kind == "repeated line"]
    if not len(table):
        raise InputError(f"{path} holds no node, nothing can be repaired; export the tree again")

    # Such a place is a damaged number; the cable to it would be written as if it were there.
    if far := next(find_far_nodes(table), None):
        raise InputError(f"{path} cannot be repaired, as no rule tells the place: {far}; correct it")

    if (table.id > LARGEST_INT).any():
        changes.append(f"ids above {LARGEST_INT}, now from 1")

    # Edges: one parent row for each node, and no cycle.
    if count := int((table.id < 0).sum()):
        changes.append(f"{format_count(count, 'negative id')} replaced")
    parent_rows, more = _resolve_parents(table)
    changes += more
    parent_rows, more = _cut_cycles(table, parent_rows)
    changes += more

    # The tree: order, radii, roots, soma, types.
    tree = morphology.build_tree(zyx_from_xyz(table.xyz), parent_rows, table.radius, table.type)
    if not np.array_equal(morphology.order_parents_first(parent_rows), np.arange(len(parent_rows))):
        changes.append("nodes sorted, parents first")
    radii = fill_bad_radii(tree)
    if count := int((tree.radii != radii).sum()):
        changes.append(f"{count} radii that were not above 0, now the parent's")
    tree, more = _settle_roots(replace(tree, radii=radii), roots)
    changes += more
    tree, more = _root_at_soma(tree)
    changes += more
    tree, more = standardize(tree)
    comments = tuple(comment.text for comment in table.comments if comment.is_whole_line)
    return RepairResult(tree, (*changes, *more), comments)


def split_by_length(tree: Tree) -> list[Tree]:
    """The separate trees of a forest, longest cable first."""
    return sorted(morphology.split_components(tree), key=morphology.length, reverse=True)


def _list_rewritten(table: SwcTable) -> list[str]:
    """Changes that writing the file anew makes, and the lines that are no node."""
    # Each kind once, in the order of the file.
    kinds = dict.fromkeys(f.kind for f in table.findings)
    changes = [_REWRITTEN[kind] for kind in kinds if kind in _REWRITTEN]
    if count := sum(not comment.is_whole_line for comment in table.comments):
        changes.append(f"{format_count(count, 'comment')} behind nodes left out")
    dropped = [f"line {f.line} dropped, {f.text}" for f in table.findings if f.kind in ("text", "columns", "id")]
    return [*changes, *_shorten(dropped, "lines dropped")]


def _drop_unplaced(table: SwcTable) -> tuple[SwcTable, list[str]]:
    """The table without nodes whose coordinates are no numbers; their parents take over their children."""
    is_lost = np.asarray(~np.isfinite(table.xyz).all(axis=1))
    if not is_lost.any():
        return table, []

    # Walk up from each node to the first ancestor with a place; a cycle of lost nodes makes a root.
    parent_of_lost = dict(zip(table.id[is_lost].tolist(), table.parent[is_lost].tolist(), strict=True))
    parent = table.parent.copy()
    for i, ancestor in enumerate(parent.tolist()):
        seen: set[int] = set()
        while ancestor in parent_of_lost and ancestor not in seen:
            seen.add(ancestor)
            ancestor = parent_of_lost[ancestor]
        parent[i] = ROOT if ancestor in seen else ancestor

    changes = [f"line {n} dropped, its coordinates are no numbers" for n in table.line[is_lost].tolist()]
    return replace(table, parent=parent).take(~is_lost), _shorten(changes, "such lines")


def _resolve_parents(table: SwcTable) -> tuple[NDArray[np.int64], list[str]]:
    """[N] row of each node's parent, ROOT for roots; every row of a repeated id is a node of its own."""
    # Which rows an id has: more than one for repeated ids.
    rows_of_id: dict[int, list[int]] = {}
    for i, number in enumerate(table.id.tolist()):
        rows_of_id.setdefault(number, []).append(i)
    again = sorted(i for rows in rows_of_id.values() for i in rows[1:])
    repeated = [f"line {table.line[i]}: id {table.id[i]} again, now a node of its own" for i in again]

    parent_rows = np.full(len(table), ROOT, dtype=np.int64)
    dangling: list[str] = []
    marks = 0
    for i, parent in enumerate(table.parent.tolist()):
        rows = rows_of_id.get(parent)
        if rows is not None:
            # Of several rows of that id, the last one above this line.
            before = [j for j in rows if j < i]
            parent_rows[i] = before[-1] if before and len(rows) > 1 else rows[0]
        elif parent > 0 or (parent == 0 and min(rows_of_id) < 0):
            dangling.append(
                f"line {table.line[i]}: parent {parent} is not in the file, node {table.id[i]} is now a root"
            )
        elif parent != ROOT:
            marks += 1

    rewritten = [f"{format_count(marks, 'mark')} of a root, now {ROOT}"] if marks else []
    return parent_rows, [*_shorten(repeated, "ids"), *_shorten(dangling, "parents missing"), *rewritten]


def _cut_cycles(table: SwcTable, parent_rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    """Make the first node of each cycle a root."""
    firsts = find_cycles(parent_rows)
    parent_rows = parent_rows.copy()
    parent_rows[firsts] = ROOT
    changes = [f"line {table.line[i]}: node {table.id[i]} was its own ancestor, now a root" for i in firsts]
    return parent_rows, _shorten(changes, "cycles")


def _settle_roots(tree: Tree, roots: Roots) -> tuple[Tree, list[str]]:
    """Several trees as the rule `roots` wants them."""
    count = len(tree.roots)
    if count == 1 or roots == "keep":
        return tree, []
    if roots == "join":
        return _join_trees(tree)

    # "largest" is the longest cable, not the most nodes, which depend on the tracer's step.
    longest = split_by_length(tree)[0]
    return longest, [f"{count - 1} smaller trees dropped with {len(tree) - len(longest)} of {len(tree)} nodes"]


def _root_at_soma(tree: Tree) -> tuple[Tree, list[str]]:
    """A single tree turned so that it grows from its one soma, where that is not at the root."""
    is_soma = tree.types == 1
    # A soma of several points begins where the parent is no soma.
    somas = np.flatnonzero(is_soma & ~((tree.parents >= 0) & is_soma[tree.parents]))
    if len(tree.roots) != 1 or len(somas) != 1 or tree.parents[somas[0]] < 0:
        return tree, []

    # Types and places stay; only the direction of the edges on the way changes.
    return morphology.reroot(tree, int(somas[0])), ["the tree turned so that its soma is the root"]


def _join_trees(tree: Tree) -> tuple[Tree, list[str]]:
    """Connect every further tree to the nearest joined node, nearest tree first (Prim's rule over whole trees)."""
    # The first tree is joined; for every other node, the nearest joined node is kept up to date.
    component, parents = morphology.label_components(tree), tree.parents.copy()
    is_waiting = component != 0
    distance, nearest = _find_nearest(tree.points[~is_waiting], tree.points)
    nearest = np.flatnonzero(~is_waiting)[nearest]

    changes: list[str] = []
    while is_waiting.any():
        waiting = np.flatnonzero(is_waiting)
        node = int(waiting[np.argmin(distance[waiting])])
        members = np.flatnonzero(component == component[node])
        morphology.turn_path(parents, node, int(nearest[node]))
        changes.append(f"a tree of {len(members)} nodes joined by an edge of length {distance[node]:.4g}")
        is_waiting[members] = False

        # The nodes that have just joined may be nearer to what still waits.
        rest = np.flatnonzero(is_waiting)
        if len(rest):
            new_distance, index = _find_nearest(tree.points[members], tree.points[rest])
            is_closer = new_distance < distance[rest]
            distance[rest[is_closer]] = new_distance[is_closer]
            nearest[rest[is_closer]] = members[index[is_closer]]

    tree = morphology.build_tree(tree.points, parents, tree.radii, tree.types)
    return tree, _shorten(changes, "trees joined")


def _find_nearest(
    targets: NDArray[np.float64], points: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to, and index of, the target nearest to each point."""
    distance, index = cKDTree(targets).query(points)
    return np.asarray(distance), np.asarray(index, dtype=np.int64)


def _shorten(changes: Sequence[str], kind: str) -> list[str]:
    """The first changes of one kind, and the number of those left out."""
    if len(changes) <= _MAX_LISTED:
        return list(changes)
    return [*changes[:_MAX_LISTED], f"... and {len(changes) - _MAX_LISTED} more {kind}"]
