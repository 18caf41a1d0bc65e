"""The verb prepare: what it writes, and that a killed run ends the same."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_neuro.core import files, morphology, schema
from hpc_neuro.core.geometry import Box, to_um
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.data.rasterize import rasterize
from hpc_neuro.data.store import Store
from hpc_neuro.data.synthetic import render_stack
from hpc_neuro.prepare import PrepareConfig, forecast, run, verb
from tests.helpers.image_pairs import EASY, SHAPE, SIZE, hash_results, make_config, make_pair, write_pair


def test_a_folder_becomes_a_store(raw: Path, whole: Path) -> None:
    store = Store(whole)
    assert (store.split("train"), store.split("val"), store.split("test")) == (("a",), ("c",), ("b",))

    for number, stored in enumerate(store):
        tree, image = make_pair(number + 1)
        np.testing.assert_array_equal(stored.image(Box.whole(SHAPE)), image)
        np.testing.assert_allclose(stored.tree().points, tree.points, atol=1e-4)
        assert stored.voxel_size == SIZE
        assert stored.root == pytest.approx(tuple(tree.points[0]), abs=1e-4)
        mask = stored.mask(Box.whole(SHAPE)) == 1
        truth = rasterize(tree, Box.whole(SHAPE), SIZE).mask == 1
        assert image[mask].mean() > 5 * image[~mask].mean()
        assert (mask & truth).sum() > 0.7 * truth.sum()
        assert (whole / "pictures" / f"{stored.id}.png").stat().st_size > 10_000
    index = json.loads((whole / "dataset.json").read_text())

    assert index["volumes"]["a"]["sha256"]["image"] == files.sha256(raw / "a.tif")
    record = json.loads((whole / "run.json").read_text())

    assert record["exit"] == 0
    assert record["summary"]["volumes"] == 3
    assert (whole / "config.yaml").exists()


def test_again_it_is_complete_and_nothing_is_touched(raw: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    with caplog.at_level(logging.INFO, "hpc_neuro"):
        assert run(make_config("split.test=[b]", "split.val=[c]", images=raw, out=whole)) == 0

    assert "already complete" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before
    with pytest.raises(ConfigError, match="made with another config"):
        run(make_config("tube=2", images=raw, out=whole))


def test_a_file_that_went_missing_is_made_again(single: Path, tmp_path: Path) -> None:
    cfg = make_config(images=single, out=tmp_path / "store")
    run(cfg)
    before = hash_results(tmp_path / "store")
    (tmp_path / "store" / "a.h5").unlink()
    (tmp_path / "store" / "pictures" / "a.png").unlink()
    run(cfg)
    assert hash_results(tmp_path / "store") == before


def test_changed_input_is_refused(single: Path, tmp_path: Path) -> None:
    for path in single.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cfg = make_config(images=tmp_path, out=tmp_path / "store")
    run(cfg)
    write_pair(tmp_path, "a", 9)

    with pytest.raises(ConfigError, match=r"the input a\.image, a\.swc.* changed since"):
        run(cfg)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_files(raw: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    code = (
        "import sys, time\n"
        "from hpc_neuro.core import schema\n"
        "from hpc_neuro.data.store import writer\n"
        "from hpc_neuro.prepare import PrepareConfig, run\n"
        "slow = writer._write_targets\n"
        "def held(file, volume, *rest):\n"
        "    slow(file, volume, *rest)\n"
        "    file.flush()\n"
        "    if volume.id == 'b':\n"
        "        print('in the middle of b', flush=True)\n"
        "        time.sleep(600)\n"
        "writer._write_targets = held\n"
        "run(schema.load(PrepareConfig, None, sys.argv[1:]))\n"
    )
    keys = [f"images={raw}", f"out={out}", "voxel_size=[1.0,0.4,0.4]", "split.test=[b]", "split.val=[c]"]
    with subprocess.Popen([sys.executable, "-c", code, *keys], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "in the middle" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)

    assert (out / "a.h5").exists()
    assert not (out / "b.h5").exists()
    assert list(out.glob(".b.h5.*.part"))

    written = (out / "a.h5").stat().st_mtime_ns
    time.sleep(0.01)
    run(make_config("split.test=[b]", "split.val=[c]", images=raw, out=out))

    assert hash_results(out) == hash_results(whole)
    assert (out / "a.h5").stat().st_mtime_ns == written
    assert not list(out.rglob("*.part"))


def test_the_forecast_names_volumes_voxels_bytes_and_splits(raw: Path, tmp_path: Path) -> None:
    text = "\n".join(forecast(make_config("split.test=[b]", images=raw, out=tmp_path / "store")))
    assert f"3 volumes, {3 * np.prod(SHAPE):,} voxels" in text
    assert "train: 2 (a, c)" in text
    assert "val: none" in text
    assert "test: 1 (b)" in text
    assert "a: 20 x 72 x 80 of 1 x 0.4 x 0.4 um, uint8" in text
    assert not (tmp_path / "store").exists()


def test_meta_json_gives_roots_voxel_sizes_and_units(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, _ = make_pair(1)
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=to_um(tree.points, SIZE)))
    meta = {"a": {"root_xyz": [7, 8, 9.5], "voxel_size_um_xyz": [0.4, 0.4, 1.0], "swc_unit": "um"}, "other": {}}
    (tmp_path / "in" / "meta.json").write_text(json.dumps(meta))
    with caplog.at_level(logging.INFO, "hpc_neuro"):
        run(schema.load(PrepareConfig, None, [f"images={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]))

    assert "voxel sizes and roots of 1 of 1 volumes" in caplog.text
    stored = Store(tmp_path / "out")["a"]

    assert stored.root == (9.5, 8, 7)
    assert stored.voxel_size == SIZE
    np.testing.assert_allclose(stored.tree().points, tree.points, atol=1e-4)


@pytest.mark.parametrize("key", ["root", "voxel_size_xyz_um", "swc_units"])
def test_a_misspelled_key_of_meta_json_is_refused(tmp_path: Path, key: str) -> None:
    write_pair(tmp_path / "in", "a", 1)
    (tmp_path / "in" / "meta.json").write_text(json.dumps({"a": {key: [1, 1, 1], "comment": "free"}}))
    with pytest.raises(InputError, match=f"says {key} of a; write "):
        run(make_config(images=tmp_path / "in", out=tmp_path / "out"))


def test_what_meta_json_says_of_no_image_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pair(tmp_path / "in", "a", 1)
    (tmp_path / "in" / "meta.json").write_text(json.dumps({"a.tif": {"root_xyz": [1, 1, 1]}, "a": {"comment": "free"}}))
    run(make_config(images=tmp_path / "in", out=tmp_path / "out"))
    assert "names a.tif, of which there is no image beside it" in caplog.text


def test_a_tree_in_um_of_other_voxels_is_refused(tmp_path: Path) -> None:
    tree, _ = make_pair(1)
    write_pair(tmp_path / "in", "a", 1)
    um = replace(tree, points=to_um(tree.points, SIZE), radii=tree.radii * 0.4)
    swc.write(tmp_path / "in" / "a.swc", um, unit="um", voxel_size=(1.0, 0.33, 0.33))

    with pytest.raises(InputError, match=r"says um, of voxels of \(1\.0, 0\.33, 0\.33\) um .* correct voxel_size"):
        run(make_config(images=tmp_path / "in", out=tmp_path / "out"))

    swc.write(tmp_path / "in" / "a.swc", um, unit="um", voxel_size=SIZE)
    assert run(make_config(images=tmp_path / "in", out=tmp_path / "out")) == 0


def test_the_unit_in_the_header_of_an_swc_is_used(tmp_path: Path) -> None:
    tree, _ = make_pair(1)
    write_pair(tmp_path / "in", "a", 1)
    swc.write(
        tmp_path / "in" / "a.swc", replace(tree, points=to_um(tree.points, SIZE), radii=tree.radii * 0.4), unit="um"
    )
    run(make_config(images=tmp_path / "in", out=tmp_path / "out"))
    stored = Store(tmp_path / "out")["a"].tree()

    np.testing.assert_allclose(stored.points, tree.points, atol=1e-4)
    np.testing.assert_allclose(stored.radii, tree.radii, atol=1e-4)


@pytest.mark.parametrize(("kind", "stretch"), [("swc", 1.0), ("constant", 1.0), ("image", None)])
def test_each_source_of_the_radius(single: Path, tmp_path: Path, kind: str, stretch: float | None) -> None:
    run(make_config(f"radius.kind={kind}", images=single, out=tmp_path / "out"))
    stored = Store(tmp_path / "out")["a"]
    radii = stored.fitted_tree().radii
    if kind == "swc":
        np.testing.assert_allclose(radii, np.maximum(stored.tree().radii, 0.5))
    elif kind == "constant":
        assert np.all(radii == 1.5)
    else:
        assert len(radii) > len(stored.tree())
    with h5py.File(tmp_path / "out" / "a.h5", locking=False) as file:
        assert file.attrs["drawing_stretch"] == stretch or (stretch is None and file.attrs["drawing_stretch"] > 1.2)


def test_an_ignored_margin_and_a_stub_before_the_root_are_255(tmp_path: Path) -> None:
    x = np.arange(0, 78, 1.0)
    points = np.stack([10 + 0 * x, 30 + 10 * np.sin(x / 30), x], axis=1)
    whole = morphology.build_tree(points, np.arange(-1, 77), 1.5)
    image = render_stack(whole, SHAPE, SIZE, EASY, 1)
    half = morphology.select_nodes(whole, x >= 40)
    write_pair(tmp_path / "in", "a", 1, image, half)
    run(make_config(images=tmp_path / "in", out=tmp_path / "stub"))
    run(make_config("beyond_root=background", images=tmp_path / "in", out=tmp_path / "none"))
    run(make_config("beyond_root=background", "ignore_margin=2", images=tmp_path / "in", out=tmp_path / "margin"))
    masks = {n: Store(tmp_path / n)["a"].mask(Box.whole(SHAPE)) for n in ("stub", "none", "margin")}

    assert set(np.unique(masks["none"])) == {0, 1}
    assert masks["stub"][10, 30 + 3, 10] == 255
    assert not (masks["stub"][:, :, 50:] == 255).any()
    assert (masks["margin"] == 255).sum() > (masks["margin"] == 1).sum() / 2
    np.testing.assert_array_equal(masks["margin"] == 1, masks["none"] == 1)


def test_a_neuron_that_nobody_traced_is_255_and_the_traced_one_is_not(tmp_path: Path) -> None:
    x = np.arange(0, 78, 1.0)
    traced, other = (
        morphology.build_tree(np.stack([10 + 0 * x, y + 4 * np.sin(x / 12), x], axis=1), np.arange(-1, 77), 1.5)
        for y in (15.0, 45.0)
    )
    image = render_stack(morphology.concatenate_trees([traced, other]), SHAPE, SIZE, EASY, 1)
    write_pair(tmp_path / "in", "a", 1, image, traced)
    masks = {}
    for label in ("background", "unlabelled"):
        run(make_config(f"off_tree={label}", images=tmp_path / "in", out=tmp_path / label))
        masks[label] = Store(tmp_path / label)["a"].mask(Box.whole(SHAPE))

    assert set(np.unique(masks["background"])) == {0, 1}
    unlabelled = masks["unlabelled"] == 255
    center = tuple(np.rint(other.points[5:-5]).astype(int).T)
    assert unlabelled[center].mean() > 0.95
    assert not unlabelled[:, :30].any()
    assert unlabelled.mean() < 0.05
    np.testing.assert_array_equal(masks["unlabelled"] == 1, masks["background"] == 1)


@pytest.mark.slow
def test_real_neurons_become_masks_that_lie_on_them(real_data: Path, tmp_path: Path) -> None:
    for name in ("OP_6.tif", "OP_6.swc", "meta.json"):
        (tmp_path / name).symlink_to(real_data / "diadem_op" / name)
    run(schema.load(PrepareConfig, None, [f"images={tmp_path}", f"out={tmp_path / 'out'}"]))
    stored = Store(tmp_path / "out")["OP_6"]
    whole = Box.whole(stored.shape)
    image, mask = stored.normalized_image(whole), stored.mask(whole)

    assert image[mask == 1].mean() > 0.5
    assert 0.0003 < (mask == 1).mean() < 0.001
    assert stored.root == pytest.approx((10, 412.01, 15.074))

    # the given tree misses the ridge by a voxel or two, the drawn one does not
    on = [
        image[tuple(np.clip(np.rint(t.points), 0, np.array(stored.shape) - 1).astype(int).T)].mean()
        for t in (morphology.resample_tree(stored.tree(), 1.0), stored.fitted_tree())
    ]
    assert on[1] > on[0] + 0.2


def test_an_image_that_changes_while_it_is_read_is_not_stored(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(single, raw)
    fit = verb.fit_radii

    def change_and_fit(*args: Any) -> Any:
        content = bytearray((raw / "a.tif").read_bytes())
        content[-1] ^= 1
        (raw / "a.tif").write_bytes(bytes(content))
        return fit(*args)

    monkeypatch.setattr(verb, "fit_radii", change_and_fit)
    with pytest.raises(InputError, match="a.tif was changed while it was read.* into another `out`"):
        run(make_config(images=raw, out=out))
    assert not list(out.glob("*.h5"))
    monkeypatch.undo()
    assert run(make_config(images=raw, out=tmp_path / "another")) == 0
