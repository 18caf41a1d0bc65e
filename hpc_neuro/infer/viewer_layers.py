"""What a viewer is shown of a run folder beside its files: the image, the trees, and a state that names all layers.

Nothing is copied: the image is given as the chunks of a zarr array, read from its own file as they are asked for; trees
as Neuroglancer's skeletons ("precomputed", https://github.com/google/neuroglancer), one segment per tree of the SWC,
numbered as in proofread/ID.neurons.csv.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, morphology, schema
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.data.store import Store
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.proofread import neuroglancer
from hpc_neuro.infer.volumes import opened

_CHUNK: Shape = (32, 64, 64)  # of the image, as it is asked for
_LOOK: Shape = (32, 256, 256)  # of it, to set the contrast
_NM = 1000.0  # in a micrometre


class Layers:
    """The layers of every volume of a run folder. `get` may be called by several threads."""

    def __init__(self, out: Path) -> None:
        """Raises InputError for a folder that `infer` did not write, or has not finished."""
        again = "give a folder that `infer` wrote; if it is not finished, give the same command again"
        self._entries: dict[str, Any] = files.read_json(out / "predictions.json", again)
        self._out, self._cfg = out, schema.load(InferConfig, out / "config.yaml")
        self._reading = threading.Lock()  # one reader at a time: HDF5 and TIFF files have one position
        self._image, self._trees = cache(self._open_image), cache(self._read_trees)

    @property
    def names(self) -> tuple[str, ...]:
        """The volumes."""
        return tuple(self._entries)

    def get(self, path: str, base: str) -> bytes | None:
        """What stands at a path such as `ID.json`, `ID.image/zarr.json` or `ID.trees/1`; None: nothing does.

        base: the address under which the viewer reaches these paths. Raises InputError when an image cannot be read.
        """
        head, _, rest = path.partition("/")
        name, _, kind = head.rpartition(".")
        if name not in self._entries:
            return None
        with self._reading:
            if kind == "json" and not rest:
                return json.dumps(self.state(name, base)).encode()
            if kind == "image":
                return self._of_image(name, rest)
            if kind == "trees" and rest == "info":
                return json.dumps({"@type": "neuroglancer_skeletons"}).encode()
            if kind == "trees" and rest.isdecimal():
                trees = self._trees(name)
                return _skeleton(trees[int(rest) - 1]) if 0 < int(rest) <= len(trees) else None
        return None

    def state(self, name: str, base: str) -> dict[str, Any]:
        """A state of Neuroglancer with the image, the probability, the mask, the trees and the doubtful places."""
        entry, saved = self._entries[name], self._out / "proofread" / f"{name}.neuroglancer.json"
        if saved.exists():
            text = saved.read_text(encoding="utf-8").replace("http://HOST/", f"{base}/")
            state: dict[str, Any] = json.loads(text)
        else:
            _, shape, _ = self._image(name)
            state = neuroglancer(name, (), shape, _voxel_size(entry), base)
        image = {"type": "image", "name": "image", "source": f"zarr3://{base}/{name}.image/"}
        contrast = {"shaderControls": {"normalized": {"range": self._contrast(name, state["position"])}}}
        state["layers"].insert(0, image | contrast)
        if entry.get("swc"):
            numbers = [str(n) for n in range(1, entry["trees"] + 1)]
            source = f"precomputed://{base}/{name}.trees"
            state["layers"].insert(3, {"type": "segmentation", "name": "trees", "source": source, "segments": numbers})
        return state

    def _open_image(self, name: str) -> tuple[np.dtype[Any], Shape, Callable[[Box], Array]]:
        cfg = self._cfg
        if cfg.store is not None and name in (store := Store(cfg.store)).ids:
            held = store[name]
            return held.dtype, held.shape, held.image
        for item in cfg.inputs:
            if name == item.name:
                volume = opened(item, item.dataset)
                return volume.dtype, volume.shape, volume.__getitem__
        raise InputError(f"{self._out}/config.yaml names no image for {name}")

    def _contrast(self, name: str, position: list[float]) -> list[float]:
        """The brightness to show as black and as white, of the voxels around a position."""
        _, shape, read = self._image(name)
        z, y, x = (round(p) - n // 2 for p, n in zip(position, _LOOK, strict=True))
        values = read(Box.at((z, y, x), _LOOK).clip(Box.whole(shape))).astype(np.float32)
        low, high = (float(v) for v in np.percentile(values, (1, 99.9)))
        return [low, max(high, low + 1e-6)]

    def _of_image(self, name: str, rest: str) -> bytes | None:
        """A file of an OME-Zarr with one level, as there are no others of the image."""
        dtype, shape, _ = self._image(name)
        if rest == "zarr.json":
            size = _voxel_size(self._entries[name])
            ome = ome_zarr.build_multiscales(name, ome_zarr.plan_levels(shape, size)[:1], size)
            return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}).encode()
        if rest.startswith("0/c/"):
            return self._chunk(name, rest.removeprefix("0/c/").split("/"))
        if rest != "0/zarr.json":
            return None
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": _sent(dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_CHUNK)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "dimension_names": ["z", "y", "x"],
        }
        return json.dumps(array).encode()

    def _chunk(self, name: str, index: list[str]) -> bytes | None:
        dtype, shape, read = self._image(name)
        counts = [-(-n // c) for n, c in zip(shape, _CHUNK, strict=True)]
        if len(index) != 3 or not all(i.isdecimal() and int(i) < n for i, n in zip(index, counts, strict=True)):
            return None
        z, y, x = (int(i) * c for i, c in zip(index, _CHUNK, strict=True))
        box = Box.at((z, y, x), _CHUNK).clip(Box.whole(shape))
        whole = np.zeros(_CHUNK, _sent(dtype))
        whole[box.relative_to((z, y, x)).slices] = read(box)
        return whole.tobytes()

    def _read_trees(self, name: str) -> list[Tree]:
        entry = self._entries[name]
        return morphology.split_components(swc.read(self._out / entry["swc"])) if entry.get("swc") else []


def _voxel_size(entry: dict[str, Any]) -> VoxelSize:
    z, y, x = (float(v) for v in entry["voxel_size"])
    return z, y, x


def _sent(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """How the viewer is given numbers: it knows no 64-bit floats and no truth values."""
    if dtype.kind == "b":
        return np.dtype("u1")
    return np.dtype("<f4") if dtype.kind == "f" else dtype.newbyteorder("<")


def _skeleton(tree: Tree) -> bytes:
    """Counts of vertices and edges, vertices x y z in nanometres, edges: all little-endian, 32 bits."""
    counts = np.array([len(tree), len(tree.edges)], "<u4")
    return counts.tobytes() + (tree.points[:, ::-1] * _NM).astype("<f4").tobytes() + tree.edges.astype("<u4").tobytes()
