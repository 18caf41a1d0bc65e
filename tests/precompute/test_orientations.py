"""Augmented views: what the cache gives for a turned crop is what the teacher makes of the turned volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro import precompute
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, load
from hpc_neuro.data import orientation
from hpc_neuro.data.crops import CropConfig, CropSampler
from hpc_neuro.data.dataset import CropDataset, read_volume_points
from hpc_neuro.data.feature_cache import CacheMismatch, FeatureCache
from hpc_neuro.data.rasterize import DrawSettings
from hpc_neuro.data.store import Store, VolumeRecord, write_index, write_volume

NAMES = ("flip_z", "flip_y", "flip_x", "rot90", "rot180", "rot270", "flip_z+rot90")
KEYS = ["teacher.model=random", "stride_v=1", "slab=64"]  # every slice, so that mirroring moves no slice's middle


def test_rot90_is_numpys() -> None:
    values = np.arange(24).reshape(2, 3, 4)
    turned = orientation.parse_orientation("rot90").apply(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(turned, np.rot90(values, axes=(1, 2)))


@given(st.lists(st.sampled_from(sorted(orientation.ORIENTATIONS)), min_size=1, max_size=5))
def test_words_joined_are_done_from_left_to_right(words: list[str]) -> None:
    values = torch.arange(24).reshape(2, 3, 4)
    wanted = values
    for word in words:
        wanted = orientation.ORIENTATIONS[word].apply(wanted)
    assert torch.equal(orientation.parse_orientation("+".join(words)).apply(values), wanted)


@given(st.sampled_from(["", "r", "c", "rc", "t", "tr", "tc", "trc"]))
def test_laid_back_undoes_laid(how: str) -> None:
    values = torch.arange(12).reshape(3, 4)
    assert torch.equal(orientation.undo_layout(orientation.apply_layout(values, how), how), values)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of one noise volume as it stands ("") and in every orientation."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (16, 32, 48), np.uint8))
    folder, tree = (
        tmp_path_factory.mktemp("stores"),
        Tree(np.full((2, 3), 8.0), np.ones(2), np.array([-1, 0]), np.full(2, 2)),
    )
    for name in ("", *NAMES):
        array = image.numpy() if not name else orientation.parse_orientation(name).apply(image).numpy()
        z, y, x = array.shape
        volume = VolumeRecord(
            id="v", shape=(z, y, x), voxel_size=(1.0, 1.0, 1.0), dtype=array.dtype, low=0.0, high=200.0, root=None,
            split="train", digest=name, sources={"image": "0", "swc": "0"},
        )  # fmt: skip
        (folder / f"s{name}").mkdir()
        write_volume(
            folder / f"s{name}" / "v.h5", volume, lambda box, a=array: a[box.slices], tree, tree, DrawSettings()
        )
        write_index(folder / f"s{name}", [volume])
    return {name: folder / f"s{name}" for name in ("", *NAMES)}


@pytest.fixture(scope="module")
def oriented_cache(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "held"
    keys = [f"store={images['']}", f"out={out}", f"augment_views=[{','.join(NAMES)}]", *KEYS]
    assert precompute.run(load(precompute.PrecomputeConfig, None, keys)) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_turned_crop_has_the_turned_volumes_features(
    images: dict[str, Path], oriented_cache: Path, tmp_path: Path, name: str
) -> None:
    keys = [f"store={images[name]}", f"out={tmp_path / 'c'}", *KEYS]
    precompute.run(load(precompute.PrecomputeConfig, None, keys))
    turn = orientation.parse_orientation(name)
    shape = (16, 48, 32) if turn.swap else (16, 32, 48)
    wanted = FeatureCache(tmp_path / "c").read_crop("v", Box.whole(shape), (8, 16, 16))
    features = FeatureCache(oriented_cache).read_crop("v", Box.whole((16, 32, 48)), (8, 16, 16), turn)

    for view in ("z", "y", "x"):
        torch.testing.assert_close(features[view].float(), wanted[view].float(), atol=4e-3, rtol=4e-3)

    plain = FeatureCache(oriented_cache).read_crop("v", Box.whole((16, 32, 48)), (8, 16, 16))
    naive = {v: turn.apply(plain[turn.source_slices(v)[0]]).float() for v in plain}
    alike = [float(torch.cosine_similarity(naive[v], wanted[v].float(), dim=1).mean()) for v in naive]
    assert min(alike) < 0.9995  # a mirrored map is not the map of the mirrored slice


def test_training_turns_distilled_crops_within_what_is_held(images: dict[str, Path], oriented_cache: Path) -> None:
    store, cache = Store(images[""]), FeatureCache(oriented_cache)
    crop = CropConfig(size=(8, 32, 32), skeleton=0, branch=0, tip=0, uniform=1)
    sampler = CropSampler(crop, read_volume_points(store, ["v"]), 0, (8, 16, 16), 1.0, cache.select_orientations(None))
    crops = CropDataset(store, sampler, (8, 16, 16), cache, ("z", "x"))
    seen = set()
    for index in range(60):
        draw, (_, sample) = sampler(index), crops[index]
        seen.add(draw.orientation)
        image = torch.from_numpy(store["v"].normalized_image(draw.box))[None]
        assert torch.equal(sample.image, draw.orientation.apply(image))
        assert torch.equal(sample.features["x"], cache.read_crop("v", draw.box, (8, 16, 16), draw.orientation)["x"])

    assert seen == set(cache.orientations)
    oblong = CropSampler(
        CropConfig(size=(8, 16, 32)), read_volume_points(store, ["v"]), 0, (8, 16, 16), 1.0, cache.orientations
    )
    assert not any(o.swap for o in oblong.orientations)


def test_more_than_is_held_is_an_error_that_names_the_command(images: dict[str, Path], tmp_path: Path) -> None:
    keys = [f"store={images['']}", f"out={tmp_path / 'c'}", "augment_views=[flip_z]", *KEYS, "stride_v=16"]
    precompute.run(load(precompute.PrecomputeConfig, None, keys))
    cache = FeatureCache(tmp_path / "c")

    assert [o.flips for o in cache.select_orientations(["flip_z"])] == [(False, False, False), (True, False, False)]
    assert not list((tmp_path / "c").glob("v.z-*"))  # slices along z are the same ones, in the other order
    with pytest.raises(CacheMismatch, match=r"hpc-neuro precompute .* augment_views=\[flip_z,rot90\]"):
        cache.select_orientations(["rot90"])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["augment_views=[flip_q]"], "'flip_q' is no orientation; want flip_z"),
        (["augment_views=[rot90]", "views=[z,y]"], "give both y and x"),
        (["augment_views=[flip_y,flip_y]"], "names something twice"),
        (["splits=[train,train]"], "names something twice"),
    ],
)
def test_bad_orientations_are_refused(tmp_path: Path, keys: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(precompute.PrecomputeConfig, None, ["store=s", f"out={tmp_path}", *keys])
