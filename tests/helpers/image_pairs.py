"""Small synthetic pairs and configs of the verb prepare, for its tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tifffile

from hpc_neuro.core import schema
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import swc
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.prepare import PrepareConfig, forecast, run

SHAPE = (20, 72, 80)
SIZE = (1.0, 0.4, 0.4)
EASY = Microscope(fragments=0, specks=0, gap_length=0.0)


def make_pair(seed: int) -> tuple[Tree, Array]:
    tree = grow_random_tree(seed, SHAPE, SIZE, TreeForm(soma=0))
    return tree, render_stack(tree, SHAPE, SIZE, EASY, seed)


def write_pair(folder: Path, id_: str, seed: int, image: Array | None = None, tree: Tree | None = None) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    made, seen = make_pair(seed)
    tifffile.imwrite(
        folder / f"{id_}.tif", seen if image is None else image, photometric="minisblack", metadata={"axes": "ZYX"}
    )
    swc.write(folder / f"{id_}.swc", made if tree is None else tree, unit="voxel")


def make_config(*keys: str, **paths: Any) -> PrepareConfig:
    keys = (*(f"{k}={v}" for k, v in paths.items()), *keys)
    if not any(k.startswith(("voxel_size", "manifest")) for k in keys):
        keys = (*keys, "voxel_size=[1.0,0.4,0.4]")
    return schema.load(PrepareConfig, None, keys)


def hash_results(folder: Path) -> dict[str, str]:
    """Digest of every file that is a result."""
    kept = [*folder.glob("*.h5"), folder / "dataset.json", *folder.glob("pictures/*.png")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def assert_refused(cfg: PrepareConfig, match: str) -> str:
    """The sentence `run` and `forecast` answer with; nothing may be written."""
    with pytest.raises((InputError, ConfigError), match=match):
        forecast(cfg)
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        run(cfg)
    assert not cfg.out.exists()
    return str(caught.value)
