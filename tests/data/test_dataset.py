"""Crops from a real store file: padding, collation, and the same batches by thread and by process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.crops import CropConfig, CropSampler
from hpc_neuro.data.dataset import CropDataset, load_batches, read_crop, read_volume_points
from hpc_neuro.data.orientation import Orientation
from hpc_neuro.data.store import Store
from tests.helpers.tiny_store import SHAPE, write_store

PATCH = (8, 16, 16)


class FakeCache:
    """Features that say where they were read: the token's z, y, x index in the volume."""

    layers, dim, views = (11,), 3, ("z", "y")

    def read_crop(
        self, volume: str, box: Box, patch: tuple[int, int, int], orientation: Orientation, views: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        lines = [torch.arange(a // p, b // p) for a, b, p in zip(box.start, box.stop, patch, strict=True)]
        where = torch.stack(torch.meshgrid(*lines, indexing="ij")).half()[None]
        return {"z": where, "y": where + 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("data") / "store", {"a": "train", "b": "train"}))


def crops(store: Store, fraction: float = 0.0, size: tuple[int, int, int] = (16, 32, 32)) -> CropDataset:
    sampler = CropSampler(CropConfig(size=size), read_volume_points(store, store.split("train")), 0, PATCH, fraction)
    return CropDataset(store, sampler, PATCH, FakeCache() if fraction else None, ("z",) if fraction else ())  # type: ignore[arg-type]


def test_a_crop_holds_what_the_volume_holds(store):
    box = Box((2, 5, 7), (18, 37, 39))
    sample = read_crop(store, "a", box)

    assert sample.image.shape == (1, 16, 32, 32)
    assert np.array_equal(sample.image[0], store["a"].normalized_image(box))
    assert np.array_equal(sample.mask[0], store["a"].mask(box))
    assert np.array_equal(sample.skeleton[0], store["a"].skeleton(box))
    assert sample.mask.any()


def test_past_the_volume_the_image_repeats_its_border_and_nothing_is_labelled(store):
    box = Box((-3, 40, -2), (21, 64, 60))
    sample = read_crop(store, "a", box)
    whole = store["a"].normalized_image(Box.whole(SHAPE))

    assert np.array_equal(sample.image[0], np.pad(whole, [(3, 1), (0, 12), (2, 4)], mode="edge")[:, 40:])
    outside = torch.ones(sample.mask.shape, dtype=torch.bool)
    outside[:, 3:23, :12, 2:58] = False

    assert (sample.mask[outside] == 255).all()
    assert (sample.mask[~outside] != 255).any()
    assert not sample.skeleton[outside].any()


def test_batches_hold_the_samples_of_their_indices(store):
    data = crops(store)
    batch = data.collate([data[i] for i in (5, 3)])
    assert batch.index.tolist() == [5, 3]
    assert torch.equal(batch.image[1], data[3][1].image)
    assert batch.features == {}
    assert not batch.distilled.any()


def test_distilled_samples_carry_features_others_zeros(store):
    data = crops(store, fraction=0.5)
    batch = data.collate([data[i] for i in range(8)])

    assert batch.features.keys() == {"z"}
    assert batch.features["z"].shape == (8, 1, 3, 2, 2, 2)
    assert batch.features["z"].dtype == torch.float16
    assert 0 < int(batch.distilled.sum()) < 8

    for i in range(8):
        draw = data.sampler(i)
        assert bool(batch.distilled[i]) == draw.distilled
        start = [a / p for a, p in zip(draw.box.start, PATCH, strict=True)] if draw.distilled else [0, 0, 0]
        assert batch.features["z"][i, 0, :, 0, 0, 0].tolist() == start


def test_read_ahead_keeps_order_and_content(store):
    data, chunks = crops(store), [[4, 1], [0, 7], [9, 2]]
    with load_batches(data, chunks, 0, ahead=2, pin=False) as ready:
        loaded = list(ready)
    assert [b.index.tolist() for b in loaded] == chunks
    for batch, chunk in zip(loaded, chunks, strict=True):
        assert torch.equal(batch.image, torch.stack([data[i][1].image for i in chunk]))


def test_leaving_early_ends_the_reading_thread(store):
    with load_batches(crops(store), ([i] for i in range(10**9)), 0, ahead=2, pin=False) as ready:
        assert next(ready).index.tolist() == [0]


def test_an_error_while_reading_is_raised_where_the_batch_is_taken(store, tmp_path):
    broken = Store(write_store(tmp_path / "store", {"a": "train"}))
    data = crops(broken)
    (tmp_path / "store" / "a.h5").write_bytes(b"not HDF5")
    broken.close()
    with load_batches(data, [[0], [1]], 0, ahead=1, pin=False) as ready, pytest.raises(InputError, match="HDF5"):
        next(ready)


@pytest.mark.slow
def test_workers_give_the_same_batches_and_outlive_signals(store):
    """A signal to the whole process group reaches the workers first; only the trainer may decide what it means."""
    data = crops(store)
    with load_batches(data, [[i] for i in range(40)], 1, ahead=1, pin=False) as ready:
        assert torch.equal(next(ready).image[0], data[0][1].image)
        worker = multiprocessing.active_children()[0]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(worker.pid, number)
            time.sleep(0.1)
        assert [b.index.item() for b in ready] == list(range(1, 40))
    worker.join(10)
    assert not worker.is_alive()


def test_the_dataset_travels_to_another_process_without_its_open_files(store):
    data = crops(store)
    first = data[0]
    again: CropDataset = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[0][1].image, first[1].image)


def test_places_hold_points_inside_the_volume(store):
    for place in read_volume_points(store, ["a", "b"]):
        assert len(place.points["skeleton"]) > 20
        assert len(place.points["tip"]) >= 2
        for points in place.points.values():
            assert points.shape[1] == 3
            assert (points >= 0).all()
            assert (points < place.shape).all()


def test_a_folder_without_a_store_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="prepare"):
        Store(Path(tmp_path))
