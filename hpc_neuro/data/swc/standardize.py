"""The form of a tree that all SWC readers agree on, and what had to change to reach it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.swc.structure import fill_bad_radii

UNDEFINED, SOMA = 0, 1


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
    types = np.where((tree.types < 0) | (tree.types > 7), UNDEFINED, tree.types)
    if count := int((types != tree.types).sum()):
        changes.append(f"{count} types outside 0 to 7, now 0")
    tree = Tree(tree.points, radii, tree.parents, types)
    tree = _one_soma(tree, changes)
    return _one_type_per_run(tree, changes), changes


def _one_soma(tree: Tree, changes: list[str]) -> Tree:
    """The soma as the first root alone.

    Soma points whose sphere meets the root's (three-point somas, cylinders, contours) are that same soma and go. Any
    other is cable that a tracer marked as soma: it stays and takes its neurite's type. No cable is lost for a type.
    """
    soma = tree.types == SOMA
    apart = np.linalg.norm(tree.points - tree.points[0], axis=1) > tree.radii + tree.radii[0]
    if soma.all() and apart.any():
        changes.append(f"all {len(tree)} nodes were soma (type 1), now undefined (type 0)")
        return Tree(tree.points, tree.radii, tree.parents, np.full(len(tree), UNDEFINED))
    own = np.zeros(len(tree), dtype=bool)  # hangs together with the first root, all soma, all touching it
    own[0] = soma[0]
    for i in np.flatnonzero(soma & ~apart):
        own[i] |= tree.parents[i] >= 0 and own[tree.parents[i]]
    types = tree.types.copy()
    for i in np.flatnonzero(soma & ~own):  # parents stand first
        up = tree.parents[i]
        types[i] = UNDEFINED if up < 0 or types[up] == SOMA else types[up]
    if count := int((soma & ~own).sum()):
        changes.append(f"{count} soma points away from the root's soma, now of their neurite's type")
    tree = Tree(tree.points, tree.radii, tree.parents, types)
    own[0] = False
    if not own.any():
        return tree
    changes.append(f"a soma of {int(own.sum()) + 1} points, now its first point alone")
    return morphology.select_nodes(tree, ~own)


def _one_type_per_run(tree: Tree, changes: list[str]) -> Tree:
    """Each unbranched run takes the type of its first node: readers store one type per section."""
    children = morphology.child_counts(tree)
    types: NDArray[np.int64] = tree.types.copy()
    up = tree.parents
    inherits = (up >= 0) & (children[up] == 1) & (tree.types[up] != SOMA)
    if not (inherits & (types != types[up])).any():
        return tree
    for i in np.flatnonzero(inherits):  # parents stand first
        types[i] = types[up[i]]
    changes.append(f"{int((types != tree.types).sum())} types that turned along an unbranched run, now the run's first")
    return Tree(tree.points, tree.radii, up, types)
