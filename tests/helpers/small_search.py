"""A search of one trial, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.helpers.tiny_store import write_store
from tests.train.conftest import TINY


def write_search(folder: Path, **keys: object) -> Path:
    """A search of one trial on a tiny store."""
    store = write_store(folder / "store", {"a": "train", "b": "val"})
    tree = {
        "out": str(folder / "study"),
        "train": {"keys": [f"store={store}", *TINY]},
        "space": {"optim.lr": {"log": [1e-3, 1e-2]}},
        "sampler": {"kind": "random"},
        "trials": 1,
        "poll": 0.2,
        **keys,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
