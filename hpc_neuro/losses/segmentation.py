"""Segmentation losses. Foreground only, float32 sums, one value per sample; voxels without a label carry no weight.

Each loss is its own config class. torch is imported inside the functions, so that a config with losses is read without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.schema import InputError, config

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_neuro.core.types import Batch, StudentOutput

_SMOOTH = 1.0
"""[voxel] Added to both sides of the ratios of overlap losses without a `smooth` of their own."""


@config
class CrossEntropy:
    """Binary cross entropy, mean over the labeled voxels of a sample, per sample.

    A mean over the labeled voxels of a pass would depend on which samples share it, hence on the number of ranks.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: float = Field(default=1.0, ge=0)
    """Factor of this loss in the total."""
    foreground: float = Field(default=1.0, gt=0)
    """Weight of a neurite voxel relative to a background voxel; 1 leaves the rare neurites to Dice."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, 1, Z, Y, X] -> scalar >= 0."""
        import torch.nn.functional as F

        truth, labeled = _split_mask(logits, batch.mask)
        loss = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
        weight = labeled * (1 + (self.foreground - 1) * truth)

        # A crop without any label must not divide by zero.
        return (_sum_per_sample(loss * weight) / _sum_per_sample(weight).clamp(min=1)).mean()


@config
class Dice:
    """One minus soft Dice, per sample so that a thin neurite weighs as much as a thick one."""

    kind: Literal["dice"] = "dice"
    weight: float = Field(default=1.0, ge=0)
    """Factor of this loss in the total."""
    smooth: float = Field(default=1.0, gt=0)
    """[voxel] Added to both sides of the ratio; an empty crop predicted empty then scores zero loss."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, 1, Z, Y, X] -> scalar in [0, 1]."""
        truth, labeled = _split_mask(logits, batch.mask)
        prob = logits.float().sigmoid() * labeled

        # Each crop has a ratio of its own: a pooled one would let thick neurites decide.
        overlap = 2 * _sum_per_sample(prob * truth) + self.smooth  # [B]
        return (1 - overlap / (_sum_per_sample(prob) + _sum_per_sample(truth) + self.smooth)).mean()


@config
class Focal:
    """Cross entropy times (1 - probability of the true class)^gamma (Lin et al., ICCV 2017, eq. 4 and 5)."""

    kind: Literal["focal"] = "focal"
    weight: float = Field(default=1.0, ge=0)
    """Factor of this loss in the total."""
    gamma: float = Field(default=2.0, ge=0)
    """How fast easy voxels lose weight; 0 is cross entropy."""
    alpha: float | None = Field(default=None, gt=0, lt=1)
    """Weight of neurite voxels, background gets 1 - alpha; none: both weigh 1."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, 1, Z, Y, X] -> scalar >= 0, mean over the labeled voxels of each sample."""
        import torch
        import torch.nn.functional as F

        truth, labeled = _split_mask(logits, batch.mask)

        # Positive where the class is right.
        signed = logits.float() * (2 * truth - 1)

        # (1 - p)^gamma = exp(gamma * log sigmoid(-signed)): gradients stay finite where 1 - p underflows
        loss = -F.logsigmoid(signed) * torch.exp(self.gamma * F.logsigmoid(-signed))
        if self.alpha is not None:
            loss = loss * (truth * self.alpha + (1 - truth) * (1 - self.alpha))

        return (_sum_per_sample(loss * labeled) / _sum_per_sample(labeled).clamp(min=1)).mean()


@config
class ClDice:
    """One minus centerline Dice of soft skeletons (Shit et al., CVPR 2021, algorithms 1 and 2), per sample."""

    kind: Literal["cldice"] = "cldice"
    weight: float = Field(default=1.0, ge=0)
    """Factor of this loss in the total."""
    iterations: int = Field(default=5, ge=1)
    """[voxel] Erosions until only the centerline is left: at least the largest neurite radius in a crop."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, 1, Z, Y, X] -> scalar in [0, 1]."""
        import torch

        # Unlabeled voxels become background before anything is skeletonized, so that no gradient reaches them.
        truth, labeled = _split_mask(logits, batch.mask)
        prob = logits.float().sigmoid() * labeled

        # The truth has nothing to learn, so its skeleton needs no graph.
        with torch.no_grad():
            true_line = soft_skeletonize(truth, self.iterations)
        line = soft_skeletonize(prob, self.iterations)

        # Without the smoothing term an empty crop would divide zero by zero.
        precision = (_sum_per_sample(line * truth) + _SMOOTH) / (_sum_per_sample(line) + _SMOOTH)  # [B]
        recall = (_sum_per_sample(true_line * prob) + _SMOOTH) / (_sum_per_sample(true_line) + _SMOOTH)  # [B]
        return (1 - 2 * precision * recall / (precision + recall)).mean()


