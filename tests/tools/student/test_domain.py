"""The synthetic domain of the bundled student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.data import swc
from hpc_neuro.data.rasterize import rasterize
from hpc_neuro.data.store import Store
from tests.helpers.stacks import make_neuron
from tools.student import scenes
from tools.student.domain import draw_scene

SHAPE = (16, 64, 64)


def test_a_scene_is_a_function_of_its_seed_and_number() -> None:
    first, again, other = draw_scene(0, 5, SHAPE), draw_scene(0, 5, SHAPE), draw_scene(0, 6, SHAPE)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.tree.points, again.tree.points)
    assert not np.array_equal(first.image, other.image)


def test_the_domain_is_wide_and_its_trees_lie_on_what_can_be_seen() -> None:
    drawn = [draw_scene(1, number, SHAPE) for number in range(24)]
    assert {scene.image.dtype for scene in drawn} == {np.dtype(np.uint8), np.dtype(np.uint16)}
    assert {bool(scene.facts["black"]) for scene in drawn} == {True, False}
    assert any(scene.facts["somas"] for scene in drawn)
    ratios = [scene.voxel_size[0] / scene.voxel_size[2] for scene in drawn]
    assert min(ratios) < 1.6
    assert max(ratios) > 4

    # Labeled voxels are brighter than the others wherever there is a neurite.
    brighter = []
    for scene in drawn:
        if len(scene.tree) < 20:
            continue
        mask = rasterize(scene.tree, Box.whole(SHAPE), scene.voxel_size).mask == 1
        brighter.append(scene.image[mask].mean() > scene.image[~mask].mean())
    assert len(brighter) > 15
    # Other bright objects outshine a neurite in a scene or two.
    assert np.mean(brighter) > 0.9


def test_trees_of_real_neurons_lend_their_shapes(tmp_path: Path) -> None:
    neuron = make_neuron(3)
    swc.write(tmp_path / "gold.swc", replace(neuron, types=np.full(len(neuron), 3)), unit="voxel")
    plain = [draw_scene(2, number, SHAPE) for number in range(12)]
    lent = [draw_scene(2, number, SHAPE, [tmp_path / "gold.swc"]) for number in range(12)]
    changed = [not np.array_equal(a.image, b.image) for a, b in zip(plain, lent, strict=True)]
    assert any(changed)
    # No edge runs across the stack: pieces that leave it are cut, not joined.
    for scene in lent:
        assert morphology.edge_lengths(scene.tree).max(initial=0) < 4


def test_scenes_are_written_once_and_stores_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_neuro import cli

    monkeypatch.setattr(scenes, "_SHAPE", (16, 64, 64))
    folder = tmp_path / "scenes"
    scenes.write_scenes(folder, 0, 3, [], 1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tif")}
    (folder / "scene_00001.json").unlink()
    scenes.write_scenes(folder, 0, 3, [], 1)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tif")}
    assert {name for name in before if after[name] != before[name]} == {"scene_00001.tif"}

    store = tmp_path / "store"
    command = ["prepare", f"manifest={folder / scenes.MANIFEST}", f"out={store}", "radius.kind=swc", "misaligned=warn"]
    assert cli.main(command) == 0
    scenes.join_stores(tmp_path / "joint", [store])
    joint = Store(tmp_path / "joint")
    assert joint.ids == Store(store).ids
    for volume in joint:
        volume.verify()
    with pytest.raises(ValueError, match="in two stores"):
        scenes.join_stores(tmp_path / "joint", [store, store])
