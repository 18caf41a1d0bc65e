"""The form of a tree that all SWC readers agree on, and what had to change to reach it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.swc.structure import fill_bad_radii

UNDEFINED, SOMA = 0, 1
"""SWC types."""


def standardize(tree: Tree) -> tuple[Tree, list[str]]:
    """A tree with one soma point at most (at the first root), one type per unbranched run, types 0-7, radii above 0.

    Returns the tree and one sentence per kind of change; a tree that is already so comes back equal, with [].
    """
    changes: list[str] = []
    radii = fill_bad_radii(tree)
    if count := int((radii != tree.radii).sum()):
        changes.append(f"{count} radii that were not above 0, now the parent's")
    if not len(tree):
        return tree, changes

    # Types beyond 7 are customs of single laboratories, which readers refuse or reinterpret.
    types = np.where((tree.types < 0) | (tree.types > 7), UNDEFINED, tree.types)
    if count := int((types != tree.types).sum()):
        changes.append(f"{count} types outside 0 to 7, now 0")

    tree, soma_changes = _reduce_soma(replace(tree, radii=radii, types=types))
    tree, run_changes = _unify_runs(tree)
    return tree, [*changes, *soma_changes, *run_changes]


def describe_other_somas(count: int) -> str:
    """The sentence on soma points that do not belong to the first root's soma."""
    return f"{count} soma points away from the root's soma, now of their neurite's type"


def _reduce_soma(tree: Tree) -> tuple[Tree, list[str]]:
    """The soma as the first root alone.

    Soma points whose sphere meets the root's (three-point somas, cylinders, contours) are that same soma and go. Any
    other is cable that a tracer marked as soma: it stays and takes its neurite's type. No cable is lost for a type.
    """
    # A tracer that marks every node as soma means none of them.
    is_soma = tree.types == SOMA
    is_apart = np.linalg.norm(tree.points - tree.points[0], axis=1) > tree.radii + tree.radii[0]
    if is_soma.all() and is_apart.any():
        undefined = replace(tree, types=np.full(len(tree), UNDEFINED))
        return undefined, [f"all {len(tree)} nodes were soma (type 1), now undefined (type 0)"]

    # The root's soma: connected with the first root through soma points that touch it. Parents come first.
    in_root_soma = np.zeros(len(tree), dtype=bool)
    in_root_soma[0] = is_soma[0]
    for i in np.flatnonzero(is_soma & ~is_apart):
        in_root_soma[i] |= tree.parents[i] >= 0 and in_root_soma[tree.parents[i]]

    # All other soma points are cable.
    changes: list[str] = []
    types = tree.types.copy()
    for i in np.flatnonzero(is_soma & ~in_root_soma):
        parent = tree.parents[i]
        types[i] = UNDEFINED if parent < 0 or types[parent] == SOMA else types[parent]
    if count := int((is_soma & ~in_root_soma).sum()):
        changes.append(describe_other_somas(count))
    tree = replace(tree, types=types)

    # The first point stays; the others of the root's soma go.
    in_root_soma[0] = False
    if in_root_soma.any():
        changes.append(f"a soma of {int(in_root_soma.sum()) + 1} points, now its first point alone")
        tree = morphology.select_nodes(tree, ~in_root_soma)
    return tree, changes


def _unify_runs(tree: Tree) -> tuple[Tree, list[str]]:
    """Each unbranched run takes the type of its first node: readers store one type per section."""
    # A node inherits where it is an only child, and not the first node after the soma.
    parents, types = tree.parents, tree.types.copy()
    is_inherited = (parents >= 0) & (morphology.child_counts(tree)[parents] == 1) & (tree.types[parents] != SOMA)
    if not (is_inherited & (types != types[parents])).any():
        return tree, []

    # Parents come first, so a type is passed on along the whole run.
    for i in np.flatnonzero(is_inherited):
        types[i] = types[parents[i]]
    count = int((types != tree.types).sum())
    return replace(tree, types=types), [f"{count} types that turned along an unbranched run, now the run's first"]
