"""Pairs and splits: folders, manifests, whole neurons in one split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.prepare import PrepareConfig
from hpc_neuro.prepare.pairs import ImagePair, find_pairs


def folder(path: Path, *ids: str) -> Path:
    path.mkdir(exist_ok=True)
    for id_ in ids:
        (path / f"{id_}.tif").write_bytes(b"II*\0")
        (path / f"{id_}.swc").write_text("1 1 0 0 0 1 -1\n")
    return path


def find(*keys: str) -> list[ImagePair]:
    return find_pairs(schema.load(PrepareConfig, None, [*keys, "out=nowhere"]))


def splits(pairs: list[ImagePair]) -> dict[str, str]:
    return {p.id: p.split for p in pairs}


def manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        keys = list(dict.fromkeys(k for row in rows for k in row))
        lines = [",".join(keys), *(",".join(str(row.get(k, "")) for k in keys) for row in rows)]
        path.write_text("﻿" + "\n".join(lines) + "\n")  # spreadsheets write a byte-order mark
    else:
        path.write_text(yaml.safe_dump(rows))
    return path


def test_a_folder_pairs_by_stem_and_ignores_the_rest(tmp_path: Path) -> None:
    made = folder(tmp_path, "a", "b.1")
    (made / "notes.txt").write_text("x")
    (made / ".hidden.tif").mkdir()
    pairs = find(f"images={made}")

    assert [p.id for p in pairs] == ["a", "b.1"]
    assert pairs[1].image == made / "b.1.tif"
    assert splits(pairs) == {"a": "train", "b.1": "train"}


def test_two_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path, "a")
    (made / "a.tiff").write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"two images of a: a\.tif and a\.tiff"):
        find(f"images={made}")


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
"""One name in the two forms of Unicode; macOS writes the second."""


def test_names_that_look_the_same_are_a_pair(tmp_path: Path) -> None:
    folder(tmp_path, DECOMPOSED)
    (tmp_path / f"{DECOMPOSED}.swc").rename(tmp_path / f"{COMPOSED}.swc")
    (tmp_path / "meta.json").write_text(json.dumps({COMPOSED: {"voxel_size_um_xyz": [1, 2, 3]}}))
    (pair,) = find(f"images={tmp_path}")
    assert (pair.id, pair.swc.name, pair.voxel_size) == (DECOMPOSED, f"{COMPOSED}.swc", (3.0, 2.0, 1.0))


def test_two_names_that_look_the_same_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, COMPOSED, DECOMPOSED)
    with pytest.raises(InputError, match="look the same"):
        find(f"images={tmp_path}")
    rows = [{"id": id_, "image": f"{id_}.tif", "swc": f"{id_}.swc"} for id_ in (COMPOSED, DECOMPOSED)]
    with pytest.raises(InputError, match="look the same"):
        find(f"manifest={manifest(tmp_path / 'm.yaml', rows)}")


def test_two_names_whose_trees_would_share_a_file_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, "a", "a.voxel")
    with pytest.raises(InputError, match="'a' and 'a.voxel' would share files"):
        find(f"images={tmp_path}")


def test_two_names_that_differ_in_capitals_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, "Neuron", "neuron")
    with pytest.raises(InputError, match="'Neuron' and 'neuron' differ in capitals only.*give one another name"):
        find(f"images={tmp_path}")
    rows = [{"id": id_, "image": "neuron.tif", "swc": "neuron.swc"} for id_ in ("a", "A")]
    with pytest.raises(InputError, match="'a' and 'A' differ in capitals only"):
        find(f"manifest={manifest(tmp_path / 'm.yaml', rows)}")

    # The advice: another name for one of them.
    for ending in (".tif", ".swc"):
        (tmp_path / f"Neuron{ending}").rename(tmp_path / f"first{ending}")
    assert {pair.id for pair in find(f"images={tmp_path}")} == {"first", "neuron"}


def test_a_fault_names_the_file_that_has_it(tmp_path: Path) -> None:
    """There is no meta.json to be corrected."""
    folder(tmp_path, "n1")
    (tmp_path / "n1.swc").unlink()
    (tmp_path / "n1.swc").symlink_to("far/n1.swc")
    with pytest.raises(InputError, match=r"n1.swc of volume n1 is a link that leads nowhere; put the file there$"):
        find(f"images={tmp_path}")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "n1.swc").write_text("1 1 0 0 0 1 -1\n")
    assert [pair.id for pair in find(f"images={tmp_path}")] == ["n1"]

    folder(tmp_path, "x" * 240)
    with pytest.raises(InputError, match=r"x.tif: id 'x+' cannot be a file name"):
        find(f"images={tmp_path}")


@pytest.mark.parametrize("suffix", ["csv", "yaml"])
def test_a_manifest_gives_everything(tmp_path: Path, suffix: str) -> None:
    folder(tmp_path / "raw", "one", "two")
    rows = [
        {"id": "n1", "image": "raw/one.tif", "swc": "raw/two.swc", "voxel_size": "1.0 0.3 0.4", "root": "3;4;5",
         "split": "test", "swc_unit": "um", "channel": 1, "axes": "CZYX"},
        {"id": "n2", "image": "raw/two.tif", "swc": "raw/one.swc"},
    ]  # fmt: skip
    a, b = find(f"manifest={manifest(tmp_path / f'list.{suffix}', rows)}")

    assert (a.id, a.image, a.swc) == ("n1", tmp_path / "raw/one.tif", tmp_path / "raw/two.swc")
    assert (a.voxel_size, a.root, a.split, a.swc_unit, a.channel, a.axes) == (
        (1.0, 0.3, 0.4), (3.0, 4.0, 5.0), "test", "um", 1, "CZYX")  # fmt: skip
    assert (b.voxel_size, b.root, b.split, b.swc_unit, b.channel, b.axes) == (None, None, "train", None, None, None)


def test_the_configs_voxel_size_overrules_the_manifest(tmp_path: Path) -> None:
    folder(tmp_path, "a")
    rows = [{"image": "a.tif", "swc": "a.swc", "voxel_size": "1 1 1"}]
    (pair,) = find(f"manifest={manifest(tmp_path / 'l.csv', rows)}", "voxel_size=[2,1,1]")
    assert pair.voxel_size == (2, 1, 1)
    assert pair.id == "a"


ROW = {"id": "a", "image": "a.tif", "swc": "a.swc"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": "none.tif"}, r"none\.tif of volume a does not exist"),
        ({"swc": "none.swc"}, r"none\.swc of volume a does not exist"),
        ({"voxel_size": "1 2"}, "voxel_size of a is '1 2'; three finite numbers z y x are wanted"),
        ({"voxel_size": "1 0 1"}, "sizes above 0 um are wanted"),
        ({"root": "a b c"}, "root of a is 'a b c'"),
        ({"root": "nan 1 1"}, "three finite numbers"),
        ({"split": "holdout"}, "split of a is 'holdout'; train, val or test is wanted"),
        ({"swc_unit": "mm"}, "swc_unit of a is 'mm'; voxel or um is wanted"),
        ({"channel": "red"}, "channel of a is 'red'; a number from 0 is wanted"),
        ({"channel": "²"}, "channel of a is '²'; a number from 0 is wanted"),
        ({"id": "../a"}, "cannot be a file name"),
        ({"color": "red"}, "unknown columns color; known are id, image, swc"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, str], match: str) -> None:
    folder(tmp_path, "a")
    with pytest.raises(InputError, match=match):
        find(f"manifest={manifest(tmp_path / 'list.csv', [ROW | change])}")


def test_bad_manifests_are_named(tmp_path: Path) -> None:
    folder(tmp_path, "a")
    with pytest.raises(InputError, match="does not exist"):
        find(f"manifest={tmp_path / 'none.csv'}")
    with pytest.raises(InputError, match="lists a more than once"):
        find(f"manifest={manifest(tmp_path / 'l.csv', [ROW, ROW])}")
    with pytest.raises(InputError, match="a has no swc"):
        find(f"manifest={manifest(tmp_path / 'l.csv', [{'id': 'a', 'image': 'a.tif'}])}")

    for text, name in (("", "e.csv"), ("a: 1", "m.yaml"), ("[1, 2]", "n.yaml")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="lists no volumes"):
            find(f"manifest={tmp_path / name}")
    (tmp_path / "bad.yaml").write_text("[1, {")

    with pytest.raises(InputError, match="is not YAML"):
        find(f"manifest={tmp_path / 'bad.yaml'}")

    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        find(f"manifest={tmp_path / 'bad.csv'}")


def test_bad_meta_json_is_named(tmp_path: Path) -> None:
    folder(tmp_path, "a")
    (tmp_path / "meta.json").write_text("{")

    with pytest.raises(InputError, match=r"meta\.json is not readable JSON"):
        find(f"images={tmp_path}")

    (tmp_path / "meta.json").write_text('{"a": 3}')
    with pytest.raises(InputError, match=r"meta\.json holds no mapping for a"):
        find(f"images={tmp_path}")

    (tmp_path / "meta.json").write_text('{"a": {"root_xyz": [1, 2]}}')
    with pytest.raises(InputError, match="root_xyz of a is .*three finite numbers x y z are wanted"):
        find(f"images={tmp_path}")


def test_lists_and_fractions_decide_the_splits(tmp_path: Path) -> None:
    made = folder(tmp_path, *"abcdefghij")
    listed = splits(find(f"images={made}", "split.test=[c]", "split.val=[a]"))

    assert {i for i, s in listed.items() if s == "test"} == {"c"}
    assert {i for i, s in listed.items() if s == "val"} == {"a"}

    drawn = splits(find(f"images={made}", "split.test_fraction=0.3", "split.val_fraction=0.1", "split.test=[c]"))
    assert drawn["c"] == "test"

    counts = {s: sum(v == s for v in drawn.values()) for s in ("train", "val", "test")}
    assert counts == {"train": 5, "val": 1, "test": 4}
    assert splits(find(f"images={made}", "split.test_fraction=0.3", "split.seed=1")) != splits(
        find(f"images={made}", "split.test_fraction=0.3", "split.seed=2")
    )


def test_adding_a_neuron_that_is_named_does_not_move_the_others(tmp_path: Path) -> None:
    made = folder(tmp_path, *"abcdef")
    before = splits(find(f"images={made}", "split.test_fraction=0.34"))
    folder(tmp_path, "zz")
    after = splits(find(f"images={made}", "split.test_fraction=0.34", "split.val=[zz]"))
    assert {k: v for k, v in after.items() if k != "zz"} == before


def test_volumes_of_one_neuron_share_a_split(tmp_path: Path) -> None:
    folder(tmp_path, *"abcd")
    rows = [{"image": f"{i}.tif", "swc": f"{i}.swc", "neuron": n} for i, n in zip("abcd", "uuvv", strict=True)]
    path = manifest(tmp_path / "l.csv", rows)
    for seed in range(5):
        pairs = splits(find(f"manifest={path}", "split.test_fraction=0.5", f"split.seed={seed}"))
        assert pairs["a"] == pairs["b"] != pairs["c"] == pairs["d"]

    assert splits(find(f"manifest={path}", "split.test=[a]")) == {"a": "test", "b": "test", "c": "train", "d": "train"}
    rows[0]["split"], rows[1]["split"] = "train", "test"

    with pytest.raises(InputError, match="neuron u is put into both train and test"):
        find(f"manifest={manifest(tmp_path / 'l.csv', rows)}")


def test_contradictions_and_unknown_names_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path, "a", "b")
    with pytest.raises(InputError, match="split names x, but the volumes are a, b"):
        find(f"images={made}", "split.test=[x]")
    with pytest.raises(ConfigError, match="a stand in both test and val"):
        find(f"images={made}", "split.test=[a]", "split.val=[a]")
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        find(f"images={made}", "split.test_fraction=0.6", "split.val_fraction=0.5")
    with pytest.raises(ConfigError, match="either images=FOLDER or manifest=FILE"):
        find()
    with pytest.raises(ConfigError, match="tube 9.0 is above 8, the largest distance"):
        find(f"images={made}", "tube=9")
