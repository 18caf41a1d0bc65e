"""The settings of tracing."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Shape, VoxelSize, fine_voxel
from hpc_neuro.core.schema import config


@config
class TraceConfig:
    """How a probability becomes trees. Lengths are in voxels of the chosen metric."""

    threshold: float = 0.5
    """[probability] A branch must reach this somewhere along a stretch."""
    low: float | None = None
    """[probability] Voxels down to this belong to a branch that reaches `threshold` elsewhere (hysteresis); none: 0.6
    of `threshold`."""
    metric: Literal["voxel", "um"] = "voxel"
    """`voxel`: lengths count voxels alike along z, y, x, which suits optics whose blur grows with the z step;
    `um`: lengths are physical, in fine voxels, which suits labels without optical blur."""
    block: Shape = (128, 256, 256)
    """[voxel] What is skeletonized at once, besides a halo of 32 voxels; memory follows it, and the trees hardly depend
    on it (docs/infer.md, Skeletons of blocks)."""
    super_block: Shape = (8, 8, 8)
    """[block] `infer` traces a volume larger than this many blocks in super-blocks, side by side on all ranks; memory
    follows it, and the trees hardly depend on it (docs/infer.md, Large volumes)."""
    min_voxels: int = 12
    """[voxel] Connected components of fewer voxels are noise."""
    min_branch: float = 5.0
    """[voxel] A side branch must reach this far out of the surface of the branch it leaves."""
    gap: float = 20.0
    """[voxel] Longest gap that is bridged straight ahead; 0 bridges none. Bends, and pieces shorter than the gap, lower
    it (docs/infer.md, Gaps)."""
    signal_gap: float = 35.0
    """[voxel] Longest gap that is bridged along a neurite that the image still shows; 0 bridges none."""
    root_snap: float = 10.0
    """[voxel] A given root may lie this far off the foreground."""
    root_is_end: bool | None = None
    """Whether a given root is the end of the neuron; cable on its far side is then left out. none: decided for each
    root. It is the end where an unbranched cable leads to it from the border of the volume and all branches lie on the
    other side. A soma is never an end."""
    contacts: bool = True
    """Cut neighbors off the tree of a given root, where neurites cross and touch (docs/infer.md, Neighbors); each cut
    is listed for proofreading."""
    crowd: bool | None = None
    """Whether the volume shows several neurons, so that most of what touches the one with the root is a neighbor's
    (docs/infer.md, Neighbors). none: decided from the volume, where one root is given."""
    min_cable: float = 30.0
    """[voxel] Without a given root, trees of less cable are dropped."""
    smooth: float = 1.0
    """[node] Standard deviation of the Gaussian that smooths paths along their length; 0 keeps the staircase."""

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.threshold <= 1:
            raise ValueError(
                f"low ({self.low}) and threshold ({self.threshold}) must satisfy 0 < low <= threshold <= 1"
            )

        if min(self.block) < 8:
            raise ValueError(f"block {list(self.block)} must be at least 8 voxels along each axis")

        if min(self.super_block) < 1:
            raise ValueError(f"super_block {list(self.super_block)} must be at least 1 block along each axis")

        for name in ("min_branch", "gap", "signal_gap", "root_snap", "min_cable", "smooth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")

    @property
    def floor(self) -> float:
        """The lower threshold of the hysteresis."""
        return 0.6 * self.threshold if self.low is None else self.low

    def spacing(self, voxel_size: VoxelSize) -> NDArray[np.float64]:
        """[3] length of one voxel along z, y, x in the metric's unit."""
        return measure_physical_spacing(voxel_size) if self.metric == "um" else np.ones(3)


def measure_physical_spacing(voxel_size: VoxelSize) -> NDArray[np.float64]:
    """[3] length of one voxel along z, y, x in fine voxels."""
    return np.asarray(voxel_size, dtype=np.float64) / fine_voxel(voxel_size)
