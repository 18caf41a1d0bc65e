"""The root configs of `teacher train` and `teacher continue`. Importing them takes no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.core.types import Contrast
from hpc_neuro.models.config import TeacherConfig

TRAINED_SIZE = 224
"""[pixel] Side of the images that timm builds a new teacher for."""

MIN_HELD = 4
"""Least photographs that are held out for the probes."""


@config
class TaskConfig:
    """What a teacher has to predict, of which part of an image."""

    crop: int = Field(default=64, ge=8, le=TRAINED_SIZE)
    """[pixel] Side of a training crop, a multiple of the teacher's patch."""
    mask: float = Field(default=0.4, gt=0, lt=1)
    """Share of the patches that are hidden."""
    visible_weight: float = Field(default=0.5, ge=0)
    """Weight of a visible patch's error beside a hidden one's; the objective `pixels` has hidden patches only."""

    def count_visible(self, patch: int) -> int:
        """Patches of a crop that the teacher sees."""
        return max(1, round((self.crop // patch) ** 2 * (1 - self.mask)))

    def find_fault(self, patch: int) -> str | None:
        """A sentence on a crop that does not fit the patch, or None."""
        if self.crop % patch or self.crop < 2 * patch:
            return f"task.crop is {self.crop}, want a multiple of the patch of {patch} pixels, at least {2 * patch}"
        return None


@config
class TeacherOptimConfig:
    """How a teacher learns."""

    minutes: float = Field(default=60.0, gt=0)
    """[min] Budget of training; the learning rate follows the minutes trained, so that a resumed run has other bits."""
    steps: int | None = Field(default=None, ge=1)
    """Budget in steps, which replaces `minutes`; a resumed run then ends with the same bits, on the same CPU."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate of AdamW."""
    decay: float = Field(default=0.05, ge=0)
    """Weight decay; biases, norms and single tokens are not decayed."""
    warmup: float = Field(default=0.05, ge=0, lt=0.5)
    """Share of the budget over which the learning rate rises. `teacher continue` first trains only what predicts, for
    this share, and then lets the teacher's own rate rise for as long."""
    batch: int = Field(default=32, ge=1)
    """Images of a step."""
    part: int = Field(default=16, ge=1)
    """Images that one CPU worker takes at a time."""
    seed: int = 0
    """Seed of weights, crops and masks."""

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent after `step` steps and `seconds` of training."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate(self, progress: float) -> float:
        """Learning rate: a linear rise, then half a cosine down to a thousandth."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 1e-3)
        rest = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * max(0.5 * (1 + math.cos(math.pi * rest)), 1e-3)

    def rate_after_head(self, progress: float) -> float:
        """Learning rate of a teacher that is continued: 0 while only what predicts from it learns, then as `rate`."""
        return 0.0 if progress < self.warmup else self.rate((progress - self.warmup) / (1 - self.warmup))


@config
class ContinueOptimConfig(TeacherOptimConfig):
    """How a teacher goes on learning: shorter, and at a lower rate."""

    minutes: float = Field(default=30.0, gt=0)
    """[min] Budget of training; the learning rate follows the minutes trained, so that a resumed run has other bits."""
    lr: float = Field(default=3e-4, gt=0)
    """Highest learning rate of AdamW."""


@config
class JudgeConfig:
    """Volumes with trees on which the gate judges the finished teacher; the figures go into its card."""

    store: Path | None = None
    """The folder that `prepare` wrote; none: the teacher is not judged. `hpc-neuro teacher probe` judges it later."""
    volumes: tuple[str, ...] = ()
    """Ids of the volumes; empty: two of those that can be judged and that the teacher was not continued on."""


@config
class TeacherTrainConfig:
    """A new teacher, from a folder of photographs."""

    photos: Path
    """Folder of photographs (JPEG, PNG, WebP), searched with its subfolders."""
    out: Path
    """Folder of the teacher; then `teacher.model=trained teacher.weights=OUT`."""
    objective: Literal["structure", "pixels"] = "structure"
    """What is predicted: `structure`, the ridges, gradients, directions and brightness of hidden and visible patches
    (rotary positions); `pixels`, those of hidden patches (masked autoencoder, a table of positions)."""
    patch: Literal[8, 16, 28, 32] = 8
    """[pixel] Side of a patch, which is one token."""
    depth: int = Field(default=6, ge=1)
    """Transformer blocks of timm's ViT-Tiny, of which timm's own has 12."""
    side: int = Field(default=128, ge=16)
    """[pixel] Side of the square tiles that photographs are decoded to."""
    held: int = Field(default=100, ge=MIN_HELD)
    """Photographs that are never trained on, for the probes in the card."""
    about: str = "not stated"
    """Words for the card: what the photographs are, and under which terms they are used."""
    license: str = "not stated"
    """License of the weights, for the card."""
    task: TaskConfig = Field(default_factory=TaskConfig)
    """Crops and masks."""
    optim: TeacherOptimConfig = Field(default_factory=TeacherOptimConfig)
    """Budget and rates."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """The gate at the end."""
    every: float = Field(default=120.0, ge=0)
    """[s] Between two checkpoints, each with weights that can be judged already."""
    log: int = Field(default=50, ge=1)
    """Steps between two lines of progress."""
    threads: int = Field(default=0, ge=0)
    """CPU workers; 0: one per core."""

    def __post_init__(self) -> None:
        fault = self.task.find_fault(self.patch)
        if fault:
            raise ValueError(fault)


@config
class TeacherContinueConfig:
    """A teacher that goes on learning on unlabeled volumes."""

    volumes: tuple[Path, ...] = Field(min_length=1)
    """Volumes without labels: stores of `prepare`, files of any format that is read, folders of them, and patterns."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The teacher to start from: one in the package, `trained`, or a timm ViT with rotary positions (DINOv3)."""
    out: Path
    """Folder of the teacher; then `teacher.model=trained teacher.weights=OUT`."""
    splits: tuple[Literal["train", "val", "test"], ...] = ("train",)
    """Splits of stores whose volumes are used."""
    channel: int | None = Field(default=None, ge=0)
    """Channel of files that have several."""
    axes: str | None = None
    """Stored axes of files that do not name them, such as ZYX."""
    contrast: Contrast = "range"
    """How brightness of files becomes 0 to 1: as the student is to see it. A store has its own."""
    windows: int = Field(default=4096, ge=1)
    """Windows that are cut from slices along z, of all volumes together, as many from each; half of them around bright
    voxels. Those of the last tenth of the slices of a volume are never trained on."""
    side: int = Field(default=128, ge=16)
    """[pixel] Side of the windows, and of the tiles of photographs."""
    photos: Path | None = None
    """Folder of photographs that are shown beside the slices."""
    photo_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of photographs in a batch; needs `photos`."""
    held: int = Field(default=100, ge=MIN_HELD)
    """Photographs that are never trained on."""
    about: str = "not stated"
    """Words for the card: what the volumes are, and under which terms they are used."""
    license: str | None = None
    """License of the weights, for the card; none: that of the teacher to start from."""
    task: TaskConfig = Field(default_factory=TaskConfig)
    """Crops and masks."""
    optim: ContinueOptimConfig = Field(default_factory=ContinueOptimConfig)
    """Budget and rates."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """The gate at the end."""
    every: float = Field(default=120.0, ge=0)
    """[s] Between two checkpoints, each with weights that can be judged already."""
    log: int = Field(default=50, ge=1)
    """Steps between two lines of progress."""
    threads: int = Field(default=0, ge=0)
    """CPU workers; 0: one per core."""
