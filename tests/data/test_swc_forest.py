"""A file of many trees that is formatted tree by tree is the one that `write` makes of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree, build_tree
from hpc_neuro.data import swc
from hpc_neuro.data.swc import forest as swc_forest


def make_tree(seed: int, nodes: int, has_soma: bool) -> Tree:
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(int(rng.integers(max(0, n - 3), n)) for n in range(1, nodes))])
    tree = build_tree(rng.uniform(-5, 500, (nodes, 3)), parents, rng.uniform(0.5, 3, nodes), 0)
    return replace(tree, types=np.array([int(has_soma)] + [0] * (nodes - 1)))


@pytest.mark.parametrize("somas", [(False, False, False, False), (True, False, True, True), (False, True, False, True)])
def test_the_bytes_are_those_of_one_file(tmp_path: Path, somas: tuple[bool, ...]) -> None:
    forest = [make_tree(n, 3 + 40 * n, has_soma) for n, has_soma in enumerate(somas)]
    comments, size = ["a comment", "unit: voxel"], (2.0, 0.5, 0.5)
    swc.write(tmp_path / "a.swc", morphology.concatenate_trees(forest), unit="um", voxel_size=size, comments=comments)

    header = swc_forest.format_forest_header(
        forest[0], len(forest), sum(somas[1:]), unit="um", voxel_size=size, comments=comments
    )
    texts, next_id = [header, swc_forest.format_first_tree(forest[0])], swc_forest.count_first_rows(forest[0]) + 1
    for tree in forest[1:]:
        texts.append(swc_forest.format_further_tree(tree, next_id))
        next_id += len(tree)
    assert "".join(texts) == (tmp_path / "a.swc").read_text()


def test_a_tree_that_would_be_changed_is_refused() -> None:
    tree = make_tree(0, 9, has_soma=False)
    with pytest.raises(ValueError, match="outside 0 to 7"):
        swc_forest.format_first_tree(replace(tree, types=np.full(9, 11)))
