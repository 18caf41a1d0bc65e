"""Results as napari's layer tuples (data, arguments, type): image, probability, trees, and places to proofread.

All layers have voxels as coordinates and the voxel size (um, or 1) as scale, so that they lie over each other. Images
are read when they are shown.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, FiniteFloat, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files, morphology, schema, yaml_text
from hpc_neuro.core.constants import TREE_COLORS
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.predictions import INDEX, read_predictions
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.viewer_layers import open_run_image
from hpc_neuro.trace_stacks.config import INDEX as TRACE_INDEX
from hpc_neuro.trace_stacks.config import TraceStacksConfig

log = logging.getLogger(__name__)
LayerData = tuple[Any, dict[str, Any], str]
PLACES = "hpc_neuro places"
"""Key in the metadata of a layer that holds places to proofread."""
_SAMPLE: Shape = (16, 256, 256)
"""[voxel] Part in the middle of an image whose brightness sets the contrast."""
_CONTRAST = (0.01, 0.999)
"""Quantiles of the brightness that are shown as black and as white."""
_PLACE_SIZE = 12.0
"""[voxel] Diameter of the circle around a place."""


@with_config(ConfigDict(extra="allow"))
class _PlaceForm(TypedDict):
    """A place to proofread; coordinates in voxels."""

    kind: str
    z: FiniteFloat
    y: FiniteFloat
    x: FiniteFloat
    doubt: FiniteFloat


_Side = Annotated[FiniteFloat, Field(gt=0)]


@with_config(ConfigDict(extra="allow"))
class _StackForm(TypedDict):
    """What trace.json says of a stack."""

    image: str
    voxel_size: Annotated[list[_Side], Field(min_length=3, max_length=3)] | None
    swc_voxel: str | None
    places: list[_PlaceForm]


@with_config(ConfigDict(extra="allow"))
class _TraceForm(TypedDict):
    """What is read from trace.json."""

    stacks: dict[str, _StackForm]


def get_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[LayerData]] | None:
    """napari's hook: the function that reads a path, None for what is no result of hpc_neuro."""
    paths = [Path(path)] if isinstance(path, str) else [Path(item) for item in path]
    return read_paths if all(_find_reader(item) for item in paths) else None


def read_paths(path: str | Sequence[str]) -> list[LayerData]:
    """The layers of one path, or of several. Raises InputError for files that cannot be read."""
    paths = [Path(path)] if isinstance(path, str) else [Path(item) for item in path]
    layers = list[LayerData]()
    for item in paths:
        reader = _find_reader(item)
        assert reader is not None, f"{item} is no result of hpc_neuro"
        layers += reader(item)
    return layers


def _find_reader(path: Path) -> Callable[[Path], list[LayerData]] | None:
    """The function for one path by its name and by the files beside it."""
    if path.suffix.lower() == ".swc":
        return _read_swc
    if path.name == TRACE_INDEX:
        return _read_traces
    if path.name == INDEX:
        return _read_predictions
    if path.name.endswith(".ome.zarr") and (path.parent / INDEX).is_file():
        return _read_prediction
    return None


# --- Results of the verbs ---


def _read_swc(path: Path) -> list[LayerData]:
    """The trees of a file; one in micrometers is brought to voxels where its header states their size."""
    header, tree = swc.require_header(path), swc.read(path)
    size = header.voxel_size
    um = None if header.unit is None else swc.unit_in_um(header.unit)
    if um is not None:
        # Without a voxel size the layers have micrometers as coordinates, and a scale of 1.
        z, y, x = (um / edge for edge in size or (1.0, 1.0, 1.0))
        tree = morphology.scale_tree(tree, (z, y, x))
    return [build_trees_layer(path.stem, morphology.split_components(tree), size)]


