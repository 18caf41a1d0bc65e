"""models/cost.py: against torch's operation counter and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpc_neuro.models.config import LinearConfig, StudentConfig, TubularTokens, UnetrConfig
from hpc_neuro.models.cost import costs, summary
from hpc_neuro.models.student import build_student

CROP = (16, 64, 64)
CASES = [
    StudentConfig(depth=4),
    StudentConfig(depth=4, decoder=UnetrConfig(), layer_scale=True, registers=4),
    StudentConfig(depth=4, decoder=LinearConfig(), patch=(16, 16, 16)),
    StudentConfig(depth=4, checkpointing=True, patch=(8, 8, 8)),
    StudentConfig(depth=2, tokenizer=TubularTokens(taps=9)),
    StudentConfig(depth=2, tokenizer=TubularTokens(taps=9, deformable=False, fuse="concat", keep_block=False)),
]


@pytest.mark.parametrize("cfg", CASES, ids=lambda c: f"{c.decoder.kind} {c.tokenizer.kind} {c.patch[0]}")
def test_operations_are_torchs(cfg: StudentConfig) -> None:
    found, student = costs(cfg, CROP, 2), build_student(cfg).train()
    # torch's counter does not know the CPU's fused attention; the plain one is two products it counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = student(torch.rand(2, 1, *CROP)).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    assert sum(c.parameters for c in found) == sum(p.numel() for p in student.parameters())
    assert sum(c.forward for c in found) == pytest.approx(forward, rel=0.01)
    assert sum(c.step for c in found) == pytest.approx(counter.get_total_flops(), rel=0.02)


def kept_bytes(student: nn.Module, image: Tensor) -> int:
    """Bytes of the distinct storages autograd holds after a forward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    found: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        student(image)
    return sum(found.values())


@pytest.mark.parametrize("cfg", CASES[:3], ids=lambda c: c.decoder.kind)
def test_kept_memory_is_autograds(cfg: StudentConfig) -> None:
    found = sum(c.kept for c in costs(cfg, CROP, 2))
    assert found == pytest.approx(kept_bytes(build_student(cfg).train(), torch.rand(2, 1, *CROP)), rel=0.05)


def test_checkpointing_saves_the_transformers_memory_for_operations() -> None:
    plain, saving = (costs(StudentConfig(checkpointing=c), CROP, 1)[1] for c in (False, True))
    assert saving.kept < plain.kept / 5
    assert plain.step * 1.2 < saving.step < plain.step * 4 / 3


def test_costs_grow_as_they_should() -> None:
    one, four = (costs(StudentConfig(), CROP, b) for b in (1, 4))
    half = costs(StudentConfig(), CROP, 4, value_bytes=2)
    for a, b, c in zip(one, four, half, strict=True):
        assert (b.parameters, b.forward, b.kept) == (a.parameters, 4 * a.forward, pytest.approx(4 * a.kept))
        assert c.kept == pytest.approx(b.kept / 2)


@pytest.mark.parametrize(
    "tokens",
    [
        TubularTokens(taps=31, keep_block=False),
        TubularTokens(taps=31, keep_block=False, deformable=False),
        TubularTokens(taps=5, fuse="concat"),
    ],
    ids=["bending", "straight", "concat"],
)
def test_what_tubes_cost_is_torchs_and_autograds(tokens: TubularTokens) -> None:
    """Alone, for a tokenizer is a small part of a student."""
    cfg = StudentConfig(depth=1, tokenizer=tokens)
    found, tokenizer, image = costs(cfg, CROP, 2)[0], build_student(cfg).tokenizer, torch.rand(2, 1, *CROP)
    with FlopCounterMode(display=False) as counter:
        out = tokenizer(image)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert (found.forward, found.step) == (forward, counter.get_total_flops())
    assert found.kept == kept_bytes(tokenizer, image)


def test_the_table_is_for_people() -> None:
    lines = summary(StudentConfig(size="base"), (32, 128, 128), 2)
    assert lines[0] == "student base, crop 32 x 128 x 128, batch 2: 4 x 8 x 8 tokens"
    assert [line.split()[0] for line in lines[1:]] == [
        "part",
        "tokenizer",
        "transformer",
        "stem",
        "decoder",
        "total",
        "weights,",
    ]
    total = float(lines[-2].split()[1])
    assert total == pytest.approx(sum(float(line.split()[1]) for line in lines[2:-2]), abs=0.03)
