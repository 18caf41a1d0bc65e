"""Raw pairs, and a store made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.prepare import run
from tests.helpers.image_pairs import make_config, write_pair


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number, id_ in enumerate(("a", "b", "c")):
        write_pair(folder, id_, number + 1)
    (folder / "SOURCE.txt").write_text("where it is from")
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    write_pair(folder, "a", 1)
    return folder


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all three, made in one go; tests leave it as it is."""
    out = tmp_path_factory.mktemp("stores") / "whole"
    assert run(make_config("split.test=[b]", "split.val=[c]", images=raw, out=out)) == 0
    return out
