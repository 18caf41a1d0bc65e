"""Whole transfers: a teacher's own features, the report, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.config import BlockTokens, StudentConfig, TransferConfig, TubularTokens
from hpc_neuro.models.inflate import RULES, find_rule, transfer
from hpc_neuro.models.student import build_student
from hpc_neuro.models.teacher import Teacher, make_untrained_copy
from hpc_neuro.models.tensor_names import fit_config
from tests.helpers.tiny_teachers import FAMILIES, family, make, student_for


def test_a_student_is_fitted_to_what_no_tensor_shows() -> None:
    fitted = fit_config(StudentConfig(depth=1), family("vit_small_patch16_dinov3"))
    assert (fitted.size, fitted.depth, fitted.positions, fitted.norm_eps) == ("small", 1, "rotary", 1e-5)
    assert (fitted.registers, fitted.layer_scale, fitted.class_token) == (4, True, True)
    assert fit_config(StudentConfig(), family("vit_small_patch8_224.dino")).grid == (8, 28, 28)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_volume_one_token_deep_gives_the_teachers_own_features(arch: str) -> None:
    """Grey fold, positions, prefix tokens, every block and norm at once: exact for each family."""
    guide = family(arch)
    student = student_for(guide)
    report = transfer(guide, student, TransferConfig(rule="center"))
    p = guide.patch
    volume = torch.rand(2, 1, 4, 2 * p, 3 * p)
    features = student(volume, (0, 1)).features
    for layer, expected in enumerate(guide.features(volume[:, 0, 2], (0, 1))):
        torch.testing.assert_close(features[layer][:, :, 0].permute(0, 2, 3, 1), expected, atol=2e-4, rtol=2e-4)
    own = student.state_dict()
    assert set(own) == {*report.copied, *report.resampled, *report.initial}
    assert {n.partition(".")[0] for n in report.initial} == {
        "encoder",
        "decoder",
        "to_tokens",
        "from_tokens",
        "token_gain",
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


@pytest.mark.parametrize("tokens", [BlockTokens(), TubularTokens(taps=9, deformable=False), TubularTokens(taps=9)])
def test_an_untrained_copy_is_transferred_by_the_rule_that_fits(tokens: BlockTokens | TubularTokens) -> None:
    guide = family("vit_tiny_patch16_224")
    student, expected = (student_for(guide, tokenizer=tokens) for _ in range(2))

    report = transfer(guide, student, TransferConfig(rule="untrained"))
    rule = find_rule(student)
    transfer(make_untrained_copy(guide), expected, TransferConfig(rule=rule))
    assert "random copy" in report.teacher["name"]
    assert f"(rule untrained, by {rule})" in str(report)

    own, other = student.state_dict(), expected.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    transfer(guide, expected, TransferConfig(rule=rule))
    assert not torch.equal(own["vit.blocks.0.attn.qkv.weight"], other["vit.blocks.0.attn.qkv.weight"])


def test_a_shuffled_teacher_keeps_the_numbers_of_every_tensor_and_nothing_else() -> None:
    guide = family("vit_tiny_patch16_224")
    student, expected = (student_for(guide) for _ in range(2))
    report = transfer(guide, student, TransferConfig(rule="shuffled"))
    transfer(guide, expected, TransferConfig())
    assert "(rule shuffled, by average)" in str(report)

    own, other = student.state_dict(), expected.state_dict()
    kept = [name for name in own if name.startswith("vit.blocks.") and torch.unique(other[name]).numel() > 1]
    assert kept
    for name in kept:
        assert not torch.equal(own[name], other[name])
        assert torch.equal(own[name].flatten().sort().values, other[name].flatten().sort().values)
    assert torch.equal(own["vit.pos_embed"], other["vit.pos_embed"])
