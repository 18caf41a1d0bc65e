"""models/inflate.py: the fold to gray, the kernel resize, and each rule's exact test for every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hpc_neuro.core.schema import InputError
from hpc_neuro.models import inflate
from hpc_neuro.models.config import BlockTokens, StudentConfig, TransferConfig, TubularTokens
from hpc_neuro.models.inflate import transfer
from hpc_neuro.models.student import build_student
from hpc_neuro.models.teacher import Teacher, timm
from hpc_neuro.models.tensor_names import fit_config
from tests.helpers.tiny_teachers import FAMILIES, embedding, family, student_for


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0.05, 2), min_size=3, max_size=3))
def test_grey_fold_is_exact_for_any_normalization(mean: list[float], std: list[float]) -> None:
    weight, bias = torch.randn(5, 3, 4, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    gray = torch.rand(2, 4, 6, dtype=torch.float64)
    rgb = torch.stack([(gray - m) / s for m, s in zip(mean, std, strict=True)], dim=1)
    kernel, shift = inflate.gray_kernel(weight, bias, tuple(mean), tuple(std))
    expected = F.conv2d(rgb, weight, bias)
    torch.testing.assert_close(F.conv2d(gray[:, None], kernel[:, None], shift), expected)


@pytest.mark.parametrize("size", [(8, 8), (14, 14), (32, 32), (8, 16), (16, 16)])
def test_kernel_resize_is_timms(size: tuple[int, int]) -> None:
    weight = torch.randn(4, 16, 16)
    expected = timm().layers.resample_patch_embed(weight[:, None], list(size))[:, 0]
    torch.testing.assert_close(inflate.resize_kernel(weight, size), expected, atol=1e-4, rtol=1e-4)


def test_a_larger_kernel_embeds_the_enlarged_patch_alike() -> None:
    weight, patch = torch.randn(3, 8, 8), torch.rand(8, 8)
    large = F.interpolate(patch[None, None], size=(16, 16), mode="bicubic", antialias=True)[0, 0]
    response = (inflate.resize_kernel(weight, (16, 16)) * large).sum((1, 2))
    torch.testing.assert_close(response, (weight * patch).sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_flatten_orders() -> None:
    kernel = torch.arange(6.0).view(1, 2, 3)
    assert inflate.flatten_kernel(kernel, "raster")[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert inflate.flatten_kernel(kernel, "boustrophedon")[0].tolist() == [0, 1, 2, 5, 4, 3]


def test_boustrophedon_neighbors_are_neighbors_in_the_patch() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    path = inflate.flatten_kernel(torch.stack([y, x]), "boustrophedon")
    assert path.diff(dim=1).abs().sum(0).eq(1).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 64))
def test_shortened_lines_stand_for_the_stretched_line(taps: int) -> None:
    line, values = torch.randn(3, 64, dtype=torch.float64), torch.rand(taps, dtype=torch.float64)
    short = inflate.shorten_line(line, taps)
    torch.testing.assert_close(short.sum(1), line.sum(1))  # a constant line gives the same
    fine = values.repeat_interleave(64).view(64, taps).mean(1)  # the line stretched to 64 voxels, by area
    torch.testing.assert_close(short @ values, line @ fine)


def test_more_taps_than_pixels_are_refused() -> None:
    with pytest.raises(InputError, match="at most 64 taps, not 65"):
        inflate.shorten_line(torch.zeros(1, 64), 65)


@pytest.mark.parametrize("order", ["raster", "boustrophedon"])
def test_tubular_gives_a_line_that_holds_the_flattened_patch_its_2d_embedding(
    tiny: Teacher, order: inflate.Order
) -> None:
    proj = tiny.backbone.patch_embed.proj
    kernel, bias = inflate.gray_kernel(proj.weight, proj.bias, tiny.mean, tiny.std)
    gray = torch.rand(3, 16, 16)
    lines = inflate.flatten_kernel(gray, order)
    weight = inflate.tubular(kernel, 256, order)
    for axis in range(3):
        torch.testing.assert_close(lines @ weight[axis].T + bias, embedding(tiny, gray), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("taps", [9, 255, 256])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_tubular_tokenizer_embeds_a_line_of_voxels(tiny: Teacher, axis: int, taps: int) -> None:
    """The token in the middle of a line of `taps` voxels is the 2D embedding of the patch the line stands for."""
    student = student_for(tiny, tokenizer=TubularTokens(taps=taps, deformable=False, keep_block=False))
    transfer(tiny, student, TransferConfig(rule="tubular", flatten="raster"))
    patch, tokens = student.patch, student.tokenizer
    with torch.no_grad():
        tokens.line_weight[[a for a in range(3) if a != axis]] = 0  # the other two lines cross this one
    grid = [1, 1, 1]
    grid[axis] = 256 // patch[axis] + 3
    middle = grid[axis] // 2
    values = torch.rand(taps)
    volume = torch.zeros([g * p for g, p in zip(grid, patch, strict=True)])
    line = [p // 2 for p in patch]
    center = middle * patch[axis] + patch[axis] // 2
    index: list[object] = list(line)
    index[axis] = slice(center - taps // 2, center - taps // 2 + taps)
    volume[tuple(index)] = values
    fine = values.repeat_interleave(256).view(256, taps).mean(1).view(1, 16, 16)
    response = tokens(volume[None, None]).select(2 + axis, middle).flatten()
    torch.testing.assert_close(response, embedding(tiny, fine)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fuse", ["sum", "mean", "concat"])
@pytest.mark.parametrize("block", ["zero", "average", "center"])
def test_deformable_with_zero_offsets_is_tubular_exactly(tiny: Teacher, fuse: str, block: str) -> None:
    outputs = []
    for deformable in (False, True):
        tokens = TubularTokens(taps=9, deformable=deformable, fuse=fuse)
        student = student_for(tiny, tokenizer=tokens)
        rule = "deformable_tubular" if deformable else "tubular"
        transfer(tiny, student, TransferConfig(rule=rule, block=block))
        outputs.append(student.tokenizer(torch.rand(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(2))))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_a_block_beside_the_tubes_adds_its_own_embedding(tiny: Teacher) -> None:
    image, outputs = torch.rand(1, 1, 8, 32, 32), {}
    for block in ("zero", "center"):
        student = student_for(tiny, tokenizer=TubularTokens(taps=9))
        report = transfer(tiny, student, TransferConfig(rule="deformable_tubular", block=block))
        outputs[block] = student.tokenizer(image)
        own = {n for n in student.state_dict() if n.startswith("tokenizer.")}
        fresh = {n for n in own if "offsets" in n} | ({"tokenizer.block.weight"} if block == "zero" else set())
        assert own - report.teacher_tensors == fresh == own & report.initial.keys()
        assert "vit.depth_embed" in report.teacher_tensors
        assert not {n for n in report.teacher_tensors if n.startswith(("encoder.", "decoder."))}
    plain = student_for(tiny)
    transfer(tiny, plain, TransferConfig(rule="center"))
    center = plain.tokenizer(image) - plain.tokenizer.proj.bias.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(outputs["center"] - outputs["zero"], center, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_rule_is_exact_for_every_family(arch: str) -> None:
    """Width, patch size and normalization differ; a block, its center slice or a line holds the teacher's patch."""
    guide = family(arch)
    p = guide.patch
    gray = torch.rand(p, p)
    want = embedding(guide, gray[None])[0]
    any_block = torch.rand(4, p, p)
    any_block[2] = gray
    line = torch.full((4, p, p * (p + 2)), 0.5)  # p + 2 blocks along x; the line fills the middle p of them
    center = p * ((p + 2) // 2) + p // 2
    line[2, p // 2, center - p * p // 2 : center - p * p // 2 + p * p] = gray.flatten()
    block, straight, bending = (
        student_for(guide, depth=1, tokenizer=tokens)
        for tokens in (BlockTokens(), *(TubularTokens(taps=p * p, deformable=d, keep_block=False) for d in (0, 1)))
    )
    for rule, student, volume in (
        ("average", block, gray.expand(4, p, p)),
        ("center", block, any_block),
        ("tubular", straight, line),
        ("deformable_tubular", bending, line),
    ):
        transfer(guide, student, TransferConfig(rule=rule, flatten="raster", blocks=False))
        if volume is line:
            with torch.no_grad():
                student.tokenizer.line_weight[:2] = 0  # the other two lines cross this one
        response = student.tokenizer(volume[None, None])[0, :, 0, 0]
        torch.testing.assert_close(response[:, response.shape[1] // 2], want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("patch", [(4, 16, 16), (2, 8, 12)])
def test_a_teacher_of_another_patch_size_is_resized_as_timm_does(patch: tuple[int, int, int]) -> None:
    guide = family("vit_small_patch14_dinov2")
    proj = guide.backbone.patch_embed.proj
    kernel, bias = inflate.gray_kernel(proj.weight, proj.bias, guide.mean, guide.std)
    small = timm().layers.resample_patch_embed(kernel[:, None], list(patch[1:]))
    image = torch.rand(2, 1, *patch[1:])
    student = build_student(fit_config(StudentConfig(patch=patch, depth=1), guide))
    report = transfer(guide, student, TransferConfig(rule="average", blocks=False))
    assert "proj.weight" in str(report)
    response = student.tokenizer(image[:, :, None].expand(-1, -1, patch[0], -1, -1))[:, :, 0, 0, 0]
    torch.testing.assert_close(response, F.conv2d(image, small, bias)[:, :, 0, 0], atol=1e-4, rtol=1e-4)
