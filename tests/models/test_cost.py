"""models/cost.py: against torch's operation counter and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpc_neuro.models.config import FeatureTubesConfig, StudentConfig, TubularTokens
from hpc_neuro.models.cost import estimate_costs, summarize_costs
from hpc_neuro.models.student import build_student

CROP = (16, 64, 64)
CASES = [
    StudentConfig(depth=4),
    StudentConfig(depth=4, layer_scale=True, registers=4, patch=(4, 8, 8)),
    StudentConfig(transformer=False),
    StudentConfig(depth=4, checkpointing=True, patch=(8, 8, 8)),
    StudentConfig(depth=2, tokenizer=TubularTokens(taps=9)),
    StudentConfig(depth=2, tokenizer=TubularTokens(taps=9, deformable=False, fuse="concat", keep_block=False)),
]
IDS = ["default", "fine tokens", "convolutions", "checkpointing", "tubes", "straight tubes"]


@pytest.mark.parametrize("cfg", CASES, ids=IDS)
def test_operations_are_torchs(cfg: StudentConfig) -> None:
    """A step is three times a forward pass; the image needs no gradient, so that torch counts a little less."""
    costs, student = estimate_costs(cfg, CROP, 2), build_student(cfg).train()
    # Torch's counter does not know the CPU's fused attention; the plain one is two products, which it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = student(torch.rand(2, 1, *CROP)).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    assert costs.total.parameters == sum(p.numel() for p in student.parameters())
    assert costs.total.forward == pytest.approx(forward, rel=0.01)
    assert costs.step == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_tubes_on_features_are_counted() -> None:
    plain, tubes = (estimate_costs(StudentConfig(depth=1, tubes=t), CROP, 1) for t in (None, FeatureTubesConfig()))
    added = tubes.total.forward - plain.total.forward
    positions, width, taps = 8 * 16 * 16, 16, 9
    point, bends, lines = 2 * 2 * 32 * width, 2 * 27 * width * 6 * (taps - 1), 2 * 3 * taps * width * width
    assert added == positions * (point + bends + lines)


def kept_bytes(student: nn.Module, image: Tensor) -> int:
    """Bytes of the distinct storages autograd holds after a forward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    sizes: dict[int, int] = {}
    references = []

    def keep(tensor: Tensor) -> Tensor:
        references.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        student(image)
    return sum(sizes.values())


@pytest.mark.parametrize("cfg", CASES[:3], ids=IDS[:3])
def test_kept_memory_is_autograds(cfg: StudentConfig) -> None:
    estimate = estimate_costs(cfg, CROP, 2).total.kept
    assert estimate == pytest.approx(kept_bytes(build_student(cfg).train(), torch.rand(2, 1, *CROP)), rel=0.05)


def test_checkpointing_saves_the_transformers_memory_for_operations() -> None:
    plain, saving = (estimate_costs(StudentConfig(checkpointing=c, patch=(4, 8, 8)), CROP, 1) for c in (False, True))
    kept = [next(part.kept for part in costs.parts if part.part == "transformer") for costs in (plain, saving)]
    assert kept[1] < kept[0] / 5
    assert plain.step < saving.step < plain.step * 4 / 3


def test_costs_grow_as_they_should() -> None:
    one, four = (estimate_costs(StudentConfig(), CROP, b).parts for b in (1, 4))
    half = estimate_costs(StudentConfig(), CROP, 4, value_bytes=2).parts
    for a, b, c in zip(one, four, half, strict=True):
        assert (b.parameters, b.forward) == (a.parameters, 4 * a.forward)
        assert b.kept == pytest.approx(4 * a.kept, rel=0.01)
        assert c.kept == pytest.approx(b.kept / 2)


def test_the_table_is_for_people() -> None:
    lines = summarize_costs(StudentConfig(size="base"), (32, 128, 128), 2)
    assert lines[0] == "student base, crop 32 x 128 x 128, batch 2: 4 x 8 x 8 tokens"
    assert [line.split()[0] for line in lines[1:]] == [
        "part",
        "encoder",
        "tokenizer",
        "transformer",
        "decoder",
        "total",
        "a",
        "weights,",
    ]
    total = float(lines[6].split()[1])
    assert total == pytest.approx(sum(float(line.split()[1]) for line in lines[2:6]), abs=0.03)
