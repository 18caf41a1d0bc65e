"""Check a pair before anything is written: its files, their fit, and the voxels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpc_neuro.core import files, morphology, schema, stop_signals
from hpc_neuro.core.geometry import Shape, VoxelSize, fine_voxel, to_voxels
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Contrast
from hpc_neuro.data import swc
from hpc_neuro.data.alignment import Fit, compare_orientations, list_changes_inside, outside_fraction
from hpc_neuro.data.formats import Volume as ImageVolume
from hpc_neuro.data.formats import describe_content, open_volume
from hpc_neuro.data.intensity import compute_histogram, compute_intensity_range
from hpc_neuro.data.remote_path import RemotePath
from hpc_neuro.data.store import FORMAT, VolumeRecord, forecast_bytes
from hpc_neuro.prepare.config import DISTANCE_CAP, PrepareConfig
from hpc_neuro.prepare.labels import LabelVolume, count_labels, open_labels
from hpc_neuro.prepare.pairs import ImagePair

MAX_OUTSIDE = 0.10
"""A tree with a larger share of its nodes beyond the image belongs to another image."""


class UnusableImageError(InputError):
    """An image whose voxels cannot be used: it is constant, damaged, or holds NaN. The message names the file."""


@dataclass(frozen=True)
class OpenedPair:
    """A pair whose files open and fit together by their shapes; no voxel has been read."""

    pair: ImagePair
    image: ImageVolume
    size: VoxelSize  # um, z y x
    unit: str  # of the SWC file: "voxel" or "um"
    tree: Tree  # voxels; radii in fine voxels; empty where there are labels
    labels: LabelVolume | None  # in the place of a tree
    sources: dict[str, str]  # SHA-256 of the image, and of the SWC or the labels
    digest: str
    remarks: tuple[str, ...]  # what the user should know, though it stops nothing

    @property
    def id(self) -> str:
        """Id of the volume."""
        return self.pair.id

    @property
    def root(self) -> tuple[float, float, float] | None:
        """The root to trace from, z y x voxel: the pair's, else the tree's own when it has exactly one."""
        if self.pair.root or len(self.tree.roots) != 1:
            return self.pair.root
        z, y, x = (float(v) for v in self.tree.points[self.tree.roots[0]])
        return z, y, x

    def require_unchanged(self) -> None:
        """Raise InputError when a file does not have the hash of the volume: it was written to while it was read."""
        for kind, path in (("image", self.pair.image), self.pair.truth):
            if _hash_source(path) != self.sources[kind]:
                raise InputError(
                    f"{path} was changed while it was read, and {self.id} would hold a mixture; wait until nothing "
                    "writes to it, then prepare it into another `out`"
                )

    def forecast_bytes(self) -> int:
        """About the most bytes of the volume's file."""
        cap = None if self.labels is not None else DISTANCE_CAP
        return forecast_bytes(self.tree, self.image.shape, self.image.dtype.itemsize, self.size, cap)


@dataclass(frozen=True)
class PairMeasurement:
    """The result of a pass over the voxels of a pair."""

    low: float
    high: float
    fit: Fit | None  # of the tree; None where there are labels
    remarks: tuple[str, ...]


def open_pair(pair: ImagePair, cfg: PrepareConfig) -> OpenedPair:
    """Open both files of a pair and check what needs no voxels; InputError names the volume and the file."""
    # Opening reads headers only.
    image = open_volume(pair.image, channel=pair.channel, axes=pair.axes)
    if min(image.shape) < 2:
        z, y, x = image.shape
        raise InputError(f"{pair.image} is {z} x {y} x {x} voxels (z y x), a 2D image; a 3D stack is wanted")

    # A size in meta.json, the manifest or the config corrects the file's own.
    size = pair.voxel_size or image.voxel_size
    if size is None:
        raise InputError(f"{pair.image} does not say its voxel size; give voxel_size=z,y,x in um")

    if pair.swc is None:
        return _open_labelled(pair, image, size, cfg)
    unit = _find_unit(pair.swc, pair, size)

    # From here on everything is in voxels, whatever the unit of the file.
    tree = swc.read(pair.swc)
    if unit not in ("um", "voxel"):
        # nm and the like differ from um by a factor only.
        scale = swc.unit_in_um(unit) or 1.0
        tree, unit = morphology.scale_tree(tree, (scale, scale, scale)), "um"
    tree = convert_to_voxels(tree, unit, size)
    if not len(tree):
        raise InputError(f"{pair.swc} holds no points; a traced tree is wanted")
    remarks = _require_inside(pair, unit, tree, image.shape, size)
    _require_root_inside(pair, image.shape)

    # Hashing reads both files once, before anything is written.
    sources = {"image": _hash_source(pair.image), "swc": _hash_source(pair.swc)}
    digest = _compute_digest(pair, unit, size, sources, cfg)
    return OpenedPair(pair, image, size, unit, tree, None, sources, digest, remarks)


