"""Segmentation losses against MONAI's, on rare foreground, and with voxels that nobody labelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.losses import (
    ClDice,
    CrossEntropy,
    Dice,
    Focal,
    Loss,
    SkeletonRecall,
    segmentation,
    sum_losses,
)
from hpc_neuro.losses.segmentation import soft_skeletonize

SHAPE = (2, 1, 9, 14, 12)
EVERY: list[Any] = [CrossEntropy(), CrossEntropy(foreground=5.0), Dice(), Focal(), Focal(gamma=0.5, alpha=0.75)]
EVERY += [ClDice(iterations=3), SkeletonRecall()]


def batch(mask: Tensor, skeleton: Tensor | None = None) -> Batch:
    count = len(mask)
    return Batch(
        image=torch.zeros(mask.shape),
        mask=mask.to(torch.uint8),
        skeleton=(mask == 1).to(torch.uint8) if skeleton is None else skeleton.to(torch.uint8),
        features={},
        distilled=torch.zeros(count, dtype=torch.bool),
        index=torch.arange(count),
    )


def tube(shape: tuple[int, ...] = SHAPE, radius: float = 2.5) -> Tensor:
    """A thick neurite along x in every sample."""
    z, y = torch.meshgrid(torch.arange(shape[2]), torch.arange(shape[3]), indexing="ij")
    disc = (z - shape[2] // 2) ** 2 + (y - shape[3] // 2) ** 2 <= radius**2
    return disc[None, None, :, :, None].expand(shape).float()


def logits(seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def monai_losses() -> Any:
    import monai.losses

    return monai.losses


@pytest.mark.slow
def test_dice_focal_and_cldice_equal_monais(monai_losses: Any) -> None:
    """One test for all, for MONAI takes seconds to import."""
    truth, given = tube(), logits() + 4 * tube() - 2
    oracles: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (Dice(smooth=1.0), monai_losses.DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)),
        (Dice(smooth=1e-3), monai_losses.DiceLoss(sigmoid=True, smooth_nr=1e-3, smooth_dr=1e-3)),
        (Focal(gamma=2.0), monai_losses.FocalLoss(gamma=2.0)),
        (Focal(gamma=1.5, alpha=0.8), monai_losses.FocalLoss(gamma=1.5, alpha=0.8)),
        *[(ClDice(iterations=n), monai_losses.SoftclDiceLoss(iter_=n, sigmoid=True, smooth=1e-9)) for n in (1, 3, 6)],
    ]
    for ours, reference in oracles:
        a, b = given.clone().requires_grad_(), given.clone().requires_grad_()
        value, want = ours(a, batch(truth)), reference(b, truth)
        torch.testing.assert_close(value, want, atol=2e-5, rtol=1e-4, msg=lambda m, o=ours: f"{o}: {m}")
        value.backward()
        want.backward()
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3, msg=lambda m, o=ours: f"{o}: {m}")
    torch.testing.assert_close(soft_skeletonize(truth, 4), monai_losses.cldice.soft_skel(truth, 4))


def test_cross_entropy_is_torchs_mean_and_weighs_the_foreground() -> None:
    truth, given = tube(), logits()
    want = F.binary_cross_entropy_with_logits(given, truth)
    torch.testing.assert_close(CrossEntropy()(given, batch(truth)), want)
    torch.testing.assert_close(Focal(gamma=0.0)(given, batch(truth)), want)
    weighed = F.binary_cross_entropy_with_logits(given, truth, weight=1 + 4 * truth, reduction="sum")
    torch.testing.assert_close(CrossEntropy(foreground=5.0)(given, batch(truth)), weighed / (1 + 4 * truth).sum())


def test_skeleton_recall_asks_only_for_the_centerline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "_SMOOTH", 1e-6)
    line = tube(radius=0.5)
    loss = SkeletonRecall()
    assert float(loss(40 * line - 20, batch(tube(), line))) == pytest.approx(0, abs=1e-5)
    assert float(loss(40 * tube() - 20, batch(tube(), line))) == pytest.approx(0, abs=1e-5)
    assert float(loss(torch.full(SHAPE, -20.0), batch(tube(), line))) == pytest.approx(1, abs=1e-5)
    half = 40 * line - 20
    half[..., : SHAPE[-1] // 2] = -20
    assert float(loss(half, batch(tube(), line))) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    "loss",
    [CrossEntropy(foreground=3.0), Focal(alpha=0.8), Dice(), ClDice(iterations=2), SkeletonRecall()],
    ids=lambda v: v.kind,
)
def test_a_sample_weighs_the_same_whatever_shares_its_pass(loss: Any) -> None:
    """A thin neurite as much as a thick one, a crop that is half unlabelled as much as a whole one."""
    mask = torch.cat([tube(radius=0.5)[:1], tube()[1:]])
    mask[0, ..., : SHAPE[-1] // 2] = 255
    given = logits() + 4 * (mask == 1)
    each = [loss(given[i : i + 1], batch(mask[i : i + 1])) for i in (0, 1)]
    torch.testing.assert_close(loss(given, batch(mask)), (each[0] + each[1]) / 2)


@pytest.mark.parametrize("loss", [Dice(), ClDice(iterations=4), SkeletonRecall()], ids=lambda v: v.kind)
def test_overlap_losses_run_from_zero_for_right_to_one_for_wrong(loss: Any) -> None:
    truth = tube()
    assert 0 <= float(loss(60 * truth - 30, batch(truth))) < 0.01
    assert 0.9 < float(loss(30 - 60 * truth, batch(truth))) <= 1


def test_the_iterations_of_cldice_act() -> None:
    """A neurite of radius 4 is not a line after one erosion."""
    thick = tube((1, 1, 13, 13, 24), radius=4.5)
    sizes = [float(soft_skeletonize(thick, n).sum()) for n in (1, 2, 4, 8)]
    assert sizes[0] == 0  # an opening by one voxel removes nothing of it yet
    assert 0 < sizes[2] <= sizes[3] < 0.1 * float(thick.sum())
    given = logits()
    values = {n: float(ClDice(iterations=n)(given, batch(tube()))) for n in (1, 3)}
    assert values[1] != values[3]


@pytest.mark.parametrize("share", [0.0, 0.003, 1.0])
@pytest.mark.parametrize("size", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("loss", EVERY, ids=lambda v: v.kind)
def test_gradients_are_finite_at_any_share_of_foreground(loss: Any, share: float, size: float) -> None:
    truth = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < share).float()
    given = logits(scale=size).requires_grad_()
    value = loss(given, batch(truth))
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert given.grad is not None
    assert given.grad.isfinite().all()


@pytest.mark.parametrize("loss", [v for v in EVERY if v.kind != "skeleton_recall"], ids=lambda v: v.kind)
def test_rare_foreground_is_pulled_up(loss: Any) -> None:
    """At 0.3 % foreground a step along the gradient raises the neurite relative to the background."""
    truth = torch.zeros(SHAPE)
    truth[..., 4, 6, 2:10] = 1
    given = torch.full(SHAPE, -2.0).add_(0.01 * logits()).requires_grad_()
    loss(given, batch(truth)).backward()
    assert given.grad is not None
    pull = -given.grad
    assert pull[truth == 1].mean() > pull[truth == 0].mean()
    assert pull[truth == 1].mean() > 0


@pytest.mark.parametrize("loss", EVERY, ids=lambda v: v.kind)
def test_unlabelled_voxels_carry_no_weight(loss: Any) -> None:
    mask = tube().to(torch.uint8)
    unknown = torch.zeros(SHAPE, dtype=torch.bool)
    unknown[..., 7:] = True
    marked = mask.masked_fill(unknown, 255)
    values, grads = [], []
    for fill in (-9.0, 9.0):
        given = logits().masked_fill(unknown, fill).requires_grad_()
        value = loss(given, batch(marked, tube()))
        value.backward()
        values.append(value)
        grads.append(given.grad)
    torch.testing.assert_close(values[0], values[1])
    for grad in grads:
        assert not grad[unknown].any()
        assert grad[~unknown].any()
    nothing = loss(logits(), batch(torch.full(SHAPE, 255), torch.zeros(SHAPE)))
    assert float(nothing) == pytest.approx(0)


def test_unlabelled_means_like_cut_away_for_sums() -> None:
    mask = tube().to(torch.uint8)
    marked = mask.clone()
    marked[..., 7:] = 255
    for loss in (CrossEntropy(), Dice(), Focal(), SkeletonRecall()):
        cut = loss(logits()[..., :7], batch(mask[..., :7]))
        torch.testing.assert_close(loss(logits(), batch(marked, mask)), cut)


@pytest.mark.parametrize("loss", EVERY, ids=lambda v: v.kind)
def test_sums_run_in_float32_whatever_the_logits(loss: Any) -> None:
    """70000 foreground voxels overflow float16 and stall a bf16 sum at 256."""
    truth = torch.ones(1, 1, 40, 44, 40)
    given = torch.full(truth.shape, 0.5)
    value = loss(given.bfloat16(), batch(truth))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(given, batch(truth)))


@pytest.mark.parametrize("loss", EVERY, ids=lambda v: v.kind)
def test_a_wrong_shape_is_named(loss: Any) -> None:
    with pytest.raises(InputError, match="want one shape"):
        loss(logits()[..., 1:], batch(tube()))


def test_a_skeleton_of_another_shape_is_named() -> None:
    with pytest.raises(InputError, match="the skeleton is"):
        SkeletonRecall()(logits(), batch(tube(), tube()[..., 1:]))


def test_weighted_sum_adds_and_names() -> None:
    given = logits().requires_grad_()
    prediction, truth = StudentOutput(given, {}), batch(tube())
    losses: list[Any] = [Dice(weight=0.5), CrossEntropy(), Dice(weight=2.0, smooth=9.0)]
    total, terms = sum_losses(losses, prediction, truth)
    assert list(terms) == ["dice", "cross_entropy", "dice_2"]
    assert not any(t.requires_grad for t in terms.values())
    want = 0.5 * terms["dice"] + terms["cross_entropy"] + 2 * terms["dice_2"]
    torch.testing.assert_close(total.detach(), want)


def test_no_losses_are_a_zero_that_reaches_the_logits() -> None:
    given = logits().requires_grad_()
    total, terms = sum_losses([], StudentOutput(given, {}), batch(tube()))
    total.backward()
    assert float(total.detach()) == 0
    assert terms == {}
    assert given.grad is not None
    assert not given.grad.any()


def test_losses_are_told_apart_by_kind() -> None:
    adapter = TypeAdapter(list[Loss])
    losses = adapter.validate_python([{"kind": "dice"}, {"kind": "cldice", "iterations": 2}, {"kind": "focal"}])
    assert [type(v) for v in losses] == [Dice, ClDice, Focal]
    for bad in ({"kind": "dicee"}, {"kind": "dice", "weight": -1}, {"kind": "cldice", "iterations": 0}):
        with pytest.raises(ValidationError):
            adapter.validate_python([bad])
