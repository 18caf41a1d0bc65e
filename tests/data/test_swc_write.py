"""SWC files: what is written comes back, and other readers measure the same; units and transforms."""

from __future__ import annotations

from pathlib import Path

import neurom
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from tests.helpers.swc_oracles import assert_all_agree, random_tree, trees_equal


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans(), st.integers(1, 3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, soma: bool, roots: int) -> None:
    tree = random_tree(seed, max(count, roots), roots, soma)
    path = tmp_path_factory.mktemp("swc") / "a.swc"
    swc.write(path, tree)
    assert trees_equal(swc.read(path), tree)
    again = path.parent / "b.swc"
    swc.write(again, swc.read(path))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("soma", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 300])
def test_other_readers_measure_what_we_wrote(tmp_path: Path, count: int, soma: bool) -> None:
    for seed in range(5):
        tree = random_tree(seed, count, soma=soma)
        swc.write(tmp_path / "a.swc", tree)
        assert swc.check(tmp_path / "a.swc") == [] or (count == 1 and soma)
        assert_all_agree(tmp_path / "a.swc", tree)


def test_root_with_many_children(tmp_path: Path) -> None:
    for kind in (1, 3):
        points = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [0, 0, 0.0]])
        tree = Tree(points, np.ones(5), np.array([-1, 0, 0, 0, 0]), np.array([kind, 3, 2, 4, 3]))
        swc.write(tmp_path / "a.swc", tree)
        assert trees_equal(swc.read(tmp_path / "a.swc"), tree)
        if kind == 1:  # the neurites stay apart, each with its own type
            types = [str(n.type) for n in neurom.load_morphology(str(tmp_path / "a.swc")).neurites]
            assert len(types) == 4


def test_unusual_trees_are_standardized(tmp_path: Path) -> None:
    tree = Tree(
        np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0.0]]),
        np.array([np.nan, 0.0, 2.0, 1e-9]),
        np.array([-1, 0, 1, 2]),
        np.array([3, 115, -73, 2]),
    )
    swc.write(tmp_path / "a.swc", tree)
    written = swc.read(tmp_path / "a.swc")
    assert (written.radii > 0).all()
    assert set(written.types) == {3}
    assert swc.check(tmp_path / "a.swc") == []
    text = (tmp_path / "a.swc").read_text()
    assert "# changed: 2 radii" in text
    assert "# changed: 2 types outside 0 to 7, now 0" in text
    assert_all_agree(tmp_path / "a.swc", written)


def test_header_states_unit_transform_and_roots(tmp_path: Path) -> None:
    swc.write(
        tmp_path / "a.swc",
        random_tree(0, roots=2),
        unit="voxel",
        voxel_size=(1, 0.33, 0.25),
        comments=["by me\nand you"],
    )
    text = (tmp_path / "a.swc").read_text()
    for line in (
        "# written by hpc_neuro",
        "# unit: voxel",
        "# voxel size um z y x: 1.0 0.33 0.25",
        "# roots: 2",
        "# by me\n# and you",
    ):
        assert line in text
    header = swc.read_header(tmp_path / "a.swc")
    assert (header.unit, header.voxel_size) == ("voxel", (1.0, 0.33, 0.25))
    assert "# transform: voxel index = um / voxel size" in text
    swc.write(tmp_path / "b.swc", random_tree(0))
    assert swc.read_header(tmp_path / "b.swc").unit == "um"


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    bad = random_tree(0)
    bad.points[3, 1] = np.nan
    for tree, message in ((bad, "no numbers"), (morphology.empty_tree(), "no node")):
        with pytest.raises(InputError, match=message):
            swc.write(tmp_path / "out" / "a.swc", tree)
    assert list(tmp_path.iterdir()) == []


def test_edited_file_keeps_its_own_nodes(tmp_path: Path) -> None:
    """Another program moved the nodes but kept the header: what it lists as added is no longer so."""
    swc.write(tmp_path / "a.swc", random_tree(0, 5))
    lines = (tmp_path / "a.swc").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    lines[first] = "1 1 500 500 500 1 -1"
    (tmp_path / "a.swc").write_text("\n".join(lines))
    assert len(swc.read(tmp_path / "a.swc")) == 6


def test_convert_there_and_back(tmp_path: Path) -> None:
    tree, size = random_tree(0), (1.0, 0.33, 0.25)
    um = swc.convert(tree, tmp_path / "a.um.swc", to="um", voxel_size=size)
    np.testing.assert_allclose(um.points, tree.points * size)
    back = swc.convert(swc.read(tmp_path / "a.um.swc"), tmp_path / "a.voxel.swc", to="voxel", voxel_size=size)
    np.testing.assert_allclose(back.points, tree.points, atol=1e-5)
    np.testing.assert_allclose(back.radii, tree.radii, atol=1e-5)
    with pytest.raises(InputError, match="already"):
        swc.convert(um, tmp_path / "b.swc", to="um", voxel_size=size, stated="um")


def test_transform_flips_voxel_onto_voxel() -> None:
    tree = random_tree(0)
    move = swc.Transform(flip="y", shape=(10, 20, 30))
    assert swc.transform(tree, move).points[:, 1] == pytest.approx(19 - tree.points[:, 1])
    np.testing.assert_allclose(swc.transform(swc.transform(tree, move), move).points, tree.points)
    moved = swc.transform(tree, swc.Transform(scale=(2, 1, 1), shift=(0, 0, 5)))
    np.testing.assert_allclose(moved.points, tree.points * [2, 1, 1] + [0, 0, 5])
    for bad in (swc.Transform(flip="y"), swc.Transform(flip="q", shape=(1, 2, 3)), swc.Transform(scale=(0, 1, 1))):
        with pytest.raises(InputError):
            swc.transform(tree, bad)
