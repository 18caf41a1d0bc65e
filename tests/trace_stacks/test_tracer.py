"""Tracing an image without a network: known neurons under noise, haze, inversion and somas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, rotate

import hpc_neuro
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree, concatenate_trees, length, tips
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import intensity, padding
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.synthetic import Microscope, grow_random_tree, render_stack
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.trace_stacks.sanity import list_warnings, measure_doubt
from hpc_neuro.trace_stacks.tracer import ImageTrace, trace_image
from hpc_neuro.tracing import TraceConfig
from tests.helpers.shapes import paint_points, sample_line
from tests.helpers.stacks import SHAPE, make_neuron, take_picture

ISO = (1.0, 1.0, 1.0)


def trace_array(image: NDArray[np.generic], roots: tuple[tuple[float, float, float], ...] = ()) -> ImageTrace:
    z, y, x = image.shape
    return trace_image(lambda box: image[box.slices], (z, y, x), ISO, roots=roots)


def measure_f1(trace: ImageTrace, gold: Tree) -> float:
    return match_cable(concatenate_trees(trace.trees), gold, 3.0).f1


@pytest.fixture(scope="module")
def gold() -> Tree:
    return make_neuron()


def test_a_plain_stack_gives_its_neuron_without_warnings(gold: Tree) -> None:
    trace = trace_array(take_picture(gold))
    assert measure_f1(trace, gold) > 0.95
    assert len(trace.trees) == 1
    assert not trace.somas
    assert measure_doubt(trace.figures) < 0.3
    assert list_warnings(trace.figures, trace.foreground.is_inverted) == []


def test_the_result_does_not_depend_on_the_type_or_the_scale(gold: Tree) -> None:
    image = take_picture(gold)
    plain = trace_array(image)
    for other in (image.astype(np.uint16) * 37 + 900, image.astype(np.float32) / 255 - 3):
        trace = trace_array(other)
        assert trace.figures.cable == pytest.approx(plain.figures.cable, rel=0.02)
        assert measure_f1(trace, gold) > 0.95


def test_haze_and_a_brightness_gradient_are_background(gold: Tree) -> None:
    image = take_picture(gold).astype(np.float32)
    haze = 150 * np.exp(-(((np.indices(SHAPE)[2] - 30) / 60.0) ** 2))
    trace = trace_array((image + haze).astype(np.uint16))
    assert measure_f1(trace, gold) > 0.93


def test_a_dark_neuron_on_a_bright_ground_is_traced_inverted_and_told(gold: Tree) -> None:
    trace = trace_array(255 - take_picture(gold))
    assert trace.foreground.is_inverted
    assert measure_f1(trace, gold) > 0.95
    assert any("dark on bright" in warning for warning in list_warnings(trace.figures, True))


def test_a_dark_neuron_that_fills_less_than_a_thousandth_is_found_too(gold: Tree) -> None:
    # In most stacks of one neuron the background is one value, and the neuron is rarer than any quantile.
    image = np.where(take_picture(gold) > 100, take_picture(gold), 0)
    wide = np.zeros((image.shape[0], 6 * image.shape[1], 6 * image.shape[2]), dtype=np.uint8)
    wide[:, : image.shape[1], : image.shape[2]] = image
    assert (wide > 0).mean() < 0.001
    trace = trace_array(255 - wide)
    assert trace.foreground.is_inverted
    assert measure_f1(trace, gold) > 0.9
    assert not trace_array(wide).foreground.is_inverted


@pytest.mark.parametrize("seed", [1, 5, 7, 8, 9])
def test_patchy_tissue_in_a_dim_stack_is_no_forest(seed: int) -> None:
    """Clouds of tissue, narrower than three tiles and a third as bright as the neurites, are background."""
    shape, voxel_size = (48, 192, 192), (1.0, 0.33, 0.33)
    tree = grow_random_tree(seed, shape, voxel_size)
    light = Microscope(brightness=0.3, photons=30, background=0.03, specks=20, fragments=0)
    image = render_stack(tree, shape, voxel_size, light, seed)
    trace = trace_image(lambda box: image[box.slices], shape, voxel_size)
    assert trace.figures.tips < 2 * len(tips(tree))
    match = match_cable(concatenate_trees(trace.trees), tree, 4.0)
    assert match.precision > 0.9
    assert match.recall > 0.5


def test_neighbors_that_are_cut_off_are_places_to_look_at() -> None:
    image = np.zeros((30, 90, 160), dtype=np.float32)
    own, other = sample_line((15, 45, 4), (15, 45, 150)), sample_line((15, 6, 60), (15, 84, 120))
    paint_points(image, own, 2.0, 180.0)
    paint_points(image, other, 2.0, 80.0)
    image = gaussian_filter(image, 0.8) + np.random.default_rng(0).normal(10, 2, image.shape)

    def read(box: Box) -> NDArray[np.generic]:
        return np.asarray(image[box.slices])

    def trace_root(contacts: bool) -> ImageTrace:
        cfg = TraceConfig(contacts=contacts)
        return trace_image(read, (30, 90, 160), ISO, roots=[(15.0, 45.0, 4.0)], cfg=cfg)

    whole, alone = trace_root(False), trace_root(True)
    assert whole.figures.cable == pytest.approx(146 + 98, rel=0.05)
    assert alone.figures.cable == pytest.approx(146, rel=0.05)
    assert not any(place.kind == "contact" for place in whole.places)
    (contact,) = (place for place in alone.places if place.kind == "contact")
    assert np.linalg.norm(np.array([contact.z, contact.y, contact.x]) - (15, 45, 90)) < 8
    assert contact.cable_um == pytest.approx(98, rel=0.15)


def test_a_carpet_of_dim_neurites_is_not_traced_with_the_bright_one() -> None:
    """Neurites seldom fill 5 % of an image: a level at which they do is too low."""
    rng = np.random.default_rng(2)
    image = np.zeros((1, 400, 400), dtype=np.float32)
    for y in range(12, 400, 24):
        course = np.column_stack([np.zeros(800), y + 4 * np.sin(np.arange(800) / 60 + y), np.linspace(0, 399, 800)])
        paint_points(image, course, 1.2, 60.0)
    bright = sample_line((0, 20, 30), (0, 200, 210), (0, 380, 190))
    paint_points(image, bright, 2.0, 220.0)
    image = gaussian_filter(image, (0, 0.8, 0.8)) + rng.normal(10, 2, image.shape)

    trace = trace_array(image.astype(np.float32))
    cable = float(np.linalg.norm(np.diff(bright, axis=0), axis=1).sum())
    assert trace.figures.cable == pytest.approx(cable, rel=0.1)


def test_hot_pixels_are_no_neurites(gold: Tree) -> None:
    image = take_picture(gold)
    places = np.random.default_rng(1).integers(0, image.size, 200)
    image.ravel()[places] = 255
    trace = trace_array(image)
    assert measure_f1(trace, gold) > 0.93


@pytest.mark.parametrize("mean", [100.0, -10.0], ids=["plain", "clipped at 0"])
def test_pure_noise_gives_no_forest(mean: float) -> None:
    noise = np.clip(np.random.default_rng(0).normal(mean, 20, SHAPE), 0, 255).astype(np.uint8)
    trace = trace_array(noise)
    assert trace.figures.cable < 60 or list_warnings(trace.figures, trace.foreground.is_inverted)
    assert measure_doubt(trace.figures) > 1.0


def pad_image(image: NDArray[np.uint8], value: int) -> NDArray[np.uint8]:
    """A stack that was rotated in the plane: the corners are `value`."""
    y, x = np.indices(image.shape[1:])
    height, width = image.shape[1:]
    is_corner = (y + x < 0.4 * width) | (height - y + width - x < 0.4 * width)
    return np.where(is_corner, np.uint8(value), image)


def test_padding_is_neither_background_nor_neurite(gold: Tree) -> None:
    # The background is as bright as the corners are dark, and their edge is as sharp as that of a neurite.
    image = np.clip(take_picture(gold).astype(np.int64) // 2 + 100, 0, 255).astype(np.uint8)
    whole, padded = trace_array(image), trace_array(pad_image(image, 0))
    assert padded.foreground.padding == 0
    assert whole.foreground.padding is None
    assert not padded.foreground.is_inverted
    in_both = match_cable(concatenate_trees(padded.trees), concatenate_trees(whole.trees), 3.0)
    assert in_both.precision > 0.97
    assert measure_f1(padded, gold) > 0.9


@pytest.mark.parametrize("value", [1, 40, 100, 128, 200, 255])
@pytest.mark.parametrize("ground", [0, 100], ids=["dark", "hazy"])
def test_padding_of_any_value_is_neither_background_nor_neurite(gold: Tree, value: int, ground: int) -> None:
    image = np.clip(take_picture(gold).astype(np.int64) // 2 + ground, 0, 255).astype(np.uint8)
    whole, padded = trace_array(image), trace_array(pad_image(image, value))
    assert padded.foreground.padding is not None
    assert not padded.foreground.is_inverted
    in_both = match_cable(concatenate_trees(padded.trees), concatenate_trees(whole.trees), 3.0)
    assert in_both.precision > 0.97
    assert measure_f1(padded, gold) > 0.9


@pytest.mark.parametrize("order", [0, 1], ids=["nearest", "linear"])
@pytest.mark.parametrize("value", [40, 255])
def test_a_rotated_stack_has_the_tree_of_the_stack(gold: Tree, value: int, order: int) -> None:
    image = np.clip(take_picture(gold).astype(np.int64) // 2 + 60, 0, 255).astype(np.uint8)
    turned = rotate(image, 20, axes=(1, 2), order=order, cval=value)
    trace = trace_array(turned)
    assert trace.foreground.padding is not None
    assert trace.figures.cable == pytest.approx(trace_array(image).figures.cable, rel=0.03)


def test_white_surroundings_of_a_neuron_are_padding(gold: Tree) -> None:
    image = np.clip(take_picture(gold).astype(np.int64) // 2 + 60, 0, 255).astype(np.uint8)
    near = np.zeros(SHAPE, dtype=bool)
    for point in np.rint(gold.points).astype(int):
        near[:, max(point[1] - 20, 0) : point[1] + 20, max(point[2] - 20, 0) : point[2] + 20] = True
    trace = trace_array(np.where(near, image, np.uint8(255)))
    assert trace.foreground.padding is not None
    assert not trace.foreground.is_inverted
    assert measure_f1(trace, gold) > 0.9


@pytest.mark.parametrize("value", [100, 255])
def test_bright_padding_beside_a_dark_neuron_is_no_neurite(gold: Tree, value: int) -> None:
    image = np.clip(255 - take_picture(gold).astype(np.int64) // 2 - 60, 1, 254).astype(np.uint8)
    trace = trace_array(pad_image(image, value))
    assert trace.foreground.is_inverted
    assert measure_f1(trace, gold) > 0.9


def test_a_saturated_soma_at_the_border_is_no_padding() -> None:
    body = np.zeros((20, 160, 160), dtype=np.float32)
    paint_points(body, np.array([[10.0, 4, 80]]), 14.0)
    paint_points(body, sample_line((10, 4, 80), (10, 150, 90)), 2.0)
    image = 20 + 900 * gaussian_filter(body, 1.5) + np.random.default_rng(0).normal(0, 3, body.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    assert (image[:, 0] == 255).any()
    trace = trace_array(image)
    assert trace.foreground.padding is None
    assert trace.figures.somas == 1


def test_padding_beside_a_dark_neuron_is_no_neurite_either(gold: Tree) -> None:
    image = np.clip(255 - take_picture(gold).astype(np.int64) // 2 - 60, 1, 254).astype(np.uint8)
    trace = trace_array(pad_image(image, 0))
    assert trace.foreground.is_inverted
    assert trace.foreground.padding == 0
    assert measure_f1(trace, gold) > 0.9


def test_an_image_that_surrounds_the_neuron_only_is_measured_there(gold: Tree) -> None:
    image = np.clip(take_picture(gold).astype(np.int64) // 2 + 60, 0, 255).astype(np.uint8)
    near = np.zeros(SHAPE, dtype=bool)
    for point in np.rint(gold.points).astype(int):
        near[:, max(point[1] - 20, 0) : point[1] + 20, max(point[2] - 20, 0) : point[2] + 20] = True
    wide = np.zeros((SHAPE[0], 3 * SHAPE[1], 3 * SHAPE[2]), dtype=np.uint8)
    wide[:, : SHAPE[1], : SHAPE[2]] = np.where(near, image, 0)
    trace = trace_array(wide)
    assert trace.foreground.padding == 0
    assert measure_f1(trace, gold) > 0.9


@pytest.mark.parametrize("value", [0, 255])
def test_padding_of_slices_that_are_read_in_parts_is_found_too(
    gold: Tree, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pad_image(np.clip(take_picture(gold).astype(np.int64) // 2 + 100, 0, 255).astype(np.uint8), value)
    sizes = []

    def read(box: Box) -> NDArray[np.uint8]:
        sizes.append(box.size)
        return image[box.slices]

    box = Box((3, 20, 40), (9, 90, 150))
    with monkeypatch.context() as patch:
        patch.setattr(intensity, "_PASS_BYTES", 64 * 64 * 8)
        read_image, dark = padding.leave_padding_out(read, SHAPE, 1 << 26)
        assert max(sizes) <= 64 * 64
        in_parts = read_image(box)
    assert dark is not None
    assert (dark == 0) == (value == 0)

    # A box of the image is the same, however its padding was searched for.
    read_image, _ = padding.leave_padding_out(read, SHAPE, 1 << 26)
    np.testing.assert_array_equal(in_parts, read_image(Box.whole(SHAPE))[box.slices])

    # Of slices that are larger than the sample, only parts are looked at.
    parts = padding._choose_parts((1000, 40_000, 40_000), 1 << 26)
    assert sum(box.size for box in parts) <= 1.1 * (1 << 26)


def test_a_black_background_is_no_padding(gold: Tree) -> None:
    image = np.clip(take_picture(gold).astype(np.int64) - 60, 0, 255).astype(np.uint8)
    assert (image == 0).mean() > 0.5
    assert trace_array(image).foreground.padding is None


def test_a_bright_soma_does_not_hide_dim_dendrites() -> None:
    body = np.zeros((30, 200, 200), dtype=np.float32)
    paint_points(body, np.array([[15.0, 100, 100]]), 14.0)
    arms = [sample_line((15, 100, 100), end) for end in ((15, 10, 60), (15, 180, 30), (15, 90, 190), (15, 190, 170))]
    for arm in arms:
        paint_points(body, arm, 1.5, 0.1)
    image = 20 + 2000 * body + np.random.default_rng(0).normal(0, 4, body.shape)

    trace = trace_array(np.clip(image, 0, 65535).astype(np.uint16))
    lengths = sum(float(np.linalg.norm(arm[-1] - arm[0])) for arm in arms)
    assert trace.figures.cable > 0.9 * (lengths - 4 * 14)
    assert trace.figures.cable < 1.3 * lengths


def test_an_image_without_contrast_is_refused() -> None:
    with pytest.raises(InputError, match="every voxel is 7"):
        trace_array(np.full((8, 16, 16), 7, dtype=np.uint8))


def test_boxes_fit_together(gold: Tree) -> None:
    image = take_picture(gold)
    measured = measure_foreground(lambda box: image[box.slices], SHAPE)
    whole = measured.probability(Box.whole(SHAPE))
    box = Box((5, 17, 33), (29, 70, 101))
    np.testing.assert_array_equal(measured.probability(box), whole[box.slices])


def test_each_soma_becomes_one_tree_of_type_1_and_a_given_root_wins() -> None:
    body = np.zeros((40, 120, 160), dtype=np.float32)
    for y, x in ((40, 40), (85, 115)):
        paint_points(body, np.array([[20.0, y, x]]), 9.0)
        paint_points(body, sample_line((20, y, x - 35), (20, y, x + 35)), 1.8, 0.6)
        paint_points(body, sample_line((20, y, x), (20, y + 30, x + 5)), 1.8, 0.6)
    image = 20 + 150 * body + np.random.default_rng(0).normal(0, 3, body.shape)

    trace = trace_array(image.astype(np.uint8))
    assert len(trace.somas) == len(trace.trees) == 2
    centers = sorted(np.round(tree.points[0]).astype(int).tolist() for tree in trace.trees)
    np.testing.assert_allclose(centers, [[20, 40, 40], [20, 85, 115]], atol=2)
    assert all(tree.types.tolist() == [1] + [0] * (len(tree) - 1) for tree in trace.trees)
    # A soma is no end of the cable: both dendrites stay.
    assert all(np.ptp(tree.points[:, 2]) > 60 for tree in trace.trees)

    given = trace_array(image.astype(np.uint8), roots=((20.0, 40.0, 5.0),))
    assert len(given.trees) == 1
    assert given.trees[0].types[0] == 0
    np.testing.assert_allclose(given.trees[0].points[0], (20, 40, 5))


def test_a_thick_trunk_and_a_dim_blob_are_no_somas() -> None:
    body = np.zeros((40, 96, 160), dtype=np.float32)
    paint_points(body, sample_line((20, 30, 10), (20, 30, 150)), 1.5)
    paint_points(body, sample_line((20, 30, 60), (20, 30, 120)), 7.0)
    paint_points(body, np.array([[20.0, 75.0, 60.0]]), 9.0, 0.35)
    image = 20 + 150 * body + np.random.default_rng(0).normal(0, 3, body.shape)
    assert not trace_array(image.astype(np.uint8)).somas


def test_the_python_function_takes_arrays_and_paths(gold: Tree, tmp_path: Path) -> None:
    image = take_picture(gold)
    tifffile.imwrite(tmp_path / "n.tif", image)
    root = tuple(gold.points[0].tolist())
    for source in (image, tmp_path / "n.tif", str(tmp_path / "n.tif")):
        (tree,) = hpc_neuro.trace(source, voxel_size=ISO, root=root)
        assert match_cable(tree, gold, 3.0).f1 > 0.95
        assert length(tree) > 100
    with pytest.raises(InputError, match="three axes"):
        hpc_neuro.trace(image[0])


def test_wide_neurites_are_no_somas(real_data: Path) -> None:
    # Blurred until every neurite is as wide as a soma.
    image = gaussian_filter(tifffile.imread(real_data / "diadem_op" / "OP_1.tif").astype(np.float32), (2, 5, 5))
    gold = hpc_neuro.read_swc(real_data / "diadem_op" / "OP_1.swc")
    z, y, x = gold.points[0].tolist()
    assert match_cable(concatenate_trees(trace_array(image, ((z, y, x),)).trees), gold, 4.0).f1 > 0.85


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("bn031_fruitfly_janelia_flylight", 0.97),  # only surroundings of the neuron are imaged
        ("bn091_fruitfly_janelia_flylight", 0.95),
        ("bn277_zebrafish_uw", 0.75),  # a soma many times as bright as the dendrites
        ("bn279_zebrafish_uw", 0.7),
        ("bn108_human_cultured_ucambridge", 0.75),
    ],
)
def test_a_projection_gives_its_neuron(real_data: Path, name: str, least: float) -> None:
    image = tifffile.imread(real_data / "bigneuron_mip2d" / f"{name}.tif")[None]
    gold = hpc_neuro.read_swc(real_data / "bigneuron_mip2d" / f"{name}.swc")
    flat = replace(gold, points=gold.points * [0, 1, 1])
    assert match_cable(concatenate_trees(trace_array(image).trees), flat, 4.0).f1 > least


@pytest.mark.parametrize(("name", "least"), [("OP_1", 0.97), ("OP_3", 0.96), ("OP_7", 0.97)])
def test_a_diadem_neuron_is_traced_without_warnings(real_data: Path, name: str, least: float) -> None:
    gold = hpc_neuro.read_swc(real_data / "diadem_op" / f"{name}.swc")
    image = tifffile.imread(real_data / "diadem_op" / f"{name}.tif")
    z, y, x = image.shape
    root = tuple(gold.points[0].tolist())
    trace = trace_image(lambda box: image[box.slices], (z, y, x), (0.9988, 0.32965, 0.32965), roots=[root])
    assert match_cable(trace.trees[0], gold, 4.0).f1 > least
    assert list_warnings(trace.figures, trace.foreground.is_inverted) == []
