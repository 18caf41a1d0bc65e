"""Leave-one-out: pairs linked, baselines traced and scored, the table made of what is done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core import files, morphology
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.data.store import Store
from tests.helpers.tiny_store import write_store
from tools import leave_one_out
from tools.leave_one_out import KEYS, METHODS, describe, link_pairs, score_baselines, summarize, thin_mask


def test_pairs_of_several_folders_become_one(tmp_path: Path) -> None:
    tree = morphology.build_tree(np.array([[0.0, 0, 0], [0, 0, 5]]), np.array([-1, 0]))
    for folder, name in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        swc.write(tmp_path / folder / f"{name}.swc", tree, unit="voxel", voxel_size=(1, 1, 1), comments=[])
        (tmp_path / folder / f"{name}.tif").write_bytes(b"image")
    files.write_json(tmp_path / "one/meta.json", {"a": {"root_xyz": [1, 2, 3]}, "z": {}})
    files.write_json(tmp_path / "more.json", {"b": {"root_xyz": [4, 5, 6]}})
    folders = [tmp_path / "one", tmp_path / "two"]
    for _ in range(2):  # and again
        assert link_pairs(folders, tmp_path / "more.json", tmp_path / "all") == ["a", "b"]
    assert (tmp_path / "all/b.tif").read_bytes() == b"image"
    assert json.loads((tmp_path / "all/meta.json").read_text()) == {
        "a": {"root_xyz": [1, 2, 3]},
        "b": {"root_xyz": [4, 5, 6]},
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for kind in ("a.swc", "a.tif"):
        (elsewhere / kind).write_bytes((tmp_path / "one" / kind).read_bytes())
    with pytest.raises(InputError, match=r"was made of .*/one/a\.swc, not of .*/elsewhere/a\.swc; give another --out"):
        link_pairs([elsewhere, tmp_path / "two"], None, tmp_path / "all")
    with pytest.raises(InputError, match="a is in two of the folders"):
        link_pairs([tmp_path / "one", tmp_path / "one"], None, tmp_path / "other")
    with pytest.raises(InputError, match="hold 1 pairs"):
        link_pairs([tmp_path / "one"], None, tmp_path / "third")
    (tmp_path / "one/a.nrrd").write_bytes(b"image")
    with pytest.raises(InputError, match="2 images of its name"):
        link_pairs(folders, None, tmp_path / "fourth")


def test_a_thinned_mask_is_a_tree_from_the_root() -> None:
    mask = np.zeros((9, 40, 60), dtype=bool)
    mask[3:6, 10:13, 5:55] = True
    mask[3:6, 13:33, 30:33] = True
    mask[3:6, 36:38, 5:20] = True  # not connected
    tree = thin_mask(mask, (4, 11, 5))
    assert len(tree.roots) == 1
    assert len(morphology.tips(tree)) >= 2
    assert np.linalg.norm(tree.points[0] - [4, 11, 5]) < 4
    assert tree.points[:, 1].max() < 34
    assert morphology.length(tree) == pytest.approx(48 + 20, rel=0.2)
    assert len(thin_mask(np.zeros((4, 4, 4), dtype=bool), (1, 1, 1))) == 0


def test_baselines_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = tmp_path / "a"
    volume = Store(write_store(fold / "store", {"a": "test"}))["a"]
    z, y, x = volume.tree().points[0]
    monkeypatch.setattr(leave_one_out, "Store", lambda _: {"a": replace(volume, root=(z, y, x))})
    trace = {"threshold": 0.9, "gap": 5.0, "min_voxels": 4, "root_snap": 30.0}
    files.write_json(fold / "infer/run.json", {"verb": "infer", "config": {"trace": trace}})
    score_baselines(fold, "a")
    baseline_scores = json.loads((fold / "baselines.json").read_text())
    assert baseline_scores.pop("trace") == trace
    assert set(baseline_scores) == {"raw", "otsu", "thin"}
    for scores in baseline_scores.values():
        assert set(scores) == set(KEYS)
        assert 0 < scores["recall_4vox"] <= 1
    stamp = (fold / "baselines.json").stat().st_mtime_ns
    score_baselines(fold, "a")
    assert (fold / "baselines.json").stat().st_mtime_ns == stamp
    files.write_json(fold / "infer/run.json", {"verb": "infer", "config": {"trace": {**trace, "signal_gap": 0.0}}})
    score_baselines(fold, "a")
    assert json.loads((fold / "baselines.json").read_text())["trace"]["signal_gap"] == 0
    model = dict.fromkeys(KEYS, 0.5)
    gold = {"tips": 4.0}
    files.write_json(fold / "metrics.json", {"volumes": {"a": {"model": model}}, "mean": {}, "gold": {"a": gold}})
    files.write_json(fold / "run.json", {"verb": "demo", "config": {"test": ["a"], "steps": 500}})
    facts = summarize(tmp_path, ["a", "not_done"])
    assert set(facts["folds"]) == {"a"}
    assert set(facts["mean"]) == set(METHODS)
    assert facts["mean"]["thin"]["esa"] == pytest.approx(baseline_scores["thin"]["esa"], abs=1e-4)
    printed = "".join(f"{line}\n" for line in describe(facts))
    assert printed.count("\n") == 1 + 2 * len(METHODS)
    assert "/4" in printed
    shutil.copytree(fold, tmp_path / "b")
    files.write_json(tmp_path / "b" / "run.json", {"verb": "demo", "config": {"test": ["b"], "steps": 50}})
    with pytest.raises(InputError, match=r"the folds a and b were made otherwise .*steps: 500 -> 50"):
        summarize(tmp_path, ["a", "b"])