@config
class SkeletonRecall:
    """One minus the soft recall of the tubed true centerline (Kirchhoff et al., ECCV 2024), per sample.

    The centerline comes with the batch; nothing is skeletonized here. A crop without a centerline scores zero loss.
    """

    kind: Literal["skeleton_recall"] = "skeleton_recall"
    weight: float = Field(default=1.0, ge=0)
    """Factor of this loss in the total."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, 1, Z, Y, X] -> scalar in [0, 1]."""
        _, labeled = _split_mask(logits, batch.mask)
        if batch.skeleton.shape != logits.shape:
            raise InputError(
                f"the skeleton is {tuple(batch.skeleton.shape)}, the logits are {tuple(logits.shape)}; want one shape"
            )

        # An unlabeled part of the line can be neither hit nor missed.
        line = (batch.skeleton > 0) * labeled
        hits = _sum_per_sample(logits.float().sigmoid() * line)
        return (1 - (hits + _SMOOTH) / (_sum_per_sample(line) + _SMOOTH)).mean()


Loss = Annotated[CrossEntropy | Dice | Focal | ClDice | SkeletonRecall, Field(discriminator="kind")]
"""Any segmentation loss, selected by `kind`."""


def sum_losses(losses: Sequence[Loss], prediction: StudentOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of weight times loss, float32, and each loss by its kind (unweighted, detached).

    A second loss of one kind is named `dice_2`. Without losses the total is a zero that still reaches every parameter
    behind the logits, so that a run that only distils is a valid distributed run.
    """
    import torch

    total = prediction.logits.new_zeros((), dtype=torch.float32) if losses else prediction.logits.float().sum() * 0
    terms: dict[str, Tensor] = {}
    for loss in losses:
        value = loss(prediction.logits, batch)
        total = total + loss.weight * value

        count = sum(name == loss.kind or name.startswith(f"{loss.kind}_") for name in terms)
        terms[loss.kind if count == 0 else f"{loss.kind}_{count + 1}"] = value.detach()
    return total, terms


def soft_skeletonize(image: Tensor, iterations: int) -> Tensor:
    """The differentiable skeleton of [B, 1, Z, Y, X] in [0, 1], by erosions and openings (clDice, algorithm 1)."""
    import torch.nn.functional as F

    eroded = _erode(image)
    line = F.relu(image - _dilate(eroded))
    for _ in range(iterations):
        image, eroded = eroded, _erode(eroded)

        # The rest is what an opening removes.
        rest = F.relu(image - _dilate(eroded))

        # What is on the line already is not added again, so that values stay within 1.
        line = line + F.relu(rest - line * rest)
    return line


def _erode(image: Tensor) -> Tensor:
    """The minimum over a voxel and its six face neighbors."""
    import torch
    import torch.nn.functional as F

    # Torch pools by maximum only, and the minimum is that of the negative.
    z, y, x = (-F.max_pool3d(-image, size, 1, pad) for size, pad in _LINES)
    return torch.minimum(torch.minimum(z, y), x)


def _dilate(image: Tensor) -> Tensor:
    """The maximum over a voxel and its 26 neighbors, taken one axis at a time."""
    import torch.nn.functional as F

    # Three lines are cheaper than one cube, and give the same maximum.
    for size, pad in _LINES:
        image = F.max_pool3d(image, size, 1, pad)
    return image


_LINES = [((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1))]
"""(kernel size, padding) of a line of three voxels along each axis."""


def _split_mask(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Truth (1 on neurite) and labeled (1 where a label exists), both float32 [B, 1, Z, Y, X]. Raises InputError."""
    if logits.shape != mask.shape:
        raise InputError(
            f"the mask is {tuple(mask.shape)}, the logits are {tuple(logits.shape)}; want one shape [B, 1, Z, Y, X]"
        )

    # Unlabeled voxels are no background: they must not count as true negatives.
    labeled = mask != UNLABELED
    return ((mask > 0) & labeled).float(), labeled.float()


def _sum_per_sample(values: Tensor) -> Tensor:
    """float32 sum over each sample, [B]."""
    return values.float().flatten(1).sum(1)
