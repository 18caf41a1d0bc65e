"""Predictions of a tiny store, as `infer` leaves them, made from the truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import evaluate
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
    gold_store, index = Store(store), {}
    for name in gold_store.split("test"):
        volume = gold_store[name]
        mask = volume.mask(Box.whole(volume.shape)) == 1
        predicted = np.roll(mask, round(shift), axis=1) & (name not in nothing)
        tifffile.imwrite(folder / f"{name}.tif", (200 * predicted).astype(np.uint8), metadata={"axes": "ZYX"})
        tree = volume.tree()
        moved = Tree(tree.points + np.array([0, shift, 0]), tree.radii, tree.parents, tree.types)
        traced = None if name in nothing else f"swc/{name}.voxel.swc"
        if traced:
            swc.write(folder / traced, moved, unit="voxel")
        index[name] = {"probability": f"{name}.tif", "swc_voxel": traced, "threshold": 0.5}
    gold_store.close()
    (folder / "predictions.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def finished_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything: two seeds of the model, another model, a training run, a tolerance in um."""
    folder = tmp_path_factory.mktemp("done")
    exact = write_predictions(folder / "exact", store)
    near = write_predictions(folder / "near", store, shift=1.0)
    far = write_predictions(folder / "far", store, shift=6.0, nothing=("b",))
    train = folder / "train"
    train.mkdir()
    steps = [{"step": i, "kind": "train", "lr": 1e-3, "loss": 1 / (i + 1), "dice": None} for i in range(5)]
    (train / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*steps, {"step": 5, "kind": "val", "dice": 0.5}])))
    cfg = evaluate.EvaluateConfig(
        store=store,
        predictions=exact,
        out=folder / "out",
        compare={"model": [near], "far": [far]},
        tolerance_um=2.5,
        train=train,
        draws=200,
        pictures=1,
    )
    assert evaluate.run(cfg) == 0
    return cfg.out
