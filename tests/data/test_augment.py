"""Augmentation: labels move with the image, distilled samples stay, a sample's fate is its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core.types import Batch
from hpc_neuro.data import augment as augment_module
from hpc_neuro.data.augment import AugmentConfig, _affine_matrix, augment

OFF = AugmentConfig(
    flip=False, warp=0, gamma=0, contrast=0, uneven=0, background=0, noise=0, blur=0, coarse=0,
    specks=0, missing=0, stripes=0,
)  # fmt: skip


def batch(count: int = 3, shape: tuple[int, int, int] = (8, 24, 24), distilled: tuple[int, ...] = ()) -> Batch:
    """Two bright bars; the mask is the bars, so whatever moves the one must move the other."""
    image = torch.zeros(count, 1, *shape)
    image[:, :, 2:5, 4:8, 3 : shape[2] - 6] = 1.0
    image[:, :, 3:6, 8 : shape[1] - 3, 5:9] = 1.0
    mask = (image > 0.5).to(torch.uint8)
    return Batch(
        image=image,
        mask=mask,
        skeleton=mask.clone(),
        features={"z": torch.ones(count, 1, 2, 1, 2, 2, dtype=torch.float16)},
        distilled=torch.tensor([i in distilled for i in range(count)]),
        index=torch.arange(count) + 100,
    )


def test_all_off_changes_nothing():
    given_batch = batch()
    result = augment(given_batch, OFF, seed=0)
    for field in dataclasses.fields(Batch):
        if field.name != "features":
            assert torch.equal(getattr(result, field.name), getattr(given_batch, field.name)), field.name


def test_labels_move_with_the_image():
    for seed in range(6):
        cfg = dataclasses.replace(OFF, flip=True, warp=1.0)
        result = augment(batch(), cfg, seed)
        labelled = result.mask != 255
        truth, seen = result.mask[labelled] > 0, result.image[labelled] > 0.5
        overlap = (truth & seen).sum() * 2 / (truth.sum() + seen.sum())
        assert overlap > 0.93  # nearest and linear interpolation differ at the surface only
        assert torch.equal(result.skeleton[labelled], result.mask[labelled])


def test_flips_and_turns_are_exact():
    result = augment(batch(8), dataclasses.replace(OFF, flip=True), seed=1)
    assert torch.equal(result.image > 0.5, result.mask > 0)
    assert len({tuple(r.flatten().tolist()) for r in result.mask}) > 4


def test_crops_that_are_not_square_keep_their_shape():
    result = augment(batch(6, (8, 24, 32)), AugmentConfig(warp=1.0), seed=1)
    assert result.image.shape == (6, 1, 8, 24, 32)


def test_distilled_samples_keep_their_geometry():
    given_batch = batch(4, distilled=(1, 3))
    result = augment(given_batch, dataclasses.replace(AugmentConfig(), warp=1.0), seed=2)

    for i in (1, 3):
        assert torch.equal(result.mask[i], given_batch.mask[i])
        assert torch.equal(result.skeleton[i], given_batch.skeleton[i])
    assert torch.equal(result.features["z"], given_batch.features["z"])
    assert not torch.equal(result.mask[0], given_batch.mask[0])
    assert not torch.equal(result.image[1], given_batch.image[1])  # intensities may change


def test_what_a_warp_brings_in_from_outside_is_unlabelled():
    cfg = dataclasses.replace(OFF, warp=1.0, angle=30.0, scale=0.0, bend=0.0)
    result = augment(batch(), cfg, seed=3)
    corners = result.mask[:, 0, 4, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).any()
    assert set(result.mask.unique().tolist()) <= {0, 1, 255}


def test_a_quarter_turn_by_warp_equals_the_exact_one():
    """A warp of 90 degrees, on a square and on an oblong crop, is a rotation of the voxels."""

    class Quarter:
        def __init__(self) -> None:
            self.values = iter([90.0, 0.0, 0.0, 0.0])

        def between(self, purpose: str, low: float, high: float) -> float:
            return next(self.values)

    image = torch.rand(1, 1, 2, 6, 6)
    theta = torch.tensor([_affine_matrix(Quarter(), AugmentConfig(), (2, 6, 6))])
    grid = torch.nn.functional.affine_grid(theta, [1, 1, 2, 6, 6], align_corners=False)
    turned = torch.nn.functional.grid_sample(image, grid, align_corners=False)

    assert torch.allclose(turned, torch.rot90(image, 1, (3, 4)), atol=1e-5)
    oblong = torch.tensor([_affine_matrix(Quarter(), AugmentConfig(), (2, 4, 8))])
    corner = oblong[0, :2, :2] @ torch.tensor([0.5, 0.0])  # 2 voxels along x
    assert torch.allclose(corner * torch.tensor([4.0, 2.0]), torch.tensor([0.0, 2.0]), atol=1e-5)  # 2 voxels along y


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000))
def test_a_sample_does_not_depend_on_its_batch(seed):
    whole = augment(batch(4, distilled=(2,)), AugmentConfig(), seed)
    pieces = batch(4, distilled=(2,))
    for i in range(4):
        one = Batch(**{k: v[i : i + 1] for k, v in vars(pieces).items() if k != "features"}, features={})
        alone = augment(one, AugmentConfig(), seed)
        assert torch.allclose(alone.image[0], whole.image[i], atol=1e-6)
        assert torch.equal(alone.mask[0], whole.mask[i])
        assert torch.equal(alone.skeleton[0], whole.skeleton[i])


def test_repeatable_and_different_for_each_index_and_seed():
    first, again, other = (augment(batch(3), AugmentConfig(), s) for s in (5, 5, 6))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
    assert not torch.equal(first.image[0], first.image[1])


def test_image_stays_in_range_and_finite():
    strong = AugmentConfig(background=1, noise=1, blur=1, uneven=1, specks=1, stripes=1, missing=1, coarse=1, warp=1)
    for seed in range(5):
        result = augment(batch(), strong, seed)
        assert torch.isfinite(result.image).all()
        assert result.image.min() >= 0
        assert result.image.max() <= 1
        assert result.image.dtype == torch.float32
        assert result.mask.dtype == torch.uint8


@pytest.mark.parametrize("name", ["background", "noise", "blur", "uneven", "specks", "stripes", "missing", "coarse"])
def test_each_degradation_acts_on_the_image_only(name):
    given_batch = batch(4)
    given_batch = dataclasses.replace(given_batch, image=0.2 + 0.5 * given_batch.image)
    result = augment(given_batch, dataclasses.replace(OFF, **{name: 1.0}), seed=0)
    assert all(not torch.equal(a, b) for a, b in zip(result.image, given_batch.image, strict=True))
    assert torch.equal(result.mask, given_batch.mask)


def test_masked_background_gets_noise_like_an_unmasked_stack():
    """Zero background, as masked stacks have, becomes uneven and noisy in most crops; neurites stay brighter."""
    given_batch = batch(40)
    result = augment(given_batch, dataclasses.replace(OFF, background=0.6, noise=0.7), seed=0)
    empty = given_batch.mask == 0
    spread = torch.stack([r[e].std() for r, e in zip(result.image, empty, strict=True)])
    level = torch.stack([r[e].mean() for r, e in zip(result.image, empty, strict=True)])

    assert 0.5 < (spread > 0.003).float().mean() < 0.99
    assert (level > 0.01).float().mean() > 0.3
    assert all(r[~e].mean() > r[e].mean() + 0.3 for r, e in zip(result.image, empty, strict=True))


def test_shot_noise_grows_with_intensity(monkeypatch):
    bright = dataclasses.replace(batch(20), image=torch.full((20, 1, 8, 24, 24), 0.5))
    dim = dataclasses.replace(bright, image=torch.full((20, 1, 8, 24, 24), 0.1))
    monkeypatch.setattr(augment_module, "READ_NOISE", 0.0)
    monkeypatch.setattr(augment_module, "SHOT_NOISE", 0.1)
    cfg = dataclasses.replace(OFF, noise=1.0)
    deviation = [(augment(b, cfg, 0).image - b.image).std(dim=(1, 2, 3, 4)) for b in (bright, dim)]
    inside = deviation[0] > 1e-4
    assert (deviation[0] / deviation[1])[inside].mean() == pytest.approx(5**0.5, rel=0.1)
