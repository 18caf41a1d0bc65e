"""What `evaluate` compares and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.constants import TOLERANCE_VOX
from hpc_neuro.core.schema import config
from hpc_neuro.metrics import list_metrics, list_voxel_metrics
from hpc_neuro.metrics.metric import Metric, tolerance_key


@config
class EvaluateConfig:
    """Predictions against the gold standard of a store, beside an Otsu threshold of the raw image."""

    store: Path
    """The folder that `prepare` wrote: images, gold masks and gold trees."""
    predictions: Path
    """The folder that `infer` wrote; reported as `model`."""
    out: Path
    """Run folder: metrics.json, metrics.csv, metrics.tex, report.html, pictures/."""
    compare: dict[str, list[Path]] = Field(default_factory=dict)
    """More `infer` folders by the name to report them under; several folders of one name are seeds of one model, whose
    scores are averaged neuron by neuron. The name `model` adds seeds to `predictions`."""
    split: Literal["train", "val", "test"] = "test"
    """Which of the store's neurons are scored."""
    otsu: bool = True
    """Score Otsu's threshold of the raw image too, its mask traced from the same root with the settings that `infer`
    recorded, so that both are traced alike."""
    trees: bool = True
    """Score the trees as well as the voxels. Volumes that were prepared from labels have no tree: where the split holds
    one, only voxels are scored, and the report says so."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Probability from which a voxel is foreground; none: the one that `infer` recorded."""
    tolerance_vox: float = Field(default=TOLERANCE_VOX, gt=0)
    """[voxel] How near cable must lie to count as found; part of the keys (`f1_4vox`)."""
    tolerance_um: float | None = Field(default=None, gt=0)
    """[um] A second tolerance, in micrometers, with scores of its own (`f1_2um`); none: no second one."""
    draws: int = Field(default=10_000, ge=100)
    """How often the bootstrap draws the neurons."""
    pictures: int = Field(default=12, ge=0)
    """How many neurons are shown in pictures, the worst ones first."""
    share: tuple[int, int] | None = None
    """[i, n]: score every n-th volume from the i-th only, with a record in OUT/shares; for tasks of job arrays. The
    same command without it afterwards gathers the scores."""
    train: Path | None = None
    """The folder that `train` wrote, for its learning curves; none: the one that `infer` recorded, if it exists."""

    def __post_init__(self) -> None:
        # These names have columns of their own in every table.
        for name in self.compare:
            if name in ("otsu", "gold"):
                raise ValueError(f"compare.{name}: this name is taken; choose another for these predictions")

        # A model without predictions would be a method without scores.
        if empty := [name for name, folders in self.compare.items() if not folders]:
            raise ValueError(f"compare.{empty[0]}: no folder is given")

    def list_metrics(self) -> list[Metric]:
        """All metrics of a run, with its tolerances in keys and texts."""
        if not self.trees:
            return list_voxel_metrics()
        return list_metrics(self.tolerance_vox, self.tolerance_um)

    @property
    def f1_key(self) -> str:
        """Key of the F1 at the tolerance in voxels."""
        return tolerance_key("f1", self.tolerance_vox)

    @property
    def rank_key(self) -> str:
        """Key of the metric by which neurons are ranked: F1, or Dice where no tree is scored."""
        return self.f1_key if self.trees else "dice"

    @property
    def rank_name(self) -> str:
        """That metric, in words."""
        return "F1" if self.trees else "Dice"
