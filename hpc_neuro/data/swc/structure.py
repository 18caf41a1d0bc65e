"""From a table of rows to a tree: how nodes hang together, and everything that is wrong with it, by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import zyx_from_xyz
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.swc.table import SwcFinding, SwcTable

_MOST_LISTED = 5  # of one kind; the last one says how many more there are


@dataclass(frozen=True)
class LinkedTable:
    """A table without repeated rows, its parents as row indices, and all findings."""

    table: SwcTable
    above: NDArray[np.int64]  # [N] row of the parent, -1 for a root, -2 for a parent that is not there
    findings: list[SwcFinding]

    @property
    def fatal(self) -> list[SwcFinding]:
        """Findings that leave the tree's meaning open."""
        return [f for f in self.findings if f.fatal]


def link(table: SwcTable) -> LinkedTable:
    """Resolve parents and list every finding, by line."""
    findings = list(table.findings)
    if not len(table):
        findings.append(SwcFinding(0, "empty", "no node: the file holds no line of seven numbers", fatal=True))
        return LinkedTable(table, np.zeros(0, np.int64), sorted(findings))
    table = _without_repeats(table, findings)
    above = _parents(table, findings)
    _cycles(table, above, findings)
    _values(table, findings)
    if not any(f.fatal for f in findings):
        _shape(table, above, findings)
    return LinkedTable(table, above, sorted(findings))


def build_tree(linked: LinkedTable) -> Tree:
    """The tree of a table without fatal findings, z y x in the file's unit; radii made finite and positive."""
    table = linked.table
    made = morphology.build_tree(zyx_from_xyz(table.xyz), linked.above, table.radius, table.type)
    return Tree(made.points, fill_bad_radii(made), made.parents, made.types)


def fill_bad_radii(found: Tree) -> NDArray[np.float64]:
    """Radii, each that is not finite and positive replaced: by its parent's, for a root by the median of the good ones.

    A tree without one good radius gets 1 (in its own unit) throughout.
    """
    good = np.isfinite(found.radii) & (found.radii > 0)
    if good.all():
        return found.radii
    median = float(np.median(found.radii[good])) if good.any() else 1.0
    radii = found.radii.copy()
    for i in np.flatnonzero(~good):  # parents stand first, so a parent is already good
        radii[i] = radii[found.parents[i]] if found.parents[i] >= 0 and good.any() else median
    return radii


def find_cycles(above: NDArray[np.int64]) -> list[int]:
    """One row of each cycle: the first in the file."""
    state = above.copy()
    state[state < 0] = -1
    alive = np.ones(len(state), dtype=bool)
    # peel off tips again and again: what no peeling reaches and has only itself above is a cycle
    children = np.bincount(state[state >= 0], minlength=len(state))
    stack = [int(i) for i in np.flatnonzero(children == 0)]
    while stack:
        i = stack.pop()
        alive[i] = False
        parent = int(state[i])
        if parent >= 0:
            children[parent] -= 1
            if children[parent] == 0:
                stack.append(parent)
    firsts: list[int] = []
    for i in np.flatnonzero(alive).tolist():
        if not alive[i]:
            continue
        firsts.append(i)
        node = i
        while node >= 0 and alive[node]:
            alive[node] = False
            node = int(state[node])
    return firsts


def _without_repeats(table: SwcTable, findings: list[SwcFinding]) -> SwcTable:
    """Drop rows that say the same again; a repeated id with other content is fatal."""
    _, first, group = np.unique(table.id, return_index=True, return_inverse=True)
    if len(first) == len(table):
        return table
    repeats = np.flatnonzero(first[group] != np.arange(len(table)))
    same = np.ones(len(table), dtype=bool)
    drop: list[int] = []
    for i in repeats.tolist():
        j = int(first[int(group[i])])
        equal = np.array_equal(table.xyz[i], table.xyz[j]) and (table.type[i], table.radius[i], table.parent[i]) == (
            table.type[j],
            table.radius[j],
            table.parent[j],
        )
        same[i] = equal
        if equal:
            drop.append(i)
    _list(
        findings,
        table,
        np.flatnonzero(~same),
        "repeated id",
        lambda i: f"id {table.id[i]} again with other content (first in line {table.line[first[group[i]]]})",
        fatal=True,
    )
    _list(findings, table, np.array(drop, np.int64), "repeated line", lambda i: f"the line of id {table.id[i]} again")
    keep = np.ones(len(table), dtype=bool)
    keep[drop] = False
    return table.take(keep)