def _read_traces(path: Path) -> list[LayerData]:
    """Every stack of a result of `trace`: image, trees, places."""
    out = path.parent
    hint = "give the same `hpc-neuro trace` again"
    record = files.read_json(path, hint, _TraceForm)
    cfg = schema.load(TraceStacksConfig, out / "config.yaml")

    layers = list[LayerData]()
    for name, stack in record["stacks"].items():
        size: VoxelSize | None = None
        if stack["voxel_size"] is not None:
            z, y, x = stack["voxel_size"]
            size = (z, y, x)
        image = Path(stack["image"])
        if image.exists():
            volume = open_volume(image, channel=cfg.channel, axes=cfg.axes, dataset=cfg.dataset)
            layers.append(build_image_layer(name, volume.dtype, volume.shape, volume.__getitem__, size))
        else:
            log.warning("%s is not there, so that only its trees are shown", image)
        if stack["swc_voxel"]:
            file = files.resolve_inside(out, stack["swc_voxel"], path, hint)
            layers.append(build_trees_layer(f"{name} trees", morphology.split_components(swc.read(file)), size))
        layers += _build_places(name, stack["places"], size)
    return layers


def _read_predictions(path: Path) -> list[LayerData]:
    """Every volume of a result of `infer`."""
    entries = _read_entries(path.parent)
    return [layer for name in entries for layer in _read_volume(path.parent, name, entries[name])]


def _read_prediction(path: Path) -> list[LayerData]:
    """One volume of a result of `infer`, by the folder of its probability."""
    entries = _read_entries(path.parent)
    for name, entry in entries.items():
        if entry["probability"] == path.name:
            return _read_volume(path.parent, name, entry)
    raise InputError(f"{path.parent / INDEX} does not name {path.name}; open one of {', '.join(entries)}")


def _read_entries(out: Path) -> dict[str, Any]:
    return read_predictions(out, "give the same `hpc-neuro infer` again")


def _read_volume(out: Path, name: str, entry: Mapping[str, Any]) -> list[LayerData]:
    """Image, probability, trees and places of a volume."""
    size: VoxelSize = tuple(entry["voxel_size"])
    layers = list[LayerData]()
    try:
        layers.append(
            build_image_layer(name, *open_run_image(schema.load(InferConfig, out / "config.yaml"), name), size)
        )
    except InputError as error:
        # The image may have moved since; the result stands for itself.
        log.warning("%s; only the result is shown", error)

    layers.append(_build_probability_layer(f"{name} probability", out / entry["probability"], size))
    if entry.get("swc_voxel"):
        trees = morphology.split_components(swc.read(out / entry["swc_voxel"]))
        layers.append(build_trees_layer(f"{name} trees", trees, size))

    table = out / "proofread" / f"{name}.csv"
    if table.is_file():
        layers += _build_places(name, _read_places(table), size)
    return layers


def _read_places(table: Path) -> list[_PlaceForm]:
    """The rows of a table of places. Raises InputError for one that is damaged."""
    hint = "move it away, and give the same `hpc-neuro infer` again"
    try:
        with table.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table} is no table of places ({error}); {hint}") from None

    places = []
    for number, row in enumerate(rows, start=2):
        try:
            z, y, x, doubt = (yaml_text.parse_decimal(row[column] or "") for column in ("z", "y", "x", "doubt"))
        except (KeyError, ValueError):
            raise InputError(f"{table}: line {number} is no place; {hint}") from None
        places.append(_PlaceForm(kind=row.get("kind") or "", z=z, y=y, x=x, doubt=doubt))
    return places


# --- Layers ---


class LazyImage:
    """An array [Z, Y, X] of which napari reads what it shows."""

    ndim = 3

    def __init__(self, dtype: np.dtype[Any], shape: Shape, read: Callable[[Box], Array]) -> None:
        self.dtype, self.shape, self._read = dtype, shape, read

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        keys = index if isinstance(index, tuple) else (index,)
        ranges = [range(n)[key] for n, key in zip(self.shape, (*keys, *[slice(None)] * (3 - len(keys))), strict=True)]
        # A whole number takes one plane, which is then dropped.
        spans = [range(r, r + 1) if isinstance(r, int) else r for r in ranges]
        if not all(len(span) for span in spans):
            return np.empty([len(r) for r in ranges if not isinstance(r, int)], self.dtype)
        lows, highs = zip(*((min(span[0], span[-1]), max(span[0], span[-1]) + 1) for span in spans), strict=True)
        block = self._read(Box(lows, highs))
        steps = tuple(slice(None, None, span.step) for span in spans)
        return np.asarray(block[steps][tuple(0 if isinstance(r, int) else slice(None) for r in ranges)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:, :, :], dtype=dtype)


