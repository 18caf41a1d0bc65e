"""What is scored: the predictions that `infer` wrote, and Otsu's threshold as the baseline that needs no training."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from skimage.filters import threshold_otsu

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import Box, Shape, tile_volume
from hpc_neuro.core.morphology import Tree, concatenate_trees, empty_tree
from hpc_neuro.core.run_folder import RECORD
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.stop_signals import stop_on_request
from hpc_neuro.core.types import Array
from hpc_neuro.data import swc
from hpc_neuro.data.formats import Volume, open_volume
from hpc_neuro.data.predictions import INDEX, read_predictions
from hpc_neuro.data.run_journal import JOURNAL, read_journal, read_markers
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.tracing import TraceConfig, trace_reader

log = logging.getLogger(__name__)


_REMAKE = "make the predictions with `hpc-neuro infer`"
_BLOCK: Shape = (64, 512, 512)
"""[voxel] Blocks in which an image is read for its histogram."""
_BINS = 1 << 16
"""Histogram bins of images with more values than that."""


@dataclass(frozen=True)
class VolumePrediction:
    """The probability and the tree of one volume."""

    image: Volume
    tree: Tree  # in voxels; empty when nothing was traced
    threshold: float

    def probability(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] in [0, 1]."""
        # `infer` stores 0 to 1 in the whole range of an unsigned integer.
        values = self.image[box]
        if values.dtype.kind == "u":
            return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
        return values.astype(np.float32)

    def mask(self, box: Box) -> Array:
        """[Z, Y, X] bool: at least `threshold`."""
        least = self.threshold
        if self.image.dtype.kind == "u":
            # The same integer from which `infer` takes a voxel as foreground.
            least = math.ceil(self.threshold * np.iinfo(self.image.dtype).max - 1e-9)
        return np.asarray(np.greater_equal(self.image[box], least))


