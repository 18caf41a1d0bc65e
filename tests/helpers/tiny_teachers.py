"""Teachers of every family for tests, and students that fit them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hpc_neuro.models import teacher
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import Student, build_student
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.models.tensor_names import fit_config

FAMILIES = {
    "vit_tiny_patch16_224": "supervised",
    "vit_small_patch8_224.dino": "DINO",
    "vit_base_patch16_224.mae": "MAE",
    "vit_small_patch14_dinov2": "DINOv2",
    "vit_large_patch14_reg4_dinov2": "DINOv2 with registers",
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_tiny_patch16_dinov3_qkvb": "DINOv3 with biases",
}


def make(arch: str = "vit_tiny_patch16_224", **overrides: object) -> Teacher:
    """A shallow teacher whose every parameter is away from its start (layer scale 1e-5 would hide the blocks)."""
    torch.manual_seed(0)
    vit = teacher._create(arch, **{"depth": 2, **overrides})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    card = vit.pretrained_cfg
    return Teacher(vit, {"name": arch, "sha256": "0"}, card["mean"], card["std"])


family = functools.cache(make)


def student_for(guide: Teacher, **changes: object) -> Student:
    torch.manual_seed(1)
    return build_student(fit_config(StudentConfig(patch=(4, guide.patch, guide.patch), **changes), guide)).eval()


def embedding(guide: Teacher, gray: Tensor) -> Tensor:
    """The teacher's own patch embedding of gray [N, p, p] in [0, 1] -> [N, C]."""
    rgb = torch.stack([(gray - m) / s for m, s in zip(guide.mean, guide.std, strict=True)], dim=1)
    return guide.backbone.patch_embed.proj(rgb)[:, :, 0, 0].detach()
