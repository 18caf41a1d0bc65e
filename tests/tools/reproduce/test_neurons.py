"""Neurons of a downloaded data set: pairs, folders of several trees, folds, splits of the authors."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tools.reproduce.neurons import COLUMNS, assign_splits, find_neurons, read_splits, write_manifest
from tools.reproduce.stand_in import encode_v3draw, write_bigneuron, write_pairs

SHAPE = (12, 32, 32)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bigneuron")
    write_bigneuron(folder, 3, SHAPE)
    return folder


def test_a_release_has_a_folder_for_each_neuron_with_several_trees(release: Path) -> None:
    neurons = find_neurons(release, "Janelia", "*sorted.swc")
    assert [neuron.id for neuron in neurons] == [
        f"gold166_wids_checked7_janelia_flylight_part1_{number}" for number in (1, 2, 3)
    ]
    assert neurons[0].tree.name == "1.v3draw.ano.swc_sorted.swc"
    assert open_volume(neurons[0].image).shape == SHAPE


def test_a_tree_that_is_not_decided_is_asked_for(release: Path) -> None:
    with pytest.raises(
        InputError, match=r"1 image and 2 trees that match '\*\.swc', want one of each .*--tree 'PATTERN'"
    ):
        find_neurons(release, "", "*.swc")
    # What the message advises.
    assert len(find_neurons(release, "", "*ano.swc_sorted.swc")) == 3


def test_pairs_of_one_stem(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2, SHAPE)
    assert [neuron.id for neuron in find_neurons(tmp_path, "", "*sorted.swc")] == ["block_001", "block_002"]


def test_missing_data_say_where_they_are(release: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a folder; docs/reproduce\.md says where to download"):
        find_neurons(tmp_path / "none", "", "*")
    with pytest.raises(InputError, match=r"holds no folders with 'taiwan' in their path"):
        find_neurons(release, "taiwan", "*")


def test_folds_divide_the_neurons_and_do_not_depend_on_their_order() -> None:
    names = [f"n{number}" for number in range(12)]
    folds = [assign_splits(names, 5, fold) for fold in range(5)]
    tested = [name for fold in folds for name in names if fold[name] == "test"]
    assert sorted(tested) == sorted(names)
    assert all({"train", "val", "test"} == set(fold.values()) for fold in folds)
    assert assign_splits(names[::-1], 5, 2) == folds[2]
    assert all(folds[1][name] == "test" for name in names if folds[0][name] == "val")
    with pytest.raises(InputError, match="4 neurons cannot be divided into 5 folds; give --folds"):
        assign_splits(names[:4], 5, 0)


def test_splits_of_the_authors(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    path.write_text("id,split\na,train\nb,test\n")
    assert read_splits(path, ["a", "b"]) == {"a": "train", "b": "test"}
    with pytest.raises(InputError, match=r"1 without a split \(c\), 0 that are not there"):
        read_splits(path, ["a", "b", "c"])
    path.write_text("id,split\na,training\n")
    with pytest.raises(InputError, match="names the split 'training'"):
        read_splits(path, ["a"])


def test_the_manifest_is_that_of_prepare(release: Path, tmp_path: Path) -> None:
    neurons = find_neurons(release, "", "*sorted.swc")
    write_manifest(tmp_path / "m.csv", neurons, assign_splits([n.id for n in neurons], 3, 0), "1 0.5 0.5")
    with (tmp_path / "m.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == COLUMNS
    assert sorted(row["split"] for row in rows) == ["test", "train", "val"]
    assert all(Path(row["image"]).is_absolute() for row in rows)


def test_a_v3draw_is_read_as_it_was_written(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 4000, (3, 4, 5), dtype=np.uint16)
    (tmp_path / "a.v3draw").write_bytes(encode_v3draw(image))
    volume = open_volume(tmp_path / "a.v3draw")
    assert np.array_equal(volume[Box.whole(volume.shape)], image)
