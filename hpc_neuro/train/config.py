"""Configuration of `train`, all sections in one file. It does not import torch: a config error is shown at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.data.config import AugmentConfig, CropConfig
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.losses import CrossEntropy, Dice, Distill, Loss
from hpc_neuro.models.config import StudentConfig, TeacherConfig, TransferConfig


@config
class OptimConfig:
    """AdamW, its learning rate schedule, and the number of crops in a step (train/optim.py)."""

    steps: int = Field(default=2000, ge=1)
    """[step] Optimizer steps of the whole run; raise it to continue a finished run."""
    batch: int = Field(default=4, ge=1)
    """[crop] Crops per step over all ranks; smaller passes are accumulated (engine.micro_batch)."""
    lr: float = Field(default=4e-3, gt=0)
    """Peak learning rate of the convolutional path, the decoder and the heads."""
    vit_lr: float = Field(default=0.15, gt=0)
    """Learning rate of the last transformer block when its weights were transferred, relative to `lr`."""
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Learning rate of each transferred block relative to the next one; 1: all blocks alike."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero; then a cosine leads to 1 % of `lr`."""
    init_lr: float = Field(default=0.25, gt=0, le=1)
    """Learning rate of the parameters that `init` gave, relative to `lr`."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of matrices and kernels; biases, norms and embeddings have none."""
    clip: float = Field(default=1.0, ge=0)
    """Largest 2-norm of the gradient over all parameters; a longer one is scaled down to it; 0: no clipping."""


@config
class EmaConfig:
    """Exponential moving average of the weights: what is validated and exported (train/optim.py)."""

    window: float = Field(default=0.1, ge=0, lt=1)
    """Share of `optim.steps` averaged over, at first a tenth of the steps done; 0: off."""


@config
class EngineConfig:
    """How DeepSpeed spreads the work over ranks, and the precision (train/deepspeed)."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 shards nothing over ranks, 1 optimizer state, 2 also gradients, 3 also parameters."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of activations and working weights; master weights are float32. auto: bf16 on a GPU with native bf16,
    else fp32."""
    micro_batch: int | None = Field(default=None, ge=1)
    """[crop] Most crops per rank and pass; none: optim.batch / ranks. Passes are accumulated to optim.batch crops on
    any number of ranks."""
    offload_optimizer: bool = False
    """Keep optimizer state and its step in host memory; needs a GPU and stage 1 to 3."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters wait between passes at stage 3: in GPU memory, in host memory, or as files in `nvme`."""
    nvme: Path | None = None
    """Folder on a fast disk of each node for offload_parameters=nvme, with or without a GPU; needs libaio, and once
    some minutes of a C++ compiler (see hpc-neuro doctor)."""
    timeout: float = Field(default=600.0, gt=0)
    """[s] A collective operation that takes longer ends the run: a rank is alive but does not join it."""
    silence: float = Field(default=30.0, ge=1)
    """[s] A rank whose process gives no sign of life for this long is lost; the others name it and end within 1.6
    times this time of its last sign."""


@config
class ValidateConfig:
    """Validation on fixed crops of `val` (of `train` if `val` is empty), from step 0 on (train/validate.py)."""

    every: int = Field(default=250, ge=1)
    """[step] Interval of validations."""
    crops: int = Field(default=16, ge=1)
    """[crop] Validation crops over all ranks: half around the centerline, half anywhere."""
    volumes: bool = True
    """At milestones (checkpoint.milestone) also score each whole volume of the `val` split, all ranks together."""


@config
class CheckpointConfig:
    """When a checkpoint is saved, and which are kept (train/checkpoint)."""

    every: int = Field(default=500, ge=0)
    """[step] Interval of checkpoints; 0: only by the clock, on a signal and at the end."""
    minutes: float = Field(default=10.0, ge=0)
    """[min] Longest time between checkpoints; 0: only by steps."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept, besides the best validated one and the milestones."""
    milestone: int = Field(default=0, ge=0)
    """[step] Save a checkpoint at each multiple of this and never remove it; 0: none."""
    metric: Literal["dice_best", "dice", "precision", "recall"] = "dice_best"
    """Validation metric that selects the best checkpoint and weights/best. dice_best is the Dice at the best
    threshold."""
    margin: float = Field(default=120.0, ge=0)
    """[s] Stop and save this long before the time limit: that of the Slurm job (SLURM_JOB_END_TIME) or `walltime`."""
    background: bool = True
    """Train on while a checkpoint is written from a copy in host memory; the last one of a run is always waited for."""
    walltime: float = Field(default=0.0, ge=0)
    """[min] Time limit of one start of the run where Slurm does not set one; 0: none."""


