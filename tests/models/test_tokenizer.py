"""Tokenizers: what a token reads, and that every parameter learns."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.tokenizer import BlockTokenizer, TubularTokenizer

PATCH = (2, 4, 6)
SHAPE = (4, 12, 12)


def tubular(**changes: object) -> TubularTokenizer:
    torch.manual_seed(0)
    settings = {"taps": 5, "deformable": True, "keep_block": False, **changes}
    return TubularTokenizer(PATCH, 7, **settings)  # type: ignore[arg-type]


def shaken(module: nn.Module) -> nn.Module:
    """The module with no parameter left at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 1, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_a_block_token_is_a_linear_map_of_its_block() -> None:
    tokens = BlockTokenizer(PATCH, 7)
    output = tokens(image())
    assert output.shape == (2, 7, 2, 3, 2)
    block = image()[1, 0, 2:4, 8:12, 6:12].flatten()
    want = tokens.proj.weight.flatten(1) @ block + tokens.proj.bias
    torch.testing.assert_close(output[1, :, 1, 2, 1], want)


@pytest.mark.parametrize("taps", [1, 5, 31, 256])
def test_a_straight_tubular_token_reads_three_crossing_lines(taps: int) -> None:
    tokens = tubular(taps=taps, deformable=False)
    half = taps // 2
    padded = F.pad(image(), [half, taps] * 3, mode="replicate")[0, 0]
    output = tokens(image())
    z, y, x = 2 + 1 + half, 4 + 2 + half, 0 + 3 + half  # middle voxel of block 1, 1, 0
    lines = (
        padded[z - half : z - half + taps, y, x],
        padded[z, y - half : y - half + taps, x],
        padded[z, y, x - half : x - half + taps],
    )
    want = tokens.bias + sum(w @ line for w, line in zip(tokens.line_weight, lines, strict=True))
    torch.testing.assert_close(output[0, :, 1, 1, 0], want, atol=1e-5, rtol=1e-5)


def test_fusing_by_mean_is_a_third_of_the_sum_and_concat_starts_as_the_sum() -> None:
    outputs = {}
    for how in ("sum", "mean", "concat"):
        outputs[how] = tubular(fuse=how)(image())
    torch.testing.assert_close(outputs["mean"] * 3, outputs["sum"])
    torch.testing.assert_close(outputs["concat"], outputs["sum"])


@pytest.mark.parametrize("keep_block", [False, True])
def test_bends_start_at_zero_so_training_starts_from_straight_tubes(keep_block: bool) -> None:
    bending, straight = tubular(keep_block=keep_block), tubular(keep_block=keep_block, deformable=False)
    state = {k: v for k, v in bending.state_dict().items() if not k.startswith("offsets")}
    straight.load_state_dict(state)
    torch.testing.assert_close(bending(image()), straight(image()), rtol=0, atol=0)
    shaken(bending.offsets)  # type: ignore[arg-type]
    assert not torch.allclose(bending(image()), straight(image()))


def test_a_kept_block_adds_its_convolution() -> None:
    tokens = tubular(keep_block=True)
    block = tokens.block
    assert block is not None
    both = tokens(image())
    tokens.block = None
    torch.testing.assert_close(both - tokens(image()), block(image()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fuse", ["sum", "mean", "concat"])
@pytest.mark.parametrize("deformable", [False, True])
@pytest.mark.parametrize("taps", [1, 5])
def test_every_parameter_gets_a_gradient(fuse: Literal["sum", "mean", "concat"], deformable: bool, taps: int) -> None:
    tokens = tubular(fuse=fuse, deformable=deformable, taps=taps, keep_block=True)
    tokens(image()).square().sum().backward()
    assert [name for name, p in tokens.named_parameters() if p.grad is None] == []
    shaken(tokens)
    tokens.zero_grad()
    tokens(image()).square().sum().backward()
    assert [name for name, p in tokens.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bends_are_bounded_by_the_extent() -> None:
    tokens = tubular(extent=0.5)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.normal_(std=5.0)
    for steps in tokens._steps(image()):
        assert steps.shape == (2, 8, 2, 3, 2)
        assert 0.4 < steps.abs().max() <= 0.5


def test_half_precision_tokens_keep_float32_bends() -> None:
    tokens = tubular(keep_block=True).bfloat16()
    assert tokens._steps(image().bfloat16())[0].dtype == torch.float32
    output = tokens(image().bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), tubular(keep_block=True)(image()), atol=0.03, rtol=0.05)


@pytest.mark.parametrize("shape", [(2, 1, 4, 12, 11), (2, 2, 4, 12, 12), (1, 4, 12, 12), (2, 1, 0, 12, 12)])
def test_images_that_do_not_fit_are_named(shape: tuple[int, ...]) -> None:
    for tokens in (BlockTokenizer(PATCH, 7), tubular()):
        with pytest.raises(InputError, match=r"multiples of the patch \(2, 4, 6\)"):
            tokens(torch.zeros(shape))


def test_impossible_settings_are_named() -> None:
    with pytest.raises(InputError, match="0 taps"):
        tubular(taps=0)
    with pytest.raises(InputError, match="extent 0"):
        tubular(extent=0)
