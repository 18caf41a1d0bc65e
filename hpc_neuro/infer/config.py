"""The settings of `infer`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Point, Shape
from hpc_neuro.core.image_names import find_clash, strip_ending
from hpc_neuro.core.image_settings import GivenChannel, GivenRange, GivenVoxelSize
from hpc_neuro.core.schema import config
from hpc_neuro.data.orientation import parse_orientation
from hpc_neuro.data.remote_path import ImagePath
from hpc_neuro.tracing import TraceConfig


@config
class VolumeConfig:
    """One volume that is not in a store."""

    image: ImagePath
    """File, folder or address that `hpc-neuro info` can open."""
    id: str | None = None
    """Name of its results; none: the file's name without its ending."""
    voxel_size: GivenVoxelSize | None = None
    """[um] z, y, x; none: as the file says."""
    root: Point | None = None
    """[voxel] z, y, x where the neuron begins; none: every piece that is long enough becomes a tree."""
    roots: tuple[Point, ...] = ()
    """[voxel] Where several neurons begin: each becomes one tree, and pieces that connect them are cut between them."""
    channel: GivenChannel | None = None
    """Channel of an image that has several."""
    axes: str | None = None
    """Order of the stored axes, such as ZCYX, where the file does not say."""
    dataset: str | None = None
    """Array inside the file, where there are several."""
    range: GivenRange | None = None
    """Brightness that becomes 0 and 1; none: measured, which reads all voxels once. Give it for a whole brain in an
    array job, where every task would measure."""
    overview: str | None = None
    """Array inside the file that is a coarser level of `dataset`; empty blocks are then found without reading them."""

    def __post_init__(self) -> None:
        if self.root is not None and self.roots:
            raise ValueError("give either root=[z, y, x] or roots=[[z, y, x], ...], not both")

        # The name becomes that of files and folders in `out`.
        if not files.is_plain_name(self.name):
            raise ValueError(f"id {self.name!r} cannot be a file name; use letters, digits, - and _")

    @property
    def name(self) -> str:
        """The `id`, or the file's name without its ending."""
        return self.id or strip_ending(self.image)


