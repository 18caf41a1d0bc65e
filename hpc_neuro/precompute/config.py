"""The root config of `precompute`, and that of the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.models.config import TeacherConfig

SliceView = Literal["z", "y", "x"]
"""The axis that slices are orthogonal to."""

SAMPLES = 8
"""Samples of tiles that the gate measures."""

COPIES = 2
"""Untrained copies that the gate compares a teacher with."""


@config
class PrecomputeConfig:
    """Which features of which volumes to store."""

    store: Path
    """The folder that `prepare` wrote."""
    out: Path
    """Folder of the feature cache."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The frozen 2D network."""
    gate: Literal["require", "report", "skip"] = "require"
    """What becomes of a teacher that knows no more about neurites than its untrained copies: `require` refuses it,
    `report` prints the figures and goes on, `skip` measures nothing. `teacher.model=random` is never measured."""
    splits: tuple[Literal["train", "val", "test"], ...] = ("train",)
    """Splits whose volumes get features; training reads those of `train`."""
    views: tuple[SliceView, ...] = Field(default=("z", "y", "x"), min_length=1)
    """Axes that slices are orthogonal to."""
    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    """Teacher blocks whose output is stored; negative ones count from the end."""
    augment_views: tuple[str, ...] = ()
    """Mirrored and turned volumes to store as well: flip_z, flip_y, flip_x, rot90, rot180, rot270, or several joined
    by +; training mirrors and turns distilled crops only in these ways."""
    stride_v: int = Field(default=8, ge=1)
    """[voxel] One slice is stored out of this many; features change slowly across slices."""
    scale: float = Field(default=1.0, gt=0)
    """Slices are enlarged by this factor first: tokens then stand for finer cells, at its square of the cost."""
    pca: int | None = Field(default=None, ge=1)
    """Principal components stored of every token, fitted per view and layer; none: all channels."""
    position_free: bool = True
    """Store f(slice) - f(black slice): a teacher's features are mostly the place of a token, which is no knowledge."""
    dtype: Literal["float16", "int8"] = "float16"
    """How values are stored; int8 has one step size per view, layer and channel."""
    tile: int = Field(default=512, ge=16)
    """[pixel] Slices larger than this are cut into tiles."""
    halo: int = Field(default=64, ge=0)
    """[pixel] Context around each tile."""
    batch: int | None = Field(default=None, ge=1)
    """Slices per teacher forward; none: 8 on a CPU, on a GPU as many as fill half of its free memory."""
    slab: int = Field(default=64, ge=1)
    """Slices per shard file."""
    silence: float = Field(default=120.0, gt=0)
    """[s] An MPI rank without a sign of life for this long is lost: the other ranks name it and stop."""

    def __post_init__(self) -> None:
        # A quarter turn makes the y slices of the oriented volume from x slices of the stored one.
        has_quarter_turn = any(parse_orientation(name).swap for name in self.augment_views)
        if has_quarter_turn and ("y" in self.views) != ("x" in self.views):
            raise ValueError(
                f"augment_views has quarter turns, which make y slices of x slices, but views is {list(self.views)}; "
                "give both y and x, or leave the turns out"
            )

        # A repeated name would build the same shards twice.
        for names in (self.splits, self.views, self.layers, self.augment_views):
            if len(set(names)) < len(names):
                raise ValueError(f"{list(names)} names something twice; give each split, view, layer, orientation once")

    @property
    def is_compressed(self) -> bool:
        """Whether features are stored in another form than float16 of every channel."""
        return self.pca is not None or self.dtype == "int8"


@config
class GateConfig:
    """Which teacher to judge on which volumes: the arguments of `hpc-neuro doctor teacher=... store=...`."""

    store: Path
    """The folder that `prepare` wrote."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """The frozen 2D network; `teacher=NAME` is short for `teacher.model=NAME`."""
    volumes: tuple[str, ...] = ()
    """Ids of the volumes; empty: two of those that can be judged."""
    layer: int = -1
    """The teacher's block; negative ones count from the end."""
    samples: int = Field(default=SAMPLES, ge=1)
    """Samples of tiles."""
    copies: int = Field(default=COPIES, ge=1)
    """Untrained copies."""
