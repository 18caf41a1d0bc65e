"""Drawing trees: analytic volumes, a plain oracle, boxes against the whole, connectedness."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, VoxelSize, fine_voxel
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.rasterize import DrawSettings, list_centerline_voxels, paint_tree, rasterize


def random_tree(seed: int, n: int, shape: tuple[int, int, int], radii: tuple[float, float] = (0.5, 4.0)) -> Tree:
    rng = np.random.default_rng(seed)
    points = [rng.uniform(0.2, 0.8, 3) * shape]
    parents = [-1]
    for i in range(1, n):
        parents.append(int(rng.integers(max(0, i - 4), i)))
        points.append(points[parents[-1]] + rng.normal(size=3) * [2, 4, 4])
    return morphology.build_tree(np.asarray(points), np.asarray(parents), rng.uniform(*radii, n))


def line(a: list[float], b: list[float], ra: float, rb: float) -> Tree:
    return morphology.build_tree(np.array([a, b]), np.array([-1, 0]), np.array([ra, rb]))


def plain(tree: Tree, shape: tuple[int, int, int], size: VoxelSize) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Distance (um) and mask by the definition, every voxel against every edge, in float64."""
    unit = fine_voxel(size)
    grid = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, size, strict=True)), indexing="ij"), axis=-1)
    distance, inside = np.full(shape, np.inf), np.zeros(shape, dtype=bool)
    for child, parent in tree.edges:
        a, b = tree.points[parent] * size, tree.points[child] * size
        square = max(float((b - a) @ (b - a)), 1e-300)
        share = np.clip(((grid - a) @ (b - a)) / square, 0, 1)
        apart = np.linalg.norm(grid - a - share[..., None] * (b - a), axis=-1)
        radius = unit * (tree.radii[parent] + share * (tree.radii[child] - tree.radii[parent]))
        distance = np.minimum(distance, apart)
        inside |= apart <= radius
    return distance, inside


def swept(tree: Tree, voxels: NDArray[np.int64], size: VoxelSize) -> NDArray[np.bool_]:
    """[N] which of `voxels` [N, 3] a sphere covers that runs along every edge and takes its radius on the way."""
    unit = fine_voxel(size)
    covered = np.zeros(len(voxels), dtype=bool)
    for child, parent in tree.edges:
        a, b = tree.points[parent] * size, tree.points[child] * size
        for share in np.linspace(0, 1, 65):
            radius = unit * (tree.radii[parent] + share * (tree.radii[child] - tree.radii[parent]))
            covered |= ((voxels * size - a - share * (b - a)) ** 2).sum(axis=-1) <= radius**2 + 1e-3 * unit**2
    return covered


@pytest.mark.parametrize("direction", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0.3, 0.5, 0.8)])
def test_the_volume_of_a_cylinder_is_within_two_percent(direction: tuple[float, float, float]) -> None:
    unit = np.asarray(direction) / np.linalg.norm(direction)
    middle = np.asarray([60.2, 60.4, 60.1])
    tree = line(list(middle - 40 * unit), list(middle + 40 * unit), 6.0, 6.0)
    mask = rasterize(tree, Box.whole((121, 121, 121)), (1.0, 1.0, 1.0)).mask
    assert mask.sum() == pytest.approx(np.pi * 36 * 80 + 4 / 3 * np.pi * 216, rel=0.02)


def test_the_volume_of_an_anisotropic_cylinder_is_within_two_percent() -> None:
    size = (1.0, 0.25, 0.25)
    tree = line([30.3, 100.2, 20.0], [30.3, 100.2, 180.0], 24.0, 24.0)  # 6 um thick, 40 um long
    voxels = rasterize(tree, Box.whole((61, 201, 201)), size).mask.sum()
    assert voxels * np.prod(size) == pytest.approx(np.pi * 36 * 40 + 4 / 3 * np.pi * 216, rel=0.02)


