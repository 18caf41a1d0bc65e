"""The root config of `train`; each section is owned by the file that uses it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.data.augment import AugmentConfig
from hpc_neuro.data.crops import CropConfig
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.losses import CrossEntropy, Dice, Distill, Loss
from hpc_neuro.models.config import StudentConfig, TeacherConfig, TransferConfig
from hpc_neuro.train.checkpoint.saver import CheckpointConfig
from hpc_neuro.train.deepspeed.config import EngineConfig
from hpc_neuro.train.ema import EmaConfig
from hpc_neuro.train.memory_plan import PlanConfig
from hpc_neuro.train.optim import OptimConfig
from hpc_neuro.train.tracker import TrackerConfig
from hpc_neuro.train.validate import ValidateConfig


@config
class TrainConfig:
    """A 3D student trained on a store, from a 2D teacher's weights and, with a cache, towards its features."""

    store: Path
    """The folder that `prepare` wrote."""
    out: Path
    """Run folder: metrics.jsonl, checkpoints/, weights/best and weights/last."""
    cache: Path | None = None
    """The folder that `precompute` wrote; needed to distil."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    """The network that is trained."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The 2D network whose weights are transferred and whose features the cache holds."""
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    """How the teacher's weights become the student's."""
    losses: tuple[Loss, ...] = Field(default_factory=lambda: (Dice(), CrossEntropy()))
    """Segmentation losses, added up by their weights."""
    distill: Distill | None = Field(default_factory=Distill)
    """Distillation of the teacher's features; null: none."""
    distill_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of crops that are distilled: on the token grid, never mirrored or bent. The others move freely."""
    crop: CropConfig = Field(default_factory=CropConfig)
    """Size of the crops and where they are taken."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    """How crops are varied."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Steps, batch, learning rates."""
    ema: EmaConfig = Field(default_factory=EmaConfig)
    """Running average of the weights."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """DeepSpeed."""
    validate: ValidateConfig = Field(default_factory=ValidateConfig)
    """Validation while training."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving."""
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)
    """Logging."""
    plan: PlanConfig = Field(default_factory=PlanConfig)
    """The machine that --dry-run plans for."""
    workers: int | None = Field(default=None, ge=0)
    """Processes per rank that read crops; 0: a thread; none: a thread on a CPU, 4 processes beside a GPU."""
    ahead: int = Field(default=4, ge=1)
    """Batches that each of them reads ahead."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything random: samples, augmentation, initial weights, drop path."""

    def __post_init__(self) -> None:
        faults = []
        if any(n % p for n, p in zip(self.crop.size, self.student.patch, strict=True)):
            faults.append(
                f"crop.size {list(self.crop.size)} must be a multiple of student.patch {list(self.student.patch)}"
            )
        turned = [name for name in self.augment.distilled or () if parse_orientation(name).swap]
        if turned and (self.crop.size[1] != self.crop.size[2] or self.student.patch[1] != self.student.patch[2]):
            faults.append(
                f"augment.distilled has {', '.join(turned)}, but y and x of crop.size {list(self.crop.size)} or "
                f"student.patch {list(self.student.patch)} differ, so that no crop can be turned; leave it out"
            )
        if self.distill is not None and self.cache is None:
            faults.append(
                "distill needs teacher features: give `cache` (see hpc-neuro precompute), or set distill=null"
            )
        if not any(part.weight > 0 for part in (*self.losses, *([self.distill] if self.distill else []))):
            faults.append("no loss has a weight above 0: there is nothing to learn; give `losses` or `distill` some")
        if faults:
            raise ValueError("; ".join(faults))
