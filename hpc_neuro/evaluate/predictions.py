"""What `infer` left in its folder, read back: a probability and a tree per volume."""

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

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Box, tile_volume
from hpc_neuro.core.morphology import Tree, concatenate_trees, empty_tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import swc
from hpc_neuro.data.formats import Volume, open_volume
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.tracing import TraceConfig, trace_reader

log = logging.getLogger(__name__)
INDEX = "predictions.json"
_BLOCK = (64, 512, 512)
_BINS = 1 << 16  # for images with more values than that
_REMAKE = "make the predictions with `hpc-neuro infer`"


@dataclass(frozen=True)
class Prediction:
    """One volume as a model sees it."""

    image: Volume
    tree: Tree  # in voxels; empty when nothing was traced
    threshold: float

    def probability(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] in [0, 1]."""
        values = self.image[box]
        if values.dtype.kind == "u":
            return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
        return values.astype(np.float32)

    def mask(self, box: Box) -> Array:
        """[Z, Y, X] bool: at least `threshold`."""
        levels = np.iinfo(self.image.dtype).max if self.image.dtype.kind == "u" else 0
        least = math.ceil(self.threshold * levels - 1e-9) if levels else self.threshold  # as `infer` cuts it
        return np.asarray(np.greater_equal(self.image[box], least))


class Predictions:
    """One folder that `infer` wrote. Raises InputError when it is not, or lacks a file of one of `ids`."""

    def __init__(self, path: Path, ids: Sequence[str], cfg: EvaluateConfig) -> None:
        self.path = path
        self._entries: dict[str, Any] = files.read_json(path / INDEX, _REMAKE)
        if missing := [i for i in ids if i not in self._entries]:
            raise InputError(
                f"{path} holds no prediction of {', '.join(missing)}, which the {cfg.split} split of {cfg.store} has; "
                "run `hpc-neuro infer` on that split, or choose another `split`"
            )
        self.config: dict[str, Any] = {}
        record = path / "run.json"
        if record.exists():
            self.config = files.read_json(record, _REMAKE).get("config", {})
        self._threshold = cfg.threshold
        lost = [f for i in ids for f in self._files(i) if not f.exists()]
        if lost:
            raise InputError(f"{path / INDEX} names {lost[0]}, which does not exist; {_REMAKE} again")
        for i in ids:
            tree, wanted = self._entries[i]["swc_voxel"], self._entries[i].get("sha256", {}).get("swc_voxel")
            if tree and wanted and files.sha256(path / tree) != wanted:
                raise InputError(
                    f"{path / tree} was changed after `infer` wrote it, so that its scores would not be the model's; "
                    f"`hpc-neuro infer verify {path}` sets it aside and writes the model's tree again"
                )

    def read(self, volume_id: str, wanted_shape: tuple[int, int, int]) -> Prediction:
        """The prediction of a volume. Raises InputError when its shape is not `wanted_shape`."""
        entry = self._entries[volume_id]
        image, *tree = self._files(volume_id)
        probability = open_volume(image)
        if probability.shape != wanted_shape:
            raise InputError(
                f"{image} has shape {probability.shape}, but volume {volume_id} of the store has {wanted_shape} (z y "
                "x): the predictions are of another volume, or of an older store; make them again"
            )
        found = swc.read(tree[0]) if tree else morphology.empty_tree()
        return Prediction(probability, found, self._threshold or float(entry["threshold"]))

    def views(self, volume_id: str, nodes: int) -> dict[str, NDArray[np.float64]]:
        """[N] `mean` confidence of all views and `agreement` of each node of the tree; nothing without mirrored views.

        Raises InputError for a table that is not of the tree.
        """
        name = self._entries[volume_id].get("confidence")
        if name is None:
            return {}
        path = self.path / name
        try:
            with path.open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if not rows or "disagreement" not in rows[0]:
                return {}
            values = np.array([[float(row["mean"]), 1 - float(row["disagreement"])] for row in rows])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read as confidences of nodes ({error}); {_REMAKE} again") from None
        if len(values) != nodes:
            raise InputError(f"{path} is of {len(values)} nodes, but the tree has {nodes}; {_REMAKE} again")
        return {"mean": values[:, 0], "agreement": values[:, 1]}

    def roots(self, volume_id: str) -> list[list[float]] | None:
        """[voxel] z y x from which a volume was traced, rounded; None where that is not recorded."""
        held = self._entries[volume_id].get("roots")
        return None if held is None else [[round(float(c), 3) for c in root] for root in held]

    def trace_config(self) -> TraceConfig | None:
        """The tracer's settings that `infer` recorded; None when it recorded none."""
        if "trace" not in self.config:
            return None
        try:
            found = TypeAdapter(TraceConfig).validate_python(self.config["trace"])
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{self.path / 'run.json'} holds settings of the tracer that this version does not take "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']}); give `trace={{}}` or settings in the config"
            ) from None
        if absent := sorted({f.name for f in fields(TraceConfig)} - set(self.config["trace"])):
            raise InputError(
                f"{self.path} was traced by a version without {', '.join(absent)}, and Otsu's mask would be traced "
                f"otherwise; {_REMAKE} again, which keeps the probabilities"
            )
        return found

    def _files(self, volume_id: str) -> list[Path]:
        """The probability, and the tree in voxels unless nothing was traced."""
        entry = self._entries[volume_id]
        names = [entry["probability"], entry["swc_voxel"]]
        return [self.path / n for n in names if n is not None]


