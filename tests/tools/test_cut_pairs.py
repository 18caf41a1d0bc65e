"""tools/cut_pairs.py: the same neuron, in the same place of a smaller image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro.data import swc
from hpc_neuro.prepare import PrepareConfig
from hpc_neuro.prepare.pairs import find_pairs
from tests.helpers.tiny_store import make_image, make_tree
from tools import cut_pairs

SHAPE = (20, 52, 96)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """One neuron in a corner of a larger stack, its root beside the tree, its SWC in micrometers."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    draw = np.random.default_rng(0)
    tree = make_tree(draw, (20, 30, 50))
    tifffile.imwrite(folder / "a.tif", make_image(draw, SHAPE, tree))
    swc.write(folder / "a.swc", swc.transform(tree, swc.Transform(scale=(2.0, 0.5, 0.5))), unit="um")
    meta = {"a": {"voxel_size_um_xyz": [0.5, 0.5, 2.0], "root_xyz": [0.0, 15.0, 10.0]}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_image_tree_and_root_move_together(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    lines = cut_pairs.cut_pairs(pairs, out, margin=5)
    before, after = tifffile.imread(pairs / "a.tif"), tifffile.imread(out / "a.tif")
    whole = swc.transform(swc.read(pairs / "a.swc"), swc.Transform(scale=(0.5, 2.0, 2.0)))
    points, tree = whole.points, swc.read(out / "a.swc")
    low = np.maximum(np.floor(points.min(0)) - 5, 0).astype(int)
    low[2] = 0  # the root
    high = np.minimum(np.ceil(points.max(0)) + 6, SHAPE).astype(int)
    np.testing.assert_array_equal(after, before[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
    np.testing.assert_allclose(tree.points + low, points, atol=1e-5)
    (pair,) = find_pairs(PrepareConfig(images=out, out=tmp_path / "store"))
    assert pair.voxel_size == (2.0, 0.5, 0.5)
    assert pair.swc_unit == "voxel"
    np.testing.assert_allclose(np.asarray(pair.root) + low, (10, 15, 0))
    assert lines == [f"a: {' x '.join(map(str, after.shape))} of {SHAPE}, {after.size / before.size:.0%} of the voxels"]


def test_noise_has_the_strength_that_was_asked_for(pairs: Path, tmp_path: Path) -> None:
    """Around the same image, with a spread of half the neurite's brightness, and the same again in a second run."""
    images = {}
    for name, noise in (("clean", 0.0), ("noisy", 0.5), ("again", 0.5)):
        cut_pairs.cut_pairs(pairs, tmp_path / name, 5, noise)
        images[name] = tifffile.imread(tmp_path / name / "a.tif").astype(np.float64)
    np.testing.assert_array_equal(images["noisy"], images["again"])

    places = np.rint(swc.read(tmp_path / "clean" / "a.swc").points).astype(int)
    brightness = np.median(images["clean"][tuple(places.T)]) - np.median(images["clean"])
    added = images["noisy"] - images["clean"]
    assert added.std() == pytest.approx(0.5 * brightness, rel=0.02)
    assert abs(added.mean()) < 0.02 * brightness


def test_what_cannot_be_cut_is_said_and_nothing_written(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    for words, says in (([pairs, taken], f"{taken} exists"), ([tmp_path / "no", tmp_path / "cut"], "is not a folder")):
        monkeypatch.setattr(sys, "argv", ["cut_pairs", *map(str, words)])
        assert cut_pairs.main() == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
    assert not list(taken.iterdir())
