"""The trees hardly depend on the blocks, and memory is that of one block and the trees."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.tracing import TraceConfig, trace, trace_reader
from hpc_neuro.tracing.block_skeleton import add_halo, list_trace_blocks
from tests.helpers.shapes import grow_crooked_tree, paint_points, paint_tree, sample_line

ISO = (1.0, 1.0, 1.0)
SHAPE = (48, 96, 160)
TOLERANCE = 1.5  # [voxel] the stated one (docs/infer.md), of places
CAP = 5.0  # [voxel] an end may be any place on the round end of a tube (radius 2 to 3 here)
LENGTH = 0.03  # of the cable


def ends(tree: Tree) -> NDArray[np.float64]:
    """[E, 3] tips and root."""
    return tree.points[np.append(morphology.tips(tree), tree.roots)]


def apart(a: Tree, b: Tree) -> float:
    """Largest distance of cable of either from the other; of what is no end's cap."""
    one, other = (morphology.resample_tree(t, 0.5).points for t in (a, b))
    distances = []
    for source, target, tree in ((one, other, a), (other, one, b)):
        inner = cKDTree(ends(tree)).query(source)[0] > CAP
        distances.append(np.max(cKDTree(target).query(source[inner])[0]))
    return float(max(distances))


def check_same(whole: list[Tree], parts: list[Tree]) -> None:
    assert len(whole) == len(parts)
    for a, b in zip(whole, parts, strict=True):
        assert apart(a, b) <= TOLERANCE
        assert np.max(cKDTree(ends(b)).query(ends(a))[0]) <= CAP
        assert len(morphology.tips(a)) == len(morphology.tips(b))
        assert len(morphology.branch_points(a)) == len(morphology.branch_points(b))
        assert morphology.length(b) == pytest.approx(morphology.length(a), rel=LENGTH)


@pytest.mark.parametrize(("seed", "block"), [(0, (24, 40, 64)), (1, (17, 33, 29)), (1, (48, 48, 12))])
def test_the_same_trees_whatever_the_blocks(seed: int, block: Shape) -> None:
    """A branched neuron with a blurred, noisy border, beside one with a break; cut in odd places, also along it."""
    gold = grow_crooked_tree(seed, SHAPE, branches=5)
    mask = paint_tree(gold, SHAPE)
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.0)
    image = np.clip(1.2 * ndimage.gaussian_filter(mask, 0.8) + 0.05 * noise / noise.std(), 0, 1).astype(np.float32)
    for roots in ([], [tuple(gold.points[0])]):
        whole, parts = (trace(image, ISO, roots=roots, cfg=TraceConfig(block=b)) for b in (SHAPE, block))
        check_same(whole, parts)
        assert len(morphology.tips(parts[0])) - (not roots) in (6, 5)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_border_along_a_neurite_does_not_show(shift: int) -> None:
    """The border runs through the middle, beside it, or just touches a tube, which a bridge continues."""
    mask = np.zeros((40, 64, 160), np.float32)
    paint_points(mask, sample_line((20, 32 + shift, 8), (20, 32 + shift, 80)), 3.0)
    paint_points(mask, sample_line((20, 32 + shift, 94), (20, 32 + shift, 150)), 3.0)
    (whole,) = trace(mask, ISO)
    (parts,) = trace(mask, ISO, cfg=TraceConfig(block=(20, 32, 32)))
    check_same([whole], [parts])
    assert len(morphology.tips(parts)) == 1
    assert np.abs(parts.points[:, 1] - 32 - shift).max() < 1.5


def test_a_soma_in_a_corner_of_blocks_is_one_soma() -> None:
    mask = np.zeros((48, 64, 128), np.float32)
    paint_points(mask, sample_line((24, 32, 10), (24, 32, 120)), 2.0)
    paint_points(mask, np.array([[24.0, 32.0, 64.0]]), 11.0)
    whole, parts = (trace(mask, ISO, cfg=TraceConfig(block=b)) for b in ((48, 64, 128), (24, 32, 64)))
    check_same(whole, parts)
    assert parts[0].types[0] == 1
    assert parts[0].radii[0] == pytest.approx(whole[0].radii[0], abs=0.5)


def test_blocks_cover_the_volume_and_are_read_with_context() -> None:
    cfg = TraceConfig(block=(16, 32, 64), metric="um")
    boxes = list_trace_blocks(SHAPE, cfg)
    counted = np.zeros(SHAPE, int)
    for box in boxes:
        counted[box.slices] += 1
        around = add_halo(box, SHAPE, (4.0, 1.0, 1.0), cfg)
        for axis, reach in enumerate((8, 32, 32)):
            assert around.start[axis] == max(box.start[axis] - reach, 0)
            assert around.stop[axis] == min(box.stop[axis] + 1 + reach, SHAPE[axis])
    assert np.all(counted == 1)


def test_memory_is_that_of_a_block_and_the_trees() -> None:
    """A neurite four times as long, with four times the foreground, in a volume four times as large."""

    def peak(width: int) -> int:
        largest = 0

        def read(box: Box) -> NDArray[np.uint8]:
            nonlocal largest
            largest = max(largest, box.size)
            z, y, _ = np.ogrid[box.slices]
            tube = (z - 16) ** 2 + (y - 16) ** 2 < 40
            return np.where(np.broadcast_to(tube, box.shape), np.uint8(255), np.uint8(0))

        tracemalloc.start()
        cfg = TraceConfig(block=(32, 32, 128))
        (tree,) = trace_reader(read, (32, 32, width), ISO, roots=[(16, 16, 0)], cfg=cfg)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert morphology.length(tree) == pytest.approx(width, abs=8)
        assert largest == 32 * 32 * (128 + 2 * 32 + 1)
        return top

    assert peak(1536) < 1.1 * peak(384)
