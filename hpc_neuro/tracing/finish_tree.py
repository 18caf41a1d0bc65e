"""Turn the forest of centerlines into rooted, pruned, smooth trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order
from scipy.spatial import cKDTree

from hpc_neuro.core.morphology import Tree, child_counts, edge_lengths, mark_above, select_nodes, tips
from hpc_neuro.tracing.graph import CenterlineGraph
from hpc_neuro.tracing.probability import Bools, Floats, Ints
from hpc_neuro.tracing.voxel_graph import follow_to_end, sum_to_root

_UNDEFINED, _SOMA = 0, 1
"""SWC types of nodes."""
_SOMA_RATIO = 3.0
"""[median radius] Radius of a node from which it is a soma, and at least `_SOMA_RADIUS`."""
_SOMA_RADIUS = 4.0
"""[voxel] Smallest radius of a soma."""
_LEAST_CERTAINTY = 0.6
"""[median of the piece] Certainty of a soma, at least."""
_END_REACH = 10.0
"""[voxel] Reach of the mean of radii that tells how thick an end is."""
_ROOT_BALL_RATIO = 3.0
"""[radius of the root] Radius of the ball at whose surface the branches of a root are counted, plus
`_ROOT_BALL_MARGIN`."""
_ROOT_BALL_MARGIN = 2.0
"""[voxel] See `_ROOT_BALL_RATIO`."""
_BORDER_MARGIN = 3.0
"""[voxel] Surface of a tip that is this near to the border of the volume: the neurite comes from outside."""
_STUB_SHARE = 0.1
"""[cable that it leaves] Length of a side path that is no branch."""
_BESIDE_RATIO, _BESIDE_MARGIN = 4.0, 4.0
"""[median radius of the cable], [voxel] What strays less than both together from a cable runs beside it."""
_STEP = 1.5
"""[voxel] Nodes closer than this to their parent are merged into the path; branch points and tips stay."""
_THINNEST = 0.5
"""[fine voxel] Smallest radius."""


@dataclass(frozen=True)
class _Root:
    """Where a tree begins."""

    node: int
    type: int
    """SWC type of the node."""


def root_trees(
    lines: CenterlineGraph,
    given: Sequence[int],
    min_branch: float,
    min_cable: float,
    certainty: Floats | None = None,
) -> Iterator[tuple[Tree, Ints]]:
    """The trees of the pieces of the `given` roots in their order, each with the node of `lines` of each of its nodes.

    Without given roots: the trees of all pieces with at least `min_cable` of cable, from a soma or a thick end that is
    as certain as the rest (`certainty` [K]; None: all nodes are). No two roots lie in one piece. The radii of the trees
    are their thickness in the metric's unit.
    """
    count, label = lines.label_pieces()
    roots = [_Root(node, _UNDEFINED) for node in given]
    if not roots:
        certainty = np.ones(len(lines)) if certainty is None else certainty
        roots = _choose_roots(lines, min_branch, min_cable, count, label, certainty)
    if not roots:
        return

    # One search from an extra node that leads to every root: a search for each tree would look at all nodes each time.
    n, starts = len(lines), np.array([root.node for root in roots], dtype=np.int64)
    rows = np.concatenate([lines.edges[:, 0], lines.edges[:, 1], np.full(len(starts), n)])
    columns = np.concatenate([lines.edges[:, 1], lines.edges[:, 0], starts])
    extended = csr_array((np.ones(len(rows)), (rows, columns)), shape=(n + 1, n + 1))
    order, predecessors = breadth_first_order(extended, n, return_predecessors=True)
    order = order[1:]

    # Pieces without a root are not reached by the search, so only the pieces of the roots get a number.
    tree_of_piece = np.full(count, -1)
    tree_of_piece[label[starts]] = np.arange(len(starts))
    tree_number = tree_of_piece[label[order]]
    ends = np.cumsum(np.bincount(tree_number))[:-1]

    # Each tree numbers its nodes from its root. The order of the search puts parents before their children.
    index = np.empty(n, dtype=np.int64)
    for root, nodes in zip(roots, np.split(order[np.argsort(tree_number, kind="stable")], ends), strict=True):
        index[nodes] = np.arange(len(nodes))
        parents = np.concatenate([[-1], index[predecessors[nodes[1:]]]]).astype(np.int64)

        types = np.full(len(nodes), _UNDEFINED, dtype=np.int64)
        types[0] = root.type
        yield Tree(lines.points[nodes], lines.thickness[nodes], parents, types), nodes.astype(np.int64)


def _choose_roots(
    lines: CenterlineGraph,
    min_branch: float,
    min_cable: float,
    count: int,
    label: NDArray[np.int32],
    certainty: Floats,
) -> list[_Root]:
    """The root of each piece: its soma, if one place is far thicker than the rest, else its thickest certain end.

    What is left of an end at which a bridge begins is no end (see prune_tree).
    """
    cable = np.bincount(label[lines.edges[:, 0]], weights=lines.edge_lengths, minlength=count)
    # The sum of a tree's edges may round otherwise than that of a piece's edges; the caller decides.
    is_long = cable >= min_cable * (1 - 1e-9)

    # Listing the neighbors is slow, and often no piece is long enough.
    neighbors = lines.list_neighbors() if is_long.any() else []

    order = np.argsort(label, kind="stable")
    order = order[is_long[label[order]]]
    pieces = np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if len(order) else []

    return [_choose_root(lines, neighbors, piece, min_branch, certainty[piece]) for piece in pieces]


def _choose_root(
    lines: CenterlineGraph, neighbors: Sequence[Sequence[int]], piece: Ints, min_branch: float, certainty: Floats
) -> _Root:
    radii = lines.thickness[piece]
    # A soma is not dimmer than its neurites.
    is_certain = certainty >= _LEAST_CERTAINTY * np.median(certainty)
    thickest = int(np.where(is_certain, radii, 0).argmax())
    if is_soma(radii[thickest], radii):
        return _Root(int(piece[thickest]), _SOMA)

    ends = piece[lines.degree[piece] <= 1]
    is_stub = np.array([_is_stub(lines, neighbors, end, min_branch) for end in ends.tolist()])

    # A piece has to have a root, even if all its ends are stubs.
    ends = ends if is_stub.all() else ends[~is_stub]

    # The radius of a single node is noisy at an end, so a mean decides. Haze, vessels and what only a network sees may
    # be thicker than the neuron, but not as bright.
    balls = cKDTree(lines.points[piece]).query_ball_point(lines.points[ends], _END_REACH, return_sorted=True)
    worth = [float(radii[ball].mean() * certainty[ball].mean() ** 2) for ball in balls]
    return _Root(int(ends[int(np.argmax(worth))]), _UNDEFINED)


def _is_stub(lines: CenterlineGraph, neighbors: Sequence[Sequence[int]], end: int, min_branch: float) -> bool:
    """Whether an end hardly leaves the surface of the line that it springs from."""
    before, here, walked = -1, end, 0.0

    while len(neighbors[here]) <= 2:
        # The other end was reached without a fork, so the line springs from nothing.
        onward = [node for node in neighbors[here] if node != before]
        if not onward:
            return False

        before, here = here, onward[0]
        walked += float(np.linalg.norm(lines.points[here] - lines.points[before]))
    return bool(walked - lines.thickness[here] < min_branch)


def prune_tree(tree: Tree, min_branch: float) -> Bools:
    """[N] the nodes that stay: without end branches that hardly leave the surface of the branch they spring from.

    The shortest branches go first.
    """
    keep, nodes = np.ones(len(tree), dtype=bool), np.arange(len(tree))

    # Without its shortest branch a fork may be none, and its other branch may then be long enough.
    while len(dropped := _find_short_branches(tree, min_branch)):
        keep[nodes[dropped]] = False
        stays = np.ones(len(tree), dtype=bool)
        stays[dropped] = False
        tree, nodes = select_nodes(tree, stays), nodes[stays]
    return keep


def _find_short_branches(tree: Tree, min_branch: float) -> Ints:
    """The nodes of the shortest end branch of each fork, where it is too short; its twin may go on."""
    counts = child_counts(tree)
    is_fork = counts >= 2
    joint, away = _measure_up_to_fork(tree, is_fork)

    # A tip without a fork above it is the end of the whole tree, and stays.
    ends = tips(tree)
    ends = ends[is_fork[joint[ends]]]

    # One branch of a fork goes at a time: the other may be what continues the neurite.
    short = ends[away[ends] - tree.radii[joint[ends]] < min_branch]
    short = short[np.argsort(away[short], kind="stable")]
    _, first = np.unique(joint[short], return_index=True)

    is_dropped = np.zeros(len(tree), dtype=bool)
    is_dropped[short[first]] = True

    # A dropped tip takes its whole branch with it.
    below = np.arange(len(tree))

    single = np.flatnonzero((tree.parents >= 0) & (counts[tree.parents] == 1))
    below[tree.parents[single]] = single

    return np.flatnonzero(is_dropped[follow_to_end(below)] & ~is_fork & (tree.parents >= 0))


def _measure_up_to_fork(tree: Tree, is_fork: Bools) -> tuple[Ints, Floats]:
    """[N] the nearest fork above each node (the root where there is none), and [N] the length of the path to it."""
    above = np.maximum(tree.parents, 0)
    is_last = is_fork[above] | (tree.parents < 0)
    step = edge_lengths(tree)

    # Chains are cut below each fork, so that every branch is summed by itself.
    up = np.where(is_last, np.arange(len(tree)), above)
    top = follow_to_end(up)

    # The step from the top of a chain to its fork belongs to the branch, too.
    away = sum_to_root(np.where(is_last, 0.0, step), up) + np.where(tree.parents[top] >= 0, step[top], 0.0)
    return np.where(tree.parents[top] >= 0, above[top], top), away


def find_main_side(tree: Tree) -> Bools:
    """[N] the nodes on the side of the root that holds most cable.

    What leaves a ball around the root is judged by its direction: at less than a right angle from the branch with most
    cable it stays, the rest is dropped.
    """
    keep = np.ones(len(tree), dtype=bool)
    step = edge_lengths(tree)

    # Near the root directions are noise, so branches are compared where they leave a ball.
    home = sum_to_root(step, np.maximum(tree.parents, 0))
    is_in_ball = home <= _ROOT_BALL_RATIO * tree.radii[0] + _ROOT_BALL_MARGIN

    leaving = np.flatnonzero(~is_in_ball & is_in_ball[tree.parents])
    if len(leaving) < 2:
        return keep

    below = step.copy()

    # Children come after their parents, so one backward pass sums what hangs below.
    for node in range(len(tree) - 1, 0, -1):
        below[tree.parents[node]] += below[node]

    out = tree.points[leaving] - tree.points[0]
    stays = leaving[out @ out[below[leaving].argmax()] > 0]

    # What hangs below the branches that stay, then what leads to them.
    keep[:] = False
    keep[stays] = True
    for node in range(1, len(tree)):
        keep[node] |= keep[tree.parents[node]]
    return mark_above(tree, keep)


def is_cable_end(tree: Tree, extent: Floats) -> bool:
    """Whether the root is where the neuron begins, and not a soma or a place on its way.

    So it is where the far side (see `find_main_side`) is one cable from the border of the volume, of `extent` [3], to
    the root, and the near side branches. Short stubs of that cable, and what runs beside it, do not count as branches:
    wide or unevenly bright cables are traced twice in places. Lengths are in the tree's unit.
    """
    keep = find_main_side(tree)
    if keep.all() or is_soma(tree.radii[0], tree.radii):
        return False

    counts = child_counts(tree)
    counts[0] = 1
    if not ((counts >= 2) & keep).any():
        return False

    far_paths = [path for path in list_long_paths(tree) if not keep[path[-1]]]
    cable = max(far_paths, key=lambda path: _measure_path(tree, path))
    if not all(_is_side_stub(tree, path, cable) for path in far_paths if path is not cable):
        return False

    tip = cable[-1]
    to_border = np.minimum(tree.points[tip], extent - tree.points[tip]).min()
    return bool(to_border <= tree.radii[tip] + _BORDER_MARGIN)


def _is_side_stub(tree: Tree, path: Ints, cable: Ints) -> bool:
    """Whether a side path is short beside the cable that it leaves, or runs along it."""
    if _measure_path(tree, path) <= _STUB_SHARE * _measure_path(tree, cable):
        return True
    stray = np.asarray(cKDTree(tree.points[cable]).query(tree.points[path])[0])
    return bool(stray.max() <= _BESIDE_RATIO * float(np.median(tree.radii[cable])) + _BESIDE_MARGIN)


def _measure_path(tree: Tree, path: Ints) -> float:
    return float(np.linalg.norm(np.diff(tree.points[path], axis=0), axis=1).sum())


def is_soma(radius: float, radii: Floats) -> bool:
    """Whether a place of this radius is far thicker than most of a neuron with these radii."""
    return bool(radius >= max(_SOMA_RATIO * np.median(radii), _SOMA_RADIUS))


def smooth_tree(tree: Tree, sigma: float) -> Tree:
    """Move nodes and radii along unbranched paths by a Gaussian of `sigma` nodes.

    The root, the tips and the joints with the parent path stay.
    """
    if sigma == 0:
        return tree

    # Beyond three standard deviations the weights are negligible.
    width = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-width, width + 1) / sigma) ** 2)
    kernel /= kernel.sum()

    points, radii = tree.points.copy(), tree.radii.copy()
    # An earlier path is final when a later one takes its joint from it.
    for path in list_long_paths(tree):
        line = _smooth_line(np.column_stack([points[path], radii[path]]), kernel)
        points[path[1:]], radii[path[1:]] = line[1:, :3], np.maximum(line[1:, 3], _THINNEST)
    return replace(tree, points=points, radii=radii)


def _smooth_line(line: Floats, kernel: Floats) -> Floats:
    """[n, 4] the columns of a line convolved with a kernel, which is cut to the line's length; both ends stay."""
    width = len(kernel) // 2
    pad = min(width, len(line) - 1)
    if pad < 1:
        return line

    # Point reflection at both ends keeps them in place.
    before, after = 2 * line[0] - line[pad:0:-1], 2 * line[-1] - line[-2 : -pad - 2 : -1]
    padded = np.concatenate([before, line, after])
    kernel = kernel[width - pad : width + pad + 1]
    kernel = kernel / kernel.sum()
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)


