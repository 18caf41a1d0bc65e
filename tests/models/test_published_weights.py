"""Files of the published DINO teachers, by the names and shapes of their tensors; the values are random.

The names are those of Meta's own files (dino_deitsmall16_pretrain.pth, dinov2_vits14_pretrain.pth,
dinov2_vits14_reg4_pretrain.pth, dinov3_vits16_pretrain_lvd1689m.pth), which differ from timm's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpc_neuro.models.config import TeacherConfig, TransferConfig
from hpc_neuro.models.inflate import transfer
from hpc_neuro.models.teacher import Teacher, load_teacher
from tests.helpers.tiny_teachers import student_for

WIDTH = 384
BLOCK = {
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (4 * WIDTH, WIDTH),
    "mlp.fc1.bias": (4 * WIDTH,),
    "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
    "mlp.fc2.bias": (WIDTH,),
}
LAYER_SCALE = {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}

# File -> timm's name, patch, what it has besides the blocks, and what a block has besides BLOCK.
PUBLISHED: dict[str, tuple[str, int, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "DINO ViT-S/16": ("vit_small_patch16_224.dino", 16, {"pos_embed": (1, 197, WIDTH)}, {}),
    "DINO ViT-S/8": ("vit_small_patch8_224.dino", 8, {"pos_embed": (1, 785, WIDTH)}, {}),
    "DINOv2 ViT-S/14": (
        "vit_small_patch14_dinov2.lvd142m",
        14,
        {"pos_embed": (1, 1370, WIDTH), "mask_token": (1, WIDTH)},
        LAYER_SCALE,
    ),
    "DINOv2 ViT-S/14 with registers": (
        "vit_small_patch14_reg4_dinov2.lvd142m",
        14,
        {"pos_embed": (1, 1370, WIDTH), "mask_token": (1, WIDTH), "register_tokens": (1, 4, WIDTH)},
        LAYER_SCALE,
    ),
    "DINOv3 ViT-S/16": (
        "vit_small_patch16_dinov3.lvd1689m",
        16,
        {"storage_tokens": (1, 4, WIDTH), "mask_token": (1, WIDTH), "rope_embed.periods": (16,)},
        {**LAYER_SCALE, "attn.qkv.bias_mask": (3 * WIDTH,)},
    ),
}


def make_state(name: str) -> dict[str, Tensor]:
    """Random tensors by published name; the biases of DINOv3's queries, keys and values are zero, as in the file."""
    _, patch, extra, block = PUBLISHED[name]
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        **extra,
    }
    for number in range(12):
        shapes |= {f"blocks.{number}.{key}": shape for key, shape in {**BLOCK, **block}.items()}

    draws = torch.Generator().manual_seed(0)
    state = {key: 0.05 * torch.randn(shape, generator=draws) for key, shape in shapes.items()}
    if "storage_tokens" in state:
        state |= {key: torch.zeros_like(tensor) for key, tensor in state.items() if key.endswith("qkv.bias")}
    return state


@pytest.fixture(scope="module", params=PUBLISHED)
def published_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a published teacher, and a file like it."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(make_state(request.param), path)
    return request.param, path


@pytest.fixture(scope="module")
def teacher(published_file: tuple[str, Path]) -> Teacher:
    name, path = published_file
    return load_teacher(TeacherConfig(model=PUBLISHED[name][0], weights=path))


def test_the_file_is_taken_whole(published_file: tuple[str, Path], teacher: Teacher) -> None:
    name, _ = published_file
    state, own = make_state(name), teacher.backbone.state_dict()
    assert (teacher.patch, teacher.dim, teacher.depth, teacher.heads) == (PUBLISHED[name][1], WIDTH, 12, 6)

    # Each has these under the same name; registers and layer scale are renamed.
    for key in ("patch_embed.proj.weight", "blocks.11.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "norm.weight"):
        torch.testing.assert_close(own[key], state[key])
    if "ls1.gamma" in PUBLISHED[name][3]:
        gamma = own.get("blocks.5.ls1.gamma", own.get("blocks.5.gamma_1"))
        torch.testing.assert_close(gamma, state["blocks.5.ls1.gamma"])
    for key in ("register_tokens", "storage_tokens"):
        if key in state:
            torch.testing.assert_close(own["reg_token"], state[key])


def test_position_free_features_are_those_of_the_pixels(teacher: Teacher) -> None:
    """Learned tables and rotary positions: a black image has none, and a bright token stands out of them."""
    side = 6 * teacher.patch
    black = torch.zeros(1, side, side)
    bright = black.clone()
    bright[:, 2 * teacher.patch : 3 * teacher.patch, :] = 1

    assert not teacher.position_free_features(black, [11]).any()
    free = teacher.position_free_features(bright, [3, 11])
    plain = teacher.features(bright, [3, 11]) - teacher.features(black, [3, 11])
    torch.testing.assert_close(free, plain)
    strength = free[1, 0].norm(dim=-1).mean(1)
    assert strength.argmax() == 2


def test_a_student_takes_the_weights(teacher: Teacher) -> None:
    student = student_for(teacher, depth=2)
    report = transfer(teacher, student, TransferConfig())
    copied = {*report.copied, *report.resampled}
    assert {"tokenizer.proj.weight", "vit.blocks.1.attn.qkv.weight", "vit.norm.weight"} <= copied