def _open_labelled(pair: ImagePair, image: ImageVolume, size: VoxelSize, cfg: PrepareConfig) -> OpenedPair:
    """A pair of an image and a label volume."""
    path = pair.truth[1]
    labels = open_labels(path, image, cfg.labels)
    _require_root_inside(pair, image.shape)
    sources = {"image": _hash_source(pair.image), "labels": _hash_source(path)}
    digest = _compute_digest(pair, "voxel", size, sources, cfg)
    remark = f"{pair.id}: labels in the place of a tree; `evaluate` scores its voxels only"
    return OpenedPair(pair, image, size, "voxel", morphology.empty_tree(), labels, sources, digest, (remark,))


def _hash_source(path: Path) -> str:
    """SHA-256 of a file or folder; of an image in a remote store, what its descriptions say."""
    return describe_content(path) if isinstance(path, RemotePath) else files.sha256(path)


def convert_to_voxels(tree: Tree, unit: str, size: VoxelSize) -> Tree:
    """A tree in `unit` ("voxel" or "um") in voxels, radii in fine voxels."""
    if unit == "voxel":
        return tree

    # An SWC radius is one number, so it is measured in one unit along all axes.
    return replace(tree, points=to_voxels(tree.points, size), radii=tree.radii / fine_voxel(size))


def measure_pair(opened: OpenedPair, misaligned: str, limits: tuple[float, float] | None = None) -> PairMeasurement:
    """Measure range and contrast in one or two passes over the voxels, and check that the tree lies on the neuron.

    limits: the intensity range where it is given.
    misaligned: "error" raises InputError for a tree that fits better in another orientation, "warn" makes a remark.
    Raises UnusableImageError for an image without contrast and for voxels that cannot be read.
    """
    pair, image = opened.pair, opened.image
    read = stop_signals.stop_on_request(image.__getitem__)
    try:
        # The histogram serves the intensity range and the percentiles along the tree.
        histogram = compute_histogram(read, image.shape)
        low, high = limits or compute_intensity_range(read, image.shape, histogram)
    except InputError as error:
        # What a reader refuses names the file already.
        prefix = "" if str(image.path) in str(error) else f"{pair.image}: "
        raise UnusableImageError(f"{prefix}{error}") from None

    if opened.labels is not None:
        return PairMeasurement(low, high, None, _compare_with_labels(opened, opened.labels, misaligned))

    # A flipped or swapped tree lies on background, where percentiles are low.
    fit = compare_orientations(opened.tree, read, image.shape, histogram, opened.size, opened.unit)
    if not fit.is_misaligned:
        return PairMeasurement(low, high, fit, ())

    sentence = (
        f"{pair.truth[1]} fits {pair.image.name} better with {fit.best_change}: mean intensity percentile along "
        f"the tree {100 * fit.best_score:.1f} against {100 * fit.score:.1f} as given; correct the SWC "
        "(`hpc-neuro swc transform`) or set swc_unit, or take it as it is with misaligned=warn"
    )
    if misaligned == "error":
        raise InputError(sentence)
    return PairMeasurement(low, high, fit, (sentence,))