class PredictionFolder:
    """One folder that `infer` wrote. Raises InputError when it is not one, or lacks a file of one of `ids`."""

    def __init__(self, path: Path, ids: Sequence[str], cfg: EvaluateConfig) -> None:
        # A volume without a prediction would drop out of the mean, so it ends the run.
        self.path = path
        self._threshold = cfg.threshold
        self._entries = read_predictions(path, _REMAKE)
        if missing := [i for i in ids if i not in self._entries]:
            raise InputError(
                f"{path} holds no prediction of {', '.join(missing)}, which the {cfg.split} split of {cfg.store} has; "
                "run `hpc-neuro infer` on that split, or choose another `split`"
            )

        # Predictions of other programs have no record; the config is then empty.
        self.config: dict[str, Any] = {}
        if (path / RECORD).exists():
            self.config = run_folder.read_record(path, _REMAKE)["config"]

        verify = f"hpc-neuro infer verify {files.quote_path(path)}"
        self._journal = read_journal(path, f"run `{verify}`")
        for volume_id in ids:
            self._check_files(volume_id)
            self._check_shards(volume_id)

    def _check_files(self, volume_id: str) -> None:
        """Raise InputError when a file of a volume is missing, or its tree was changed after `infer`."""
        for path in self._list_files(volume_id):
            if not path.exists():
                raise InputError(f"{self.path / INDEX} names {path}, which does not exist; {_REMAKE} again")

        # A tree that a person corrected is not the model's work.
        entry = self._entries[volume_id]
        tree, digest = entry["swc_voxel"], entry.get("sha256", {}).get("swc_voxel")
        if tree and digest and not files.has_checksum(self.path / tree, digest):
            raise InputError(
                f"{self.path / tree} was changed after `infer` wrote it, so that its scores would not be the model's; "
                f"`hpc-neuro infer verify {files.quote_path(self.path)}` sets it aside and writes the model's tree "
                "again"
            )
        if tree:
            self._require_voxels(self.path / tree)

    def _require_voxels(self, tree: Path) -> None:
        """Raise InputError for a tree whose header states another unit."""
        unit = swc.require_header(tree).unit
        if unit not in (None, "voxel"):
            raise InputError(
                f"{tree} is in {unit} by its header, and trees of predictions are compared in voxels; name in "
                f"{self.path / INDEX} the file that this writes:  hpc-neuro swc convert {files.quote_path(tree)} "
                "to=voxel"
            )

    def _check_shards(self, volume_id: str) -> None:
        """Raise InputError when a shard that a done marker of `infer` records does not exist, or a marker is lost.

        A zarr array reads a shard without a file as zeros, so a lost shard would be scored as background.
        """
        entry = self._entries[volume_id]
        image = self.path / entry["probability"]
        verify = f"hpc-neuro infer verify {files.quote_path(self.path)}"
        markers = read_markers(self._journal, volume_id, f"run `{verify}`")

        # Predictions of other programs have neither a record nor markers.
        blocks = entry.get("blocks", {}).get("all", 0) if self.config else 0
        if len(markers) < blocks:
            raise InputError(
                f"{self.path / JOURNAL} has done markers of {len(markers)} of the {blocks} blocks of {volume_id}, so "
                f"that it is unknown what its probability should hold; `{verify}` makes the others again"
            )
        for marker in markers:
            if missing := [image / shard for shard in marker.files if not (image / shard).is_file()]:
                raise InputError(
                    f"{missing[0]} does not exist, although `infer` wrote it (block {marker.index}); its voxels would "
                    f"be scored as background. `{verify}` computes it again"
                )

    def _list_files(self, volume_id: str) -> list[Path]:
        """The probability, and the tree in voxels unless nothing was traced."""
        # Where nothing was traced there is no tree file, and the entry says so with a null.
        entry = self._entries[volume_id]
        if absent := {"probability", "swc_voxel"} - entry.keys():
            raise InputError(f"{self.path / INDEX} does not say {min(absent)} of {volume_id}; {_REMAKE} again")
        names = [entry["probability"], entry["swc_voxel"]]
        return [files.resolve_inside(self.path, n, self.path / INDEX, _REMAKE) for n in names if n is not None]

    def read(self, volume_id: str, expected_shape: Shape) -> VolumePrediction:
        """The prediction of a volume. Raises InputError when its shape is not `expected_shape`."""
        # Compare shapes before values: a mask of another volume would only look like a bad model.
        image, *trees = self._list_files(volume_id)
        probability = open_volume(image)
        if probability.shape != expected_shape:
            raise InputError(
                f"{image} has shape {probability.shape}, but volume {volume_id} of the store has {expected_shape} (z y "
                "x): the predictions are of another volume, or of an older store; make them again"
            )

        tree = swc.read(trees[0]) if trees else empty_tree()
        return VolumePrediction(probability, tree, self.read_threshold(volume_id))

    def read_threshold(self, volume_id: str) -> float:
        """The probability from which a voxel of a volume is foreground."""
        if self._threshold is not None:
            return self._threshold
        if "threshold" not in self._entries[volume_id]:
            raise InputError(f"{self.path / INDEX} states no threshold for {volume_id}; give threshold=VALUE")
        return float(self._entries[volume_id]["threshold"])

    def read_flip_confidence(self, volume_id: str, nodes: int) -> dict[str, NDArray[np.float64]]:
        """[N] `mean` confidence of all flips and their `agreement` at each node of the tree; {} without flips.

        Raises InputError for a table that does not belong to the tree.
        """
        name = self._entries[volume_id].get("confidence")
        if name is None:
            return {}

        # Without flips the table has no column of disagreement.
        path = files.resolve_inside(self.path, name, self.path / INDEX, _REMAKE)
        try:
            with path.open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if not rows or "disagreement" not in rows[0]:
                return {}
            values = np.array([[float(row["mean"]), 1 - float(row["disagreement"])] for row in rows])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read as confidences of nodes ({error}); {_REMAKE} again") from None

        # Rows belong to nodes by their order, so another number means another tree.
        if len(values) != nodes:
            raise InputError(f"{path} is of {len(values)} nodes, but the tree has {nodes}; {_REMAKE} again")

        return {"mean": values[:, 0], "agreement": values[:, 1]}

    def read_places(self, volume_id: str) -> dict[str, NDArray[np.float64]]:
        """[N, 3] z y x voxels of the places to proofread, by kind; {} where `infer` listed none.

        Raises InputError for a table that cannot be read.
        """
        path = self.path / "proofread" / f"{volume_id}.csv"
        if not path.exists():
            return {}
        places: dict[str, list[list[float]]] = {}
        try:
            with path.open(encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    places.setdefault(row["kind"], []).append([float(row[axis]) for axis in "zyx"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read as places ({error!r}); {_REMAKE} again") from None
        return {kind: np.array(points) for kind, points in places.items()}

    def read_roots(self, volume_id: str) -> list[list[float]] | None:
        """[voxel] z y x from which a volume was traced, rounded; None where that is not recorded."""
        roots = self._entries[volume_id].get("roots")
        return None if roots is None else [[round(float(c), 3) for c in root] for root in roots]

    def read_trace_config(self) -> TraceConfig | None:
        """The tracer's settings that `infer` recorded; None when it recorded none."""
        if "trace" not in self.config:
            return None

        try:
            trace = TypeAdapter(TraceConfig).validate_python(self.config["trace"])
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{self.path / 'run.json'} holds settings of the tracer that this version does not take "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']}); {_REMAKE} again, which keeps the probabilities"
            ) from None

        # A setting that the record lacks would take its default here, which may not be how that version traced.
        if absent := sorted({f.name for f in fields(TraceConfig)} - set(self.config["trace"])):
            raise InputError(
                f"{self.path} was traced by a version without {', '.join(absent)}, and Otsu's mask would be traced "
                f"otherwise; {_REMAKE} again, which keeps the probabilities"
            )

        return trace


@dataclass(frozen=True)
class Method:
    """One way from image to mask and tree; several seeds of a model are one method."""

    name: str
    seeds: tuple[PredictionFolder, ...]
    """Empty for the Otsu baseline."""


def list_methods(cfg: EvaluateConfig, ids: Sequence[str]) -> list[Method]:
    """`model` first, then what it is compared with, Otsu last. Raises InputError for what cannot be read."""
    # `compare.model` adds seeds to the model, so the main folder comes first in its list.
    folders = {"model": [cfg.predictions], **{name: [] for name in cfg.compare if name != "model"}}
    for name, more in cfg.compare.items():
        folders[name] += more

    # Reading checks every folder before anything is scored.
    methods = [Method(name, tuple(PredictionFolder(p, ids, cfg) for p in paths)) for name, paths in folders.items()]

    return [*methods, Method("otsu", ())] if cfg.otsu else methods


def list_volumes(cfg: EvaluateConfig, store: Store) -> tuple[str, ...]:
    """The ids of the split to score. Raises InputError when it is empty."""
    ids = store.split(cfg.split)
    if not ids:
        sizes = ", ".join(f"{s} {len(store.split(s))}" for s in ("train", "val", "test"))
        raise InputError(f"the {cfg.split} split of {cfg.store} is empty ({sizes}); choose another `split`")
    return ids


def choose_trace_config(methods: Sequence[Method]) -> TraceConfig:
    """How Otsu's mask is traced: with the settings that `infer` recorded, else the defaults."""
    return methods[0].seeds[0].read_trace_config() or TraceConfig()


class OtsuMask:
    """Where the raw image is above Otsu's threshold, read by box."""

    def __init__(self, volume: StoredVolume) -> None:
        self.threshold = compute_otsu_threshold(volume)
        self._volume = volume

    def mask(self, box: Box) -> NDArray[np.bool_]:
        """[Z, Y, X] bool."""
        return np.greater(self._volume.image(box), self.threshold)

    def probability(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] 0 or 1, as the tracer reads it."""
        return self.mask(box).astype(np.float32)


def compute_otsu_threshold(volume: StoredVolume) -> float:
    """Otsu's threshold of the whole image (foreground is above it), from a histogram gathered block by block.

    Images of up to 16 bits have one bin per value: the result is that of scikit-image on the whole array. Others have
    65,536 bins between their extremes. Source: Otsu 1979.
    """
    is_exact = volume.dtype.kind == "u" and volume.dtype.itemsize <= 2
    counts, values = _count_values(volume) if is_exact else _bin_values(volume)

    # Empty bins at the ends would only slow the search, and scikit-image trims them as well.
    present = np.flatnonzero(counts)
    kept = slice(int(present[0]), int(present[-1]) + 1)

    return float(threshold_otsu(hist=(counts[kept], values[kept])))


def _count_values(volume: StoredVolume) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Histogram with one bin per value of an unsigned integer type."""
    size = 1 << (8 * volume.dtype.itemsize)
    counts = np.zeros(size, dtype=np.int64)
    for block in tile_volume(volume.shape, _BLOCK):
        counts += np.bincount(volume.image(block.write).ravel(), minlength=size)
    return counts, np.arange(size, dtype=np.float64)


def _bin_values(volume: StoredVolume) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Histogram with `_BINS` bins between the extremes of the image."""
    # A first pass finds the range, a second one fills the bins.
    low, high = math.inf, -math.inf
    for block in tile_volume(volume.shape, _BLOCK):
        image = volume.image(block.write)
        low, high = min(low, float(image.min())), max(high, float(image.max()))

    counts = np.zeros(_BINS, dtype=np.int64)
    for block in tile_volume(volume.shape, _BLOCK):
        counts += np.histogram(volume.image(block.write), bins=_BINS, range=(low, high))[0]

    return counts, low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS


def trace_otsu_mask(volume: StoredVolume, baseline: OtsuMask, cfg: TraceConfig) -> Tree:
    """The tree (voxels) of Otsu's mask, from the volume's root; empty, with a warning, when nothing can be traced."""
    # The same tracer, settings, root and image as for the model: only the mask differs.
    try:
        trees = trace_reader(
            stop_on_request(baseline.probability),
            volume.shape,
            volume.voxel_size,
            roots=() if volume.root is None else (volume.root,),
            cfg=cfg,
            image=stop_on_request(volume.normalized_image),
        )
    except InputError as error:
        log.warning("%s: Otsu's mask gives no tree and counts as a miss: %s", volume.id, error)
        return empty_tree()
    return concatenate_trees(trees)
