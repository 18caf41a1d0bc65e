"""Super-blocks against one process: the same trees, whatever lies across their borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.core.geometry import Box, Point, Shape
from hpc_neuro.core.morphology import Tree, concatenate_trees, length, resample_tree
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.tracing import (
    BlockSkeleton,
    TraceConfig,
    list_trace_blocks,
    skeletonize_block,
    trace_block_skeletons,
)
from hpc_neuro.tracing.super_blocks import (
    SuperBlockLines,
    collect_trees,
    finish_batch,
    group_pieces,
    link_super_block,
    list_blocks_of,
    list_super_blocks,
    trace_super_block,
)
from tests.helpers.shapes import grow_crooked_tree, paint_points, paint_tree, sample_line
from tests.tracing.test_trace import measure_f1

ISO = (1.0, 1.0, 1.0)
CFG = TraceConfig(block=(32, 32, 32), super_block=(2, 2, 4))


def skeletonize(mask: NDArray[np.float32], cfg: TraceConfig) -> dict[Box, BlockSkeleton]:
    shape = get_shape(mask)
    skeletons = {
        box: skeletonize_block(lambda b: mask[b.slices], shape, box, ISO, cfg) for box in list_trace_blocks(shape, cfg)
    }
    return {box: skeleton for box, skeleton in skeletons.items() if skeleton is not None}


def get_shape(mask: NDArray[np.float32]) -> Shape:
    z, y, x = mask.shape
    return z, y, x


def trace_in_parts(mask: NDArray[np.float32], cfg: TraceConfig, roots: Sequence[Point] = ()) -> list[Tree]:
    shape, skeletons = get_shape(mask), skeletonize(mask, cfg)
    cores = list_super_blocks(shape, cfg)
    assert len(cores) > 1

    def read(box: Box) -> NDArray[np.float32]:
        return mask[box.slices]

    lines: list[SuperBlockLines | None] = []
    for core in cores:
        own = {box: skeletons[box] for box in list_blocks_of(core, shape, ISO, cfg) if box in skeletons}
        lines.append(trace_super_block(own, read, shape, core, ISO, roots=roots, cfg=cfg))

    for core, part in zip(cores, lines, strict=True):
        if part is not None:
            assert ((part.voxels >= core.start) & (part.voxels < core.stop)).all(), "each voxel has one owner"

    links = [
        link_super_block(lines.__getitem__, number, cores, shape, ISO, roots=roots, cfg=cfg)
        for number in range(len(cores))
    ]
    groups = group_pieces(links.__getitem__, len(cores), roots=roots, cfg=cfg)
    members = [groups.list_members(batch, links.__getitem__) for batch in range(groups.batches)]
    return collect_trees(
        [
            finish_batch(lines.__getitem__, own, groups, batch, read, shape, ISO, roots=roots, cfg=cfg)
            for batch, own in enumerate(members)
        ],
        groups,
    ).trees


def label_all(lines: Sequence[SuperBlockLines | None], shape: Shape, cfg: TraceConfig) -> dict[tuple[int, int], int]:
    """Group of each kept piece, from all voxels and bridges at once."""
    owner, keys = {}, {}
    for number, part in enumerate(lines):
        for voxel, piece in zip(part.voxels.tolist(), part.component.tolist(), strict=True) if part else ():
            keys[tuple(voxel)] = (number, piece)
    for key in sorted(set(keys.values())):
        owner[key] = len(owner)

    def connect(pairs: list[tuple[tuple[int, int], tuple[int, int]]]) -> list[int]:
        rows = np.array([[owner[a], owner[b]] for a, b in pairs], dtype=np.int64).reshape(-1, 2)
        graph = csr_array((np.ones(len(rows)), (rows[:, 0], rows[:, 1])), shape=(len(owner),) * 2)
        labels: list[int] = connected_components(graph, directed=False)[1].tolist()
        return labels

    steps = [step for step in np.ndindex(3, 3, 3) if step > (1, 1, 1)]
    beside = [
        (key, keys[other])
        for (z, y, x), key in keys.items()
        for dz, dy, dx in steps
        if (other := (z + dz - 1, y + dy - 1, x + dx - 1)) in keys
    ]
    component = connect(beside)
    count, strong = dict[int, int](), set[int]()
    for (number, piece), place in owner.items():
        part = lines[number]
        assert part is not None
        count[component[place]] = count.get(component[place], 0) + int(part.count[piece])
        strong |= {component[place]} if part.strong[piece] else set()
    kept = {
        key for key, place in owner.items() if component[place] in strong and count[component[place]] >= cfg.min_voxels
    }

    bridges = [
        (keys[tuple(a)], keys[tuple(b)])
        for part in lines
        if part is not None
        for a, b in zip(part.bridge_ends.tolist(), part.bridge_targets.tolist(), strict=True)
        if tuple(a) in keys and tuple(b) in keys
    ]
    group = connect(beside + [(a, b) for a, b in bridges if a in kept and b in kept])
    return {key: group[owner[key]] for key in kept}


@pytest.mark.parametrize("seed", range(3))
def test_pieces_are_joined_as_from_all_voxels_at_once(seed: int) -> None:
    """Only the pieces that go on beyond their super-block reach the one rank that joins."""
    rng, shape, cfg = np.random.default_rng(seed), (32, 64, 256), TraceConfig(block=(32, 32, 32), super_block=(1, 1, 2))
    mask = np.zeros(shape, dtype=np.float32)
    for _ in range(14):
        start = rng.uniform((4, 4, 4), (28, 60, 250))
        stop = np.clip(start + rng.uniform(-1, 1, 3) * (12, 25, 60), 3, np.array(shape) - 4)
        paint_points(mask, sample_line(tuple(start), tuple(stop)), 1.5)
    mask *= rng.choice([0.4, 1.0], p=[0.3, 0.7], size=shape[2] // 16).repeat(16).astype(np.float32)

    skeletons, cores = skeletonize(mask, cfg), list_super_blocks(shape, cfg)
    lines = [
        trace_super_block(
            {box: skeletons[box] for box in list_blocks_of(core, shape, ISO, cfg) if box in skeletons},
            lambda box: mask[box.slices],
            shape,
            core,
            ISO,
            cfg=cfg,
        )
        for core in cores
    ]
    links = [link_super_block(lines.__getitem__, number, cores, shape, ISO, cfg=cfg) for number in range(len(cores))]
    groups = group_pieces(links.__getitem__, len(cores), cfg=cfg)
    batch_of = {
        (owner, piece): batch
        for batch in range(groups.batches)
        for owner, pieces in groups.list_members(batch, links.__getitem__).items()
        for piece in pieces.tolist()
    }

    expected = label_all(lines, shape, cfg)
    assert batch_of.keys() == expected.keys()
    for group in set(expected.values()):
        assert len({batch_of[key] for key, own in expected.items() if own == group}) == 1
    inner = sum(len(part.inner) for part in links if part is not None)
    assert 0 < inner < len(expected)


def trace_whole(mask: NDArray[np.float32], cfg: TraceConfig, roots: Sequence[Point] = ()) -> list[Tree]:
    return trace_block_skeletons(
        list(skeletonize(mask, cfg).values()), lambda b: mask[b.slices], get_shape(mask), ISO, roots=roots, cfg=cfg
    )


def paint_tube(shape: Shape, *corners: Point, radius: float = 2.0) -> NDArray[np.float32]:
    mask = np.zeros(shape, dtype=np.float32)
    paint_points(mask, sample_line(*corners), radius)
    return mask


@pytest.mark.parametrize("seed", range(2))
def test_the_trees_are_those_of_one_process(seed: int) -> None:
    shape = (64, 64, 384)
    gold = [grow_crooked_tree(10 * seed + n, shape, 6) for n in range(2)]
    mask = np.clip(ndimage.gaussian_filter(sum(paint_tree(t, shape, 2.0) for t in gold), 0.7), 0, 1)
    whole, parts = trace_whole(mask, CFG), trace_in_parts(mask, CFG)
    assert len(parts) == len(whole)
    a, b = concatenate_trees(parts), concatenate_trees(whole)
    assert measure_f1(a, b, 1.0) > 0.99
    assert length(a) == pytest.approx(length(b), rel=0.01)


def test_a_tube_through_many_super_blocks_is_one_tree_with_given_roots_in_their_order() -> None:
    shape = (32, 64, 512)
    first, second = (16.0, 10.0, 6.0), (16.0, 50.0, 500.0)
    mask = np.maximum(paint_tube(shape, first, (16.0, 14.0, 505.0)), paint_tube(shape, (16.0, 46.0, 6.0), second))
    trees = trace_in_parts(mask, CFG, [second, first])
    assert [tuple(tree.points[0]) for tree in trees] == [second, first]
    assert all(length(tree) == pytest.approx(495, abs=8) for tree in trees)
    assert len(trace_in_parts(mask, CFG, [first])) == 1


def test_a_ring_over_a_border_is_opened_once() -> None:
    """Each side would open it at another place, and what hangs between would fall off."""
    shape = (32, 64, 512)
    corners = [(16.0, 32.0, 20.0), (16.0, 32.0, 216.0), (16.0, 12.0, 236.0), (16.0, 12.0, 276.0), (16.0, 32.0, 296.0)]
    mask = np.maximum(
        paint_tube(shape, *corners, (16.0, 32.0, 490.0)),
        paint_tube(shape, corners[1], (16.0, 52.0, 236.0), (16.0, 52.0, 276.0), corners[4]),
    )
    (whole,), (tree,) = trace_whole(mask, CFG), trace_in_parts(mask, CFG)
    assert measure_f1(tree, whole, 2.0) > 0.99


def test_a_gap_at_a_border_is_bridged_once() -> None:
    shape = (32, 32, 256)
    mask = paint_tube(shape, (16.0, 16.0, 6.0), (16.0, 16.0, 250.0))
    mask[:, :, 122:134] = 0
    (tree,) = trace_in_parts(mask, CFG)
    assert length(tree) == pytest.approx(244, abs=8)
    assert len(trace_in_parts(mask, TraceConfig(block=CFG.block, super_block=CFG.super_block, gap=0))) == 2


def test_what_is_weak_for_long_belongs_to_what_is_strong_far_away() -> None:
    """A super-block sees no voxel above the threshold, nor does its margin; alone it would be noise."""
    mask = 0.4 * paint_tube((32, 32, 512), (16.0, 16.0, 6.0), (16.0, 16.0, 500.0))
    assert trace_in_parts(mask, CFG) == []
    mask[:, :, 480:] *= 2
    (tree,) = trace_in_parts(mask, CFG)
    assert np.ptp(resample_tree(tree, 1.0).points[:, 2]) > 480


def test_faults_of_roots_are_said() -> None:
    mask = paint_tube((32, 32, 384), (16.0, 16.0, 6.0), (16.0, 16.0, 120.0))
    for far in (250.0, 370.0):
        with pytest.raises(InputError, match="root_snap = 10"):
            trace_in_parts(mask, CFG, [(16.0, 16.0, far)])
    with pytest.raises(InputError, match="one root"):
        trace_in_parts(mask, CFG, [(16.0, 16.0, 60.0), (16.0, 16.2, 60.0)])
    with pytest.raises(ConfigError, match="super_block"):
        load(TraceConfig, None, ["super_block=[0,1,1]"])


def test_neighbors_are_cut_off_as_in_one_process() -> None:
    """A line crosses the rooted one far from any border of a super-block, and goes on beyond one."""
    mask = np.zeros((32, 96, 160), dtype=np.float32)
    paint_points(mask, sample_line((16, 48, 6), (16, 48, 150)), 2.5)
    paint_points(mask, sample_line((16, 6, 80), (16, 90, 100)), 2.5)
    roots: list[Point] = [(16.0, 48.0, 6.0)]

    (whole,) = trace_in_parts(mask, replace(CFG, contacts=False), roots)
    (tree,) = trace_in_parts(mask, replace(CFG, contacts=True), roots)
    assert length(whole) > 220
    assert length(tree) == pytest.approx(144, rel=0.06)