def test_the_volume_of_a_cone_is_within_two_percent() -> None:
    tree = line([30.0, 30.0, 20.0], [30.0, 30.0, 120.0], 12.0, 4.0)
    mask = rasterize(tree, Box.whole((61, 61, 141)), (1.0, 1.0, 1.0)).mask[:, :, 20:121]
    assert mask.sum() == pytest.approx(np.pi * 101 / 3 * (144 + 48 + 16), rel=0.02)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.33, 0.33), (0.4, 0.5, 0.9)]))
@example(257, (1.0, 1.0, 1.0))
def test_mask_and_distance_are_the_definition(seed: int, size: VoxelSize) -> None:
    shape = (18, 30, 34)
    tree = random_tree(seed, 12, shape)
    drawn = rasterize(tree, Box.whole(shape), size)
    distance, inside = plain(tree, shape, size)
    unit = fine_voxel(size)

    np.testing.assert_allclose(drawn.distance, np.minimum(distance / unit, 8.0), atol=2e-3)
    on_line = np.zeros(shape, dtype=bool)
    on_line[tuple(list_centerline_voxels(tree, Box.whole(shape)).T)] = True
    drawn_in, must = drawn.mask == 1, inside | on_line

    assert (must & ~drawn_in).mean() < 1e-4  # voxels on the surface to within rounding
    # a long tapering edge is drawn in pieces, whose round joints may stand out of the plain cone, not of its spheres
    assert (~swept(tree, np.argwhere(drawn_in & ~must), size)).sum() < 1e-4 * must.size


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_a_box_is_the_same_part_of_the_whole(seed: int, z: int, y: int, x: int) -> None:
    shape, size = (26, 40, 44), (1.0, 0.4, 0.4)
    tree = random_tree(seed, 30, shape)
    drawing = DrawSettings(ignore_margin=1.5, stretch=2.0)
    whole = rasterize(tree, Box.whole(shape), size, drawing)
    box = Box.at((z // 4, y, x), (13, 17, 19)).clip(Box.whole(shape))
    part = rasterize(tree, box, size, drawing)

    for name in ("mask", "skeleton", "distance", "tangent"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[(..., *box.slices)], err_msg=name)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.permutations([0, 1, 2]))
def test_axes_are_permutations_of_one_another(seed: int, order: list[int]) -> None:
    shape, size = np.array([20, 30, 40]), np.array([1.0, 0.5, 0.4])
    tree = random_tree(seed, 12, (20, 30, 40))
    turned = Tree(tree.points[:, order], tree.radii, tree.parents, tree.types)
    a = rasterize(tree, Box.whole(tuple(shape)), tuple(size))
    b = rasterize(turned, Box.whole(tuple(shape[order])), tuple(size[order]))

    np.testing.assert_allclose(a.distance.transpose(order), b.distance, atol=1e-4)
    assert (a.mask.transpose(order) != b.mask).mean() < 1e-4


def test_thin_neurites_never_break() -> None:
    shape, size = (30, 60, 60), (1.0, 0.33, 0.33)
    tree = random_tree(3, 40, shape, radii=(0.05, 0.2))
    drawn = rasterize(tree, Box.whole(shape), size)
    for target in (drawn.mask, drawn.skeleton):
        assert cc3d.connected_components(target, connectivity=26).max() == 1


def test_the_tube_stays_in_the_mask_and_around_the_line() -> None:
    shape = (30, 40, 40)
    drawn = rasterize(random_tree(5, 20, shape), Box.whole(shape), (1.0, 1.0, 1.0), DrawSettings(tube=1.5))
    tube = drawn.skeleton == 1
    assert np.all(drawn.mask[tube] == 1)
    assert drawn.distance[tube].max() <= 1.5
    assert tube.sum() < (drawn.mask == 1).sum()


def test_tangents_run_along_the_edge_and_are_zero_beyond_the_cap() -> None:
    size = (2.0, 1.0, 1.0)
    drawn = rasterize(
        line([5.0, 10.0, 5.0], [10.0, 10.0, 25.0], 1, 1), Box.whole((16, 40, 32)), size, DrawSettings(cap=4)
    )

    assert np.all(drawn.tangent[:, drawn.distance >= 4] == 0)
    along = np.rint(127 * np.array([10, 0, 20]) / np.sqrt(500))  # in space, not in voxels
    near = drawn.tangent[:, drawn.distance < 4].T
    np.testing.assert_array_equal(near, np.tile(along, (len(near), 1)))


def test_the_ignored_margin_is_a_shell_around_the_mask() -> None:
    tree, box = line([15.0, 15.0, 5.0], [15.0, 15.0, 35.0], 3, 3), Box.whole((31, 31, 41))
    plain_mask = rasterize(tree, box, (1.0, 1.0, 1.0)).mask
    drawn = rasterize(tree, box, (1.0, 1.0, 1.0), DrawSettings(ignore_margin=2))
    np.testing.assert_array_equal(drawn.mask == 1, plain_mask == 1)
    np.testing.assert_array_equal(drawn.mask == 255, (drawn.distance <= 5) & (drawn.distance > 3))


def test_stretch_lengthens_the_mask_along_the_coarse_axis_alone() -> None:
    tree, box = line([20.0, 30.0, 10.0], [20.0, 30.0, 50.0], 4, 4), Box.whole((41, 61, 61))
    drawn = rasterize(tree, box, (0.5, 0.25, 0.25), DrawSettings(stretch=2.0))
    section = drawn.mask[:, :, 30] == 1
    assert section.any(axis=0).sum() == 2 * 4 + 1  # radius 4 fine voxels across
    assert section.any(axis=1).sum() == 2 * 4 + 1  # 2 um = 4 slices up and down
    np.testing.assert_array_equal(drawn.distance, rasterize(tree, box, (0.5, 0.25, 0.25)).distance)


def test_a_lone_node_is_a_sphere_and_an_empty_tree_draws_nothing() -> None:
    box = Box.whole((21, 21, 21))
    ball = rasterize(
        morphology.build_tree(np.array([[10.0, 10.0, 10.0]]), np.array([-1]), 6.0), box, (1.0, 1.0, 1.0)
    ).mask

    assert ball.sum() == pytest.approx(4 / 3 * np.pi * 216, rel=0.03)
    nothing = rasterize(morphology.empty_tree(), box, (1.0, 1.0, 1.0))

    assert not nothing.mask.any()
    assert np.all(nothing.distance == 8)


def test_what_lies_outside_the_volume_is_cut_off() -> None:
    tree = line([5.0, -30.0, 5.0], [5.0, 60.0, 5.0], 2, 2)
    drawn = rasterize(tree, Box.whole((11, 20, 11)), (1.0, 1.0, 1.0))
    assert np.all(drawn.mask[5, :, 5] == 1)
    assert len(list_centerline_voxels(tree, Box.whole((11, 20, 11)))) == 20


def test_a_drawing_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="tube"):
        rasterize(morphology.empty_tree(), Box.whole((4, 4, 4)), (1.0, 1.0, 1.0), DrawSettings(tube=9, cap=8))


def test_paint_is_bright_inside_soft_at_the_edge_and_keeps_the_brighter() -> None:
    tree = morphology.build_tree(
        np.array([[10, 10, 2], [10, 10, 30], [10, 30, 16], [10, 12, 16.0]]), np.array([-1, 0, -1, 2]), 3.0
    )
    glow = np.array([1.0, 3.0, 9.0, 9.0])
    image = paint_tree(tree, glow, Box.whole((21, 41, 33)), (1.0, 1.0, 1.0))

    assert image[10, 10, 2] == pytest.approx(1, abs=0.01)
    assert image[10, 10, 28] == pytest.approx(1 + 2 * 26 / 28, rel=0.01)
    assert image[10, 20, 16] == pytest.approx(9)
    assert image[10, 11, 16] == pytest.approx(9)
    assert 0 < image[13, 10, 5] < image[12, 10, 5]
    assert image[14, 10, 5] == 0