def _compare_with_labels(opened: OpenedPair, labels: LabelVolume, misaligned: str) -> tuple[str, ...]:
    """Remarks on a label volume; see measure_pair. Raises InputError where neurites are no brighter than background."""
    counts = count_labels(labels, stop_signals.stop_on_request(opened.image.__getitem__))
    total = counts.background + counts.neurite + counts.unlabelled
    remark = (
        f"{opened.id}: {counts.neurite:,} voxels of neurite and {counts.background:,} of background are labelled, "
        f"{counts.unlabelled / total:.1%} of the volume is not"
    )
    if counts.neurite_brightness > counts.background_brightness:
        return (remark,)

    sentence = (
        f"{labels.path} labels voxels as neurite that are no brighter than its background (means "
        f"{counts.neurite_brightness:.4g} and {counts.background_brightness:.4g}); correct `labels`, or the file if it "
        "is flipped or of another image, or take it as it is with misaligned=warn"
    )
    if misaligned == "error":
        raise InputError(sentence)
    return remark, sentence


def make_record(opened: OpenedPair, measurement: PairMeasurement, contrast: Contrast) -> VolumeRecord:
    """The volume as the store's index describes it."""
    return VolumeRecord(
        id=opened.id,
        shape=opened.image.shape,
        voxel_size=opened.size,
        dtype=opened.image.dtype,
        low=measurement.low,
        high=measurement.high,
        root=opened.root,
        split=opened.pair.split,
        digest=opened.digest,
        sources=opened.sources,
        contrast=contrast,
    )


def _find_unit(path: Path, pair: ImagePair, size: VoxelSize) -> str:
    """The unit of an SWC file: "voxel", "um", "nm" ...; InputError when its header contradicts the voxel size."""
    # The pair's unit overrules the header; files without either are in voxels.
    header = swc.read_header(path) if pair.swc_unit else swc.require_header(path)
    unit = pair.swc_unit or header.unit or "voxel"

    # A tree in um that was made for other voxels would be scaled wrongly.
    if unit == "um" and header.voxel_size and not np.allclose(header.voxel_size, size, rtol=0.01):
        raise InputError(
            f"the header of {path} says um, of voxels of {header.voxel_size} um (z y x), but {pair.id} has {size}; "
            "correct voxel_size, or the header if it is wrong"
        )
    return unit


def _require_inside(pair: ImagePair, unit: str, tree: Tree, shape: Shape, size: VoxelSize) -> tuple[str, ...]:
    """Raise InputError when much of the tree lies outside the image; -> a remark when a little of it does."""
    share = outside_fraction(tree, shape)
    if share > MAX_OUTSIDE:
        # The most common reasons are another unit and another order of the axes.
        changes = list_changes_inside(tree, shape, size, unit)
        low, high = (", ".join(f"{v:.0f}" for v in bound(tree.points, axis=0)) for bound in (np.min, np.max))
        advice = (
            f"it fits inside with {' or '.join(changes)}"
            if changes
            else "check unit, offset and that both are of one neuron"
        )
        raise InputError(
            f"{100 * share:.0f} % of {pair.swc} lie outside {pair.image.name}: the tree spans ({low}) to ({high}) "
            f"voxels, the image is {shape} (z y x); {advice}"
        )

    # A few nodes beyond the border come from cropped stacks.
    if share:
        return (f"{pair.id}: {100 * share:.1f} % of the nodes lie outside the image and are not drawn",)
    return ()


def _require_root_inside(pair: ImagePair, shape: Shape) -> None:
    if pair.root and outside_fraction(morphology.build_tree(np.asarray([pair.root]), np.asarray([-1])), shape):
        raise InputError(f"the root of {pair.id}, {pair.root} (z y x voxel), lies outside the image of shape {shape}")


def _compute_digest(pair: ImagePair, unit: str, size: VoxelSize, sources: dict[str, str], cfg: PrepareConfig) -> str:
    """SHA-256 of everything that decides the content of the volume's file."""
    # Whatever is missing here is not written again when it changes.
    facts = {
        "format": FORMAT,
        "sources": sources,
        "pair": [pair.id, unit, pair.root, pair.channel, pair.axes, size],
        "targets": schema.to_plain([cfg.radius, cfg.tube, DISTANCE_CAP, cfg.ignore_margin, cfg.beyond_root]),
    }
    if pair.labels is not None:
        facts["labels"] = {str(value): kind for value, kind in sorted(cfg.labels.items())}
    if cfg.contrast != "range":
        facts["contrast"] = cfg.contrast
    if cfg.off_tree != "background":
        facts["off_tree"] = cfg.off_tree
    if cfg.range is not None:
        facts["range"] = cfg.range
    return files.sha256_json(facts)
