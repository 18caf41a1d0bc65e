"""Configurations of the student and its tokenizer, the 2D teacher and the weight transfer.

This file does not import torch, so that the command line checks a config within a second. The networks themselves are
in the file that each class names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from hpc_neuro.core.schema import config
from hpc_neuro.core.types import Contrast

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Size -> width, depth and heads of the transformer, equal to timm's ViTs of the same names."""

CHANNELS = {"tiny": (16, 32, 64), "small": (32, 64, 128), "base": (64, 128, 256), "large": (96, 192, 384)}
"""Size -> channels of the convolutional path, finest level first."""

BUNDLED = {"bundled": "teacher_vit_tiny_patch16", "bundled8": "teacher_vit_tiny_patch8"}
"""`TeacherConfig.model` -> file stem in hpc_neuro/assets, for teachers that ship in the package."""

Order = Literal["raster", "boustrophedon"]
"""Order in which a 2D kernel is flattened into a line."""


@config
class BlockTokens:
    """One strided convolution per block of voxels (models/tokenizer.py)."""

    kind: Literal["block"] = "block"


@config
class TubularTokens:
    """Line kernels along z, y and x, straight or bending with the neurite (models/tokenizer.py)."""

    kind: Literal["tubular"] = "tubular"
    taps: Annotated[int, Field(ge=1, le=256)] = 15
    """Taps of a line kernel; at most the pixels of the teacher's patch when its kernel is transferred."""
    deformable: bool = True
    """Whether the tubes bend; the bends start at zero."""
    extent: Annotated[float, Field(gt=0)] = 1.0
    """[voxel] Largest sideways step of a tube between neighboring taps."""
    fuse: Literal["sum", "mean", "concat"] = "sum"
    """How the three axes become one token."""
    keep_block: bool = True
    """Keep the block convolution beside the tubes."""

    def __post_init__(self) -> None:
        if self.deformable and self.taps == 1:
            raise ValueError("a tube of one tap cannot bend; give more `taps`, or deformable=false")


Tokens = Annotated[BlockTokens | TubularTokens, Field(discriminator="kind")]
"""Any tokenizer, selected by `kind`."""


@config
class FeatureTubesConfig:
    """Tubes on the features of the encoder's middle level, as a residual branch (models/feature_tubes.py)."""

    kind: Literal["straight", "deformable"] = "deformable"
    """Whether the tubes bend; the bends start at zero."""
    taps: Annotated[int, Field(ge=3)] = 9
    """Taps of a tube, odd."""
    width: Annotated[int, Field(ge=1)] = 16
    """Channels inside the branch."""
    extent: Annotated[float, Field(gt=0)] = 1.0
    """[voxel of the level] Largest sideways step of a tube between neighboring taps."""

    def __post_init__(self) -> None:
        if self.taps % 2 == 0:
            raise ValueError(f"a tube on features has an odd number of taps, not {self.taps}")


@config
class StudentConfig:
    """The 3D student (models/student.py)."""

    size: Literal["tiny", "small", "base", "large"] = "tiny"
    """Width, heads and depth of the transformer, and channels of the convolutional path."""
    depth: Positive | None = None
    """Transformer blocks; none: the size's own. A student with fewer than the teacher takes the first ones."""
    patch: tuple[Positive, Positive, Positive] = (8, 16, 16)
    """[voxel] Block of one token, z y x."""
    unshuffle: tuple[Positive, Positive, Positive] = (1, 2, 2)
    """[voxel] Block folded into channels before the first convolution; (2, 2, 2) suits isotropic voxels."""
    channels: tuple[Positive, Positive, Positive] | None = None
    """Channels of the convolutional path, finest level first; none: the size's own."""
    transformer: bool = True
    """Run the transformer; false leaves the convolutional path alone, as a control."""
    tokenizer: Tokens = BlockTokens()
    """How a block of voxels becomes a token."""
    tubes: FeatureTubesConfig | None = None
    """Tubes on encoder features; null: none."""
    positions: Literal["grid", "rotary"] = "grid"
    """Learned table shared over depth (DINO, DINOv2, MAE, supervised teachers), or 3D rotary (DINOv3)."""
    grid: tuple[Positive, Positive, Positive] = (8, 14, 14)
    """[token] Size of the learned position tables, z y x; they are resampled to each crop's tokens."""
    class_token: bool = True
    """Run a class token beside the patch tokens, as the teacher does."""
    registers: Annotated[int, Field(ge=0)] = 0
    """Register tokens; as many as the teacher has."""
    layer_scale: bool = False
    """Give blocks a layer scale; as the teacher (DINOv2 and DINOv3 have it)."""
    norm_eps: float = 1e-6
    """Epsilon of the transformer's norms; as the teacher (DINOv3: 1e-5)."""
    drop_path: Share = 0.0
    """Drop-path rate of the last block, falling linearly to 0 at the first."""
    checkpointing: bool = False
    """Recompute each transformer block in the backward pass: less memory, a third more time."""

    @property
    def width(self) -> tuple[int, int, int]:
        """Channels, blocks and heads of the transformer."""
        dim, depth, heads = SIZES[self.size]
        return dim, self.depth or depth, heads

    @property
    def level_channels(self) -> tuple[int, int, int]:
        """Channels of the convolutional path, finest level first."""
        return self.channels or CHANNELS[self.size]


