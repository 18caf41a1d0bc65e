"""The student: a convolutional encoder and decoder, and a 3D transformer beside them; saved as plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import StudentOutput
from hpc_neuro.models import tokenizer
from hpc_neuro.models.config import BlockTokens, SavedStudent, StudentConfig
from hpc_neuro.models.encoder_decoder import LAYERS, Decoder, Encoder, level_strides
from hpc_neuro.models.layers import Gain, ResampleLinear, init_zero
from hpc_neuro.models.tokenizer import check_image
from hpc_neuro.models.vit3d import ViT3D

_TOKEN_GAIN = 0.1
"""Start of the factor on what the transformer adds to the coarsest features."""


class Student(nn.Module):
    """Image -> logits, and token maps of the layers asked for.

        image --> encoder --> coarsest features --(+)--> decoder --> logits
          |                     |                ^
          +--> tokenizer --(+)--+--> transformer |
                                          +------+

    A token is the tokenizer's embedding of its block of voxels, which a teacher's patch kernel can fill, plus a
    projection of the encoder's features. The projection starts at zero: a transferred transformer first sees exactly
    what the teacher would see.
    """

    def __init__(self, cfg: StudentConfig) -> None:
        super().__init__()
        channels = cfg.level_channels
        self.cfg, self.patch = cfg, cfg.patch
        self.encoder = Encoder(cfg.unshuffle, channels, cfg.tubes)
        self.decoder = Decoder(cfg.unshuffle, channels)

        self.vit: ViT3D | None = None
        self.tokenizer: nn.Module | None = None

        # The control without a transformer has none of its tensors, so that its cost and its file are its own.
        if not cfg.transformer:
            return

        dim, depth, heads = cfg.width
        self.to_tokens = ResampleLinear(channels[-1], dim)
        # A projection of zero: the transformer first sees exactly what the teacher would see.
        self.to_tokens.apply(init_zero)
        self.from_tokens = ResampleLinear(dim, channels[-1])
        self.token_gain = Gain(channels[-1], _TOKEN_GAIN)

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

        # The tokenizer comes last, because tokenizers draw different numbers of random values: with one seed, students
        # that differ in the tokenizer alone start alike in everything else.
        self.tokenizer = _build_tokenizer(cfg, dim)

    def require_transformer(self) -> ViT3D:
        """The transformer. Raises InputError for a student without one."""
        if self.vit is None:
            raise InputError("this student has no transformer; set student.transformer=true")
        return self.vit

    @property
    def dim(self) -> int:
        """Channels of the tokens; 0 without a transformer."""
        return 0 if self.vit is None else self.vit.dim

    @property
    def depth(self) -> int:
        """Transformer blocks; 0 without a transformer."""
        return 0 if self.vit is None else self.vit.depth

    def forward(self, image: Tensor, layers: Sequence[int] = ()) -> StudentOutput:
        """image [B, 1, Z, Y, X] in [0, 1], Z Y X multiples of the patch -> logits [B, 1, Z, Y, X], features as asked.

        Features are patch tokens after the final norm, as the teacher's. Raises InputError for another shape or layer.
        """
        wrong = [i for i in layers if not 0 <= i < self.depth]
        if wrong:
            blocks = f"has blocks 0 to {self.depth - 1}" if self.depth else "has no transformer"
            raise InputError(f"layers {wrong} do not exist; this student {blocks}")
        check_image(image, self.patch)

        # The weights may be bfloat16 where the image is float32.
        image = image.to(self.encoder.first.conv.weight.dtype)
        features = self.encoder(image)
        maps: dict[int, Tensor] = {}

        if self.vit is not None:
            features[-1], maps = self._attend(image, features[-1], layers)

        # The encoder pads images that its strides do not divide.
        z, y, x = image.shape[2:]
        return StudentOutput(self.decoder(features)[:, :, :z, :y, :x], maps)

    def _attend(self, image: Tensor, coarse: Tensor, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The coarsest features with what the transformer adds, and the token maps of `layers`."""
        assert self.vit is not None
        assert self.tokenizer is not None
        stride = level_strides(self.cfg.unshuffle)[-1]

        tokens = self.tokenizer(image)  # [B, C, z, y, x]
        tokens = tokens + self.to_tokens(coarse, stride, tokens.shape[2:], self.patch)
        last, maps = self.vit(tokens, tuple(layers))

        # The transformer's result lies on the token grid. The coarsest level has a stride of its own.
        return coarse + self.token_gain(self.from_tokens(last, self.patch, coarse.shape[2:], stride)), maps

    @property
    def halo(self) -> Shape:
        """Reach of the convolutional path in voxels, rounded up to whole patches, z y x.

        Attention sees the whole window besides; a blocked prediction must read `sliding_window.halo`.
        """
        strides = level_strides(self.cfg.unshuffle)

        # The convolutions of a level reach one of its cells each. Blocks of the coarsest level add what lies between a
        # voxel and the edge of its block.
        reach = [
            sum(n * s for n, s in zip(LAYERS, axis, strict=True)) + axis[-1] for axis in zip(*strides, strict=True)
        ]

        z, y, x = (math.ceil(r / p) * p for r, p in zip(reach, self.patch, strict=True))
        return z, y, x


