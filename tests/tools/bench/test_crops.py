"""Crops hold one connected tree that begins at their root."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro import prepare
from hpc_neuro.core.morphology import length, tips
from hpc_neuro.core.schema import load
from hpc_neuro.data.store import Store
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from tools.bench.crops import draw_crops, score_crop


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("crops")
    write_dataset(folder / "raw", SyntheticConfig(volumes=2))
    prepare.run(load(prepare.PrepareConfig, None, [f"images={folder / 'raw'}", f"out={folder / 'store'}"]))
    return Store(folder / "store")


def test_crops_are_columns_with_one_connected_tree(store: Store) -> None:
    volume = next(iter(store))
    crops = list(draw_crops(volume, 96, 3, np.random.default_rng(0)))
    assert len(crops) == 3
    for crop in crops:
        assert crop.image.shape[0] == volume.shape[0]
        assert max(crop.image.shape[1:]) <= 96
        assert len(crop.tree.roots) == 1
        assert length(crop.tree) >= 96
        assert np.all((crop.tree.points >= 0) & (crop.tree.points <= np.array(crop.image.shape) - 1))
    again = list(draw_crops(volume, 96, 3, np.random.default_rng(0)))
    assert all(np.array_equal(crop.image, other.image) for crop, other in zip(crops, again, strict=True))


def test_a_crop_of_a_lone_neuron_is_traced_alike_by_all_rules(store: Store) -> None:
    crop = next(draw_crops(next(iter(store)), 128, 1, np.random.default_rng(1)))
    assert len(tips(crop.tree)) > 1
    score = score_crop(crop)
    assert not score["is_crowd"]
    assert score["decided"] == score["lone"] > 0.8
