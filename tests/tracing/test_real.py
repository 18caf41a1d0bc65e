"""Real neurons: the gold tree painted as a mask, and Otsu's mask of the raw stack, traced and compared with gold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage.filters import threshold_otsu

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import swc
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.metrics.cable import match_cable, remove_stub
from hpc_neuro.metrics.tree import distances
from hpc_neuro.tracing import TraceConfig, trace
from tests.helpers.shapes import paint_tree

VOXEL = (0.9988, 0.32965, 0.32965)


def gold_of(folder: Path, name: str) -> tuple[Tree, tuple[float, float, float]]:
    x, y, z = json.loads((folder / "meta.json").read_text())[name]["root_xyz"]
    return swc.read(folder / f"{name}.swc"), (z, y, x)


@pytest.mark.parametrize("name", ["OP_1", "OP_6", "OP_7"])
def test_a_perfect_mask_gives_the_gold_tree(real_data: Path, name: str) -> None:
    folder = real_data / "diadem_op"
    gold, root = gold_of(folder, name)
    with tifffile.TiffFile(folder / f"{name}.tif") as tif:
        shape = (len(tif.pages), 512, 512)
    (tree,) = trace(paint_tree(gold, shape, 2.3), VOXEL, roots=[root])
    assert match_cable(tree, gold, 4.0).f1 > 0.99
    assert distances(tree, gold)["esa"] < 0.6
    assert morphology.length(tree) == pytest.approx(morphology.length(gold), rel=0.065)


@pytest.mark.parametrize(("name", "least"), [("OP_1", 0.96), ("OP_7", 0.90)])
def test_otsu_on_the_raw_stack_follows_the_neuron(real_data: Path, name: str, least: float) -> None:
    folder = real_data / "diadem_op"
    gold, root = gold_of(folder, name)
    image = tifffile.imread(folder / f"{name}.tif")
    (tree,) = trace(image > threshold_otsu(image), VOXEL, roots=[root])
    tree = remove_stub(tree, gold, 4.0)
    assert match_cable(tree, gold, 4.0).f1 > least
    assert len(morphology.tips(tree)) < 1.5 * len(morphology.tips(gold))


def test_a_mask_broken_beside_the_root_is_joined_along_the_image(real_data: Path) -> None:
    """Otsu's mask of OP_3 breaks where the neurite is faint: without the image nearly all of the neuron is lost."""
    gold, root = gold_of(real_data / "diadem_op", "OP_3")
    image = tifffile.imread(real_data / "diadem_op" / "OP_3.tif")
    mask = image > threshold_otsu(image)
    cfg = TraceConfig(root_is_end=True)
    (blind,) = trace(mask, VOXEL, roots=[root], cfg=cfg)
    (tree,) = trace(mask, VOXEL, roots=[root], cfg=cfg, image=image)
    assert match_cable(blind, gold, 4.0).recall < 0.1
    assert match_cable(tree, gold, 4.0).f1 > 0.95


def test_unrelated_neurites_are_not_followed_from_the_root(real_data: Path) -> None:
    gold, root = gold_of(real_data / "diadem_op", "OP_9")
    image = tifffile.imread(real_data / "diadem_op" / "OP_9.tif")
    mask = image > threshold_otsu(image)
    (tree,) = trace(mask, VOXEL, roots=[root])
    away = np.linalg.norm(tree.points - gold.points.mean(axis=0), axis=1).max()
    assert away < np.linalg.norm(gold.points - gold.points.mean(axis=0), axis=1).max() + 25
    assert match_cable(tree, gold, 4.0).precision > 0.85


@pytest.mark.parametrize("name", ["OP_1", "OP_3"])
def test_cutting_contacts_takes_nothing_from_a_neuron_without_neighbors(real_data: Path, name: str) -> None:
    """OP_1 ends in short swellings, and two faint lines of OP_3 meet over a bridge: neither is a contact."""
    _, root = gold_of(real_data / "diadem_op", name)
    image = tifffile.imread(real_data / "diadem_op" / f"{name}.tif")
    shape = (len(image), 512, 512)
    probability = measure_foreground(lambda box: image[box.slices], shape).probability(Box.whole(shape))

    trees = [
        trace(probability, VOXEL, roots=[root], cfg=TraceConfig(contacts=contacts), image=image)[0]
        for contacts in (False, True)
    ]
    assert morphology.length(trees[1]) == pytest.approx(morphology.length(trees[0]), rel=0.003)


def test_a_crop_of_a_dense_neuron_is_no_crowd(real_data: Path) -> None:
    """Many branches of OP_9 leave the crop, and its hubs look like contacts; nothing sets their brightness apart."""
    gold, _ = gold_of(real_data / "diadem_op", "OP_9")
    image = tifffile.imread(real_data / "diadem_op" / "OP_9.tif")
    corner = np.array([0, *(np.rint(gold.points[len(gold) // 2, 1:]).astype(int) - 48)])
    crop = np.ascontiguousarray(image[:, corner[1] : corner[1] + 96, corner[2] : corner[2] + 96])

    is_inside = np.all((gold.points >= corner) & (gold.points <= corner + np.array(crop.shape) - 1), axis=1)
    parts = morphology.split_components(morphology.select_nodes(gold, is_inside))
    part = max(parts, key=morphology.length)
    z, y, x = (part.points[0] - corner).tolist()

    probability = measure_foreground(lambda box: crop[box.slices], crop.shape).probability(Box.whole(crop.shape))
    decided, lone = (
        trace(probability, VOXEL, roots=[(z, y, x)], cfg=TraceConfig(crowd=crowd), image=crop)[0]
        for crowd in (None, False)
    )
    assert morphology.length(decided) == pytest.approx(morphology.length(lone), rel=0.003)
