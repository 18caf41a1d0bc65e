"""What prepare refuses before it writes anything."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile

from hpc_neuro.core import files, schema
from hpc_neuro.core.geometry import to_um
from hpc_neuro.core.schema import InputError
from hpc_neuro.prepare import PrepareConfig, run
from tests.helpers.image_pairs import SHAPE, SIZE, assert_refused, make_config, make_pair, write_pair


def test_a_misaligned_tree_is_an_error_with_both_figures_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, _ = make_pair(1)
    flipped = replace(tree, points=tree.points * [1, -1, 1] + [0, SHAPE[1] - 1, 0])
    write_pair(tmp_path / "in", "a", 1, tree=flipped)
    sentence = assert_refused(
        make_config(images=tmp_path / "in", out=tmp_path / "out"), "fits a.tif better with y flipped"
    )
    given, best = (
        sentence.split(" against ")[1].split(" as")[0],
        sentence.split("along the tree ")[1].split(" against")[0],
    )

    assert float(best) > 95 > float(given) + 10
    with caplog.at_level(logging.INFO, "hpc_neuro"):
        assert run(make_config("misaligned=warn", images=tmp_path / "in", out=tmp_path / "out")) == 0

    assert "a: written" in (tmp_path / "out" / "log.txt").read_text()
    assert "better with y flipped" in (tmp_path / "out" / "log.txt").read_text()


def test_a_tree_in_um_taken_for_voxels_is_an_error_that_says_so(tmp_path: Path) -> None:
    tree, _ = make_pair(1)
    (tmp_path / "in").mkdir()
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=to_um(tree.points, SIZE)))
    assert_refused(make_config(images=tmp_path / "in", out=tmp_path / "out"), "better with swc_unit=um")


BAD: dict[str, tuple[Any, str]] = {
    "nan": (np.full(SHAPE, np.nan, dtype=np.float32), r"a\.tif: voxel z=0 y=0 x=0 is NaN"),
    "constant": (np.full(SHAPE, 7, dtype=np.uint8), r"a\.tif: every voxel is 7"),
    "flat": (np.zeros((72, 80), dtype=np.uint8), "2D image"),
    "one slice": (np.zeros((1, 72, 80), dtype=np.uint8), "2D image"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_images_are_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    image, match = BAD[kind]
    # Beside a good pair, one whose voxels cannot be used is left out (test_unusable_images.py).
    if kind not in ("nan", "constant"):
        write_pair(tmp_path / "in", "b", 2)
    write_pair(tmp_path / "in", "a", 1)
    axes = {2: "YX", 3: "ZYX"}[image.ndim]
    tifffile.imwrite(tmp_path / "in" / "a.tif", image, photometric="minisblack", metadata={"axes": axes})
    assert_refused(make_config(images=tmp_path / "in", out=tmp_path / "out"), match)


def test_missing_halves_and_empty_folders_are_named(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(make_config(images=tmp_path / "nowhere", out=out), "nowhere is not a folder")

    (tmp_path / "empty").mkdir()
    assert_refused(make_config(images=tmp_path / "empty", out=out), "holds no image and no SWC")

    write_pair(tmp_path / "in", "a", 1)
    write_pair(tmp_path / "in", "b", 2)
    (tmp_path / "in" / "b.swc").unlink()

    assert_refused(make_config(images=tmp_path / "in", out=out), r"b\.tif has no SWC of the same stem")
    (tmp_path / "in" / "b.tif").rename(tmp_path / "in" / "c.tif")
    (tmp_path / "in" / "c.tif").unlink()
    (tmp_path / "in" / "a.tif").unlink()
    assert_refused(make_config(images=tmp_path / "in", out=out), r"a\.swc has no image of the same stem")


def test_an_swc_outside_the_image_is_named_with_both_extents(tmp_path: Path) -> None:
    tree, _ = make_pair(1)
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=tree.points + np.array([0, 500, 0])))
    text = assert_refused(
        make_config(images=tmp_path / "in", out=tmp_path / "out"), r"100 % of .*a\.swc lie outside a\.tif"
    )

    assert "(20, 72, 80)" in text
    blown = replace(tree, points=tree.points / np.asarray(SIZE) * 1.5)
    write_pair(tmp_path / "in", "a", 1, tree=blown)
    (tmp_path / "in" / "a.swc").write_text((tmp_path / "in" / "a.swc").read_text().replace("# unit: voxel", "# none"))

    assert_refused(make_config("swc_unit=um", images=tmp_path / "in", out=tmp_path / "out"), "lie outside")
    write_pair(tmp_path / "in", "a", 1, tree=replace(tree, points=tree.points[:, ::-1]))

    assert_refused(
        make_config(images=tmp_path / "in", out=tmp_path / "out"), "it fits inside with axes z and x swapped"
    )


def test_a_volume_without_voxel_size_asks_for_it(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a", 1)
    cfg = schema.load(PrepareConfig, None, [f"images={tmp_path / 'in'}", f"out={tmp_path / 'out'}"])
    assert_refused(cfg, r"does not say its voxel size; give voxel_size=z,y,x in um")


def test_a_root_outside_the_image_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a", 1)
    (tmp_path / "in" / "meta.json").write_text(json.dumps({"a": {"root_xyz": [7, 800, 9]}}))
    assert_refused(
        make_config(images=tmp_path / "in", out=tmp_path / "out"), "the root of a, .* lies outside the image"
    )


def test_too_little_room_is_said_before_anything_is_written(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: os.times() and type("U", (), {"free": 1000})())
    assert_refused(make_config(images=raw, out=tmp_path / "out"), r"the store needs .* but only 1\.0 kB are free")


def test_the_store_is_not_written_over_its_images(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = tifffile.imread(tmp_path / "a.tif")
    (tmp_path / "a.tif").unlink()
    before = (tmp_path / "a.h5").read_bytes()

    with pytest.raises(InputError, match=r"a\.h5 would be replaced by the store's file of that name"):
        run(make_config("voxel_size=[1,1,1]", images=tmp_path, out=tmp_path))
    assert (tmp_path / "a.h5").read_bytes() == before


def test_one_image_is_not_in_two_splits(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_pair(folder, "a", 1)
    for path in list(folder.iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("a.", "copy.")))

    with pytest.raises(InputError, match=r"a \(train\) and copy \(test\) are the same image"):
        run(make_config("split.test=[copy]", images=folder, out=tmp_path / "store"))
    assert run(make_config(images=folder, out=tmp_path / "store")) == 0
