"""models/inflate.py: each rule's exact test, the fold to grey, the kernel resize, and whole transfers."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.models import inflate, teacher
from hpc_neuro.models.inflate import RULES, TransferConfig, transfer
from hpc_neuro.models.student import BlockTokens, Student, StudentConfig, TubularTokens, build_student
from hpc_neuro.models.teacher import Teacher, timm
from hpc_neuro.models.translate import fit_config
from hpc_neuro.schema import InputError

FAMILIES = {
    "vit_tiny_patch16_224": "supervised",
    "vit_small_patch8_224.dino": "DINO",
    "vit_base_patch16_224.mae": "MAE",
    "vit_small_patch14_dinov2": "DINOv2",
    "vit_large_patch14_reg4_dinov2": "DINOv2 with registers",
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_tiny_patch16_dinov3_qkvb": "DINOv3 with biases",
}


def make(arch: str = "vit_tiny_patch16_224", **overrides: object) -> Teacher:
    """A shallow teacher whose every parameter is away from its start (layer scale 1e-5 would hide the blocks)."""
    torch.manual_seed(0)
    vit = teacher._create(arch, **{"depth": 2, **overrides})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    card = vit.pretrained_cfg
    return Teacher(vit, {"name": arch, "sha256": "0"}, card["mean"], card["std"])


family = functools.cache(make)


@pytest.fixture(scope="module")
def tiny() -> Teacher:
    return family("vit_tiny_patch16_224")


def student_for(guide: Teacher, **changes: object) -> Student:
    torch.manual_seed(1)
    return build_student(fit_config(StudentConfig(patch=(4, guide.patch, guide.patch), **changes), guide)).eval()


def embedding(guide: Teacher, grey: Tensor) -> Tensor:
    """The teacher's own patch embedding of grey [N, p, p] in [0, 1] -> [N, C]."""
    rgb = torch.stack([(grey - m) / s for m, s in zip(guide.mean, guide.std, strict=True)], dim=1)
    return guide.backbone.patch_embed.proj(rgb)[:, :, 0, 0].detach()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0.05, 2), min_size=3, max_size=3))