_Widths = tuple[Annotated[float, Field(gt=0)] | None, Annotated[float, Field(gt=0)]]
_Sides = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


@with_config(ConfigDict(extra="allow"))
class _ExtraForm(TypedDict, total=False):
    """What is read of `SavedStudent.extra`."""

    window: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    threshold: Annotated[float, Field(ge=0, le=1)]
    contrast: Contrast
    voxel_sizes: tuple[_Sides, _Sides]
    neurite_widths: tuple[_Widths, _Widths, _Widths] | None


@config
class SavedStudent:
    """Content of student.yaml."""

    student: StudentConfig
    """The network."""
    code: str
    """Version of the package that saved it."""
    extra: Annotated[dict[str, Any], Field(default_factory=dict)]
    """What the trainer adds: `window` (training crop), normalization, threshold, step ..."""
    sha256: str = ""
    """Of model.safetensors; "": saved by a version that did not note it."""

    def __post_init__(self) -> None:
        try:
            TypeAdapter(_ExtraForm).validate_python(self.extra)
        except ValidationError as error:
            # The first one tells enough of a file that a program wrote.
            fault = error.errors()[0]
            key = ".".join(map(str, ("extra", *fault["loc"])))
            raise ValueError(
                f"{key}: {fault['msg']}, found {str(fault['input'])[:60]}; train the student again"
            ) from None


@config
class TeacherConfig:
    """The frozen 2D vision transformer that gives weights and features (models/teacher.py)."""

    model: str = "bundled"
    """`bundled` (in the package; `bundled8`: one with patches of 8 pixels), `trained` (by `hpc-neuro teacher`, which
    wrote the folder `weights`), `random` (untrained `arch`), or any timm ViT, e.g. vit_small_patch16_224.dino."""
    weights: Path | None = None
    """Weights of `model`: a file (.safetensors, .pth, .bin) or the folder fetch-teacher wrote; none: timm's hub."""
    sha256: str | None = None
    """Hex digest that the weights file must have."""
    arch: str = "vit_tiny_patch16_224"
    """timm architecture of `model: random`."""
    seed: int = 0
    """Seed of the weights of `model: random`."""

    def __post_init__(self) -> None:
        # A setting without effect is an error, because its author believes that it has one.
        if self.weights and self.model in (*BUNDLED, "random"):
            raise ValueError(f"`weights` needs `model` to name the timm architecture in the file, not `{self.model}`")

        if self.model == "trained" and not self.weights:
            raise ValueError("`model: trained` needs `weights`, the folder that `hpc-neuro teacher` wrote")

        if self.model != "random" and (self.arch, self.seed) != (TeacherConfig.arch, TeacherConfig.seed):
            raise ValueError(f"`arch` and `seed` are those of `model: random`, a `{self.model}` teacher has its own")

        if self.sha256 and self.model == "random":
            raise ValueError("`sha256` has no file to check with `model: random`")


@config
class TransferConfig:
    """How the teacher's weights become the student's (models/inflate.py)."""

    rule: Literal["scratch", "untrained", "shuffled", "average", "center", "tubular", "deformable_tubular"] = "average"
    """3D form of the patch kernel. Three controls: `scratch` leaves the whole student at its random start; `untrained`
    and `shuffled` transfer random weights in the teacher's form, and the teacher's own weights in random order within
    each tensor, by the rule that fits the tokenizer."""
    flatten: Order = "boustrophedon"
    """Order in which the tubular rules flatten the patch; boustrophedon keeps neighboring taps neighbors."""
    block: Literal["zero", "average", "center"] = "zero"
    """Start of the block kernel that a tubular tokenizer may keep beside its tubes; zero: with the tubes alone."""
    blocks: bool = True
    """Also transfer transformer blocks, norms, tokens and positions; false: the patch kernel alone."""
