"""Ends of a tree that an image does not show: what a network adds beyond it."""

from __future__ import annotations

import numpy as np

from hpc_neuro.core.morphology import Tree, edge_lengths, mark_above
from hpc_neuro.tracing.probability import Bools, Floats

_REACH = 8.0
"""[voxel] Length of cable that is judged together."""
_LEAST_SHARE = 0.6
"""Share of that length which the image must show."""
_LEVEL = 0.4
"""What an image says of an edge that it shows, at least; 0.5 is the level of its foreground."""


def find_supported_nodes(tree: Tree, support: Floats) -> Bools:
    """[N] whether a node leads to cable that an image shows, or is such cable.

    A network crosses gaps that a level cannot, and for the same reason follows what is far dimmer than the neuron.
    `support` [N] is what the image says of the edge from each node to its parent, as of `measure_confidence`. A node is
    shown where 60 % of the 8 voxels (the tree's unit) from it towards the root are. What leads to a node that is shown
    stays, so that gaps are crossed; ends that are not shown are dropped. Roots are always supported.
    """
    length = edge_lengths(tree)
    shown = length * (support >= _LEVEL)
    total, part = length.copy(), shown.copy()

    # Every node walks towards its root, all at once, until it has walked its reach.
    place = tree.parents.copy()
    is_walking = (place >= 0) & (total < _REACH)
    while is_walking.any():
        nodes = np.flatnonzero(is_walking)
        total[nodes] += length[place[nodes]]
        part[nodes] += shown[place[nodes]]
        place[nodes] = tree.parents[place[nodes]]
        is_walking = (place >= 0) & (total < _REACH)

    return mark_above(tree, (part >= _LEAST_SHARE * total) | (tree.parents < 0))
