"""The root config of `precompute`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.models.config import TeacherConfig

View = Literal["z", "y", "x"]


@config
class PrecomputeConfig:
    """Which features of which volumes to keep."""

    store: Path
    """The folder that `prepare` wrote."""
    out: Path
    """Folder of the feature cache."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The frozen 2D network."""
    splits: tuple[Literal["train", "val", "test"], ...] = ("train",)
    """Splits whose volumes get features; training reads those of `train`."""
    views: tuple[View, ...] = Field(default=("z", "y", "x"), min_length=1)
    """Axes that slices stand orthogonal to."""
    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    """Teacher blocks whose output is kept; negative ones count from the end."""
    augment_views: tuple[str, ...] = ()
    """Mirrored and turned volumes to hold as well: flip_z, flip_y, flip_x, rot90, rot180, rot270, or several joined
    by +; training mirrors and turns distilled crops only so."""
    stride_v: int = Field(default=8, ge=1)
    """[voxel] Every how many slices one is kept; features change slowly across slices."""
    scale: float = Field(default=1.0, gt=0)
    """Slices are enlarged by this factor first: tokens then stand for finer cells, at its square of the cost."""
    isotropic: bool = True
    """Stretch the coarser axis of a slice so that its pixels are square, as a photograph's are."""
    pca: int | None = Field(default=None, ge=1)
    """Principal components kept of every token, fitted per view and layer; none: all channels."""
    dtype: Literal["float16", "int8"] = "float16"
    """How values are kept; int8 has one step size per view, layer and channel."""
    sample: int = Field(default=48, ge=2)
    """Slices per view that `pca` and `int8` are fitted on."""
    tile: int = Field(default=512, ge=16)
    """[pixel] Slices larger than this are cut into tiles."""
    halo: int = Field(default=64, ge=0)
    """[pixel] Context around each tile."""
    batch: int | None = Field(default=None, ge=1)
    """Slices per teacher forward; none: 8 on a CPU, on a GPU as many as fill half of its free memory."""
    slab: int = Field(default=64, ge=1)
    """Slices per shard file."""
    silence: float = Field(default=120.0, gt=0)
    """[s] An MPI rank that gives no sign of life for so long is lost: the others say so and stop."""

    def __post_init__(self) -> None:
        if any(parse_orientation(name).swap for name in self.augment_views) and ("y" in self.views) != (
            "x" in self.views
        ):
            raise ValueError(
                f"augment_views has quarter turns, which make y slices of x slices, but views is {list(self.views)}; "
                "give both y and x, or leave the turns out"
            )
        for names in (self.splits, self.views, self.layers, self.augment_views):
            if len(set(names)) < len(names):
                raise ValueError(f"{list(names)} names something twice; give each split, view, layer, orientation once")

    @property
    def coded(self) -> bool:
        """Whether features are kept in another form than float16 of every channel."""
        return self.pca is not None or self.dtype == "int8"