@config
class InferConfig:
    """Which volumes a student predicts, and how its probability becomes trees."""

    model: Path
    """The folder that `train` wrote, or one of its weights folders."""
    out: Path
    """Run folder: ID.ome.zarr, swc/ID.swc (um), swc/ID.voxel.swc, predictions.json."""
    store: Path | None = None
    """Take the volumes of this store's `split` ..."""
    split: Literal["train", "val", "test"] = "test"
    """... this one."""
    images: tuple[ImagePath, ...] = ()
    """Volumes that are in no store: image files, folders of images, OME-Zarr folders or their s3://, gs:// or https://
    addresses, or patterns such as `*.tif`; plain paths after the verb. They are kept as `inputs`."""
    inputs: tuple[VolumeConfig, ...] = ()
    """The same with settings of their own; `inputs=[{image: brain.tif, root: [3, 40, 20]}]`."""
    voxel_size: GivenVoxelSize | None = None
    """[um] z, y, x of all `inputs` that have none of their own; none: as the files say."""
    channel: GivenChannel | None = None
    """Channel of all `inputs` that have none of their own."""
    range: GivenRange | None = None
    """Brightness that becomes 0 and 1 in all `inputs` that have none of their own; none: measured. A student of local
    contrast sees the brightness between the two."""
    root: Point | None = None
    """[voxel] z,y,x where the neuron begins, for a single image; none: every piece that is long enough becomes a
    tree."""
    weights: Literal["best", "last"] = "best"
    """Which of a train folder's weights."""
    block: Shape = (128, 512, 512)
    """[voxel] What is written at once, one shard of the output; rounded up to whole window steps."""
    chunk: Shape = (32, 64, 64)
    """[voxel] What a viewer reads at once; the block is a multiple of it."""
    window: Shape | None = None
    """[voxel] What the student sees at once; none: the crop it was trained on."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Share of a window that the next one covers again."""
    batch: int = Field(default=4, ge=1)
    """Windows at once; halved by itself when the memory is too small."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Probability from which a voxel is neurite; none: the one that training found best."""
    empty_level: float | None = Field(default=0.0, ge=0, lt=1)
    """Normalized brightness. A block is skipped, and recorded as skipped, when no cell of 2 x 4 x 4 voxels of it and of
    its surroundings is above it; 0: only black blocks; none: nothing is skipped, else windows of zeros
    are not run, and count as probability 0. Of the blocks skipped above 0, 2 % are
    predicted nevertheless: a neurite in one is listed as a failure."""
    share: tuple[int, int] | None = None
    """[i, n]: do every n-th volume from the i-th and no more, with a record in OUT/shares; for tasks of job arrays. Of
    fewer than n volumes, a share does its part of the blocks of one. The same command without it gathers what the
    shares wrote, and does what is missing."""
    deaths: int = Field(default=3, ge=1)
    """How often a process may be killed while it is at a block, or another task, before that is left out and listed."""
    silence: float = Field(default=300.0, gt=0)
    """[s] An MPI rank that gives no sign of life for so long is lost: the others report it and stop. One step of
    tracing lets none through for about 0.3 s per million voxels of centerlines."""
    any_voxel_size: bool = False
    """Whether a student sees every image as it is. Else an image whose voxels are more than 1.5 times as small or large
    as those of its training is resampled, and one beyond 8 times is refused."""
    trees: bool = True
    """Whether to trace."""
    tree_files: int = Field(default=10_000, ge=0)
    """Of a volume with so many trees at most, each tree also gets files of its own, swc/ID/0001.swc and so on."""
    page: bool = True
    """Whether to write infer.html: the block map, the volumes with their trees, what to proofread first."""
    trace: TraceConfig = TraceConfig()
    """How the probability becomes trees."""
    flips: tuple[str, ...] = ()
    """Mirrored views, such as [flip_x, flip_y+flip_x], in which the student predicts every window through which a tree
    runs once more; proofread/ shows how far the confidence then differs. Each costs as much as those windows did at
    first; none: off."""

    def __post_init__(self) -> None:
        # A frozen dataclass allows no plain assignment. The record of a run then holds one list of its volumes.
        object.__setattr__(self, "inputs", self._list_inputs())
        object.__setattr__(self, "images", ())

        if (self.store is None) == (not self.inputs):
            raise ValueError("give either images, as in  hpc-neuro infer model=M IMAGE..., or store=FOLDER")

        # What a store says of its volumes would otherwise be taken in silence.
        given = [key for key in ("voxel_size", "channel", "range", "root") if getattr(self, key) is not None]
        if self.store is not None and given:
            raise ValueError(f"{', '.join(given)}: {self.store} has its own for each volume; leave it out")

        # A block or chunk without voxels cannot tile a volume.
        if min(*self.block, *self.chunk) < 1:
            raise ValueError(f"block {list(self.block)} and chunk {list(self.chunk)} must be at least 1 voxel")

        # A view that mirrors nothing, or occurs twice, would count one confidence twice.
        views = [parse_orientation(name) for name in self.flips]
        if any(view.swap or not any(view.flips) for view in views) or len(set(views)) < len(views):
            raise ValueError(
                f"flips {list(self.flips)}: expected different mirrors, such as [flip_z, flip_y, flip_x, flip_y+flip_x]"
            )

        # Mirrored views are predicted only where trees run.
        if self.flips and not self.trees:
            raise ValueError("flips looks at trees; give trees=true, or no flips")

        # Results are named by volume, so two of one name would overwrite each other.
        names = [item.name for item in self.inputs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"inputs: {', '.join(repeated)} would be written twice; give each volume its own `id`")
        if clash := find_clash(names):
            raise ValueError(f"inputs: {clash[0]!a} and {clash[1]!a} {clash[2]}; give each its own `id`")

    def _list_inputs(self) -> tuple[VolumeConfig, ...]:
        """`inputs` and `images`, with the settings that hold for all of them."""
        items = list(self.inputs)
        if self.images:
            # Imported late: it opens image formats, which most configs do not need.
            from hpc_neuro.data.image_list import expand_images

            items += [VolumeConfig(image=path) for named in self.images for path in expand_images(named)]

        if self.root is not None and len(items) > 1:
            raise ValueError(
                f"root holds for one image, and there are {len(items)}; give each its own, as in "
                f"inputs=[{{image: {items[0].image}, root: [z, y, x]}}, ...]"
            )

        return tuple(
            dataclasses.replace(
                item,
                root=item.root if item.root is not None or item.roots else self.root,
                voxel_size=item.voxel_size or self.voxel_size,
                channel=self.channel if item.channel is None else item.channel,
                range=item.range or self.range,
            )
            for item in items
        )
