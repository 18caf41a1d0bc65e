"""The two objectives: their training path is timm's forward pass, and their targets are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.teacher import augment, frozen_features, structure_targets
from hpc_neuro.teacher.config import TaskConfig, TeacherOptimConfig
from hpc_neuro.teacher.masked_autoencoder import MaskedAutoencoder
from hpc_neuro.teacher.masked_structure import MaskedStructure
from hpc_neuro.teacher.objective import Batch, patchify
from hpc_neuro.teacher.photographs import list_photographs, open_tiles
from hpc_neuro.teacher.tiles import Source
from hpc_neuro.teacher.trainer import Recipe, build_network, draw_batch, normalize_input
from hpc_neuro.teacher.verbs import OBJECTIVES, choose_objective
from tests.helpers.tiny_teachers import make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(photos: Path, teacher_run: Path) -> Source:
    tiles = open_tiles(list_photographs(photos, 4), teacher_run / "cache", 64, 4)
    assert not set(tiles.held) & set(tiles.train)
    return Source(tiles, 4, is_photographs=True)


def make_recipe(name: str, patch: int, batch: int = 4) -> Recipe:
    return Recipe(OBJECTIVES[name], patch, TaskConfig(crop=32), TeacherOptimConfig(batch=batch))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_depend_on_the_step_alone(name: str, source: Source) -> None:
    recipe = make_recipe(name, 8)
    first = draw_batch([source], 3, recipe, CPU)
    draw_batch([source], 7, recipe, CPU)
    again = draw_batch([source], 3, recipe, CPU)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.order, again.order)
    assert not torch.equal(first.target, draw_batch([source], 4, recipe, CPU).target)
    assert first.target.min() >= -1
    assert first.target.max() <= 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_batch_is_learned(name: str, source: Source) -> None:
    recipe = make_recipe(name, 8)
    network = build_network(recipe, recipe.objective.make_encoder(8, 1), [source], CPU)
    batch, keep = draw_batch([source], 0, recipe, CPU), recipe.task.count_visible(8)

    losses = []
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        loss = network(batch, keep)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_new_teachers_can_be_continued_by_their_own_objective_and_others_by_their_positions() -> None:
    assert choose_objective(make("vit_tiny_patch16_dinov3_qkvb")).name == "structure"
    assert choose_objective(load_teacher(TeacherConfig(model="bundled"))).name == "pixels"
    with pytest.raises(
        InputError, match=r"vit_tiny_patch16_224 cannot be continued: .*rotary.*fixed positions.*DINOv3"
    ):
        choose_objective(make("vit_tiny_patch16_224"))


def test_images_are_normalized_as_the_teacher_wants_them() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.25)
    expected = torch.tensor([(0 - 0.1) / 0.4, (0.5 - 0.2) / 0.5, (1 - 0.3) / 0.25]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize_input(image, mean, std), expected)
    assert normalize_input(image, (0.5,) * 3, (0.5,) * 3) is image


def test_crops_are_turned_and_mirrored_but_never_sheared() -> None:
    """Every output of a smooth ramp is again a ramp along one axis: a quarter turn, nothing between."""
    ramp = torch.linspace(0, 1, 64).expand(32, 3, 64, 64)
    turned = augment.vary_photographs(ramp, 32, torch.Generator().manual_seed(0))  # [32, 3, 32, 32]
    along_y = (turned[:, :, 1:] - turned[:, :, :-1]).abs().amax((1, 2, 3))
    along_x = (turned[..., 1:] - turned[..., :-1]).abs().amax((1, 2, 3))
    assert torch.minimum(along_y, along_x).max() < 1e-4
    assert (along_y > 1e-3).any()
    assert (along_x > 1e-3).any()


def test_tokens_of_training_are_those_of_timm() -> None:
    """All patches visible at timm's own positions: the training path is exactly timm's forward pass."""
    torch.manual_seed(0)
    vit = OBJECTIVES["pixels"].make_encoder(16, 2).eval()
    mae = MaskedAutoencoder(vit, 16, 32, 1).eval()
    image = torch.randn(1, 3, 224, 224)
    axis = torch.arange(14.0)
    y, x = (c.flatten()[None] for c in torch.meshgrid(axis, axis, indexing="ij"))
    with torch.no_grad():
        torch.testing.assert_close(
            mae.encode(patchify(image, 16), y, x), vit.forward_features(image), rtol=1e-4, atol=1e-4
        )


def test_coordinates_stay_on_the_table() -> None:
    y, x = OBJECTIVES["pixels"].draw_coordinates(torch.Generator().manual_seed(0), 200, 8, 16)
    assert min(y.min(), x.min()) >= 0
    assert max(y.max(), x.max()) <= 13 + 1e-4
    spacing = (x.view(200, 8, 8)[:, 0, 1:] - x.view(200, 8, 8)[:, 0, :-1]).mean(1)
    assert ((spacing - 1).abs() < 1e-5).float().mean() > 0.4
    assert spacing.min() >= 0.5 - 1e-5


def test_orientation_of_stripes() -> None:
    x = torch.arange(224.0)
    vertical = (x / 3).sin().expand(1, 3, 224, 224)
    torch.testing.assert_close(
        frozen_features.orientation(vertical, 16)[0, 20], torch.tensor([1.0, 0.0]), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(
        frozen_features.orientation(vertical.mT, 16)[0, 20], torch.tensor([-1.0, 0.0]), atol=1e-2, rtol=0
    )


def test_a_teacher_of_structure_trains_as_timm_runs_it() -> None:
    """All patches visible at the coordinates of a whole image: the training path is timm's forward pass."""
    torch.manual_seed(0)
    vit = OBJECTIVES["structure"].make_encoder(8, 2).eval()
    network = MaskedStructure(vit, 8, 0.5, torch.rand(2, 3, 64, 64)).eval()
    image = torch.randn(2, 3, 64, 64)
    axis = 2 * (torch.arange(8) + 0.5 - 4) / 8
    y, x = (c.flatten().expand(2, -1) for c in torch.meshgrid(axis, axis, indexing="ij"))
    batch = Batch(image, image, torch.arange(64).expand(2, -1), y, x)

    with torch.no_grad():
        expected = vit.forward_features(image)[:, -64:]
        torch.testing.assert_close(network.encode(batch, 64), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network.encode(batch, 40), expected)