def build_image_layer(
    name: str, dtype: np.dtype[Any], shape: Shape, read: Callable[[Box], Array], size: VoxelSize | None
) -> LayerData:
    """An image that is read where it is shown. The contrast is that of its middle."""
    start = [max(0, (n - part) // 2) for n, part in zip(shape, _SAMPLE, strict=True)]
    stop = [min(n, first + part) for n, first, part in zip(shape, start, _SAMPLE, strict=True)]
    sample = read(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    low, high = np.quantile(sample.astype(np.float64), _CONTRAST)
    limits = (float(low), max(float(high), float(low) + 1e-6))
    arguments = {"name": name, "scale": size or (1.0, 1.0, 1.0), "contrast_limits": limits, "multiscale": False}
    return LazyImage(dtype, shape, read), arguments, "image"


def _build_probability_layer(name: str, folder: Path, size: VoxelSize) -> LayerData:
    """The pyramid of a probability, 255 is 1."""
    first = ome_zarr.open_level(folder)
    z, y, x = first.shape
    count = len(ome_zarr.plan_levels((z, y, x), size))
    levels = [first, *(ome_zarr.open_level(folder, number) for number in range(1, count))]
    images = [LazyImage(np.dtype(np.uint8), tuple(level.shape), _make_reader(level)) for level in levels]
    arguments = {
        "name": name,
        "scale": size,
        "contrast_limits": (0, 255),
        "colormap": "red",
        "blending": "additive",
        "multiscale": len(images) > 1,
    }
    return images if len(images) > 1 else images[0], arguments, "image"


def _make_reader(level: Any) -> Callable[[Box], Array]:
    return lambda box: ome_zarr.read_box(level, box)


def build_trees_layer(name: str, trees: Sequence[Tree], size: VoxelSize | None) -> LayerData:
    """Trees in voxels as Shapes: one path for each unbranched section, and one color for each tree."""
    sections = [(number, section) for number, tree in enumerate(trees, start=1) for section in list_sections(tree)]
    arguments = {
        "name": name,
        "scale": size or (1.0, 1.0, 1.0),
        "shape_type": "path",
        "edge_width": 1.0,
        "edge_color": [TREE_COLORS[(number - 1) % len(TREE_COLORS)] for number, _ in sections],
        "face_color": "transparent",
        "features": {"tree": [number for number, _ in sections]},
    }
    return [section for _, section in sections], arguments, "shapes"


def list_sections(tree: Tree) -> list[NDArray[np.float64]]:
    """[n, 3] points of each unbranched section, from a root or branch point to the next branch point or tip."""
    counts = morphology.child_counts(tree)
    children: dict[int, list[int]] = {}
    for child, parent in tree.edges.tolist():
        children.setdefault(parent, []).append(child)

    sections = []
    ends = np.flatnonzero((counts != 1) | (tree.parents < 0))
    for end in ends.tolist():
        for child in children.get(end, []):
            nodes = [end, child]
            while counts[nodes[-1]] == 1:
                nodes.append(children[nodes[-1]][0])
            sections.append(tree.points[nodes])
    return sections


def _build_places(name: str, rows: Sequence[_PlaceForm], size: VoxelSize | None) -> list[LayerData]:
    """The places to proofread as Points; [] without any."""
    if not rows:
        return []
    points = np.array([[row["z"], row["y"], row["x"]] for row in rows], np.float64)
    features = {
        "rank": list(range(1, len(rows) + 1)),
        "kind": [row["kind"] for row in rows],
        "doubt": [row["doubt"] for row in rows],
    }
    arguments = {
        "name": f"{name} places",
        "scale": size or (1.0, 1.0, 1.0),
        "size": _PLACE_SIZE,
        "face_color": "transparent",
        "border_color": "yellow",
        "border_width": 0.1,
        "features": features,
        "metadata": {PLACES: True},
    }
    return [(points, arguments, "points")]
