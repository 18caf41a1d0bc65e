"""The student: tokenizer, 3D transformer, full-resolution convolutional stem and decoder; saved as plain torch."""

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
from hpc_neuro.models.stem import Stem, level_strides
from hpc_neuro.models.vit3d import ViT3D


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


def save_student(folder: Path, cfg: StudentConfig, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Write `folder`/student.yaml and model.safetensors (float32), whole or not at all. `extra`: plain YAML values."""
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
