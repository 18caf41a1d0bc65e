"""Deformable tubular distillation: the student's tokens along curved tubes learn the teacher's along the same tubes.

The equations are this project's own; no paper gives them. For student tokens S, cached teacher tokens T_v of view v,
the tube P^a(p) along axis a through token p, window w, head g_v and the teacher's per-channel normalisation n:

    s_a(p) = sum_k w_k S(P^a_k(p))        t_{v,a}(p) = sum_k w_k T_v(P^a_k(p))
    L = mean over v, a, p of m(p) * [ c * (1 - cos(g_v(s_a), n(t_{v,a}))) + (1 - c) * smooth_l1(g_v(s_a), n(t_{v,a})) ]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hpc_neuro.core.constants import UNLABELLED
from hpc_neuro.core.schema import ConfigError, InputError, config
from hpc_neuro.core.types import Array, Batch, copy_to_device

View = Literal["z", "y", "x"]


class TubeSum(Protocol):
    """`hpc_neuro.models.tubular.tube_sum`; handed in by the caller because losses do not import models."""

    def __call__(self, x: Tensor, offsets: Tensor, window: Tensor, axis: int) -> Tensor:
        """x [B, C, z, y, x], offsets [B, 2*(K-1), z, y, x], window [K] -> [B, C, z, y, x]."""


@config
class Distill:
    """Distil a frozen 2D teacher's cached features into the student's tokens, along tubes."""

    kind: Literal["distill"] = "distill"
    axes: Literal["none", "straight", "deformable"] = "deformable"
    """What is compared: single tokens, straight tubes along z, y and x, or tubes that bend with the neurite."""
    views: tuple[View, ...] = ("z", "y", "x")
    """Teacher views (slices orthogonal to this axis) to learn from; the cache must hold them."""
    layers: tuple[tuple[int, int], ...] = ((-1, -1),)
    """Pairs of student block and teacher layer; negative counts from the last block and the cache's last layer."""
    taps: int = Field(default=5, ge=3)
    """[token] Taps K of a tube, odd."""
    window: Literal["triangular", "uniform"] = "triangular"
    """Weight of the taps of a tube, normalised to 1."""
    extent: float = Field(default=1.0, gt=0)
    """[token] How far a tube may bend sideways per step."""
    smoothness: float = Field(default=0.01, ge=0)
    """Price of the squared change of direction from one step of a tube to the next."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Weight of a token without any neurite; one full of neurite weighs 1."""
    cosine: float = Field(default=0.9, ge=0, le=1)
    """Share of the cosine distance in the loss; the rest is smooth L1."""
    weight: float = Field(default=5.0, ge=0)
    """Factor of this loss in the total. Most tokens weigh little more than `floor`, hence more than 1."""

    def __post_init__(self) -> None:
        if self.taps % 2 == 0:
            raise ValueError(f"taps is {self.taps}; a tube has its token in the middle, so it must be odd")
        if not self.views or len(set(self.views)) != len(self.views):
            raise ValueError(f"views is {list(self.views)}; name one to three of z, y, x, each once")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(
                f"layers is {[list(p) for p in self.layers]}; give [student block, teacher layer] pairs, each once"
            )

    def build(
        self,
        *,
        student_dim: int,
        student_depth: int,
        teacher_layers: Sequence[int],
        mean: Mapping[str, Array | Tensor],
        std: Mapping[str, Array | Tensor],
        tube_sum: TubeSum,
    ) -> Distiller:
        """The trainable module for a student and a feature cache.

        student_dim: channels C of the student's tokens; student_depth: its number of blocks; teacher_layers: the layers
        in the cache, in its order; mean, std: view -> [L, D] of the cache; tube_sum: `models.tubular.tube_sum`.
        Raises ConfigError for a view, layer or block that is not there.
        """
        faults = [
            f"distill.views: the cache holds the views {sorted(mean)}, not {v!r}; drop it or run precompute with it"
            for v in self.views
            if v not in mean or v not in std
        ]
        pairs = []
        for block, layer in self.layers:
            if not -student_depth <= block < student_depth:
                faults.append(f"distill.layers: the student has blocks 0 to {student_depth - 1}, not {block}")
            if layer not in teacher_layers and not -len(teacher_layers) <= layer < 0:
                faults.append(
                    f"distill.layers: the cache holds layers {list(teacher_layers)}, not {layer}; precompute it"
                )
            else:
                index = layer % len(teacher_layers) if layer < 0 else list(teacher_layers).index(layer)
                pairs.append((block % student_depth, index))
        if faults:
            raise ConfigError("\n".join(faults))
        return Distiller(self, student_dim, pairs, {v: (mean[v], std[v]) for v in self.views}, tube_sum)


