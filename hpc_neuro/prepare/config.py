"""The root config of `prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core.image_settings import GivenChannel, GivenRange, GivenVoxelSize
from hpc_neuro.core.schema import config
from hpc_neuro.core.types import Contrast
from hpc_neuro.data.radius import ImageRadius, RadiusConfig

DISTANCE_CAP = 8.0
"""[fine voxel] Largest stored distance to the centerline; the stored tangent is zero beyond it."""

LabelKind = Literal["background", "neurite", "unlabelled"]
"""What a value of a label volume stands for."""


def _make_mask_key() -> dict[int, LabelKind]:
    """The values of a plain mask."""
    return {0: "background", 1: "neurite"}


@config
class SplitConfig:
    """Which neurons are held out. Whole neurons, never crops: neighboring crops must not be in different splits."""

    test: tuple[str, ...] = ()
    """Ids (or neurons) of the test split."""
    val: tuple[str, ...] = ()
    """Ids (or neurons) of the validation split."""
    test_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the neurons not named anywhere that is drawn for test (at least one when above 0)."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the neurons not named anywhere that is drawn for validation (at least one when above 0)."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        both = sorted(set(self.test) & set(self.val))
        if both:
            raise ValueError(f"{', '.join(both)} stand in both test and val")

        if self.test_fraction + self.val_fraction >= 1:
            raise ValueError("test_fraction and val_fraction leave nothing to train on")


@config
class PrepareConfig:
    """Pairs of an image and an SWC -> a training store."""

    out: Path
    """Folder of the store."""
    images: Path | None = None
    """Folder of pairs with the same stem, ID.tif and ID.swc; in the place of a tree, ID_labels.tif may hold labels (key
    `labels`). An optional meta.json {ID: {root_xyz: [voxel], voxel_size_um_xyz: [um], swc_unit: voxel or um}} beside
    them is used."""
    manifest: Path | None = None
    """Instead of `images`: a CSV or YAML list with id, image, swc and, where wanted, voxel_size (z y x um), root (z y x
    voxel), split, neuron, swc_unit, channel, axes; relative paths start at the manifest's folder. In the place of `swc`
    a row may name `labels`, an image of the same shape whose values say what each voxel is."""
    labels: dict[int, LabelKind] = Field(default_factory=_make_mask_key)
    """What the values of label volumes stand for, such as {0: unlabelled, 1: background, 2: neurite, 3: background}.
    Unlabelled voxels count neither in training nor in a score."""
    voxel_size: GivenVoxelSize | None = None
    """[um] z, y, x of all volumes; overrules meta.json, manifest and files."""
    swc_unit: Literal["voxel", "um"] | None = None
    """Unit of the SWC coordinates where meta.json or the manifest does not give it; none: the unit in the file's
    header, else voxel."""
    channel: GivenChannel | None = None
    """Channel of images with several, where the manifest does not give it."""
    range: GivenRange | None = None
    """Brightness that becomes 0 and 1 in all volumes; none: measured in each."""
    axes: str | None = None
    """Order of the stored axes, such as ZCYX, where neither the file nor the manifest gives it."""
    contrast: Contrast = "range"
    """How brightness becomes 0 to 1 for networks. `range`: by the range of the whole volume; `local`: above the local
    background, 0.5 at the level of the foreground (docs/trace.md), which suits noise and uneven light. The student
    bundled with the package wants `local`."""
    radius: RadiusConfig = ImageRadius()
    """Source of the mask's radius. A fine voxel is as long as the middle one of a voxel's three sides."""
    tube: float = Field(default=1.5, gt=0)
    """[fine voxel] Radius of the tube around the centerline."""
    ignore_margin: float = Field(default=0.0, ge=0)
    """[fine voxel] Shell around the mask that is marked unlabelled (255), for boundaries that no annotator can draw."""
    beyond_root: Literal["unlabelled", "background"] = "unlabelled"
    """Label of a bright neurite that meets the root from outside the tree: annotators often start at the arbor and
    leave out the axon that leads to it. Unlabelled (255) it counts neither in training nor in a score."""
    off_tree: Literal["background", "unlabelled"] = "background"
    """Label of what is as bright as a neurite and lies off the tree. Give `unlabelled` where the SWC holds one neuron
    of several: the neurites that nobody traced then count neither in training nor in a score."""
    split: SplitConfig = SplitConfig()
    """Which neurons are held out."""
    share: tuple[int, int] | None = None
    """[i, n]: only every n-th volume from the i-th on, with a record in OUT/shares, for tasks of job arrays. Afterwards
    the same command without it gathers the shares."""
    misaligned: Literal["error", "warn"] = "error"
    """What to do with a tree that fits better flipped, axis-swapped or in the other unit."""

    def __post_init__(self) -> None:
        # Contradictions within the config are found before any file is opened.
        if (self.images is None) == (self.manifest is None):
            raise ValueError("give either images=FOLDER or manifest=FILE")

        if self.tube > DISTANCE_CAP:
            raise ValueError(f"tube {self.tube} is above {DISTANCE_CAP:g}, the largest distance that is stored")