@config
class TrackerConfig:
    """Logging to metrics.jsonl, the console and Weights & Biases (train/tracker.py)."""

    every: int = Field(default=10, ge=1)
    """[step] Interval at which rows are written and a line is printed; each step has its own row."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: offline files in OUT/wandb (`wandb sync` them from a login node), online, or disabled."""
    project: str = "hpc_neuro"
    """Weights & Biases project."""
    name: str | None = None
    """Weights & Biases run name; none: the name of the output folder."""
    group: str | None = None
    """Weights & Biases group: runs of one study or one chain; none: no group."""
    pictures: int = Field(default=2, ge=0)
    """Fixed validation crops shown in Weights & Biases: image, truth and probability."""
    patience: float = Field(default=30.0, ge=0)
    """[s] Longest wait at the end of a run for Weights & Biases to take the last rows."""
    profile: tuple[int, int] | None = None
    """[step] First and last step of which every rank writes a trace of torch's profiler, and on a GPU a snapshot of its
    memory, to OUT/profile; none: no trace."""

    def __post_init__(self) -> None:
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile {list(self.profile)} must be a first and a last step, such as [20, 24]")


@config
class PlanConfig:
    """The machine that --dry-run plans for. It changes nothing in a run (train/memory_plan.py)."""

    nodes: int = Field(default=1, ge=1)
    """Nodes."""
    gpus: int | None = Field(default=None, ge=1)
    """GPUs per node; none: as many ranks as this start has, on this machine."""
    memory: float = Field(default=80.0, gt=0)
    """[GB] Memory of one GPU."""

    def __post_init__(self) -> None:
        if self.gpus is None and self.nodes > 1:
            raise ValueError(f"`nodes` is {self.nodes}, but `gpus` is not set; give the GPUs of a node, too")

    @property
    def ranks(self) -> int | None:
        """Ranks of the planned machine; None if none is planned."""
        return None if self.gpus is None else self.nodes * self.gpus


@config
class TrainConfig:
    """A 3D student trained on a store, from a 2D teacher's weights and, with a cache, towards its features."""

    store: Path
    """The folder that `prepare` wrote."""
    out: Path
    """Run folder: metrics.jsonl, checkpoints/, weights/best and weights/last."""
    cache: Path | None = None
    """The folder that `precompute` wrote; required for distillation."""
    init: Path | None = None
    """Student to start from: `bundled`, the folder of a finished run, or one of its weights folders. What it lacks,
    such as a transformer, is added without changing what it predicts; none: a new student."""
    freeze: tuple[Literal["encoder", "decoder", "transformer"], ...] = ()
    """Parts of the student that stay as `init` gave them."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    """The network to train."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The 2D network whose weights are transferred and whose features the cache holds."""
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    """How the teacher's weights become the student's."""
    losses: tuple[Loss, ...] = Field(default_factory=lambda: (Dice(), CrossEntropy()))
    """Segmentation losses, summed with their weights."""
    distill: Distill | None = Field(default_factory=Distill)
    """Distillation of the teacher's features; null: none."""
    distill_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of crops that are distilled: these lie on the token grid and are never mirrored or bent."""
    crop: CropConfig = Field(default_factory=CropConfig)
    """Size and sampling of the crops."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    """Augmentation of the crops."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Steps, batch size, learning rates."""
    ema: EmaConfig = Field(default_factory=EmaConfig)
    """Running average of the weights."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """DeepSpeed."""
    validate: ValidateConfig = Field(default_factory=ValidateConfig)
    """Validation during training."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)
    """Logging."""
    plan: PlanConfig = Field(default_factory=PlanConfig)
    """The machine that --dry-run plans for."""
    workers: int | None = Field(default=None, ge=0)
    """Processes per rank that read crops; 0: a thread; none: a thread on a CPU, 4 processes beside a GPU."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of samples, augmentation, initial weights and drop path."""

    def __post_init__(self) -> None:
        # All faults are reported together, so that one correction is enough.
        faults = [*self._check_crop(), *self._check_losses()]
        if self.freeze and self.init is None:
            faults.append("freeze keeps parts of a trained student, and there is none; give init=bundled or init=RUN")
        if faults:
            raise ValueError("; ".join(faults))

    def _check_crop(self) -> list[str]:
        """Faults of the crop size."""
        faults = []
        size, patch = self.crop.size, self.student.patch

        if any(n % p for n, p in zip(size, patch, strict=True)):
            faults.append(f"crop.size {list(size)} must be a multiple of student.patch {list(patch)}")

        # A rotation by 90 degrees swaps y and x, so both must have the same size.
        swapped = [name for name in self.augment.distilled or () if parse_orientation(name).swap]
        if swapped and (size[1] != size[2] or patch[1] != patch[2]):
            faults.append(
                f"augment.distilled has {', '.join(swapped)}, but y and x of crop.size {list(size)} or "
                f"student.patch {list(patch)} differ, so that no crop can be rotated by 90 degrees; leave it out"
            )
        return faults

    def _check_losses(self) -> list[str]:
        """Faults of losses and distillation."""
        faults = []

        if self.distill is not None and self.cache is None:
            faults.append(
                "distill needs teacher features: give `cache` (see hpc-neuro precompute), or set distill=null"
            )

        # Distillation alone is a valid run, so one weight above 0 is enough.
        parts = [*self.losses, *([self.distill] if self.distill else [])]
        if not any(part.weight > 0 for part in parts):
            faults.append(
                "no loss has a weight above 0: there is nothing to learn; give `losses` or `distill` a weight"
            )
        return faults
