"""From a table of rows to a tree: how the nodes are connected, and everything that is wrong with it, by line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import zyx_from_xyz
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.swc.table import SwcFinding, SwcTable

ROOT, MISSING = -1, -2
"""Parent rows of a root, and of a node whose parent is not in the file."""

_FARTHEST = 1e9
"""Largest coordinate of a neuron in any unit; a meter in nanometers."""
LARGEST_INT, _LARGEST_UINT = (1 << 31) - 1, (1 << 32) - 1
"""Largest ids of programs that keep them in 32 bits."""
_MAX_LISTED = 5
"""Findings of one kind that are listed by name; one more counts the rest."""


@dataclass(frozen=True)
class LinkedTable:
    """A table without repeated rows, its parents as row indices, and all findings."""

    table: SwcTable
    parent_rows: NDArray[np.int64]
    """[N] row of the parent, ROOT or MISSING."""
    findings: list[SwcFinding]

    @property
    def fatal(self) -> list[SwcFinding]:
        """Findings that leave the tree's meaning open."""
        return [f for f in self.findings if f.fatal]


def link(table: SwcTable) -> LinkedTable:
    """Resolve parents and list every finding, by line."""
    if not len(table):
        empty = SwcFinding(0, "empty", "no node: the file holds no line of seven numbers", fatal=True)
        return LinkedTable(table, np.zeros(0, np.int64), sorted([*table.findings, empty]))

    # Repeated rows go first, since ids must be unique for the search of parents.
    table, repeats = drop_repeated_rows(table)
    parent_rows = _resolve_parents(table)
    findings = [
        *table.findings,
        *repeats,
        *_check_parents(table, parent_rows),
        *_check_cycles(table, parent_rows),
        *_check_values(table),
    ]
    if not np.isfinite(table.xyz).all(axis=1).any():
        findings.append(SwcFinding(0, "empty", "no node: no line has a place of finite numbers", fatal=True))

    # What other readers dislike matters only in a tree whose meaning is settled.
    if not any(f.fatal for f in findings):
        findings += _check_order(table, parent_rows)
        findings += _check_types(table, parent_rows)
    return LinkedTable(table, parent_rows, sorted(findings))


def build_tree(linked: LinkedTable) -> Tree:
    """The tree of a table without fatal findings, z y x in the file's unit; radii made finite and positive."""
    table = linked.table
    tree = morphology.build_tree(zyx_from_xyz(table.xyz), linked.parent_rows, table.radius, table.type)
    return Tree(tree.points, fill_bad_radii(tree), tree.parents, tree.types)


def fill_bad_radii(tree: Tree) -> NDArray[np.float64]:
    """Radii with each that is not finite and positive replaced: by its parent's, for a root by the median of the good.

    A tree without one good radius gets 1 (in its own unit) throughout.
    """
    # Many tracers write 0 for "unknown".
    is_good = np.isfinite(tree.radii) & (tree.radii > 0)
    if is_good.all():
        return tree.radii

    median = float(np.median(tree.radii[is_good])) if is_good.any() else 1.0
    radii = tree.radii.copy()
    # Parents come first, so a parent's radius is good by the time its child takes it.
    for i in np.flatnonzero(~is_good):
        radii[i] = radii[tree.parents[i]] if tree.parents[i] >= 0 and is_good.any() else median
    return radii


def find_cycles(parent_rows: NDArray[np.int64]) -> list[int]:
    """One row of each cycle: the first in the file."""
    up = np.where(parent_rows < 0, ROOT, parent_rows)
    in_cycle = np.ones(len(up), dtype=bool)

    # Remove tips again and again; only cycles have no tip.
    children = np.bincount(up[up >= 0], minlength=len(up))
    tips = [int(i) for i in np.flatnonzero(children == 0)]
    while tips:
        i = tips.pop()
        in_cycle[i] = False
        parent = int(up[i])
        if parent >= 0:
            children[parent] -= 1
            if children[parent] == 0:
                tips.append(parent)

    # Walk each cycle once, from its first row.
    firsts: list[int] = []
    for i in np.flatnonzero(in_cycle).tolist():
        if not in_cycle[i]:
            continue
        firsts.append(i)
        node = i
        while node >= 0 and in_cycle[node]:
            in_cycle[node] = False
            node = int(up[node])
    return firsts


