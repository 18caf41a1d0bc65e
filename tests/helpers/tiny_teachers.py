"""Teachers of every family for tests, and students that fit them."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
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
    vit = teacher.create_vit(arch, **{"depth": 2, **overrides})
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


def write_trained(folder: Path, **changes: object) -> Path:
    """What `hpc-neuro teacher train` leaves: a ViT that timm has no name for, two blocks deep, with patches of 8."""
    arch = "vit_tiny_patch16_224"
    folder.mkdir()
    shape = {"num_classes": 0, "patch_size": 8, "img_size": 224, "depth": 2}
    save_file(teacher.timm().create_model(arch, **shape).state_dict(), folder / "teacher.safetensors")
    card = {
        "name": "trained",
        "arch": arch,
        "patch": 8,
        "file": "teacher.safetensors",
        "recipe": {"depth": 2},
        "sha256": hashlib.sha256((folder / "teacher.safetensors").read_bytes()).hexdigest(),
        "input": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 224},
    }
    (folder / "teacher.json").write_text(json.dumps({k: v for k, v in {**card, **changes}.items() if v is not None}))
    return folder
