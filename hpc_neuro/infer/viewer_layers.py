"""What a viewer is shown of a run folder beside its files: the image, the trees, and a state that names all layers.

Nothing is copied. The image appears as the chunks of a zarr array, read from its own file when they are wanted; trees
as Neuroglancer's skeletons ("precomputed", https://github.com/google/neuroglancer), one segment per tree of the SWC,
numbered as in proofread/ID.neurons.csv.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files, morphology, schema
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.data.predictions import read_predictions
from hpc_neuro.data.store import Store
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.proofread import build_neuroglancer_state
from hpc_neuro.infer.volumes import open_image

_CHUNK: Shape = (32, 64, 64)
"""[voxel] Chunk of the image, as the viewer reads it."""
_CONTRAST_BOX: Shape = (32, 256, 256)
"""[voxel] Part of the image whose brightness sets the contrast."""
_CONTRAST_PERCENTILES = (1, 99.9)
"""[percent] Brightness shown as black and as white."""
_MAX_DIGITS = 18
"""Digits of a number in a path; `int` refuses thousands of them."""
_NM_PER_UM = 1000.0


@with_config(ConfigDict(extra="allow"))
class _StateForm(TypedDict):
    """The parts of a state of Neuroglancer that are read here."""

    position: Annotated[list[FiniteFloat], Field(min_length=3, max_length=3)]
    layers: list[dict[str, Any]]


def open_run_image(cfg: InferConfig, name: str) -> tuple[np.dtype[Any], Shape, Callable[[Box], Array]]:
    """Type, shape and reader of the image that a run of `infer` predicted. Raises InputError if it cannot be read."""
    if cfg.store is not None and name in (store := Store(cfg.store)).ids:
        stored = store[name]
        return stored.dtype, stored.shape, stored.image

    for item in cfg.inputs:
        if name == item.name:
            volume = open_image(item, item.dataset)
            return volume.dtype, volume.shape, volume.__getitem__
    raise InputError(f"{cfg.out}/config.yaml names no image for {name}")


class ViewerLayers:
    """The layers of every volume of a run folder. `get` may be called by several threads."""

    def __init__(self, out: Path) -> None:
        """Raises InputError for a folder that `infer` did not write, or has not finished."""
        hint = "give a folder that `infer` wrote; if it is not finished, give the same command again"
        self._entries = read_predictions(out, hint)
        self._out, self._cfg = out, schema.load(InferConfig, out / "config.yaml")

        # One reader at a time: HDF5 and TIFF files have one position.
        self._reading = threading.Lock()

        # A view makes hundreds of requests, and opening a file or parsing trees takes long.
        self._image, self._trees = cache(self._open_image), cache(self._read_trees)

    @property
    def names(self) -> tuple[str, ...]:
        """The volumes."""
        return tuple(self._entries)

    def get(self, path: str, base: str) -> bytes | None:
        """What is at a path such as `ID.json`, `ID.image/zarr.json` or `ID.trees/1`; None: nothing is.

        base: the address under which the viewer reaches these paths. Raises InputError when an image cannot be read.
        """
        head, _, rest = path.partition("/")
        name, _, kind = head.rpartition(".")

        if name not in self._entries:
            return None

        with self._reading:
            if kind == "json" and not rest:
                return json.dumps(self.build_state(name, base)).encode()
            if kind == "image":
                return self._get_image_file(name, rest)
            if kind == "trees":
                return self._get_trees_file(name, rest)
        return None

    def build_state(self, name: str, base: str) -> dict[str, Any]:
        """A state of Neuroglancer with the image, the probability, the mask, the trees and the doubtful places."""
        entry = self._entries[name]
        state = self._read_state(name, base)

        image = {"type": "image", "name": "image", "source": f"zarr3://{base}/{name}.image/"}

        # Measured where the view begins, since brightness may differ across an image.
        contrast = {"normalized": {"range": self._measure_contrast(name, state["position"])}}
        state["layers"].insert(0, {**image, "shaderControls": contrast})

        # Trees come above the mask, and below the places to look at.
        if entry.get("swc"):
            source = f"precomputed://{base}/{name}.trees"
            numbers = [str(number) for number in range(1, len(self._trees(name)) + 1)]
            state["layers"].insert(3, {"type": "segmentation", "name": "trees", "source": source, "segments": numbers})
        return state

    def _read_state(self, name: str, base: str) -> dict[str, Any]:
        """The state that `infer` wrote for proofreading; a plain one for a volume without trees."""
        path = self._out / "proofread" / f"{name}.neuroglancer.json"
        if path.exists():
            state = files.read_json(
                path, f"`hpc-neuro infer verify {files.quote_path(self._out)}` writes it again", _StateForm
            )
            # The address of the server was not known when the file was written.
            return dict(json.loads(json.dumps(state).replace("http://HOST/", f"{base}/")))

        _, shape, _ = self._image(name)
        return build_neuroglancer_state(name, (), shape, _voxel_size(self._entries[name]), base)

    def _open_image(self, name: str) -> tuple[np.dtype[Any], Shape, Callable[[Box], Array]]:
        return open_run_image(self._cfg, name)

    def _measure_contrast(self, name: str, position: list[float]) -> list[float]:
        """The brightness to show as black and as white, of the voxels around a position."""
        _, shape, read = self._image(name)

        # A part suffices: reading all of a brain would take too long.
        # A position outside the image is one at its border.
        centers = [min(max(center, 0), n - 1) for center, n in zip(position, shape, strict=True)]
        z, y, x = (round(center) - size // 2 for center, size in zip(centers, _CONTRAST_BOX, strict=True))
        values = read(Box.at((z, y, x), _CONTRAST_BOX).clip(Box.whole(shape))).astype(np.float32)
        low, high = (float(value) for value in np.percentile(values, _CONTRAST_PERCENTILES))

        # An image of one brightness would give an empty range.
        return [low, max(high, low + 1e-6)]

    def _get_image_file(self, name: str, rest: str) -> bytes | None:
        """A file of an OME-Zarr with one level; the image has no others."""
        dtype, shape, _ = self._image(name)
        if rest == "zarr.json":
            voxel_size = _voxel_size(self._entries[name])
            ome = ome_zarr.build_multiscales(name, ome_zarr.plan_levels(shape, voxel_size)[:1], voxel_size)
            return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}).encode()

        if rest == "0/zarr.json":
            return json.dumps(_describe_array(shape, dtype)).encode()

        if rest.startswith("0/c/"):
            return self._read_chunk(name, rest.removeprefix("0/c/").split("/"))
        return None

    def _read_chunk(self, name: str, index: list[str]) -> bytes | None:
        dtype, shape, read = self._image(name)
        counts = [-(-size // chunk) for size, chunk in zip(shape, _CHUNK, strict=True)]

        # The index comes with a request, and may be anything.
        numbers = [_parse_number(text) for text in index]
        if len(numbers) != 3 or not all(0 <= n < count for n, count in zip(numbers, counts, strict=True)):
            return None

        z, y, x = (number * chunk for number, chunk in zip(numbers, _CHUNK, strict=True))
        box = Box.at((z, y, x), _CHUNK).clip(Box.whole(shape))

        # The last chunk of an axis is as large as the others.
        values = np.zeros(_CHUNK, _viewer_dtype(dtype))
        values[box.relative_to((z, y, x)).slices] = read(box)
        return values.tobytes()

    def _get_trees_file(self, name: str, rest: str) -> bytes | None:
        """The description of the trees, or the skeleton of one of them."""
        if rest == "info":
            return json.dumps({"@type": "neuroglancer_skeletons"}).encode()
        number = _parse_number(rest)

        # Trees are numbered from 1, and what is no number gives -1.
        if number < 1:
            return None

        trees = self._trees(name)
        return _encode_skeleton(trees[number - 1]) if number <= len(trees) else None

    def _read_trees(self, name: str) -> list[Tree]:
        entry = self._entries[name]
        if not entry.get("swc"):
            return []
        index = self._out / "predictions.json"
        path = files.resolve_inside(self._out, entry["swc"], index, "make it again with `hpc-neuro infer`")
        return morphology.split_components(swc.read(path))


def _describe_array(shape: Shape, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The zarr.json of the image's array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": _viewer_dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_CHUNK)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        # Uncompressed, so that a chunk costs no more than its reading.
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "dimension_names": ["z", "y", "x"],
    }


def _parse_number(text: str) -> int:
    """A number in a path; -1 for anything else."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else -1


def _voxel_size(entry: dict[str, Any]) -> VoxelSize:
    if "voxel_size" not in entry:
        raise InputError("predictions.json states no voxel size; remove it, and run the same `hpc-neuro infer` again")
    z, y, x = (float(size) for size in entry["voxel_size"])
    return z, y, x


def _viewer_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which the viewer gets values: it knows no 64-bit floats and no booleans."""
    if dtype.kind == "b":
        return np.dtype("u1")
    return np.dtype("<f4") if dtype.kind == "f" else dtype.newbyteorder("<")


def _encode_skeleton(tree: Tree) -> bytes:
    """Counts of vertices and edges, vertices x y z in nanometers, edges: all little-endian, 32 bits."""
    counts = np.array([len(tree), len(tree.edges)], "<u4")

    # Neuroglancer takes x y z, where trees here are z y x.
    vertices = (tree.points[:, ::-1] * _NM_PER_UM).astype("<f4")
    return counts.tobytes() + vertices.tobytes() + tree.edges.astype("<u4").tobytes()
