"""The settings of `trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hpc_neuro.core.geometry import Point
from hpc_neuro.core.image_settings import GivenChannel, GivenRange, GivenVoxelSize
from hpc_neuro.core.schema import config
from hpc_neuro.data.remote_path import ImagePath
from hpc_neuro.tracing import TraceConfig

INDEX = "trace.json"
"""File of OUT that lists the stacks and their results."""
NO_MODEL = "none"
"""`model` of a stack whose brightness alone is traced."""


@config
class TraceStacksConfig:
    """Which stacks are traced, and how."""

    stacks: tuple[ImagePath, ...] = ()
    """Image files, folders of images, OME-Zarr folders or their s3://, gs:// or https:// addresses, or patterns such as
    `*.tif`; plain paths after the verb."""
    out: Path = Path("trace")
    """Folder of the results."""
    model: Path = Path("none")
    """What finds the neurites: `none`, the brightness of the image itself; `bundled`, the student in the package; or a
    student that you trained, as the folder of its run."""
    voxel_size: GivenVoxelSize | None = None
    """[um] z,y,x; none: as each file says. A stack without one is traced in voxels, and no micrometers are written."""
    any_voxel_size: bool = False
    """Whether a student sees every image as it is. Else an image whose neurites are too thin or too wide for it, in
    voxels, is resampled (docs/trace.md), and one with neurites more than 8 times as wide is refused."""
    channel: GivenChannel | None = None
    """Channel of images that have several, from 0."""
    range: GivenRange | None = None
    """Brightness that becomes 0 and 1: darker voxels count as the first, brighter ones as the second; none: all
    brightness counts as it is."""
    root: Point | None = None
    """[voxel] z,y,x where the neuron begins, for a single stack; none: its seed file, else its somas, else the thickest
    end of every piece."""
    seeds: Path | None = None
    """Seed file of Vaa3D (.marker or .apo) with a root for each neuron, for a single stack; none: a file of that kind
    beside a stack with its name, where there is one."""
    axes: str | None = None
    """Order of the stored axes, such as ZCYX, where a file does not say."""
    dataset: str | None = None
    """Array inside a file that holds several."""
    somas: bool = True
    """Whether somas are searched for where no root is given."""
    edits: Literal["keep", "set_aside"] = "set_aside"
    """What becomes of a tree in OUT/swc that you have corrected, when its stack is traced again. `keep`: it is the
    result, with what else the tracer finds, and what you deleted stays deleted. `set_aside`: it moves to
    OUT/set_aside."""
    trace: TraceConfig = TraceConfig()
    """How the foreground becomes trees."""

    def __post_init__(self) -> None:
        if not self.stacks:
            raise ValueError("no stack is given:  hpc-neuro trace STACK... [key=value ...]")
        if self.root is not None and self.seeds is not None:
            raise ValueError("give either root=z,y,x or seeds=FILE, not both")

    @property
    def has_student(self) -> bool:
        """Whether a student finds the neurites."""
        return str(self.model) != NO_MODEL