def list_long_paths(tree: Tree) -> list[Ints]:
    """The tree as unbranched paths, each from its joint with an earlier path (or the root) to a tip.

    At a branch point the path goes on along the child with the longest way to a tip.
    """
    # Plain lists: single values of numpy's arrays are several times slower.
    parents, step = tree.parents.tolist(), edge_lengths(tree).tolist()
    farthest, heir = [0.0] * len(parents), [-1] * len(parents)

    # Children come after their parents, so the way below a node is final when it is reached.
    for node in range(len(parents) - 1, 0, -1):
        parent, reach = parents[node], farthest[node] + step[node]
        if parent >= 0 and (heir[parent] < 0 or reach > farthest[parent]):
            farthest[parent], heir[parent] = reach, node

    paths = []
    for start, parent in enumerate(parents):
        if parent >= 0 and heir[parent] == start:
            continue

        # The joint belongs to the path, so that smoothing does not tear it off.
        path = [start] if parent < 0 else [parent, start]
        while heir[path[-1]] >= 0:
            path.append(heir[path[-1]])
        paths.append(np.array(path))
    return paths


def decimate_tree(tree: Tree) -> Tree:
    """The tree without path nodes closer than `_STEP` to the last kept node above; root, forks and tips stay."""
    parents, lengths, counts = tree.parents.tolist(), edge_lengths(tree).tolist(), child_counts(tree).tolist()
    since = [0.0] * len(parents)
    keep = np.ones(len(parents), dtype=bool)

    # Lengths add up over dropped nodes, so a run of short edges keeps some of its nodes.
    for node in range(1, len(parents)):
        walked = lengths[node] + since[parents[node]]
        if counts[node] == 1 and walked < _STEP:
            keep[node] = False
            since[node] = walked
    return select_nodes(tree, keep)
