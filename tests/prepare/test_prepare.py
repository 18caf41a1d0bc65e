"""The verb prepare: what it writes, what it refuses before it writes anything, and that a killed run ends the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
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
import tifffile

from hpc_neuro import files, morphology, schema
from hpc_neuro.data import swc
from hpc_neuro.data.rasterize import rasterize
from hpc_neuro.data.store import Store
from hpc_neuro.data.synthetic import MicroscopeConfig, TreeConfig, random_tree, render
from hpc_neuro.geometry import Box, to_um
from hpc_neuro.morphology import Tree
from hpc_neuro.prepare import PrepareConfig, forecast, run
from hpc_neuro.schema import ConfigError, InputError
from hpc_neuro.types import Array

SHAPE = (20, 72, 80)
SIZE = (1.0, 0.4, 0.4)
EASY = MicroscopeConfig(fragments=0, specks=0, gap_length=0.0)


def pair(seed: int) -> tuple[Tree, Array]:
    tree = random_tree(seed, SHAPE, SIZE, TreeConfig(soma=0))
    return tree, render(tree, SHAPE, SIZE, EASY, seed)


def write_pair(folder: Path, id_: str, seed: int, image: Array | None = None, tree: Tree | None = None) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    made, seen = pair(seed)
    tifffile.imwrite(
        folder / f"{id_}.tif", seen if image is None else image, photometric="minisblack", metadata={"axes": "ZYX"}
    )
    swc.write(folder / f"{id_}.swc", made if tree is None else tree, unit="voxel")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number, id_ in enumerate(("a", "b", "c")):
        write_pair(folder, id_, number + 1)
    (folder / "SOURCE.txt").write_text("where it is from")
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    write_pair(folder, "a", 1)
    return folder


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all three, made in one go; tests leave it as it is."""
    out = tmp_path_factory.mktemp("stores") / "whole"
    assert run(config("split.test=[b]", "split.val=[c]", images=raw, out=out)) == 0
    return out