def build_student(cfg: StudentConfig) -> Student:
    """A freshly initialized student, float32 on the CPU. Seed torch before for reproducible weights."""
    return Student(cfg)


def blank_student(cfg: StudentConfig) -> Student:
    """A student of shapes alone, on the meta device: what it costs and which tensors it has."""
    with torch.device("meta"):
        return Student(cfg)


def _build_tokenizer(cfg: StudentConfig, dim: int) -> nn.Module:
    if isinstance(cfg.tokenizer, BlockTokens):
        return tokenizer.BlockTokenizer(cfg.patch, dim)

    t = cfg.tokenizer
    return tokenizer.TubularTokenizer(
        cfg.patch, dim, t.taps, fuse=t.fuse, deformable=t.deformable, extent=t.extent, keep_block=t.keep_block
    )


def save_student(folder: Path, cfg: StudentConfig, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Write `folder`/student.yaml and model.safetensors (float32), whole or not at all. `extra`: plain YAML values."""
    # The file does not depend on the device and precision of training. Tensors are copied, because safetensors
    # refuses those that share memory.
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in state.items()}

    with files.atomic(folder) as part:
        part.mkdir()
        path = part / "model.safetensors"
        save_file(plain, path)
        digest = files.sha256(path)
        saved = SavedStudent(student=cfg, code=run_folder.code_version(), extra=dict(extra), sha256=digest)
        (part / "student.yaml").write_text(schema.dump(saved), encoding="utf-8")


def load_student(folder: Path) -> tuple[Student, dict[str, Any]]:
    """The student saved in `folder`, in eval mode on the CPU, and what was saved beside it (`extra`, and `code`).

    Raises ConfigError for a broken student.yaml, InputError for missing, broken, left-over or misshapen tensors.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} holds no trained student (no model.safetensors); give a folder that train wrote")

    saved = schema.load(SavedStudent, folder / "student.yaml")
    if saved.sha256 and files.sha256(path) != saved.sha256:
        raise InputError(
            f"{path} does not have the checksum in the student.yaml beside it: it is damaged; copy the folder "
            "again, or give the same `hpc-neuro train` again, which writes it anew"
        )
    student = Student(saved.student)

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the folder again") from None

    # `load_state_dict` would raise torch's own error, which does not say what to do.
    expected = student.state_dict()
    faults = [f"{n} is missing" for n in expected.keys() - state.keys()]
    faults += [f"{n} is left over" for n in state.keys() - expected.keys()]
    faults += [
        f"{n} is {tuple(state[n].shape)}" for n in expected.keys() & state.keys() if state[n].shape != expected[n].shape
    ]

    if faults:
        raise InputError(
            f"{path} does not fit the student.yaml beside it: {', '.join(sorted(faults))}; save both again"
        )

    student.load_state_dict(state)
    return student.eval(), {**saved.extra, "code": saved.code}
