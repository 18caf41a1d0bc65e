"""Synthetic neurons: seeded, inside, branching and tapering; stacks that look like the microscope they name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, fine_voxel, to_um
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.data.rasterize import rasterize
from hpc_neuro.data.synthetic import (
    Microscope,
    SyntheticConfig,
    TreeForm,
    grow_random_tree,
    render_stack,
    write_dataset,
)

SHAPE = (24, 96, 96)
SIZE = (1.0, 0.33, 0.33)
QUIET = Microscope(photons=1e6, read_noise=0, background=0, specks=0, fragments=0, gap_length=0.0, unevenness=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0]))
def test_a_tree_is_seeded_single_inside_and_positive(seed: int, soma: float) -> None:
    tree = grow_random_tree(seed, SHAPE, SIZE, TreeForm(soma=soma))
    again = grow_random_tree(seed, SHAPE, SIZE, TreeForm(soma=soma))

    np.testing.assert_array_equal(tree.points, again.points)
    assert len(tree.roots) == 1
    assert np.all((tree.points >= 0) & (tree.points <= np.asarray(SHAPE) - 1))
    assert tree.radii.min() > 0
    assert (tree.types[0] == 1) == bool(soma)
    assert len(tree) > 5


def test_seeds_differ_and_trees_branch_wind_and_taper() -> None:
    trees = [grow_random_tree(seed, (48, 192, 192), SIZE) for seed in range(8)]
    assert len({len(t) for t in trees}) > 4
    assert np.median([len(morphology.branch_points(t)) for t in trees]) >= 4

    for tree in trees:
        um = to_um(tree.points, SIZE)
        tips, root = morphology.tips(tree), tree.roots[0]
        if tree.types[root] != 1:
            assert tree.radii[tips].mean() < tree.radii[: len(tree) // 8 + 1].mean()
        reach = np.linalg.norm(um[tips] - um[root], axis=1).max()
        assert morphology.length(morphology.Tree(um, tree.radii, tree.parents, tree.types)) > 1.05 * reach


def test_winding_and_branching_do_what_they_say() -> None:
    straight = grow_random_tree(3, SHAPE, SIZE, TreeForm(winding=0.0, orders=0, soma=0))
    assert len(morphology.branch_points(straight)) == 0

    ends = np.linalg.norm(np.diff(to_um(straight.points[[0, len(straight) // 2]], SIZE), axis=0))
    half = morphology.edge_lengths(morphology.Tree(to_um(straight.points, SIZE), *_rest(straight)))[
        : len(straight) // 2 + 1
    ]

    assert half.sum() < 1.1 * ends
    few = grow_random_tree(3, (48, 192, 192), SIZE, TreeForm(branch_every=60, soma=0))
    many = grow_random_tree(3, (48, 192, 192), SIZE, TreeForm(branch_every=6, soma=0))
    assert len(morphology.branch_points(many)) > len(morphology.branch_points(few))


def _rest(tree: morphology.Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tree.radii, tree.parents, tree.types


def test_an_image_is_seeded_of_the_shape_and_dtype_asked_for() -> None:
    tree = grow_random_tree(1, SHAPE, SIZE)
    a, b, c = (render_stack(tree, SHAPE, SIZE, seed=s) for s in (5, 5, 6))

    assert a.shape == SHAPE
    assert a.dtype == np.uint8
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()

    deep = render_stack(tree, SHAPE, SIZE, Microscope(bits=16))
    assert deep.dtype == np.uint16
    assert 255 < deep.max() <= 4095


def test_the_signal_lies_on_the_tree() -> None:
    tree = grow_random_tree(2, SHAPE, SIZE, TreeForm(soma=0))
    image = render_stack(tree, SHAPE, SIZE)
    drawn = rasterize(tree, Box.whole(SHAPE), SIZE)
    assert image[drawn.mask == 1].mean() > 8 * image[drawn.distance >= 8].mean()


def test_blur_is_longer_along_z_by_what_the_psf_says() -> None:
    line = morphology.build_tree(np.array([[12, 48, 5], [12, 48, 90.0]]), np.array([-1, 0]), 0.6)
    image = render_stack(
        line, SHAPE, SIZE, Microscope(**{**vars(QUIET), "psf": (1.5, 0.3), "halo": 0.0, "bouton_every": 1e9})
    )
    mean = image[:, :, 20:76].astype(float).mean(axis=2)
    z, y = mean.sum(axis=1), mean.sum(axis=0)

    assert np.sqrt((z * (np.arange(24) - 12) ** 2).sum() / z.sum()) == pytest.approx(1.5, rel=0.12)
    assert np.sqrt((y * (np.arange(96) - 48) ** 2).sum() / y.sum()) * 0.33 == pytest.approx(0.32, rel=0.2)


def test_noise_is_poisson_and_read_noise() -> None:
    empty = morphology.build_tree(np.array([[2, 2, 2], [2, 2, 4.0]]), np.array([-1, 0]), 0.5)
    settings_ = {**vars(QUIET), "bits": 16, "read_noise": 0.01, "background": 0.2}
    noisy = render_stack(empty, SHAPE, SIZE, Microscope(**{**settings_, "photons": 50.0}), 3)
    calm = render_stack(empty, SHAPE, SIZE, Microscope(**{**settings_, "photons": 5000.0}), 3)
    local = [
        float(np.std(i[8:, 20:, 20:] - ndimage.gaussian_filter(i.astype(float), 4)[8:, 20:, 20:]))
        for i in (noisy, calm)
    ]

    assert local[0] > 3 * local[1]
    assert local[1] > 0.009 * 4095


def test_background_is_uneven_and_clean_stacks_have_none() -> None:
    tree = grow_random_tree(2, SHAPE, SIZE)
    dirty = render_stack(tree, SHAPE, SIZE, Microscope(background=0.05))
    clean = render_stack(tree, SHAPE, SIZE, Microscope(background=0.05), clean_background=True)
    far = rasterize(tree, Box.whole(SHAPE), SIZE).distance >= 8

    assert ndimage.gaussian_filter(dirty.astype(float), 6)[far].std() > 1
    assert (clean[far] == 0).mean() > 0.95

    near = rasterize(tree, Box.whole(SHAPE), SIZE).skeleton == 1
    assert clean[near].mean() == pytest.approx(dirty[near].mean(), rel=0.1)


def test_gaps_break_the_signal_and_boutons_swell_it() -> None:
    line = morphology.build_tree(np.array([[12, 48, 0], [12, 48, 95.0]]), np.array([-1, 0]), 1.5)
    base = {**vars(QUIET), "bouton_every": 1e9}
    whole = render_stack(line, SHAPE, SIZE, Microscope(**base), 1)[12, 48].astype(float)
    broken = render_stack(line, SHAPE, SIZE, Microscope(**{**base, "gap_every": 8.0, "gap_length": 2.5}), 1)[
        12, 48
    ].astype(float)

    assert whole[10:85].min() > 0.5 * whole[10:85].max()
    assert broken[10:85].min() < 0.5 * broken[10:85].max()

    swollen = render_stack(line, SHAPE, SIZE, Microscope(**{**base, "bouton_every": 4.0}), 1)
    plain = render_stack(line, SHAPE, SIZE, Microscope(**base), 1)
    assert (swollen > 60).sum() > 1.2 * (plain > 60).sum()


def test_distractors_are_there_and_not_in_the_truth() -> None:
    tree = grow_random_tree(2, SHAPE, SIZE, TreeForm(soma=0))
    far = rasterize(tree, Box.whole(SHAPE), SIZE).distance >= 8
    bare = render_stack(tree, SHAPE, SIZE, Microscope(**{**vars(QUIET), "halo": 0.0}), 4)
    busy = render_stack(
        tree, SHAPE, SIZE, Microscope(**{**vars(QUIET), "halo": 0.0, "specks": 100.0, "fragments": 2}), 4
    )
    assert (busy[far] > 30).sum() > (bare[far] > 30).sum() + 20


def test_a_folder_looks_like_a_users_own_data(tmp_path: Path) -> None:
    cfg = SyntheticConfig(volumes=2, shape=SHAPE, seed=7)
    write_dataset(tmp_path / "one", cfg)
    write_dataset(tmp_path / "two", cfg)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())

    assert names == ["meta.json", *sorted(f"syn_{i}.{e}" for i in (1, 2) for e in ("swc", "tif"))]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name

    meta = json.loads((tmp_path / "one" / "meta.json").read_text())
    for id_, entry in meta.items():
        image = tifffile.imread(tmp_path / "one" / f"{id_}.tif")
        tree = swc.read(tmp_path / "one" / f"{id_}.swc")
        assert image.shape == SHAPE
        assert entry["voxel_size_um_xyz"] == [0.33, 0.33, 1.0]
        np.testing.assert_allclose(entry["root_xyz"], tree.points[tree.roots[0]][::-1], atol=1e-3)
        drawn = rasterize(tree, Box.whole(SHAPE), SIZE)
        assert image[drawn.skeleton == 1].mean() > 3 * image[drawn.distance >= 8].mean()


def test_both_kinds_of_background_appear_and_volumes_differ(tmp_path: Path) -> None:
    write_dataset(tmp_path, SyntheticConfig(volumes=5, shape=(16, 64, 64)))
    stacks = [tifffile.imread(p) for p in sorted(tmp_path.glob("*.tif"))]
    zeros = sorted(float((s == 0).mean()) for s in stacks)
    assert zeros[0] < 0.9 < 0.95 < zeros[-1]
    assert len({float(s.mean()) for s in stacks}) == 5


def test_a_given_tree_is_imaged_and_moved_into_the_volume(tmp_path: Path) -> None:
    tree = grow_random_tree(4, (24, 300, 300), SIZE, TreeForm(soma=0))
    far = morphology.Tree(tree.points + np.array([100, 500, 900]), tree.radii, tree.parents, tree.types)
    swc.write(tmp_path / "mine.swc", far, unit="voxel")
    cfg = SyntheticConfig(volumes=1, shape=SHAPE, trees=(tmp_path / "mine.swc",))
    write_dataset(tmp_path / "out", cfg)
    read = swc.read(tmp_path / "out" / "syn_1.swc")

    assert np.all((read.points >= 0) & (read.points <= np.asarray(SHAPE) - 1))
    assert len(read.roots) == 1
    assert len(read) > 10
    with pytest.raises(InputError, match="no branch inside a volume"):
        write_dataset(tmp_path / "none", SyntheticConfig(volumes=1, shape=(8, 8, 8), trees=(_ring(tmp_path),)))


def _ring(folder: Path) -> Path:
    angle = np.linspace(0, 6, 50)
    points = np.stack([np.zeros(50), 100 * np.sin(angle), 100 * np.cos(angle)], axis=1)
    swc.write(folder / "ring.swc", morphology.build_tree(points, np.arange(-1, 49)), unit="voxel")
    return folder / "ring.swc"


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="too small for a neuron"):
        SyntheticConfig(shape=(4, 64, 64))
    with pytest.raises(ValueError, match="above 0 um"):
        SyntheticConfig(voxel_size=(0, 1, 1))
    assert fine_voxel(SIZE) == pytest.approx(0.33)


def test_labeling_dims_one_neuron_of_a_forest_and_leaves_the_other() -> None:
    shape, size = (16, 48, 96), (1.0, 0.33, 0.33)
    lines = [
        morphology.build_tree(np.array([[8.0, y, 10.0], [8.0, y, 86.0]]), np.array([-1, 0]), 2.0) for y in (12.0, 36.0)
    ]
    light = Microscope(unevenness=0, gap_every=1e9, fragments=0, specks=0, photons=1e6, bouton_every=1e9)
    forest = morphology.concatenate_trees(lines)
    even = render_stack(forest, shape, size, light, 0).astype(float)
    dimmed = render_stack(forest, shape, size, light, 0, labeling=[1.0, 0.4]).astype(float)

    first, second = (slice(8, 9), 12, slice(30, 60)), (slice(8, 9), 36, slice(30, 60))
    assert dimmed[first].mean() == pytest.approx(even[first].mean(), rel=0.05)
    assert dimmed[second].mean() == pytest.approx(0.4 * even[second].mean(), rel=0.1)
