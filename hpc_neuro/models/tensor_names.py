"""A teacher's transformer in the student's names: which tensor goes where, for timm's two families of ViT.

VisionTransformer (supervised, DINO, DINOv2, MAE): names as ours; a position table. Eva (DINOv3): layer scale called
`gamma_1`, a query-key-value bias in parts or none, rotary positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.student import Student
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.models.vit3d import TEMPERATURE, resample_plane

# Eva's names of the layer scale.
_RENAMED = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


@dataclass
class Translation:
    """The student's tensors (names below `vit.`) and what became of the teacher's."""

    # Taken as they are.
    same: dict[str, Tensor] = field(default_factory=dict)
    # With what was done to them.
    changed: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    # Teacher's name -> why.
    unused: dict[str, str] = field(default_factory=dict)


def fit_config(cfg: StudentConfig, teacher: Teacher) -> StudentConfig:
    """`cfg` with the fields that a full transfer from `teacher` fixes: size, positions, tokens, layer scale, epsilon.

    Patch, tokenizer, decoder and stem stay; the depth is at most the teacher's. Raises InputError for a teacher whose
    width and heads are no student's size.
    """
    # Heads divide the width, so that equal width with other heads is another network.
    size: Any = next((n for n, (dim, _, heads) in SIZES.items() if (dim, heads) == (teacher.dim, teacher.heads)), None)
    if size is None:
        raise InputError(
            f"{teacher.identity['name']} is {teacher.dim} wide with {teacher.heads} heads; students come as "
            + ", ".join(f"{n} ({d}, {h})" for n, (d, _, h) in SIZES.items())
            + "; choose a teacher of one of these sizes"
        )

    vit = teacher.backbone
    first = dict(vit.blocks[0].named_parameters())

    # Rotary positions need no table, so that the student's own grid stays.
    rotary = getattr(vit, "rope", None) is not None
    plane = cfg.grid[1:] if rotary else tuple(vit.patch_embed.grid_size)

    return replace(
        cfg,
        size=size,
        depth=min(cfg.depth or teacher.depth, teacher.depth),
        positions="rotary" if rotary else cfg.positions,
        grid=(cfg.grid[0], *plane),
        class_token=vit.cls_token is not None,
        registers=0 if vit.reg_token is None else vit.reg_token.shape[1],
        layer_scale=bool({"gamma_1", "ls1.gamma"} & first.keys()),
        norm_eps=vit.blocks[0].norm1.eps,
    )


def translate(teacher: Teacher, student: Student) -> Translation:
    """The teacher's blocks, norm, class and register tokens and positions as the student's.

    Raises InputError for a setting of the student that the teacher contradicts, naming the key to change.
    """
    _check(teacher, student.cfg)

    vit, out = teacher.backbone, Translation()
    state = {k: v.float() for k, v in vit.state_dict().items() if not k.startswith("patch_embed.")}

    biases: dict[str, dict[str, Tensor]] = {}

    for name, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name.startswith("head."):
            out.unused[name] = "the classifier's head"
        elif block and int(block[1]) >= student.require_transformer().depth:
            out.unused[name] = f"blocks beyond the student's {student.require_transformer().depth}"
        elif block and block[2] in ("attn.q_bias", "attn.v_bias"):
            # Eva keeps the biases apart. They are joined once all are seen.
            biases.setdefault(block[1], {})[block[2][5]] = tensor
        elif block:
            out.same[f"blocks.{block[1]}.{_RENAMED.get(block[2], block[2])}"] = tensor
        elif name != "pos_embed":
            out.same[name] = tensor

    # DINOv3 has no key bias, and a query and value bias only where retrained.
    for index in range(student.require_transformer().depth):
        key = f"blocks.{index}.attn.qkv.bias"
        if key not in out.same:
            zero = torch.zeros(teacher.dim)
            parts = biases.get(str(index), {})
            joined = torch.cat([parts.get("q", zero), zero, parts.get("v", zero)])
            out.changed[key] = (joined, "the teacher's query and value bias" if parts else "zero, as in the teacher")

    # DINOv3 has no table.
    if "pos_embed" in state:
        _positions(state["pos_embed"], vit, student, out)

    return out


def _positions(table: Tensor, vit: Any, student: Student, out: Translation) -> None:
    """Split the teacher's table [1, prefix + H*W, C]: the prefix is folded into its tokens, the plane is resampled."""
    # A table that covers the prefix gives positions to the class and register tokens too. The student's have none.
    if not vit.no_embed_class:
        prefix, table = table[:, : vit.num_prefix_tokens], table[:, vit.num_prefix_tokens :]
        for name in ("cls_token", "reg_token"):
            if name in out.same:
                token = out.same.pop(name)
                position, prefix = prefix[:, : token.shape[1]], prefix[:, token.shape[1] :]
                out.changed[name] = (token + position, "the teacher's plus its position")

    plane = table.reshape(1, *vit.patch_embed.grid_size, -1)  # [1, H, W, C]

    table_2d = student.require_transformer().pos_embed
    if table_2d is None:
        out.unused["pos_embed"] = "learnt positions, replaced by rotary ones"
        return

    # The report tells a copy from a change.
    size = table_2d.shape[1:3]
    if plane.shape[1:3] == size:
        out.same["pos_embed"] = plane
    else:
        how = f"from {plane.shape[1]} x {plane.shape[2]} to {size[0]} x {size[1]} positions, bicubic"
        out.changed["pos_embed"] = (resample_plane(plane, (size[0], size[1])), how)


def _check(teacher: Teacher, cfg: StudentConfig) -> None:
    """Settings that no tensor's name or shape would betray."""
    rope = getattr(teacher.backbone, "rope", None)
    if rope is not None:
        # Each of these changes the rotation and leaves no trace in the tensors.
        ours = {"temperature": TEMPERATURE, "rotate_half": True, "normalize_coords": "separate", "grid_offset": 0.0}
        if any(getattr(rope, key, None) != value for key, value in ours.items()):
            raise InputError(
                f"{teacher.identity['name']} turns its tokens by {type(rope).__name__}, which this 3D transformer does "
                "not have; choose a DINOv3 teacher or one with learnt positions"
            )

    # The config that a full transfer would give is the reference, so that the message is the fix.
    fitting = fit_config(cfg, teacher)
    keys = ["size", "class_token", "registers", "layer_scale", "norm_eps", "positions"]
    # A student may be shallower than its teacher, but not deeper.
    if cfg.width[1] > teacher.depth:
        keys.append("depth")
    wrong = [f"student.{key}={getattr(fitting, key)}" for key in keys if getattr(cfg, key) != getattr(fitting, key)]

    if wrong:
        raise InputError(f"the student does not fit the teacher {teacher.identity['name']}; set {' '.join(wrong)}")
