"""The student: tokenizer, 3D transformer, full-resolution convolutional stem and decoder; saved as plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import InputError, config
from hpc_neuro.core.types import StudentOutput
from hpc_neuro.models import tokenizer
from hpc_neuro.models.decoder import Decoder, LightConfig
from hpc_neuro.models.stem import Stem, level_strides
from hpc_neuro.models.vit3d import ViT3D

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads, as timm's ViTs of these names."""

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


@config
class BlockTokens:
    """One strided convolution per block of voxels."""

    kind: Literal["block"] = "block"


@config
class TubularTokens:
    """Line kernels along z, y and x, straight or bending with the neurite."""

    kind: Literal["tubular"] = "tubular"
    taps: Annotated[int, Field(ge=1, le=256)] = 15
    """Taps of a line kernel; at most the pixels of the teacher's patch when its kernel is transferred."""
    deformable: bool = True
    """Whether the tubes bend; their bends start at zero."""
    extent: Annotated[float, Field(gt=0)] = 1.0
    """[voxel] Largest sideways step of a tube between neighbouring taps."""
    fuse: Literal["sum", "mean", "concat"] = "sum"
    """How the three axes become one token."""
    keep_block: bool = True
    """Whether the block convolution stays beside the tubes."""

    def __post_init__(self) -> None:
        if self.deformable and self.taps == 1:
            raise ValueError("a tube of one tap cannot bend; give more `taps`, or deformable=false")


Tokens = Annotated[BlockTokens | TubularTokens, Field(discriminator="kind")]


@config
class StudentConfig:
    """The 3D student."""

    size: Literal["tiny", "small", "base", "large"] = "tiny"
    """Width, heads and default depth of the transformer: 192/3/12, 384/6/12, 768/12/12, 1024/16/24."""
    depth: Positive | None = None
    """Transformer blocks; none: the size's own. Fewer than the teacher's take its first ones."""
    patch: tuple[Positive, Positive, Positive] = (8, 16, 16)
    """[voxel] Block of one token, z y x."""
    tokenizer: Tokens = BlockTokens()
    decoder: Decoder = LightConfig()
    stem_channels: tuple[Positive, Positive, Positive] = (8, 16, 48)
    """Channels of the convolutional path at its three resolutions, finest first."""
    positions: Literal["grid", "rotary"] = "grid"
    """Learnt table shared over depth (DINO, DINOv2, MAE, supervised teachers), or 3D rotary (DINOv3)."""
    grid: tuple[Positive, Positive, Positive] = (8, 14, 14)
    """Size of the learnt position tables, z y x; they are resampled to each crop's tokens."""
    class_token: bool = True
    """Whether a class token runs beside the patch tokens, as in the teacher."""
    registers: Annotated[int, Field(ge=0)] = 0
    """Register tokens; as many as the teacher has."""
    layer_scale: bool = False
    """Whether blocks have layer scale; as the teacher (DINOv2 and DINOv3 have)."""
    norm_eps: float = 1e-6
    """Epsilon of the transformer's norms; as the teacher (DINOv3: 1e-5)."""
    drop_path: Share = 0.0
    """Drop-path rate of the last block, falling linearly to 0 at the first."""
    checkpointing: bool = False
    """Recompute each transformer block in backward: less memory, a third more time."""

    @property
    def width(self) -> tuple[int, int, int]:
        """Channels, blocks and heads of the transformer."""
        dim, depth, heads = SIZES[self.size]
        return dim, self.depth or depth, heads


