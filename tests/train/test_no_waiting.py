"""A training step asks its device for no number and brings none over unasked.

Meta tensors stand in for a GPU, which CI has not: they have no numbers, so whatever would make the host wait for the
device raises, and whatever mixes host and device tensors raises as well. Noise and the tubes' sums of gradients, which
have kernels of their own on a GPU, are replaced by their shapes.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.data.augment import AugmentConfig, SampleStreams, augment
from hpc_neuro.losses import ClDice, CrossEntropy, Dice, Distill, Focal, SkeletonRecall, sum_losses
from hpc_neuro.models import tubular
from hpc_neuro.models.config import BlockTokens, StudentConfig, TubularTokens
from hpc_neuro.models.student import build_student
from hpc_neuro.models.tubular import torch_impl
from hpc_neuro.train.step_metrics import Meter
from hpc_neuro.train.train_module import TrainModule

DEVICE = torch.device("meta")
SHARES = ("warp", "uneven", "specks", "blur", "coarse", "background", "noise", "stripes", "missing")
LOSSES = [Dice(weight=1), CrossEntropy(weight=1), Focal(weight=1), ClDice(weight=1), SkeletonRecall(weight=1)]


def module(tokens: BlockTokens | TubularTokens, axes: str) -> TrainModule:
    """Student and distiller with their parameters on the device; the distiller's statistics come from the host."""
    student = build_student(StudentConfig(depth=2, tokenizer=tokens))
    numbers = {view: np.ones((1, 192), np.float32) for view in "zyx"}
    distill = Distill(axes=axes, layers=((-1, -1),), views=("z", "y", "x"), taps=5).build(
        student_dim=192,
        student_depth=2,
        teacher_layers=[11],
        mean=numbers,
        std=numbers,
        tube_sum=tubular.tube_sum,
    )
    made = TrainModule(student, distill, sharded=False)
    for part in made.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty_like(value, device=DEVICE)))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(value, device=DEVICE))
    return made


def batch(distilled: bool) -> Batch:
    """Two crops on the device; which are distilled, and their numbers, the host knows."""

    def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(2, *shape, dtype=dtype, device=DEVICE)

    image, mask, skeleton = (on_device(1, 16, 64, 64, dtype=t) for t in (torch.float32, torch.uint8, torch.uint8))
    features = {view: on_device(1, 192, 2, 4, 4) for view in "zyx"}
    return Batch(image, mask, skeleton, features, torch.full((2,), distilled), torch.arange(2))


@pytest.mark.parametrize("tokens", [BlockTokens(), TubularTokens()], ids=["block", "tubular"])
@pytest.mark.parametrize("axes", ["none", "straight", "deformable"])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_step_never_waits_for_the_device(tokens, axes, distilled, monkeypatch):
    def noise(self: SampleStreams, purpose: str, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        return torch.empty(1, *shape, device=device)

    monkeypatch.setattr(SampleStreams, "normal", noise)
    monkeypatch.setattr(tubular, "_exact", lambda x: contextlib.nullcontext())  # meta knows no autocast
    monkeypatch.setattr(torch_impl, "_scatter", lambda *arguments: None)
    net = module(tokens, axes)
    moved = augment(batch(distilled), AugmentConfig(**dict.fromkeys(SHARES, 1.0)), 0)
    logits, distillation, extra = net(dict(vars(moved)))
    loss, terms = sum_losses(LOSSES, StudentOutput(logits, {}), moved)
    (loss + distillation).backward()
    meter = Meter(DEVICE)
    meter.new_step()
    output = {"loss": loss, **terms, **extra}
    meter.add(output, dict.fromkeys(output, 2.0) | dict.fromkeys(extra, 2.0 * distilled))
    meter.end_step(loss.detach(), {"step": 1})
    assert not [name for name, value in net.named_parameters() if value.grad is None]
    assert all(value.device == DEVICE for value in (*terms.values(), *extra.values()))