def _parents(table: SwcTable, findings: list[SwcFinding]) -> NDArray[np.int64]:
    order = np.argsort(table.id, kind="stable")
    ids = table.id[order]
    place = np.minimum(np.searchsorted(ids, table.parent), len(ids) - 1)
    above = np.where(ids[place] == table.parent, order[place], -2)
    root = (table.parent < 0) & (above < 0)
    zero = (table.parent == 0) & (above < 0) & bool(ids[0] > 0)  # ids from 1: 0 is another way to say "none"
    above[root | zero] = -1
    odd = np.flatnonzero((above == -1) & (table.parent != -1))
    _list(
        findings, table, odd, "root mark", lambda i: f"parent {table.parent[i]} taken as root; the mark of a root is -1"
    )
    _list(
        findings,
        table,
        np.flatnonzero(above == -2),
        "dangling parent",
        lambda i: f"node {table.id[i]} hangs on {table.parent[i]}, which is not in the file",
        fatal=True,
    )
    return above


def _cycles(table: SwcTable, above: NDArray[np.int64], findings: list[SwcFinding]) -> None:
    if np.all(above < np.arange(len(above))):
        return  # parents first: no cycle is possible
    firsts = np.array(find_cycles(above), np.int64)
    _list(
        findings,
        table,
        firsts,
        "cycle",
        lambda i: f"node {table.id[i]} is its own {'parent' if above[i] == i else 'ancestor'}",
        fatal=True,
    )


def _values(table: SwcTable, findings: list[SwcFinding]) -> None:
    _list(
        findings,
        table,
        np.flatnonzero(~np.isfinite(table.xyz).all(axis=1)),
        "coordinate",
        lambda i: f"node {table.id[i]} has a coordinate that is no number",
        fatal=True,
    )
    radius = table.radius
    _list(
        findings,
        table,
        np.flatnonzero(~np.isfinite(radius) | (radius <= 0)),
        "radius",
        lambda i: f"node {table.id[i]} has radius {radius[i]:g}; wanted above 0",
    )
    _list(
        findings,
        table,
        np.flatnonzero((table.type < 0) | (table.type > 7)),
        "type",
        lambda i: f"node {table.id[i]} has type {table.type[i]}; wanted 0 to 7",
    )
    _list(findings, table, np.flatnonzero(table.id < 0), "negative id", lambda i: f"id {table.id[i]} is negative")


def _shape(table: SwcTable, above: NDArray[np.int64], findings: list[SwcFinding]) -> None:
    """What other readers stumble over in a tree that is whole."""
    roots = np.flatnonzero(above < 0)
    _list(
        findings,
        table,
        roots[1:],
        "several roots",
        lambda i: f"node {table.id[i]} is a further root; the first is node {table.id[roots[0]]}",
    )
    unsorted = np.flatnonzero(above > np.arange(len(above)))
    _list(
        findings,
        table,
        unsorted,
        "unsorted",
        lambda i: f"node {table.id[i]} stands before its parent {table.parent[i]} (line {table.line[above[i]]})",
    )
    child = np.flatnonzero(above >= 0)
    parent = above[child]
    soma = table.type == 1
    _list(
        findings,
        table,
        child[soma[child] & ~soma[parent]],
        "soma",
        lambda i: f"node {table.id[i]} is soma (type 1) on a parent that is not",
    )
    _list(
        findings,
        table,
        np.flatnonzero(soma & (above < 0))[1:],
        "soma",
        lambda i: f"node {table.id[i]} begins a second soma",
    )
    single = np.bincount(parent, minlength=len(above)) == 1
    turns = child[single[parent] & ~soma[parent] & ~soma[child] & (table.type[parent] != table.type[child])]
    turns = turns[above[above[turns]] >= 0]
    _list(
        findings,
        table,
        turns,
        "type change",
        lambda i: f"type turns from {table.type[above[i]]} to {table.type[i]} without a branch point",
    )
    if len(table) == 1:
        findings.append(SwcFinding(int(table.line[0]), "single point", "the tree is a single point"))


def _list(
    findings: list[SwcFinding],
    table: SwcTable,
    rows: NDArray[np.int64],
    kind: str,
    text: Callable[[int], str],
    fatal: bool = False,
) -> None:
    """Add one finding per row, the first few by name and the rest as a number."""
    for i in rows[:_MOST_LISTED].tolist():
        findings.append(SwcFinding(int(table.line[i]), kind, text(i), fatal))
    if (more := len(rows) - _MOST_LISTED) > 0:
        line = int(table.line[rows[_MOST_LISTED]])
        findings.append(
            SwcFinding(line, kind, f"this and {more - 1} more of the kind: {text(int(rows[_MOST_LISTED]))}", fatal)
        )