class Distiller(nn.Module):
    """Heads, tubes and the distillation loss. Parameters train with the student and are dropped afterwards.

    `student_layers`: blocks whose tokens `forward` wants; `views`: views whose teacher features it wants.
    """

    def __init__(
        self,
        cfg: Distill,
        student_dim: int,
        pairs: Sequence[tuple[int, int]],
        statistics: Mapping[str, tuple[Array | Tensor, Array | Tensor]],
        tube_sum: TubeSum,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.pairs = tuple(pairs)
        self.views = tuple(statistics)
        self.student_layers = tuple(sorted({block for block, _ in pairs}))
        self._tube_sum = tube_sum
        mean, std = (torch.stack([torch.as_tensor(s[i]).float() for s in statistics.values()]) for i in (0, 1))
        if mean.ndim != 3 or mean.shape != std.shape or not bool((std > 0).all()):
            raise InputError(
                f"the cache's mean {tuple(mean.shape)} and std {tuple(std.shape)} must be views x layers x channels "
                "with std above 0; run precompute again"
            )
        # Plain tensors, not buffers: a half-precision engine would round them.
        self._constants: tuple[Tensor, ...] = (mean, std, _window(cfg.window, cfg.taps))  # [V, L, D], [V, L, D], [K]
        teacher_dim = int(mean.shape[-1])
        heads = {f"{v}_{i}": nn.Linear(student_dim, teacher_dim) for i in range(len(pairs)) for v in self.views}
        self.heads = nn.ModuleDict(heads)
        self.offsets = nn.ModuleList()
        if cfg.axes == "deformable":
            self.offsets.extend(_offset_conv(student_dim, cfg.taps) for _ in pairs)

    def forward(self, features: Mapping[int, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """features {student block: [B, C, z, y, x]}, batch -> (scalar, terms).

        The scalar is float32 and already multiplied by `weight`. Terms (detached): `distill` (before `weight`),
        `distill_cosine_<view>` (mean over all tokens, unweighted), `distill_bend` [token per step]. When no sample of
        the batch is distilled they are nan, and the scalar is a zero that still reaches every parameter.
        Raises InputError when a feature is missing or the token grids differ.
        """
        self._constants = tuple(c.to(batch.image.device) for c in self._constants)
        chosen = batch.distilled.nonzero()[:, 0]
        if len(chosen) == 0:
            return self._nothing(batch.image)
        chosen = copy_to_device(chosen, batch.image.device)
        share = self._neurite_share(features, batch)[chosen]  # [b, z, y, x]
        weight = self.cfg.floor + (1 - self.cfg.floor) * share
        zero = weight.new_zeros(())
        loss, rough, bend = zero, zero, zero
        cosines = dict.fromkeys(self.views, zero)
        for i, (block, layer) in enumerate(self.pairs):
            student = features[block][chosen].float()  # [b, C, z, y, x]
            teacher = torch.cat(
                [self._teacher(batch, n, layer)[chosen] for n in range(len(self.views))], 1
            )  # [b, V*D, ...]
            offsets = self.bends(i, student)  # one [b, 2*(K-1), z, y, x] per axis; none for points
            if offsets is not None:
                rough = rough + torch.stack([_roughness(d) for d in offsets]).mean() / len(self.pairs)
                bend = bend + torch.stack([d.detach().abs().mean() for d in offsets]).mean() / len(self.pairs)
            tubes = self._tubes(student, teacher, offsets)
            for line, targets in tubes:
                flat = line.movedim(1, -1)  # [b, z, y, x, C]
                for v, target in zip(self.views, targets.chunk(len(self.views), 1), strict=True):
                    guess = _applied(self.heads[f"{v}_{i}"], flat)  # [b, z, y, x, D]
                    goal = target.movedim(1, -1)
                    cosine = F.cosine_similarity(guess, goal, dim=-1)  # [b, z, y, x]
                    distance = F.smooth_l1_loss(guess, goal, reduction="none").mean(-1)
                    each = self.cfg.cosine * (1 - cosine) + (1 - self.cfg.cosine) * distance
                    parts = len(self.pairs) * len(tubes)
                    loss = loss + (weight * each).mean() / (parts * len(self.views))
                    cosines[v] = cosines[v] + cosine.detach().mean() / parts
        loss = loss + self.cfg.smoothness * rough
        terms = {"distill": loss.detach(), "distill_bend": bend}
        terms |= {f"distill_cosine_{v}": value for v, value in cosines.items()}
        return loss * self.cfg.weight, terms

    def bends(self, pair: int, student: Tensor) -> list[Tensor] | None:
        """Steps sideways of the tubes along z, y and x, each [b, 2*(taps-1), z, y, x] in tokens, bounded by `extent`.

        pair: index into `layers`; student: float32 tokens [b, C, z, y, x]. None when points are compared.
        """
        steps = 2 * (self.cfg.taps - 1)
        if self.cfg.axes == "none":
            return None
        if self.cfg.axes == "straight":
            return [student.new_zeros(len(student), steps, *student.shape[2:])] * 3
        # Tokens of deep blocks differ in scale by orders of magnitude; the tubes should not.
        normed = F.layer_norm(student.movedim(1, -1), student.shape[1:2]).movedim(-1, 1)
        # Adam moves every weight by its rate, so a sum over a whole neighbourhood would throw the tubes to their extent
        # within a few steps and leave them there, where tanh has no slope.
        raw = _applied(self.offsets[pair], normed) / math.sqrt(27 * student.shape[1])
        return list((self.cfg.extent * torch.tanh(raw)).chunk(3, 1))

    def _tubes(self, student: Tensor, teacher: Tensor, offsets: list[Tensor] | None) -> list[tuple[Tensor, Tensor]]:
        """(student, teacher) of every axis, each [b, C or V*D, z, y, x]; the tokens themselves without tubes."""
        if offsets is None:
            return [(student, teacher)]
        window = self._constants[2]
        return [
            (self._tube_sum(student, d, window, a), self._tube_sum(teacher, d.detach(), window, a))
            for a, d in enumerate(offsets)
        ]

    def _teacher(self, batch: Batch, view: int, layer: int) -> Tensor:
        """The normalised cached tokens of one view and layer, [B, D, z, y, x] float32."""
        cached = batch.features[self.views[view]][:, layer].detach().float()
        mean, std = (s[view, layer].view(1, -1, 1, 1, 1) for s in self._constants[:2])
        return (cached - mean) / std

    def _neurite_share(self, features: Mapping[int, Tensor], batch: Batch) -> Tensor:
        """Share of neurite among the labelled voxels of every token's block, [B, z, y, x]; 0 where none is labelled."""
        missing = [b for b in self.student_layers if b not in features]
        absent = [v for v in self.views if v not in batch.features]
        if missing or absent:
            raise InputError(
                f"distillation lacks student blocks {missing} and teacher views {absent}; "
                f"ask the student for {self.student_layers} and the cache for {self.views}"
            )
        grid = features[self.student_layers[0]].shape[2:]
        grids = {tuple(features[b].shape[2:]) for b in self.student_layers}
        grids |= {tuple(batch.features[v].shape[3:]) for v in self.views}
        if len(grids) > 1:
            raise InputError(
                f"student and teacher tokens lie on different grids {sorted(grids)}; "
                "build the cache with the student's patch"
            )
        labelled = batch.mask != UNLABELLED
        size = (grid[0], grid[1], grid[2])
        neurite = F.adaptive_avg_pool3d(((batch.mask > 0) & labelled).float(), size)
        share = neurite / F.adaptive_avg_pool3d(labelled.float(), size).clamp(min=1e-6)
        return share[:, 0]

    def _nothing(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A zero that reaches every parameter: a rank with nothing to distil must not leave the others waiting."""
        zero = torch.stack([p.float().sum() * 0 for p in self.parameters()]).sum()
        nan = like.new_full((), float("nan"), dtype=torch.float32)
        names = ["distill", "distill_bend", *(f"distill_cosine_{v}" for v in self.views)]
        return zero, dict.fromkeys(names, nan)


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in the layer's own precision, given back in float32."""
    result: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return result.float()


def _window(kind: str, taps: int) -> Tensor:
    """Normalised weights [K] of a tube's taps; triangular falls to zero one step beyond the ends."""
    half = taps // 2
    distance = torch.arange(-half, half + 1).abs().float()
    weight = half + 1 - distance if kind == "triangular" else torch.ones(taps)
    return weight / weight.sum()


def _offset_conv(dim: int, taps: int) -> nn.Conv3d:
    """Raw steps of the tubes along z, y and x; zero at first, so that training starts from straight tubes."""
    conv = nn.Conv3d(dim, 3 * 2 * (taps - 1), 3, padding=1)
    conv.apply(_zero)
    return conv


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _roughness(offsets: Tensor) -> Tensor:
    """Mean squared change of direction between neighbouring steps of [b, 2*(K-1), z, y, x].

    Steps point away from the centre, so those of the first half are turned to run along the tube; a straight but
    slanted tube then costs nothing.
    """
    steps = torch.stack(offsets.chunk(2, 1), 1)  # [b, 2, K-1, z, y, x]
    half = steps.shape[2] // 2
    along = torch.cat([-steps[:, :, :half], steps[:, :, half:]], 2)
    return along.diff(dim=2).square().sum(1).mean()