def test_ridges_are_bright_lines_of_their_scale() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    line = (-((x - 32) ** 2) / (2 * 2.0**2)).exp()[None, None]

    bright, dark = structure_targets.measure_ridges(line, 2.0), structure_targets.measure_ridges(1 - line, 2.0)
    assert bright[0, 0, 32, 32] > 0.8
    assert bright[0, 0, 32, 10] < 0.01
    assert dark[0, 0, 32, 32] < 0.01
    # A ramp has no ridge but where it is reflected.
    assert structure_targets.measure_ridges((y + x)[None, None] / 128, 1.0)[..., 8:-8, 8:-8].max() < 0.01


def test_the_directions_of_a_token_are_those_of_its_pixels() -> None:
    """Vertical stripes left, horizontal ones right: the groups differ there, and in nothing else."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.where(x < 32, (x * 1.5).sin(), (y * 1.5).sin())[None, None] / 2 + 0.5
    groups = structure_targets.describe_structure(image, 8)
    assert [group.shape for group in groups] == [(1, 64, n) for n in (16, 16, 16, 4, 32, 8)]

    histograms = groups[4].view(8, 8, structure_targets.HISTOGRAM_BINS, 4).mean(-1)
    assert histograms[4, 1].argmax() == 0
    assert histograms[4, 6].argmax() == structure_targets.HISTOGRAM_BINS // 2
    directions = groups[5].view(8, 8, 2, 4).mean(-1)
    assert directions[4, 1, 0] > 0.8
    assert directions[4, 6, 0] < -0.8


def test_a_dark_field_is_black_but_for_its_brightest_part() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 32, 32, generator=draws) * 2 - 1
    darkened = augment.darken_field(images, draws)
    black = (darkened == -1).float().mean((1, 2, 3))
    assert 16 < int((black > 0.25).sum()) < 48
    assert float(black.max()) < 0.95
    assert torch.equal(darkened[:, 0], darkened[:, 1])