@dataclass(frozen=True)
class Method:
    """One way from image to mask and tree; several seeds of a model are one method."""

    name: str
    seeds: tuple[Predictions, ...]  # none: the Otsu baseline


def methods(cfg: EvaluateConfig, ids: Sequence[str]) -> list[Method]:
    """`model` first, then what it is compared with, Otsu last. Raises InputError for what cannot be read."""
    folders = {"model": [cfg.predictions], **{k: [] for k in cfg.compare if k != "model"}}
    for name, more in cfg.compare.items():
        folders[name] += more
    found = [Method(name, tuple(Predictions(p, ids, cfg) for p in paths)) for name, paths in folders.items()]
    return [*found, Method("otsu", ())] if cfg.otsu else found


def wanted(cfg: EvaluateConfig, store: Store) -> tuple[str, ...]:
    """The ids to score. Raises InputError when the split is empty."""
    ids = store.split(cfg.split)
    if not ids:
        sizes = ", ".join(f"{s} {len(store.split(s))}" for s in ("train", "val", "test"))
        raise InputError(f"the {cfg.split} split of {cfg.store} is empty ({sizes}); choose another `split`")
    return ids


def threshold(volume: StoredVolume) -> float:
    """Otsu's threshold of the whole image (foreground is above it), from a histogram gathered block by block.

    Images of up to 16 bits have one bin per value: the result is that of scikit-image on the whole array. Others have
    65,536 bins between their extremes. Source: Otsu 1979.
    """
    dtype = volume.dtype
    if dtype.kind == "u" and dtype.itemsize <= 2:
        size = 1 << (8 * dtype.itemsize)
        counts = np.zeros(size, dtype=np.int64)
        for block in tile_volume(volume.shape, _BLOCK):
            counts += np.bincount(volume.image(block.write).ravel(), minlength=size)
        values: NDArray[np.float64] = np.arange(size, dtype=np.float64)
    else:
        ends = [
            (float(b.min()), float(b.max())) for b in (volume.image(t.write) for t in tile_volume(volume.shape, _BLOCK))
        ]
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        counts = np.zeros(_BINS, dtype=np.int64)
        for block in tile_volume(volume.shape, _BLOCK):
            counts += np.histogram(volume.image(block.write), bins=_BINS, range=(low, high))[0]
        values = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS
    present = np.flatnonzero(counts)
    kept = slice(int(present[0]), int(present[-1]) + 1)
    return float(threshold_otsu(hist=(counts[kept], values[kept])))


class OtsuMask:
    """Where the raw image is above Otsu's threshold, read by box."""

    def __init__(self, volume: StoredVolume) -> None:
        self.threshold = threshold(volume)
        self._volume = volume

    def mask(self, box: Box) -> NDArray[np.bool_]:
        """[Z, Y, X] bool."""
        return np.greater(self._volume.image(box), self.threshold)

    def probability(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] 0 or 1, as the tracer wants it."""
        return self.mask(box).astype(np.float32)


def otsu_tree(volume: StoredVolume, baseline: OtsuMask, cfg: TraceConfig) -> Tree:
    """The tree (voxels) of Otsu's mask, from the volume's root; empty, and said so, when nothing can be traced."""
    try:
        return concatenate_trees(
            trace_reader(
                baseline.probability,
                volume.shape,
                volume.voxel_size,
                roots=() if volume.root is None else (volume.root,),
                cfg=cfg,
                image=volume.normalized_image,
            )
        )
    except InputError as error:
        log.warning("%s: Otsu's mask gives no tree and counts as a miss: %s", volume.id, error)
        return empty_tree()