def drop_repeated_rows(table: SwcTable) -> tuple[SwcTable, list[SwcFinding]]:
    """The table without rows that repeat an earlier one; a repeated id with other content is a fatal finding."""
    # `original` is the first row with the same id.
    _, first, group = np.unique(table.id, return_index=True, return_inverse=True)
    if len(first) == len(table):
        return table, []
    original = first[group]
    again = np.flatnonzero(original != np.arange(len(table)))

    # A row may repeat any earlier row of its id, not only the first.
    contents: dict[int, set[tuple[float, ...]]] = {}
    is_equal = np.zeros(len(again), dtype=bool)
    for place, i in enumerate(again.tolist()):
        earlier = contents.setdefault(int(table.id[i]), {_row_content(table, int(original[i]))})
        is_equal[place] = _row_content(table, i) in earlier
        earlier.add(_row_content(table, i))

    def describe_conflict(i: int) -> str:
        return f"id {table.id[i]} again with other content (first in line {table.line[original[i]]})"

    def describe_repeat(i: int) -> str:
        return f"the line of id {table.id[i]} again"

    findings = [
        *_report(table, again[~is_equal], "repeated id", describe_conflict, fatal=True),
        *_report(table, again[is_equal], "repeated line", describe_repeat),
    ]
    keep = np.ones(len(table), dtype=bool)
    keep[again[is_equal]] = False
    return table.take(keep), findings


def _row_content(table: SwcTable, i: int) -> tuple[float, ...]:
    """All of a row but its id."""
    return (*table.xyz[i].tolist(), float(table.radius[i]), int(table.type[i]), int(table.parent[i]))


def _resolve_parents(table: SwcTable) -> NDArray[np.int64]:
    """[N] row of each node's parent, ROOT or MISSING."""
    # One sorted search for all parents; of a repeated id the first row counts.
    order = np.argsort(table.id, kind="stable")
    ids = table.id[order]
    place = np.minimum(np.searchsorted(ids, table.parent), len(ids) - 1)
    parent_rows = np.where(ids[place] == table.parent, order[place], MISSING)

    # A negative parent marks a root unless it is an id; where ids run from 1, so does 0.
    is_absent = parent_rows < 0
    is_root = (table.parent < 0) & is_absent
    is_zero = (table.parent == 0) & is_absent & bool(ids[0] > 0)
    parent_rows[is_root | is_zero] = ROOT
    return parent_rows


def _check_parents(table: SwcTable, parent_rows: NDArray[np.int64]) -> Iterator[SwcFinding]:
    def describe_root(i: int) -> str:
        return f"parent {table.parent[i]} taken as root; the mark of a root is -1"

    def describe_dangling(i: int) -> str:
        return f"node {table.id[i]} has parent {table.parent[i]}, which is not in the file"

    unusual = np.flatnonzero((parent_rows == ROOT) & (table.parent != -1))
    yield from _report(table, unusual, "root mark", describe_root)
    yield from _report(table, np.flatnonzero(parent_rows == MISSING), "dangling parent", describe_dangling, fatal=True)


def _check_cycles(table: SwcTable, parent_rows: NDArray[np.int64]) -> Iterator[SwcFinding]:
    # Where parents come first, no cycle is possible.
    if np.all(parent_rows < np.arange(len(parent_rows))):
        return

    def describe(i: int) -> str:
        return f"node {table.id[i]} is its own {'parent' if parent_rows[i] == i else 'ancestor'}"

    firsts = np.array(find_cycles(parent_rows), np.int64)
    yield from _report(table, firsts, "cycle", describe, fatal=True)


def find_far_nodes(table: SwcTable) -> Iterator[SwcFinding]:
    """Nodes with finite coordinates that no neuron reaches."""
    is_far = np.isfinite(table.xyz).all(axis=1) & (np.abs(table.xyz) > _FARTHEST).any(axis=1)

    def describe(i: int) -> str:
        return f"node {table.id[i]} lies at {np.abs(table.xyz[i]).max():g}, farther than a neuron reaches in any unit"

    yield from _report(table, np.flatnonzero(is_far), "far", describe)


