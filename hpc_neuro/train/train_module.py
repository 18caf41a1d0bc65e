"""The module that a training step runs: student and distiller as one, and how it is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hpc_neuro.core.types import Batch
from hpc_neuro.data.feature_cache import FeatureCache
from hpc_neuro.losses.distill import Distiller
from hpc_neuro.models.student import Student, build_student
from hpc_neuro.models.tubular import tube_sum
from hpc_neuro.train.config import TrainConfig

STUDENT = "student."
"""Prefix of the names of the student's parameters in a TrainModule."""


class TrainModule(nn.Module):
    """Student and distiller as one module, so that all their parameters are sharded alike.

    Its inputs and outputs are plain tensors and dicts, and the two are entered by `forward` rather than called: ZeRO-3
    finds the tensors that it watches in nothing else.
    """

    def __init__(self, student: Student, distiller: Distiller | None, sharded: bool) -> None:
        """sharded: all ranks gather parameters together (ZeRO-3), so all must pass the same layers."""
        super().__init__()
        self.student = student
        self.distiller = distiller
        self.sharded = sharded

    def forward(self, fields: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Fields of a Batch -> logits, distillation loss (mean over the distilled samples; None without), its terms.

        The loss of a batch without distilled samples must get no weight.
        """
        batch = Batch(**fields)
        layers = () if self.distiller is None else self.distiller.student_layers
        prediction = self.student.forward(batch.image, layers)
        if self.distiller is None:
            return prediction.logits, None, {}

        # A rank with nothing to distil passes the distiller all the same: the other ranks gather its parameters.
        if self.sharded and not bool(batch.distilled.any()):
            first_only = torch.zeros_like(batch.distilled).index_fill(0, torch.tensor([0]), True)
            batch = dataclasses.replace(batch, distilled=first_only)

        loss, terms = self.distiller.forward(prediction.features, batch)
        return prediction.logits, loss, terms


def build_train_module(cfg: TrainConfig, cache: FeatureCache | None) -> TrainModule:
    """Student and distiller (none without `cache` or `distill`) at their start, in float32 on the CPU."""
    torch.manual_seed(cfg.seed)

    student = build_student(cfg.student)
    return TrainModule(student, build_distiller(cfg, student, cache), sharded=cfg.engine.stage == 3)


def build_distiller(cfg: TrainConfig, student: Student, cache: FeatureCache | None) -> Distiller | None:
    """The distillation of a student of this width and depth; None without `distill` or without a cache."""
    if cfg.distill is None or cache is None:
        return None

    # Seeded anew, so that heads start alike whatever student was drawn before them.
    torch.manual_seed(cfg.seed + 1)
    return cfg.distill.build(
        student_dim=student.dim,
        student_depth=student.depth,
        teacher_layers=cache.layers,
        mean=cache.mean,
        std=cache.std,
        tube_sum=tube_sum,
    )
