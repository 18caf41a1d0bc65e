"""What `evaluate` compares and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.tracing import TraceConfig


@config
class EvaluateConfig:
    """Predictions against the truth of a store, beside an Otsu threshold of the raw image."""

    store: Path
    """The folder that `prepare` wrote: images, gold masks and gold trees."""
    predictions: Path
    """The folder that `infer` wrote; reported as `model`."""
    out: Path
    """Run folder: metrics.json, metrics.csv, metrics.tex, report.html, pictures/."""
    compare: dict[str, list[Path]] = Field(default_factory=dict)
    """More `infer` folders by the name to report them under; several folders of one name are seeds of one model, whose
    scores are averaged neuron by neuron. Under the name `model` stand more seeds of `predictions`."""
    split: Literal["train", "val", "test"] = "test"
    """Which of the store's neurons are scored."""
    otsu: bool = True
    """Score Otsu's threshold of the raw image too, its mask traced from the same root."""
    trace: TraceConfig | None = None
    """How Otsu's mask is traced; none: with the settings that `infer` recorded, so that both are traced alike."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Probability from which a voxel is foreground; none: the one that `infer` recorded."""
    tolerance_vox: float = Field(default=4.0, gt=0)
    """[voxel] How near cable must lie to count as found; in the names of the keys (`f1_4vox`)."""
    tolerance_um: float | None = Field(default=None, gt=0)
    """[um] A second tolerance, in micrometres, whose scores are given beside (`f1_2um`); none: no second one."""
    draws: int = Field(default=10_000, ge=100)
    """How often the bootstrap draws neurons anew."""
    seed: int = 0
    """Seed of the bootstrap."""
    pictures: int = Field(default=12, ge=0)
    """How many neurons are shown in pictures, the worst ones first."""
    whole: int = Field(default=1 << 30, ge=1)
    """[voxel] Masks of larger volumes are compared block by block: memory then does not grow with the volume."""
    share: tuple[int, int] | None = None
    """[i, n]: do every n-th volume from the i-th and no more, with a record in OUT/shares; for tasks of job arrays. The
    same command without it afterwards gathers what they made."""
    train: Path | None = None
    """The folder that `train` wrote, for its learning curves; none: the one that `infer` recorded, if it is there."""

    def __post_init__(self) -> None:
        for name in self.compare:
            if name in ("otsu", "gold"):
                raise ValueError(f"compare.{name}: this name is taken; choose another for these predictions")
        if empty := [name for name, folders in self.compare.items() if not folders]:
            raise ValueError(f"compare.{empty[0]}: no folder is given")