def _check_values(table: SwcTable) -> Iterator[SwcFinding]:
    """Coordinates, radii, types and ids, node by node."""
    # Only a place is needed to read the tree: radii are filled in, types and ids are just numbers.
    radius = table.radius
    bad_place = np.flatnonzero(~np.isfinite(table.xyz).all(axis=1))
    bad_radius = np.flatnonzero(~np.isfinite(radius) | (radius <= 0))
    bad_type = np.flatnonzero((table.type < 0) | (table.type > 7))

    def describe_place(i: int) -> str:
        return f"node {table.id[i]} has a coordinate that is no number"

    def describe_radius(i: int) -> str:
        return f"node {table.id[i]} has radius {radius[i]:g}; wanted above 0"

    def describe_type(i: int) -> str:
        return f"node {table.id[i]} has type {table.type[i]}; wanted 0 to 7"

    yield from _report(table, bad_place, "coordinate", describe_place, fatal=True)
    yield from find_far_nodes(table)
    yield from _report(table, bad_radius, "radius", describe_radius)
    yield from _report(table, bad_type, "type", describe_type)
    negative = np.flatnonzero(table.id < 0)
    yield from _report(table, negative, "negative id", lambda i: f"id {table.id[i]} is negative")
    yield from _report(
        table, np.flatnonzero(table.id > LARGEST_INT), "large id", lambda i: _describe_large_id(table, i)
    )


def _describe_large_id(table: SwcTable, i: int) -> str:
    number = int(table.id[i])
    if number > _LARGEST_UINT:
        return f"id {number} is above {_LARGEST_UINT}, the largest that MorphIO and NeuroM read"
    return f"id {number} is above {LARGEST_INT}, the largest in programs that keep ids in 32 bits"


def _check_order(table: SwcTable, parent_rows: NDArray[np.int64]) -> Iterator[SwcFinding]:
    """Several roots, children before their parents, a lone point: other readers refuse them or misread them."""
    # Some readers take only the first tree; others stop at a parent that they have not seen yet.
    roots = np.flatnonzero(parent_rows < 0)
    unsorted = np.flatnonzero(parent_rows > np.arange(len(parent_rows)))

    def describe_root(i: int) -> str:
        return f"node {table.id[i]} is a further root; the first is node {table.id[roots[0]]}"

    def describe_unsorted(i: int) -> str:
        return f"node {table.id[i]} stands before its parent {table.parent[i]} (line {table.line[parent_rows[i]]})"

    yield from _report(table, roots[1:], "several roots", describe_root)
    yield from _report(table, unsorted, "unsorted", describe_unsorted)
    if len(table) == 1:
        yield SwcFinding(int(table.line[0]), "single point", "the tree is a single point")


def _check_types(table: SwcTable, parent_rows: NDArray[np.int64]) -> Iterator[SwcFinding]:
    """Somas and changes of type where other readers do not expect them."""
    child = np.flatnonzero(parent_rows >= 0)
    parent = parent_rows[child]
    is_soma = table.type == 1

    # A type may change at a branch point and at the soma.
    is_only_child = np.bincount(parent, minlength=len(parent_rows)) == 1
    changes = is_only_child[parent] & ~is_soma[parent] & ~is_soma[child] & (table.type[parent] != table.type[child])
    turns = child[changes]

    # A soma is one unbranched run of cylinders; only its first point may have several (three-point somas, contours).
    soma_children = np.bincount(parent[is_soma[child]], minlength=len(parent_rows))
    forks = np.flatnonzero(is_soma & (parent_rows >= 0) & (soma_children > 1))

    def describe_soma(i: int) -> str:
        return f"node {table.id[i]} is soma (type 1) on a parent that is not"

    def describe_turn(i: int) -> str:
        return f"type turns from {table.type[parent_rows[i]]} to {table.type[i]} without a branch point"

    yield from _report(table, child[is_soma[child] & ~is_soma[parent]], "soma", describe_soma)
    further_somas = np.flatnonzero(is_soma & (parent_rows < 0))[1:]
    yield from _report(table, forks, "soma", lambda i: f"the soma branches at node {table.id[i]}")
    yield from _report(table, further_somas, "soma", lambda i: f"node {table.id[i]} begins a second soma")
    yield from _report(table, turns, "type change", describe_turn)


def _report(
    table: SwcTable, rows: NDArray[np.int64], kind: str, describe: Callable[[int], str], fatal: bool = False
) -> Iterator[SwcFinding]:
    """One finding per row: the first few by name, and the rest as a number."""
    for i in rows[:_MAX_LISTED].tolist():
        yield SwcFinding(int(table.line[i]), kind, describe(i), fatal)

    more = len(rows) - _MAX_LISTED
    if more > 0:
        i = int(rows[_MAX_LISTED])
        yield SwcFinding(int(table.line[i]), kind, f"this and {more - 1} more of the kind: {describe(i)}", fatal)