def config(*keys: str, **paths: Any) -> PrepareConfig:
    keys = (*(f"{k}={v}" for k, v in paths.items()), *keys)
    if not any(k.startswith(("voxel_size", "manifest")) for k in keys):
        keys = (*keys, "voxel_size=[1.0,0.4,0.4]")
    return schema.load(PrepareConfig, None, keys)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file that is a result."""
    kept = [*folder.glob("*.h5"), folder / "dataset.json", *folder.glob("pictures/*.png")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def refused(cfg: PrepareConfig, match: str) -> str:
    """The sentence `run` and `forecast` answer with; nothing may be written."""
    with pytest.raises((InputError, ConfigError), match=match):
        forecast(cfg)
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        run(cfg)
    assert not cfg.out.exists()
    return str(caught.value)


def test_a_folder_becomes_a_store(raw: Path, whole: Path) -> None:
    store = Store(whole)
    assert (store.split("train"), store.split("val"), store.split("test")) == (("a",), ("c",), ("b",))
    for number, stored in enumerate(store):
        tree, image = pair(number + 1)
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
        assert run(config("split.test=[b]", "split.val=[c]", images=raw, out=whole)) == 0
    assert "already complete" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before
    with pytest.raises(ConfigError, match="made with another config"):
        run(config("tube=2", images=raw, out=whole))


def test_a_file_that_went_missing_is_made_again(single: Path, tmp_path: Path) -> None:
    cfg = config(images=single, out=tmp_path / "store")
    run(cfg)
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "a.h5").unlink()
    (tmp_path / "store" / "pictures" / "a.png").unlink()
    run(cfg)
    assert contents(tmp_path / "store") == before


def test_changed_input_is_refused(single: Path, tmp_path: Path) -> None:
    for path in single.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cfg = config(images=tmp_path, out=tmp_path / "store")
    run(cfg)
    write_pair(tmp_path, "a", 9)
    with pytest.raises(ConfigError, match=r"the input a\.image, a\.swc.* changed since"):
        run(cfg)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_files(raw: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    code = (
        "import sys, time\n"
        "from hpc_neuro import schema\n"
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
    run(config("split.test=[b]", "split.val=[c]", images=raw, out=out))
    assert contents(out) == contents(whole)
    assert (out / "a.h5").stat().st_mtime_ns == written
    assert not list(out.rglob("*.part"))


def test_the_forecast_names_volumes_voxels_bytes_and_splits(raw: Path, tmp_path: Path) -> None:
    text = "\n".join(forecast(config("split.test=[b]", images=raw, out=tmp_path / "store")))
    assert f"3 volumes, {3 * np.prod(SHAPE):,} voxels" in text
    assert "train: 2 (a, c)" in text
    assert "val: none" in text
    assert "test: 1 (b)" in text
    assert "a: 20 x 72 x 80 of 1 x 0.4 x 0.4 um, uint8" in text
    assert not (tmp_path / "store").exists()


def test_meta_json_gives_roots_voxel_sizes_and_units(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, _ = pair(1)
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


def test_the_unit_in_the_header_of_an_swc_is_used(tmp_path: Path) -> None:
    tree, _ = pair(1)
    write_pair(tmp_path / "in", "a", 1)
    swc.write(
        tmp_path / "in" / "a.swc", replace(tree, points=to_um(tree.points, SIZE), radii=tree.radii * 0.4), unit="um"
    )
    run(config(images=tmp_path / "in", out=tmp_path / "out"))
    stored = Store(tmp_path / "out")["a"].tree()
    np.testing.assert_allclose(stored.points, tree.points, atol=1e-4)
    np.testing.assert_allclose(stored.radii, tree.radii, atol=1e-4)


@pytest.mark.parametrize(("kind", "stretch"), [("swc", 1.0), ("constant", 1.0), ("image", None)])
def test_each_source_of_the_radius(single: Path, tmp_path: Path, kind: str, stretch: float | None) -> None:
    run(config(f"radius.kind={kind}", images=single, out=tmp_path / "out"))
    stored = Store(tmp_path / "out")["a"]
    radii = stored.fitted().radii
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
    whole = morphology.make(points, np.arange(-1, 77), 1.5)
    image = render(whole, SHAPE, SIZE, EASY, 1)
    half = morphology.subset(whole, x >= 40)
    write_pair(tmp_path / "in", "a", 1, image, half)
    run(config(images=tmp_path / "in", out=tmp_path / "stub"))
    run(config("beyond_root=background", images=tmp_path / "in", out=tmp_path / "none"))
    run(config("beyond_root=background", "ignore_margin=2", images=tmp_path / "in", out=tmp_path / "margin"))
    masks = {n: Store(tmp_path / n)["a"].mask(Box.whole(SHAPE)) for n in ("stub", "none", "margin")}
    assert set(np.unique(masks["none"])) == {0, 1}
    assert masks["stub"][10, 30 + 3, 10] == 255
    assert not (masks["stub"][:, :, 50:] == 255).any()
    assert (masks["margin"] == 255).sum() > (masks["margin"] == 1).sum() / 2
    np.testing.assert_array_equal(masks["margin"] == 1, masks["none"] == 1)


def test_a_misaligned_tree_is_an_error_with_both_figures_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, _ = pair(1)
    flipped = replace(tree, points=tree.points * [1, -1, 1] + [0, SHAPE[1] - 1, 0])
    write_pair(tmp_path / "in", "a", 1, tree=flipped)
    sentence = refused(config(images=tmp_path / "in", out=tmp_path / "out"), "fits a.tif better with y flipped")
    given, best = (
        sentence.split(" against ")[1].split(" as")[0],
        sentence.split("along the tree ")[1].split(" against")[0],
    )
    assert float(best) > 95 > float(given) + 10
    with caplog.at_level(logging.INFO, "hpc_neuro"):
        assert run(config("misaligned=warn", images=tmp_path / "in", out=tmp_path / "out")) == 0
    assert "a: written" in (tmp_path / "out" / "log.txt").read_text()
    assert "better with y flipped" in (tmp_path / "out" / "log.txt").read_text()


def test_a_tree_in_um_taken_for_voxels_is_an_error_that_says_so(tmp_path: Path) -> None:
    tree, _ = pair(1)
    (tmp_path / "in").mkdir()
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=to_um(tree.points, SIZE)))
    refused(config(images=tmp_path / "in", out=tmp_path / "out"), "better with swc_unit=um")


BAD: dict[str, tuple[Any, str]] = {
    "nan": (np.full(SHAPE, np.nan, dtype=np.float32), r"a\.tif: voxel z=0 y=0 x=0 is NaN"),
    "constant": (np.full(SHAPE, 7, dtype=np.uint8), r"a\.tif: every voxel is 7"),
    "flat": (np.zeros((72, 80), dtype=np.uint8), "2D image"),
    "one slice": (np.zeros((1, 72, 80), dtype=np.uint8), "2D image"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_images_are_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    image, match = BAD[kind]
    write_pair(tmp_path / "in", "b", 2)
    write_pair(tmp_path / "in", "a", 1)
    axes = {2: "YX", 3: "ZYX"}[image.ndim]
    tifffile.imwrite(tmp_path / "in" / "a.tif", image, photometric="minisblack", metadata={"axes": axes})
    refused(config(images=tmp_path / "in", out=tmp_path / "out"), match)


def test_missing_halves_and_empty_folders_are_named(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(config(images=tmp_path / "nowhere", out=out), "nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    refused(config(images=tmp_path / "empty", out=out), "holds no image and no SWC")
    write_pair(tmp_path / "in", "a", 1)
    write_pair(tmp_path / "in", "b", 2)
    (tmp_path / "in" / "b.swc").unlink()
    refused(config(images=tmp_path / "in", out=out), r"b\.tif has no SWC of the same stem")
    (tmp_path / "in" / "b.tif").rename(tmp_path / "in" / "c.tif")
    (tmp_path / "in" / "c.tif").unlink()
    (tmp_path / "in" / "a.tif").unlink()
    refused(config(images=tmp_path / "in", out=out), r"a\.swc has no image of the same stem")


def test_an_swc_outside_the_image_is_named_with_both_extents(tmp_path: Path) -> None:
    tree, _ = pair(1)
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=tree.points + np.array([0, 500, 0])))
    text = refused(config(images=tmp_path / "in", out=tmp_path / "out"), r"100 % of .*a\.swc lie outside a\.tif")
    assert "(20, 72, 80)" in text
    blown = replace(tree, points=tree.points / np.asarray(SIZE) * 1.5)
    write_pair(tmp_path / "in", "a", 1, tree=blown)
    (tmp_path / "in" / "a.swc").write_text((tmp_path / "in" / "a.swc").read_text().replace("# unit: voxel", "# none"))
    refused(config("swc_unit=um", images=tmp_path / "in", out=tmp_path / "out"), "lie outside")
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=tree.points[:, ::-1]))
    refused(config(images=tmp_path / "in", out=tmp_path / "out"), "it fits inside with axes z and x swapped")


def test_a_volume_without_voxel_size_asks_for_it(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a", 1)
    cfg = schema.load(PrepareConfig, None, [f"images={tmp_path / 'in'}", f"out={tmp_path / 'out'}"])
    refused(cfg, r"does not say its voxel size; give voxel_size=\[z,y,x\] in um")


def test_a_root_outside_the_image_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a", 1)
    (tmp_path / "in" / "meta.json").write_text(json.dumps({"a": {"root_xyz": [7, 800, 9]}}))
    refused(config(images=tmp_path / "in", out=tmp_path / "out"), "the root of a, .* lies outside the image")


def test_too_little_room_is_said_before_anything_is_written(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: os.times() and type("U", (), {"free": 1000})())
    refused(config(images=raw, out=tmp_path / "out"), r"the store needs .* but only 1\.0 kB are free")


@pytest.mark.slow
def test_real_neurons_become_masks_that_lie_on_them(real_data: Path, tmp_path: Path) -> None:
    for name in ("OP_6.tif", "OP_6.swc", "meta.json"):
        (tmp_path / name).symlink_to(real_data / "diadem_op" / name)
    run(schema.load(PrepareConfig, None, [f"images={tmp_path}", f"out={tmp_path / 'out'}"]))
    stored = Store(tmp_path / "out")["OP_6"]
    whole = Box.whole(stored.shape)
    image, mask = stored.normalised(whole), stored.mask(whole)
    assert image[mask == 1].mean() > 0.5
    assert 0.0003 < (mask == 1).mean() < 0.001
    assert stored.root == pytest.approx((10, 412.01, 15.074))
    # the given tree misses the ridge by a voxel or two, the drawn one does not
    on = [
        image[tuple(np.clip(np.rint(t.points), 0, np.array(stored.shape) - 1).astype(int).T)].mean()
        for t in (morphology.resampled(stored.tree(), 1.0), stored.fitted())
    ]
    assert on[1] > on[0] + 0.2
