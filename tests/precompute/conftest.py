"""A store and a cache of it that the tests share: they read them, or change a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro import precompute
from hpc_neuro.core.schema import load
from tests.helpers.tiny_store import write_store

KEYS = ["teacher.model=random", "stride_v=8", "slab=2", "layers=[3,-1]", "position_free=false"]
Configure = Callable[..., precompute.PrecomputeConfig]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", {"a": "train", "b": "train", "c": "test"})


@pytest.fixture(scope="session")
def configure(store: Path) -> Configure:
    """A config of the small store; later keys win."""
    return lambda out, *keys: load(precompute.PrecomputeConfig, None, [f"store={store}", f"out={out}", *KEYS, *keys])


@pytest.fixture(scope="session")
def cache_folder(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert precompute.run(configure(out)) == 0
    return out
