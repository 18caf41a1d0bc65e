"""Deformable tubular distillation: the student's tokens along curved tubes learn the teacher's along the same tubes.

The equations are this project's own; no paper gives them. For student tokens S, cached teacher tokens T_v of view v,
the tube P^a(p) along axis a through token p, window w, head g_v and the teacher's per-channel normalization n:

    s_a(p) = sum_k w_k S(P^a_k(p))        t_{v,a}(p) = sum_k w_k T_v(P^a_k(p))
    L = mean over v, a, p of m(p) * [ c * (1 - cos(g_v(s_a), n(t_{v,a}))) + (1 - c) * smooth_l1(g_v(s_a), n(t_{v,a})) ]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array, Batch, copy_to_device
from hpc_neuro.losses.config import Distill


class TubeSum(Protocol):
    """`hpc_neuro.models.tubular.tube_sum`; passed in by the caller because losses do not import models."""

    def __call__(self, x: Tensor, offsets: Tensor, window: Tensor, axis: int) -> Tensor:
        """x [B, C, z, y, x], offsets [B, 2*(K-1), z, y, x], window [K] -> [B, C, z, y, x]."""


@dataclass(frozen=True)
class _PairTerms:
    """Terms of one pair of student block and teacher layer; all scalars."""

    distances: list[Tensor]  # per axis and view
    cosines: dict[str, list[Tensor]]  # view -> per axis, detached
    roughness: Tensor | None  # None without tubes
    bend: Tensor | None  # [token per step], detached


class Distiller(nn.Module):
    """Heads, tubes and the distillation loss. Its parameters train with the student and are dropped afterwards.

    `student_layers`: blocks whose tokens `forward` needs; `views`: views whose teacher features it needs.
    """

    def __init__(
        self,
        cfg: Distill,
        student_dim: int,
        pairs: Sequence[tuple[int, int]],
        statistics: Mapping[str, tuple[Array | Tensor, Array | Tensor]],
        tube_sum: TubeSum,
    ) -> None:
        """pairs: (student block, row of the cache's layers); statistics: view -> (mean, std), each [L, D]."""
        super().__init__()
        self.cfg = cfg
        self.pairs = tuple(pairs)
        self.views = tuple(statistics)
        self.student_layers = tuple(sorted({block for block, _ in pairs}))
        self._tube_sum = tube_sum

        # Constants are plain tensors, not buffers: a half-precision engine would round buffers.
        mean, std = _stack_statistics(statistics)
        window = _make_window(cfg.window, cfg.taps)
        self._constants: tuple[Tensor, ...] = (mean, std, window)  # [V, L, D], [V, L, D], [K]

        # The features of a view depend on its axis, so each view has heads of its own.
        teacher_dim = int(mean.shape[-1])
        heads = {f"{v}_{i}": nn.Linear(student_dim, teacher_dim) for i in range(len(pairs)) for v in self.views}
        self.heads = nn.ModuleDict(heads)

        # Straight tubes and single tokens have nothing to learn about the shape of a tube.
        self.offsets = nn.ModuleList()
        if cfg.axes == "deformable":
            self.offsets.extend(_make_offset_conv(student_dim, cfg.taps) for _ in pairs)

    def forward(self, features: Mapping[int, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss. features {student block: [B, C, z, y, x]}, batch -> (scalar, terms).

        The scalar is float32 and already multiplied by `weight`. Terms (detached): `distill` (before `weight`),
        `distill_cosine_<view>` (mean over all tokens, unweighted), `distill_bend` [token per step]. If no sample of the
        batch is distilled the terms are nan, and the scalar is a zero that still reaches every parameter.
        Raises InputError when a feature is missing or the token grids differ.
        """
        # A module moves its parameters and buffers to the device, but no plain tensors.
        self._constants = tuple(c.to(batch.image.device) for c in self._constants)

        chosen = batch.distilled.nonzero()[:, 0]
        if len(chosen) == 0:
            return self._make_zero_loss(batch.image)
        chosen = copy_to_device(chosen, batch.image.device)

        self._check_features(features, batch)

        # Neurites fill a small part of a crop, and the background would dominate a plain mean.
        share = self._measure_neurite_share(features, batch)[chosen]  # [b, z, y, x]
        weight = torch.where(share > 0, 1.0, self.cfg.floor)

        terms = []
        for pair, (block, layer) in enumerate(self.pairs):
            student = features[block][chosen].float()  # [b, C, z, y, x]
            teacher = self._read_teacher(batch, layer, chosen)  # [b, V*D, z, y, x]
            terms.append(self._compare_pair(pair, student, teacher, weight))

        return self._combine(terms, weight.new_zeros(()))

    def bends(self, pair: int, student: Tensor) -> list[Tensor] | None:
        """Sideways steps of the tubes along z, y and x, each [b, 2*(taps-1), z, y, x] in tokens, bounded by `extent`.

        pair: index into `layers`; student: float32 tokens [b, C, z, y, x]. None when single tokens are compared.
        """
        if self.cfg.axes == "none":
            return None

        steps = 2 * (self.cfg.taps - 1)
        if self.cfg.axes == "straight":
            return [student.new_zeros(len(student), steps, *student.shape[2:])] * 3

        # Tokens of deep blocks differ in scale by orders of magnitude; the tubes should not.
        normed = F.layer_norm(student.movedim(1, -1), student.shape[1:2]).movedim(-1, 1)

        # Adam moves every weight by its learning rate, so a sum over a whole neighborhood would drive the tubes to
        # their extent within a few steps and leave them there, where tanh has no slope.
        raw = _apply_in_own_dtype(self.offsets[pair], normed) / math.sqrt(27 * student.shape[1])

        return list((self.cfg.extent * torch.tanh(raw)).chunk(3, 1))

    def _compare_pair(self, pair: int, student: Tensor, teacher: Tensor, weight: Tensor) -> _PairTerms:
        """Compare student tokens [b, C, z, y, x] with teacher tokens [b, V*D, z, y, x] along the tubes of one pair."""
        offsets = self.bends(pair, student)
        roughness = bend = None
        if offsets is not None:
            roughness = torch.stack([_measure_roughness(o) for o in offsets]).mean()
            bend = torch.stack([o.detach().abs().mean() for o in offsets]).mean()

        distances: list[Tensor] = []
        cosines: dict[str, list[Tensor]] = {v: [] for v in self.views}
        for line, targets in self._sum_along_tubes(student, teacher, offsets):
            flat = line.movedim(1, -1)  # [b, z, y, x, C]
            for view, target in zip(self.views, targets.chunk(len(self.views), 1), strict=True):
                guess = _apply_in_own_dtype(self.heads[f"{view}_{pair}"], flat)  # [b, z, y, x, D]

                # Cosines are logged without weights, so that runs with other weights can be compared.
                cosine, distance = self._measure_distance(guess, target.movedim(1, -1))
                distances.append((weight * distance).mean())
                cosines[view].append(cosine.detach().mean())

        return _PairTerms(distances, cosines, roughness, bend)

    def _sum_along_tubes(
        self, student: Tensor, teacher: Tensor, offsets: list[Tensor] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """(student, teacher) of every axis, each [b, C or V*D, z, y, x]; the tokens themselves without tubes."""
        if offsets is None:
            return [(student, teacher)]

        # The student bends the tubes; the teacher is only read along them.
        window = self._constants[2]
        return [
            (self._tube_sum(student, o, window, axis), self._tube_sum(teacher, o.detach(), window, axis))
            for axis, o in enumerate(offsets)
        ]

    def _measure_distance(self, guess: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """(cosine similarity, mixed distance) of [b, z, y, x, D], each [b, z, y, x]."""
        # The cosine ignores the length of a token. The smooth L1 term ties it to the teacher's.
        cosine = F.cosine_similarity(guess, goal, dim=-1)
        smooth_l1 = F.smooth_l1_loss(guess, goal, reduction="none").mean(-1)
        return cosine, self.cfg.cosine * (1 - cosine) + (1 - self.cfg.cosine) * smooth_l1

    def _combine(self, terms: Sequence[_PairTerms], zero: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss times `weight`, and the terms that are logged. zero: a float32 scalar on the device."""
        loss = _average([distance for pair in terms for distance in pair.distances], zero)
        roughness = _average([pair.roughness for pair in terms if pair.roughness is not None], zero)
        bend = _average([pair.bend for pair in terms if pair.bend is not None], zero)

        # The logged loss is free of `weight`, so that runs with other weights can be compared.
        loss = loss + self.cfg.smoothness * roughness

        logged = {"distill": loss.detach(), "distill_bend": bend}
        for view in self.views:
            logged[f"distill_cosine_{view}"] = _average([c for pair in terms for c in pair.cosines[view]], zero)
        return loss * self.cfg.weight, logged

    def _read_teacher(self, batch: Batch, layer: int, chosen: Tensor) -> Tensor:
        """Normalized cached tokens of all views of the chosen samples, [b, V*D, z, y, x] float32."""
        tokens = []
        for index, view in enumerate(self.views):
            cached = batch.features[view][:, layer].detach().float()  # [B, D, z, y, x]

            # Without normalization the channels of the largest scale would decide the loss.
            mean, std = (s[index, layer].view(1, -1, 1, 1, 1) for s in self._constants[:2])
            tokens.append(((cached - mean) / std)[chosen])
        return torch.cat(tokens, 1)

    def _measure_neurite_share(self, features: Mapping[int, Tensor], batch: Batch) -> Tensor:
        """Share of neurite among the labeled voxels of every token's block, [B, z, y, x]; 0 where none is labeled."""
        z, y, x = features[self.student_layers[0]].shape[2:]
        labeled = batch.mask != UNLABELED
        neurite = (batch.mask > 0) & labeled

        # Both are shares of the whole block, so their ratio is the share among the labeled voxels.
        labeled_share = F.adaptive_avg_pool3d(labeled.float(), (z, y, x))
        neurite_share = F.adaptive_avg_pool3d(neurite.float(), (z, y, x)) / labeled_share.clamp(min=1e-6)
        return neurite_share[:, 0]

    def _check_features(self, features: Mapping[int, Tensor], batch: Batch) -> None:
        """Raise InputError when a feature is missing or the token grids differ."""
        missing = [b for b in self.student_layers if b not in features]
        absent = [v for v in self.views if v not in batch.features]
        if missing or absent:
            raise InputError(
                f"distillation lacks student blocks {missing} and teacher views {absent}; "
                f"request {self.student_layers} from the student and {self.views} from the cache"
            )

        # Tokens are compared place by place, which has a meaning on one grid only.
        grids = {tuple(features[b].shape[2:]) for b in self.student_layers}
        grids |= {tuple(batch.features[v].shape[3:]) for v in self.views}
        if len(grids) > 1:
            raise InputError(
                f"student and teacher tokens lie on different grids {sorted(grids)}; "
                "build the cache with the student's patch"
            )

    def _make_zero_loss(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A zero that reaches every parameter, so that a rank with nothing to distil joins the reductions of others."""
        zero = torch.stack([p.float().sum() * 0 for p in self.parameters()]).sum()

        # A nan marks a term of no sample. It gets no weight in the mean over passes.
        nan = like.new_full((), float("nan"), dtype=torch.float32)
        names = ["distill", "distill_bend", *(f"distill_cosine_{v}" for v in self.views)]
        return zero, dict.fromkeys(names, nan)


def _average(values: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Mean of scalars; `zero` without any. Divides before it adds: a fixed order of rounding."""
    total = zero
    for value in values:
        total = total + value / len(values)
    return total


def _apply_in_own_dtype(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in the layer's own precision, returned in float32."""
    result: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return result.float()


def _stack_statistics(statistics: Mapping[str, tuple[Array | Tensor, Array | Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and std of all views, each [V, L, D] float32. Raises InputError for other shapes or a std of 0."""
    mean = torch.stack([torch.as_tensor(mean).float() for mean, _ in statistics.values()])
    std = torch.stack([torch.as_tensor(std).float() for _, std in statistics.values()])

    # A channel without variance would be divided by 0.
    if mean.ndim != 3 or mean.shape != std.shape or not bool((std > 0).all()):
        raise InputError(
            f"the cache's mean {tuple(mean.shape)} and std {tuple(std.shape)} must be views x layers x channels "
            "with std above 0; run precompute again"
        )
    return mean, std


def _make_window(kind: str, taps: int) -> Tensor:
    """Normalized weights [K] of a tube's taps; triangular falls to zero one step beyond the ends."""
    half = taps // 2
    distance = torch.arange(-half, half + 1).abs().float()

    weight = half + 1 - distance if kind == "triangular" else torch.ones(taps)
    return weight / weight.sum()


def _make_offset_conv(dim: int, taps: int) -> nn.Conv3d:
    """Convolution to the raw steps of the tubes along z, y and x; zero at first, so that tubes start straight."""
    conv = nn.Conv3d(dim, 3 * 2 * (taps - 1), 3, padding=1)
    # ZeRO-3 shards the parameters when the constructor returns; `apply` gathers them again.
    conv.apply(_zero_parameters)
    return conv


def _zero_parameters(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _measure_roughness(offsets: Tensor) -> Tensor:
    """Mean squared change of direction between neighboring steps of [b, 2*(K-1), z, y, x].

    Steps point away from the center, so those of the first half are reversed to run along the tube; a straight but
    slanted tube then costs nothing.
    """
    steps = torch.stack(offsets.chunk(2, 1), 1)  # [b, 2, K-1, z, y, x]

    half = steps.shape[2] // 2
    along = torch.cat([-steps[:, :, :half], steps[:, :, half:]], 2)
    return along.diff(dim=2).square().sum(1).mean()
