"""Learning rates are functions of the step and of a parameter's name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hpc_neuro.train.config import OptimConfig
from hpc_neuro.train.optim import group_parameters, lr_at, lr_scale


@given(st.integers(2, 500), st.floats(0, 0.9), st.floats(0, 1))
def test_the_rate_rises_then_falls_to_its_end(steps, warmup, final):
    cfg = OptimConfig(steps=steps, warmup=warmup)
    rates = [lr_at(s, cfg, final) for s in range(steps)]
    top = rates.index(max(rates))
    assert all(0 <= r <= 1 for r in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert top <= warmup * steps + 1
    assert rates[0] > 0 or final == 0
    if steps - 1 - warmup * steps >= 1:
        assert rates[-1] == pytest.approx(final, abs=1e-9)


def test_known_values():
    cfg = OptimConfig(steps=101, warmup=0.0)
    assert [lr_at(s, cfg, 0.1) for s in (0, 50, 100, 200)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert lr_at(0, OptimConfig(steps=100, warmup=0.1)) == pytest.approx(1 / 11)


def test_transferred_blocks_learn_slower_the_deeper_they_lie():
    cfg = OptimConfig(vit_lr=0.5, layer_decay=0.8)
    names = {
        "student.vit.norm.weight": 0.5,
        "student.vit.blocks.11.attn.qkv.weight": 0.5,
        "student.vit.blocks.10.mlp.fc1.bias": 0.5 * 0.8,
        "student.vit.blocks.0.norm1.weight": 0.5 * 0.8**11,
        "student.vit.cls_token": 0.5 * 0.8**12,
        "student.tokenizer.proj.weight": 0.5 * 0.8**12,
    }
    assert {n: lr_scale(n, cfg, 12) for n in names} == pytest.approx(names)
    fresh = ["student.encoder.first.weight", "student.tokenizer.offsets.0.weight", "distiller.heads.z_0.weight"]
    named = [(n, nn.Parameter(torch.zeros(1))) for n in (*names, *fresh)]
    scales = {n: lr_scale(n, cfg, 12) for n in names}
    scale_of = {n: g.lr_scale for g in group_parameters(named, cfg.weight_decay, scales) for n in g.names}
    assert scale_of == pytest.approx({**names, **dict.fromkeys(fresh, 1.0)})


def test_every_trainable_parameter_is_in_one_group_and_vectors_do_not_decay():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    module[2].bias.requires_grad_(False)
    groups = group_parameters(module.named_parameters(), 0.1, {})
    assert sorted(n for g in groups for n in g.names) == ["0.bias", "0.weight", "1.bias", "1.weight", "2.weight"]
    assert {n: g.weight_decay for g in groups for n in g.names} == {
        **dict.fromkeys(["0.weight", "2.weight"], 0.1),
        **dict.fromkeys(["0.bias", "1.weight", "1.bias"], 0.0),
    }
    assert {g.lr_scale for g in groups} == {1.0}
