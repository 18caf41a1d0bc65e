"""Predictions of a tiny store, as `infer` leaves them, made from the truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import swc
from hpc_neuro.data.store import Store
from tests.helpers.tiny_store import write_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("evaluate") / "store", {"a": "test", "b": "test", "c": "train"})


def write_predictions(folder: Path, store: Path, shift: float = 0.0, nothing: tuple[str, ...] = ()) -> Path:
    """The gold mask as probability and the gold tree moved by `shift` voxels along y; of `nothing`, neither."""
    (folder / "swc").mkdir(parents=True)
    held, index = Store(store), {}
    for name in held.split("test"):
        volume = held[name]
        mask = volume.mask(Box.whole(volume.shape)) == 1
        found = np.roll(mask, round(shift), axis=1) & (name not in nothing)
        tifffile.imwrite(folder / f"{name}.tif", (200 * found).astype(np.uint8), metadata={"axes": "ZYX"})
        tree = volume.tree()
        moved = Tree(tree.points + np.array([0, shift, 0]), tree.radii, tree.parents, tree.types)
        traced = None if name in nothing else f"swc/{name}.voxel.swc"
        if traced:
            swc.write(folder / traced, moved, unit="voxel")
        index[name] = {"probability": f"{name}.tif", "swc_voxel": traced, "threshold": 0.5}
    held.close()
    (folder / "predictions.json").write_text(json.dumps(index))
    return folder