def test_grey_fold_is_exact_for_any_normalisation(mean: list[float], std: list[float]) -> None:
    weight, bias = torch.randn(5, 3, 4, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    grey = torch.rand(2, 4, 6, dtype=torch.float64)
    rgb = torch.stack([(grey - m) / s for m, s in zip(mean, std, strict=True)], dim=1)
    kernel, shift = inflate.grey_kernel(weight, bias, tuple(mean), tuple(std))
    expected = F.conv2d(rgb, weight, bias)
    torch.testing.assert_close(F.conv2d(grey[:, None], kernel[:, None], shift), expected)


@pytest.mark.parametrize("size", [(8, 8), (14, 14), (32, 32), (8, 16), (16, 16)])
def test_kernel_resize_is_timms(size: tuple[int, int]) -> None:
    weight = torch.randn(4, 16, 16)
    expected = timm().layers.resample_patch_embed(weight[:, None], list(size))[:, 0]
    torch.testing.assert_close(inflate.resize_kernel(weight, size), expected, atol=1e-4, rtol=1e-4)


def test_a_larger_kernel_embeds_the_enlarged_patch_alike() -> None:
    weight, patch = torch.randn(3, 8, 8), torch.rand(8, 8)
    large = F.interpolate(patch[None, None], size=(16, 16), mode="bicubic", antialias=True)[0, 0]
    found = (inflate.resize_kernel(weight, (16, 16)) * large).sum((1, 2))
    torch.testing.assert_close(found, (weight * patch).sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_flatten_orders() -> None:
    kernel = torch.arange(6.0).view(1, 2, 3)
    assert inflate.flatten_kernel(kernel, "raster")[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert inflate.flatten_kernel(kernel, "boustrophedon")[0].tolist() == [0, 1, 2, 5, 4, 3]


def test_boustrophedon_neighbours_are_neighbours_in_the_patch() -> None:
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


def test_average_gives_a_depth_constant_block_its_2d_embedding(tiny: Teacher) -> None:
    student = student_for(tiny)
    transfer(tiny, student, TransferConfig(rule="average"))
    grey = torch.rand(3, 16, 16)
    tokens = student.tokenizer(grey[:, None, None].expand(-1, 1, 4, -1, -1))
    torch.testing.assert_close(tokens[:, :, 0, 0, 0], embedding(tiny, grey), atol=1e-4, rtol=1e-4)


def test_center_gives_any_block_the_2d_embedding_of_its_centre_slice(tiny: Teacher) -> None:
    student = student_for(tiny)
    transfer(tiny, student, TransferConfig(rule="center"))
    block = torch.rand(3, 1, 4, 16, 16)
    tokens = student.tokenizer(block)
    torch.testing.assert_close(tokens[:, :, 0, 0, 0], embedding(tiny, block[:, 0, 2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["raster", "boustrophedon"])
def test_tubular_gives_a_line_that_holds_the_flattened_patch_its_2d_embedding(
    tiny: Teacher, order: inflate.Order
) -> None:
    proj = tiny.backbone.patch_embed.proj
    kernel, bias = inflate.grey_kernel(proj.weight, proj.bias, tiny.mean, tiny.std)
    grey = torch.rand(3, 16, 16)
    lines = inflate.flatten_kernel(grey, order)
    weight = inflate.tubular(kernel, 256, order)
    for axis in range(3):
        torch.testing.assert_close(lines @ weight[axis].T + bias, embedding(tiny, grey), atol=1e-4, rtol=1e-4)


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
    centre = middle * patch[axis] + patch[axis] // 2
    index: list[object] = list(line)
    index[axis] = slice(centre - taps // 2, centre - taps // 2 + taps)
    volume[tuple(index)] = values
    fine = values.repeat_interleave(256).view(256, taps).mean(1).view(1, 16, 16)
    found = tokens(volume[None, None]).select(2 + axis, middle).flatten()
    torch.testing.assert_close(found, embedding(tiny, fine)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fuse", ["sum", "mean", "concat"])
@pytest.mark.parametrize("block", ["zero", "average", "center"])
def test_deformable_with_zero_offsets_is_tubular_exactly(tiny: Teacher, fuse: str, block: str) -> None:
    found = []
    for deformable in (False, True):
        tokens = TubularTokens(taps=9, deformable=deformable, fuse=fuse)
        student = student_for(tiny, tokenizer=tokens)
        rule = "deformable_tubular" if deformable else "tubular"
        transfer(tiny, student, TransferConfig(rule=rule, block=block))
        found.append(student.tokenizer(torch.rand(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(2))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_block_beside_the_tubes_adds_its_own_embedding(tiny: Teacher) -> None:
    image, found = torch.rand(1, 1, 8, 32, 32), {}
    for block in ("zero", "center"):
        student = student_for(tiny, tokenizer=TubularTokens(taps=9))
        report = transfer(tiny, student, TransferConfig(rule="deformable_tubular", block=block))
        found[block] = student.tokenizer(image)
        own = {n for n in student.state_dict() if n.startswith("tokenizer.")}
        fresh = {n for n in own if "offsets" in n} | ({"tokenizer.block.weight"} if block == "zero" else set())
        assert own - report.kept == fresh == own & report.initial.keys()
        assert "vit.depth_embed" in report.kept
        assert not {n for n in report.kept if n.startswith(("stem.", "decoder."))}
    plain = student_for(tiny)
    transfer(tiny, plain, TransferConfig(rule="center"))
    centre = plain.tokenizer(image) - plain.tokenizer.proj.bias.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(found["center"] - found["zero"], centre, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_rule_is_exact_for_every_family(arch: str) -> None:
    """Width, patch size and normalisation differ; a block, its centre slice or a line holds the teacher's patch."""
    guide = family(arch)
    p = guide.patch
    grey = torch.rand(p, p)
    want = embedding(guide, grey[None])[0]
    any_block = torch.rand(4, p, p)
    any_block[2] = grey
    line = torch.full((4, p, p * (p + 2)), 0.5)  # p + 2 blocks along x; the line fills the middle p of them
    centre = p * ((p + 2) // 2) + p // 2
    line[2, p // 2, centre - p * p // 2 : centre - p * p // 2 + p * p] = grey.flatten()
    block, straight, bending = (
        student_for(guide, depth=1, tokenizer=tokens)
        for tokens in (BlockTokens(), *(TubularTokens(taps=p * p, deformable=d, keep_block=False) for d in (0, 1)))
    )
    for rule, student, volume in (
        ("average", block, grey.expand(4, p, p)),
        ("center", block, any_block),
        ("tubular", straight, line),
        ("deformable_tubular", bending, line),
    ):
        transfer(guide, student, TransferConfig(rule=rule, flatten="raster", blocks=False))
        if volume is line:
            with torch.no_grad():
                student.tokenizer.line_weight[:2] = 0  # the other two lines cross this one
        found = student.tokenizer(volume[None, None])[0, :, 0, 0]
        torch.testing.assert_close(found[:, found.shape[1] // 2], want, atol=2e-4, rtol=2e-4)


def test_a_student_is_fitted_to_what_no_tensor_shows() -> None:
    fitted = fit_config(StudentConfig(depth=1), family("vit_small_patch16_dinov3"))
    assert (fitted.size, fitted.depth, fitted.positions, fitted.norm_eps) == ("small", 1, "rotary", 1e-5)
    assert (fitted.registers, fitted.layer_scale, fitted.class_token) == (4, True, True)
    assert fit_config(StudentConfig(), family("vit_small_patch8_224.dino")).grid == (8, 28, 28)


@pytest.mark.parametrize("patch", [(4, 16, 16), (2, 8, 12)])
def test_a_teacher_of_another_patch_size_is_resized_as_timm_does(patch: tuple[int, int, int]) -> None:
    guide = family("vit_small_patch14_dinov2")
    proj = guide.backbone.patch_embed.proj
    kernel, bias = inflate.grey_kernel(proj.weight, proj.bias, guide.mean, guide.std)
    small = timm().layers.resample_patch_embed(kernel[:, None], list(patch[1:]))
    image = torch.rand(2, 1, *patch[1:])
    student = build_student(fit_config(StudentConfig(patch=patch, depth=1), guide))
    report = transfer(guide, student, TransferConfig(rule="average", blocks=False))
    assert "proj.weight" in str(report)
    found = student.tokenizer(image[:, :, None].expand(-1, -1, patch[0], -1, -1))[:, :, 0, 0, 0]
    torch.testing.assert_close(found, F.conv2d(image, small, bias)[:, :, 0, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_volume_one_token_deep_gives_the_teachers_own_features(arch: str) -> None:
    """Grey fold, positions, prefix tokens, every block and norm at once: exact for each family."""
    guide = family(arch)
    student = student_for(guide)
    report = transfer(guide, student, TransferConfig(rule="center"))
    p = guide.patch
    volume = torch.rand(2, 1, 4, 2 * p, 3 * p)
    found = student(volume, (0, 1)).features
    for layer, expected in enumerate(guide.features(volume[:, 0, 2], (0, 1))):
        torch.testing.assert_close(found[layer][:, :, 0].permute(0, 2, 3, 1), expected, atol=2e-4, rtol=2e-4)
    own = student.state_dict()
    assert set(own) == {*report.copied, *report.resampled, *report.initial}
    assert {n.partition(".")[0] for n in report.initial} == {
        "stem",
        "decoder",
        *["vit"] * (student.cfg.positions == "grid"),
    }
    assert not {n for n in report.initial if n.startswith("vit.")} - {"vit.depth_embed"}


def test_the_report_adds_up(tiny: Teacher) -> None:
    student = student_for(tiny, depth=1, grid=(3, 9, 9))
    report = transfer(tiny, build_student(dataclasses.replace(student.cfg, grid=(3, 9, 9))), TransferConfig())
    text = str(report)
    assert "(rule average)" in text
    assert "vit.pos_embed: from 14 x 14 to 9 x 9 positions" in text
    assert "12 tensors, blocks beyond the student's 1" in text
    total = sum(report.copied.values()) + sum(n for n, _ in report.resampled.values())
    everything = sum(p.numel() for p in student.parameters()) - (14 * 14 - 9 * 9) * 192
    assert total + sum(report.initial.values()) == everything
    assert f"{total / everything:.1%}" in text


def test_scratch_and_patch_kernel_alone_leave_the_rest_as_it_is(tiny: Teacher) -> None:
    student = student_for(tiny)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    report = transfer(tiny, student, TransferConfig(rule="scratch"))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert set(report.initial) == set(before)
    report = transfer(tiny, student, TransferConfig(blocks=False))
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(report.resampled) == {"tokenizer.proj.weight", "tokenizer.proj.bias"}


def test_rotary_may_replace_learnt_positions(tiny: Teacher) -> None:
    student = student_for(tiny, positions="rotary")
    report = transfer(tiny, student, TransferConfig())
    assert report.unused["pos_embed"] == "learnt positions, replaced by rotary ones"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_and_a_tokenizer_that_do_not_fit_name_the_keys(tiny: Teacher, rule: str) -> None:
    wrong = TubularTokens(deformable=rule == "tubular") if rule != "deformable_tubular" else None
    student = student_for(tiny, **({"tokenizer": wrong} if wrong else {}))
    with pytest.raises(InputError, match=rf"transfer\.rule={rule} fills .*student\.tokenizer\.kind="):
        transfer(tiny, student, TransferConfig(rule=rule))


@pytest.mark.parametrize(
    ("arch", "overrides", "changes", "says"),
    [
        ("vit_tiny_patch16_224", {}, {"size": "small"}, r"student\.size=tiny"),
        ("vit_tiny_patch16_224", {}, {"depth": 3}, r"student\.depth=2"),
        ("vit_tiny_patch16_224", {}, {"registers": 1}, r"student\.registers=0"),
        (
            "vit_tiny_patch16_224",
            {},
            {"class_token": False, "norm_eps": 0.1},
            r"class_token=True student\.norm_eps=1e-06",
        ),
        ("vit_small_patch14_reg4_dinov2", {}, {"layer_scale": False}, r"student\.layer_scale=True"),
        ("vit_small_patch16_dinov3", {}, {"positions": "grid"}, r"student\.positions=rotary"),
        ("vit_tiny_patch16_224", {"embed_dim": 200, "num_heads": 4}, {}, "200 wide with 4 heads"),
        ("vit_tiny_patch16_224", {"mlp_ratio": 2}, {}, r"blocks\.0\.mlp\.fc1\.weight is \(384, 192\)"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, {}, r"attn\.q_norm\.weight has no place"),
        (
            "vit_tiny_patch16_224",
            {"class_token": False, "global_pool": "avg"},
            {},
            r"norm\.bias has no source.*fc_norm",
        ),
        ("vit_base_patch16_rope_224", {}, {}, "RotaryEmbeddingCat|Mixed"),
    ],
)
def test_what_does_not_fit_is_named_and_the_student_untouched(
    arch: str, overrides: dict[str, object], changes: dict[str, object], says: str
) -> None:
    guide = make(arch, **overrides)
    sized = (guide.dim, guide.heads) in {(192, 3), (384, 6), (768, 12)}
    cfg = fit_config(StudentConfig(), guide) if sized else StudentConfig()
    student = build_student(dataclasses.replace(cfg, **changes))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(InputError, match=says):
        transfer(guide, student, TransferConfig())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