class Student(nn.Module):
    """Image -> logits, and token maps of the layers asked for."""

    def __init__(self, cfg: StudentConfig) -> None:
        super().__init__()
        dim, depth, heads = cfg.width
        strides = level_strides(cfg.patch)
        channels = cfg.stem_channels[: len(strides)]
        self.cfg, self.patch = cfg, cfg.patch
        # The tokenizer comes last, for tokenizers draw different numbers of random values: with one seed, students
        # that differ in it alone start alike in everything else.
        self.stem = Stem(strides, channels)
        self.decoder = cfg.decoder.build(dim, depth, cfg.patch, strides, channels)
        self.vit = ViT3D(
            dim,
            depth,
            heads,
            registers=cfg.registers,
            class_token=cfg.class_token,
            positions=cfg.positions,
            grid=cfg.grid,
            layer_scale=cfg.layer_scale,
            drop_path=cfg.drop_path,
            norm_eps=cfg.norm_eps,
            checkpointing=cfg.checkpointing,
        )
        self.tokenizer = _tokenizer(cfg, dim)

    def forward(self, image: Tensor, layers: Sequence[int] = ()) -> StudentOutput:
        """image [B, 1, Z, Y, X] in [0, 1], Z Y X multiples of the patch -> logits [B, 1, Z, Y, X], features as asked.

        Features are patch tokens after the final norm, as the teacher's. Raises InputError for another shape or layer.
        """
        wrong = [i for i in layers if not 0 <= i < self.vit.depth]
        if wrong:
            raise InputError(f"layers {wrong} do not exist; this student has blocks 0 to {self.vit.depth - 1}")
        image = image.to(self.stem.first.weight.dtype)
        tokens = self.tokenizer(image)  # [B, C, z, y, x]; first, for it checks the image's shape
        _, maps = self.vit(tokens, tuple({*layers, *self.decoder.layers}))
        return StudentOutput(self.decoder(self.stem(image), maps), {i: maps[i] for i in layers})

    @property
    def halo(self) -> Shape:
        """Reach of the convolutional path in voxels, rounded up to whole patches, z y x.

        Attention sees the whole window besides; what a blocked prediction must read is `sliding_window.halo`.
        """
        strides = level_strides(self.patch)
        reach = [3 * sum(level) + strides[-1][axis] for axis, level in enumerate(zip(*strides, strict=True))]
        z, y, x = (math.ceil(r / p) * p for r, p in zip(reach, self.patch, strict=True))
        return z, y, x


def build_student(cfg: StudentConfig) -> Student:
    """A freshly initialised student, float32 on the CPU. Seed torch before for reproducible weights."""
    return Student(cfg)


def blank_student(cfg: StudentConfig) -> Student:
    """A student of shapes alone, on the meta device: what it costs and which tensors it has."""
    with torch.device("meta"):
        return Student(cfg)


def _tokenizer(cfg: StudentConfig, dim: int) -> nn.Module:
    if isinstance(cfg.tokenizer, BlockTokens):
        return tokenizer.BlockTokenizer(cfg.patch, dim)
    t = cfg.tokenizer
    return tokenizer.TubularTokenizer(
        cfg.patch, dim, t.taps, fuse=t.fuse, deformable=t.deformable, extent=t.extent, keep_block=t.keep_block
    )


@config
class SavedStudent:
    """What student.yaml holds."""

    student: StudentConfig
    code: str
    """Version of the package that saved it."""
    extra: Annotated[dict[str, Any], Field(default_factory=dict)]
    """What the trainer adds: `window` (training crop), normalisation, threshold, step ..."""


def save_student(folder: Path, cfg: StudentConfig, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Write `folder`/student.yaml and model.safetensors (float32), whole or not at all. `extra`: plain YAML values."""
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in state.items()}
    saved = SavedStudent(student=cfg, code=run_folder.code_version(), extra=dict(extra))
    with files.atomic(folder) as part:
        part.mkdir()
        (part / "student.yaml").write_text(schema.dump(saved), encoding="utf-8")
        save_file(plain, part / "model.safetensors")


def load_student(folder: Path) -> tuple[Student, dict[str, Any]]:
    """The student saved in `folder`, in eval mode on the CPU, and what was saved beside it (`extra`, and `code`).

    Raises ConfigError for a broken student.yaml, InputError for missing, broken, left-over or misshapen tensors.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} holds no trained student (no model.safetensors); give a folder that train wrote")
    saved = schema.load(SavedStudent, folder / "student.yaml")
    student = Student(saved.student)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the folder again") from None
    wanted = student.state_dict()
    faults = [f"{n} is missing" for n in wanted.keys() - state.keys()]
    faults += [f"{n} is left over" for n in state.keys() - wanted.keys()]
    faults += [
        f"{n} is {tuple(state[n].shape)}" for n in wanted.keys() & state.keys() if state[n].shape != wanted[n].shape
    ]
    if faults:
        raise InputError(
            f"{path} does not fit the student.yaml beside it: {', '.join(sorted(faults))}; save both again"
        )
    student.load_state_dict(state)
    return student.eval(), {**saved.extra, "code": saved.code}
