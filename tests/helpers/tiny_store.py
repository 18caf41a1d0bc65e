"""A training store small enough for tests: random bright paths in noise."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import feature_cache
from hpc_neuro.data.orientation import VIEW_AXES
from hpc_neuro.data.rasterize import DrawSettings
from hpc_neuro.data.store import Store, VolumeRecord, write_index, write_volume

SHAPE = (20, 52, 56)  # no multiple of the patch, larger than the crops of the tests


def write_store(
    folder: Path, splits: dict[str, str], shape: tuple[int, int, int] = SHAPE, digest: str = "digest"
) -> Path:
    """Write volumes id -> split, each one branching path in a noisy image; returns the folder."""
    folder.mkdir(parents=True)
    volumes = []
    for number, (name, split) in enumerate(splits.items()):
        draw = np.random.default_rng(number)
        tree = make_tree(draw, shape)
        image = make_image(draw, shape, tree)
        volume = VolumeRecord(
            id=name,
            shape=shape,
            voxel_size=(1.0, 1.0, 1.0),
            dtype=image.dtype,
            low=0.0,
            high=200.0,
            root=None,
            split=split,
            digest=f"{digest} of {name}",
            sources={"image": "0", "swc": "0"},
        )
        drawing = DrawSettings()
        write_volume(folder / f"{name}.h5", volume, functools.partial(read_box, image), tree, tree, drawing)
        volumes.append(volume)
    write_index(folder, volumes)
    return folder


def read_box(image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    return image[box.slices]


def make_tree(draw: np.random.Generator, shape: tuple[int, int, int]) -> Tree:
    """A trunk along x with one branch along y."""
    z, y, x = shape
    trunk = [(z / 2 + draw.normal(), y / 2 + 3 * np.sin(i / 5), i) for i in np.linspace(3, x - 4, 24)]
    branch = [(z / 2, y / 2 + i, x / 2) for i in np.linspace(2, y / 2 - 4, 8)]
    points = np.array(trunk + branch)
    parents = np.array([*range(-1, 23), 12, *range(24, 31)])
    return Tree(points, np.full(len(points), 2.0), parents, np.full(len(points), 2))


def make_image(draw: np.random.Generator, shape: tuple[int, int, int], tree: Tree) -> np.ndarray:
    canvas = np.ones(shape)
    for a, b in enumerate(tree.parents):
        if b >= 0:
            for t in np.linspace(0, 1, 12):
                canvas[tuple(np.rint(tree.points[a] * t + tree.points[b] * (1 - t)).astype(int))] = 0
    near = ndimage.distance_transform_edt(canvas) <= 2
    return np.clip(180 * near + draw.normal(20, 8, shape), 0, 255).astype(np.uint8)


def write_cache(folder: Path, store: Path, identity: dict[str, str], dim: int = 6) -> Path:
    """A feature cache of the store's training volumes: random channels, one token per 8 x 16 x 16 voxels and view."""
    folder.mkdir(parents=True)
    stored, records = Store(store), []
    train = stored.split("train")
    for number, name in enumerate(train):
        for view, (across, down, right) in VIEW_AXES.items():
            shape, patch = stored[name].shape, (8, 16, 16)
            slices, rows, columns = (-(-shape[a] // patch[a]) for a in (across, down, right))
            cell = (float(patch[down]), float(patch[right]))
            unit = feature_cache.ShardSpec(name, view, 0, patch[across], slices, rows, columns, cell)
            values = np.random.default_rng(number).normal(size=(slices, 1, rows, columns, dim)).astype(np.float16)
            writer = feature_cache.ShardWriter(folder / unit.name, unit, 1, dim, "key", tile=32)
            writer.write(slice(0, slices), slice(0, rows), slice(0, columns), values)
            writer.finish()
            records.append(feature_cache.read_shard_record(folder / unit.name, unit))
    digests = {name: stored[name].digest for name in train}
    facts = {
        "layers": [11],
        "views": list(VIEW_AXES),
        "dim": dim,
        "teacher": identity,
        "volumes": digests,
    }
    feature_cache.write_manifest(folder, facts, records)
    stored.close()
    return folder
