"""models/vit3d.py: timm's numbers on one slice, and the properties of what is new in 3D."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_neuro.models.teacher import timm
from hpc_neuro.models.vit3d import DropPath, TransformerBlock, ViT3D, grid_positions, resample_plane, rotary, rotate


def _noisy(vit: ViT3D) -> ViT3D:
    """Parameters away from their start, so that zeros and small layer scales hide nothing."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


@pytest.mark.parametrize("size", [(14, 14), (8, 8), (3, 20)])
def test_plane_positions_are_resampled_as_timm_does(size: tuple[int, int]) -> None:
    plane = torch.randn(1, 14, 14, 8)
    expected = timm().layers.resample_abs_pos_embed(plane.flatten(1, 2), list(size), num_prefix_tokens=0)
    torch.testing.assert_close(resample_plane(plane, size).flatten(1, 2), expected.view(1, size[0] * size[1], 8))


def test_positions_are_shared_over_depth_and_depth_shifts_a_whole_slice() -> None:
    plane, depth = torch.randn(1, 4, 5, 6), torch.randn(1, 3, 6)
    table = grid_positions(plane, depth, (3, 4, 5)).view(3, 4, 5, 6)
    torch.testing.assert_close(table, plane + depth[0, :, None, None])
    assert grid_positions(plane, depth, (7, 2, 9)).shape == (1, 7 * 2 * 9, 6)


@pytest.mark.parametrize("grid", [(8, 8), (3, 7)])
def test_rotary_on_one_slice_is_dinov3s(grid: tuple[int, int]) -> None:
    rope = timm().create_model("vit_small_patch16_dinov3", num_classes=0, depth=1).rope
    sine, cosine = rope.get_embed(list(grid)).chunk(2, dim=-1)
    torch.testing.assert_close(rotary((1, *grid), 64), torch.stack([sine, cosine]))
    x = torch.randn(2, 3, grid[0] * grid[1] + 2, 64)
    expected = timm().layers.apply_rot_embed_cat(x[:, :, 2:], torch.cat([sine, cosine], -1), half=True)
    torch.testing.assert_close(rotate(x, rotary((1, *grid), 64)), torch.cat([x[:, :, :2], expected], dim=2))


@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.data())
def test_rotated_products_depend_on_the_displacement_alone(shape: tuple[int, int, int], data: st.DataObject) -> None:
    """Equal displacements anywhere in the grid give equal query-key products."""
    query, key = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = rotary(shape, 32)

    def turn(vector: Tensor) -> Tensor:
        n = rotation.shape[1]
        return rotate(vector.expand(1, 1, n, 32), rotation)[0, 0].double().view(*shape, 32)

    q, k = turn(query), turn(key)
    by = [data.draw(st.integers(0, n - 1)) for n in shape]
    start = tuple(slice(0, n - d) for n, d in zip(shape, by, strict=True))
    stop = tuple(slice(d, n) for n, d in zip(shape, by, strict=True))
    products = (q[start] * k[stop]).sum(-1)
    torch.testing.assert_close(products, products.flatten()[0].expand_as(products), atol=1e-4, rtol=0)


def test_a_step_in_depth_turns_as_one_in_the_plane_however_deep_the_grid() -> None:
    (shallow, deep), phases = (rotary((z, 6, 5), 32) for z in (2, 4)), slice(0, 16)
    turn = [torch.atan2(r[0, 30:, phases], r[1, 30:, phases]) - torch.atan2(r[0, :-30, phases], r[1, :-30, phases])
            for r in (shallow, deep)]  # fmt: skip
    torch.testing.assert_close(turn[0][:1].cos().expand(90, -1), turn[1].cos(), atol=1e-5, rtol=0)
    row = rotary((1, 6, 5), 32)  # y, the longer axis: the same angle a step, half of the pairs
    step = torch.atan2(row[0, 5, :8], row[1, 5, :8]) - torch.atan2(row[0, 0, :8], row[1, 0, :8])
    torch.testing.assert_close(turn[0][0, :8].cos(), step.cos(), atol=1e-5, rtol=0)
    fastest = torch.stack([turn[0][0, 0], turn[0][0, 8]])  # of y and of x: a third of a turn, in opposite directions
    torch.testing.assert_close(fastest.sin(), torch.tensor([1.0, -1.0]) * math.sin(2 * math.pi / 3), atol=1e-5, rtol=0)


def test_no_two_displacements_look_alike() -> None:
    rotation = rotary((5, 5, 5), 64)
    phases = torch.cat([rotation[0], rotation[1]], dim=-1)  # [125, 128]
    apart = torch.cdist(phases, phases) + 10 * torch.eye(125)
    assert apart.min() > 0.1


@pytest.mark.parametrize("positions", ["grid", "rotary"])
def test_checkpointing_changes_memory_not_numbers(positions: str) -> None:
    torch.manual_seed(0)
    plain = _noisy(ViT3D(32, 3, 2, registers=2, positions=positions, layer_scale=True))
    saving = ViT3D(32, 3, 2, registers=2, positions=positions, layer_scale=True, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    tokens = torch.randn(2, 32, 2, 3, 4)
    outputs = []
    for vit in (plain, saving):
        last, maps = vit(tokens, (1,))
        (last.square().sum() + maps[1].sum()).backward()
        outputs.append([last, maps[1], *[p.grad for p in vit.parameters()]])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_every_parameter_gets_a_gradient() -> None:
    vit = _noisy(ViT3D(32, 2, 2, registers=3, layer_scale=True))
    vit(torch.randn(1, 32, 3, 2, 2))[0].square().sum().backward()
    assert not [name for name, p in vit.named_parameters() if p.grad is None or not p.grad.any()]


def test_layers_are_the_depths_asked_for() -> None:
    vit = _noisy(ViT3D(32, 3, 2)).eval()
    tokens = torch.randn(2, 32, 2, 3, 4)
    last, maps = vit(tokens, (2, 0))
    assert set(maps) == {0, 2}
    torch.testing.assert_close(maps[2], last)
    shorter = ViT3D(32, 1, 2).eval()
    shorter.load_state_dict({k: v for k, v in vit.state_dict().items() if not k.startswith(("blocks.1", "blocks.2"))})
    torch.testing.assert_close(shorter(tokens)[0], maps[0])


def test_samples_of_a_batch_do_not_meet() -> None:
    vit = _noisy(ViT3D(32, 2, 2)).eval()
    tokens = torch.randn(3, 32, 2, 2, 2)
    torch.testing.assert_close(vit(tokens)[0][1:2], vit(tokens[1:2])[0])


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    kept = drop(torch.ones(4000, 3))
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert (kept == kept[:, :1]).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(torch.ones(2, 3)).eq(1).all()
    block, x = TransformerBlock(8, 2, 1e-6, False, 0.5), torch.randn(64, 3, 8)
    unchanged = (block(x, None) == x).flatten(1).all(1)
    assert 4 < unchanged.sum() < 32  # one in four drops both branches
    assert [b.drop_path.rate for b in ViT3D(32, 3, 2, drop_path=0.2).blocks] == pytest.approx([0, 0.1, 0.2])
