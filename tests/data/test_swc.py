"""SWC files: what is read, what is refused and why, what is repaired and how, and that other readers agree on what we write."""

from __future__ import annotations

import time
from pathlib import Path

import neurom
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro import morphology
from hpc_neuro.data import swc
from hpc_neuro.data.swc.standard import standard
from hpc_neuro.morphology import Tree
from hpc_neuro.schema import InputError
from tests.data.swc_oracles import assert_all_agree, ours, random_tree, same

GOOD = "1 1 0 0 0 5 -1\n2 3 6 0 0 1 1\n3 3 7 1 0 1 2\n4 3 6 9 2 0.5 2\n"


@pytest.fixture
def file(tmp_path: Path):  # type: ignore[no-untyped-def]
    def put(content: str | bytes, name: str = "a.swc") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


# --- reading ---------------------------------------------------------------------------------------------------------


def test_x_y_z_become_z_y_x(file) -> None:  # type: ignore[no-untyped-def]
    tree = swc.read(file("1 2 10 20 30 4 -1\n2 3 11 21 31 5 1\n"))
    np.testing.assert_array_equal(tree.points, [[30, 20, 10], [31, 21, 11]])
    assert tree.radii.tolist() == [4, 5]
    assert tree.types.tolist() == [2, 3]
    assert tree.parents.tolist() == [-1, 0]


TOLERATED = {
    "Windows lines": GOOD.replace("\n", "\r\n"),
    "old Mac lines": GOOD.replace("\n", "\r"),
    "byte-order mark": "\ufeff" + GOOD,
    "UTF-16": GOOD.encode("utf-16"),
    "latin-1 comment": b"# \xb5m, by Ram\xf3n\n" + GOOD.encode(),
    "commas": GOOD.replace(" ", ", "),
    "bare commas": GOOD.replace(" ", ","),
    "semicolons": GOOD.replace(" ", ";"),
    "tabs and trailing blanks": GOOD.replace(" ", "\t").replace("\n", "  \n\n"),
    "float ids": "1.0 1 0 0 0 5 -1.0\n2.0 3.0 6 0 0 1 1.0\n3 3 7 1 0 1 2.0\n4 3 6 9 2 0.5 2\n",
    "exponents": GOOD.replace("0.5", "5e-1"),
    "extra columns": GOOD.replace("\n", " 7 0 0.5\n"),
    "comments between and behind": "#a\n" + GOOD.replace("\n", " # soma\n# b\n"),
    "header without #": "id type x y z radius parent\n" + GOOD,
    "reversed": "\n".join(reversed(GOOD.strip().split("\n"))),
    "repeated line": GOOD + "3 3 7 1 0 1 2\n",
    "gaps in the ids": GOOD.replace("3 3 7", "30 3 7"),
    "root 0": GOOD.replace("-1", "0"),
    "root -2": GOOD.replace("-1", "-2"),
    "no newline at the end": GOOD.strip(),
}


@pytest.mark.parametrize("kind", TOLERATED)
def test_what_has_one_meaning_is_read(file, kind: str) -> None:  # type: ignore[no-untyped-def]
    expected = swc.read(file(GOOD, "good.swc"))
    found = swc.read(file(TOLERATED[kind]))
    order = np.lexsort(found.points.T)
    np.testing.assert_array_equal(found.points[order], expected.points[np.lexsort(expected.points.T)])
    assert ours(found) == pytest.approx(ours(expected))
    assert np.array_equal(np.sort(found.radii), np.sort(expected.radii))


REFUSED = {
    "empty": ("", "no node"),
    "comments only": ("# nothing\n", "no node"),
    "cycle": ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 2 0 0 1 2\n", "line 2: node 2 is its own ancestor"),
    "own parent": ("1 3 0 0 0 1 1\n", "line 1: node 1 is its own parent"),
    "dangling": ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 9\n", "line 2: node 2 hangs on 9, which is not in the file"),
    "repeated id": ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n\n2 3 5 0 0 1 1\n", r"line 4: id 2 again .*first in line 2"),
    "NaN": ("1 3 0 0 0 1 -1\n2 3 nan 0 0 1 1\n", "line 2: node 2 has a coordinate that is no number"),
    "infinite": ("1 3 0 inf 0 1 -1\n", "line 1: node 1 has a coordinate"),
    "decimal commas": ("# h\n1 3 0,5 1,5 0 1 -1\n", "line 2: decimal commas in '1 3 0,5 1,5 0 1 -1'"),
    "text": ("1 3 0 0 0 1 -1\n2 3 zero 0 0 1 1\n", "line 2: not seven numbers"),
    "short": ("1 3 0 0 0 1 -1\n2 3 1 0 0\n", "line 2: 5 columns where id type x y z radius parent are wanted"),
    "half an id": ("1.5 3 0 0 0 1 -1\n", "line 1: id 1.5 or parent -1 is no whole number"),
    "NaN id": ("nan 3 0 0 0 1 -1\n", "line 1: id nan"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_open_is_refused_by_line(file, kind: str) -> None:  # type: ignore[no-untyped-def]
    content, says = REFUSED[kind]
    with pytest.raises(InputError, match=says) as caught:
        swc.read(file(content))
    assert "hpc-neuro swc fix" in str(caught.value)
    assert any(f.fatal for f in swc.check(file(content)))


def test_what_is_no_swc_is_refused(file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for content, says in (
        (b"\x1f\x8b\x08\0abc", "gzip-compressed"),
        (b"<?xml version='1.0'?><tracings/>", "is XML"),
        (b"II*\0\0\0\0\0", "binary file"),
    ):
        with pytest.raises(InputError, match=says):
            swc.read(file(content))
    with pytest.raises(InputError, match="does not exist"):
        swc.read(tmp_path / "none.swc")
    with pytest.raises(InputError, match="is a folder"):
        swc.read(tmp_path)


def test_a_long_list_is_cut(file) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"and \d+ more") as caught:
        swc.read(file("".join(f"{i} 3 nan 0 0 1 {i + 1000}\n" for i in range(1, 200))))
    assert len(str(caught.value)) < 2000


def test_radii_are_always_usable(file) -> None:  # type: ignore[no-untyped-def]
    rows = "1 3 0 0 0 0 -1\n2 3 1 0 0 4 1\n3 3 2 0 0 nan 2\n4 3 3 0 0 -1 3\n5 3 1 1 0 2 1\n"
    assert swc.read(file(rows)).radii.tolist() == [3, 4, 4, 4, 2]
    assert [f.line for f in swc.check(file(rows)) if f.kind == "radius"] == [1, 3, 4]
    assert swc.read(file("1 3 0 0 0 0 -1\n2 3 1 0 0 0 1\n")).radii.tolist() == [1, 1]


def test_a_hundred_thousand_nodes_in_a_second(tmp_path: Path) -> None:
    tree = random_tree(0, 100_000)
    swc.write(tmp_path / "a.swc", tree)
    began = time.process_time()
    found = swc.read(tmp_path / "a.swc")
    assert time.process_time() - began < 1.0
    assert same(found, tree)
    # and a chain written tip first, the worst case for sorting
    n = 100_000
    rows = "".join(f"{i} 3 {i} 0 0 1 {i - 1 if i > 1 else -1}\n" for i in range(n, 0, -1))
    (tmp_path / "b.swc").write_text(rows)
    began = time.process_time()
    assert morphology.length(swc.read(tmp_path / "b.swc")) == n - 1
    assert time.process_time() - began < 1.5


# --- checking and repair ---------------------------------------------------------------------------------------------

MILD = {
    "type": "1 12 0 0 0 1 -1\n2 12 1 0 0 1 1\n",
    "unsorted": "2 3 1 0 0 1 1\n1 3 0 0 0 1 -1\n",
    "several roots": "1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n3 3 9 0 0 1 -1\n4 3 8 0 0 1 3\n",
    "soma": "1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n3 1 2 0 0 5 2\n4 3 9 0 0 1 3\n",
    "type change": "1 1 0 0 0 1 -1\n2 3 1 0 0 1 1\n3 2 2 0 0 1 2\n4 2 3 0 0 1 3\n",
    "single point": "1 1 0 0 0 5 -1\n",
    "root mark": "1 3 0 0 0 1 -7\n2 3 1 0 0 1 1\n",
    "negative id": "-5 3 0 0 0 1 -1\n2 3 1 0 0 1 -5\n",
    "line ends": GOOD.replace("\n", "\r\n"),
    "BOM": "\ufeff" + GOOD,
    "commas": GOOD.replace(" ", ","),
    "float ids": TOLERATED["float ids"],
    "extra columns": TOLERATED["extra columns"],
    "header": TOLERATED["header without #"],
    "repeated line": TOLERATED["repeated line"],
}


@pytest.mark.parametrize("kind", MILD)
def test_findings_and_that_fix_settles_them(file, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    path = file(MILD[kind])
    assert kind in {f.kind for f in swc.check(path)}
    fixed = swc.fix(path)
    swc.write(tmp_path / "fixed.swc", fixed.tree)
    left = {f.kind for f in swc.check(tmp_path / "fixed.swc")}
    assert left == ({"single point"} if kind == "single point" else set())
    assert_all_agree(tmp_path / "fixed.swc", fixed.tree)
    if kind not in ("single point", "root mark", "negative id", "repeated line"):
        assert fixed.changes


def test_a_clean_file_is_clean(file) -> None:  # type: ignore[no-untyped-def]
    assert swc.check(file(GOOD)) == []
    assert swc.fix(file(GOOD)).changes == ()


@pytest.mark.parametrize("kind", [k for k in REFUSED if k not in ("empty", "comments only", "half an id", "NaN id")])
def test_fix_makes_one_readable_tree(file, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    if kind == "infinite":
        with pytest.raises(InputError, match="no node"):
            swc.fix(file(REFUSED[kind][0]))
        return
    fixed = swc.fix(file(REFUSED[kind][0]))
    assert fixed.changes
    assert len(fixed.tree.roots) == 1
    swc.write(tmp_path / "fixed.swc", fixed.tree)
    assert not [f for f in swc.check(tmp_path / "fixed.swc") if f.kind != "single point"]
    assert_all_agree(tmp_path / "fixed.swc", fixed.tree)


def test_what_fix_does_is_what_it_says(file) -> None:  # type: ignore[no-untyped-def]
    cut = swc.fix(file("1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 2 0 0 1 2\n"))
    assert any("line 2: node 2 was its own ancestor, now a root" in c for c in cut.changes)
    assert morphology.length(cut.tree) == 2  # 2-3 kept, hung on 1 by the shortest edge
    gone = swc.fix(file("1 3 0 0 0 1 -1\n2 3 nan 0 0 1 1\n3 3 2 0 0 1 2\n"))
    assert len(gone.tree) == 2
    assert morphology.length(gone.tree) == 2
    again = swc.fix(file("1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n2 3 0 5 0 1 1\n3 3 0 6 0 1 2\n"))
    assert morphology.length(again.tree) == 1 + 5 + 1  # node 3 hangs on the nearer row above it
    comma = swc.fix(file("1 3 0,5 1,5 0 1 -1\n2 3 0,5 3,5 0 1 1\n"))
    assert morphology.length(comma.tree) == 2


def test_roots_are_joined_kept_or_dropped(file) -> None:  # type: ignore[no-untyped-def]
    rows = "1 3 0 0 0 1 -1\n2 3 10 0 0 1 1\n3 3 10 2 0 1 -1\n4 3 10 9 0 1 3\n5 3 10 30 0 1 4\n6 3 50 30 0 1 -1\n"
    path = file(rows)
    assert morphology.length(swc.fix(path, "keep").tree) == 10 + 28
    assert len(swc.fix(path, "keep").tree.roots) == 3
    assert morphology.length(swc.fix(path, "largest").tree) == 28
    joined = swc.fix(path)
    assert len(joined.tree.roots) == 1
    assert morphology.length(joined.tree) == 10 + 28 + 2 + 40
    assert sum("joined by an edge" in c for c in joined.changes) == 2
    parts = swc.components(swc.read(path))
    assert [round(morphology.length(p)) for p in parts] == [28, 10, 0]


def test_joining_turns_a_tree_that_is_nearest_in_its_middle(file) -> None:  # type: ignore[no-untyped-def]
    rows = "1 3 0 0 0 1 -1\n2 3 10 0 0 1 1\n3 3 12 -20 0 1 -1\n4 3 12 0 0 1 3\n5 3 12 20 0 1 4\n"
    tree = swc.fix(file(rows)).tree
    assert morphology.length(tree) == 10 + 40 + 2
    assert len(morphology.tips(tree)) == 2
    assert len(morphology.branch_points(tree)) == 1


def test_a_soma_becomes_the_root(file) -> None:  # type: ignore[no-untyped-def]
    fixed = swc.fix(file(MILD["soma"]))
    assert fixed.tree.types.tolist()[0] == 1
    assert fixed.tree.points[0].tolist() == [0, 0, 2]
    assert morphology.length(fixed.tree) == 9


def test_somas_of_several_points() -> None:
    three = Tree(
        np.array([[0, 0, 0], [0, -5, 0], [0, 5, 0], [0, 0, 9], [0, 0, 12.0]]),
        np.array([5.0, 5, 5, 1, 1]),
        np.array([-1, 0, 0, 0, 3]),
        np.array([1, 1, 1, 3, 3]),
    )
    tree, changes = standard(three)
    assert len(tree) == 3
    assert changes == ["a soma of 3 points, now its first point alone"]
    chain = Tree(np.arange(30.0).reshape(10, 3), np.full(10, 0.5), np.arange(-1, 9), np.full(10, 1))
    kept, changes = standard(chain)
    assert morphology.length(kept) == pytest.approx(morphology.length(chain))  # no cable is lost to a wrong type
    assert set(kept.types) == {0}
    assert "all 10 nodes were soma" in changes[0]


# --- writing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans(), st.integers(1, 3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, soma: bool, roots: int) -> None:
    tree = random_tree(seed, max(count, roots), roots, soma)
    path = tmp_path_factory.mktemp("swc") / "a.swc"
    swc.write(path, tree)
    assert same(swc.read(path), tree)
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


def test_a_root_with_many_children(tmp_path: Path) -> None:
    for kind in (1, 3):
        points = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [0, 0, 0.0]])
        tree = Tree(points, np.ones(5), np.array([-1, 0, 0, 0, 0]), np.array([kind, 3, 2, 4, 3]))
        swc.write(tmp_path / "a.swc", tree)
        assert same(swc.read(tmp_path / "a.swc"), tree)
        if kind == 1:  # the neurites stay apart, each with its own type
            types = [str(n.type) for n in neurom.load_morphology(str(tmp_path / "a.swc")).neurites]
            assert len(types) == 4


def test_odd_trees_are_written_in_the_standard_form(tmp_path: Path) -> None:
    tree = Tree(
        np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0.0]]),
        np.array([np.nan, 0.0, 2.0, 1e-9]),
        np.array([-1, 0, 1, 2]),
        np.array([3, 115, -73, 2]),
    )
    swc.write(tmp_path / "a.swc", tree)
    found = swc.read(tmp_path / "a.swc")
    assert (found.radii > 0).all()
    assert set(found.types) == {3}
    assert swc.check(tmp_path / "a.swc") == []
    text = (tmp_path / "a.swc").read_text()
    assert "# changed: 2 radii" in text
    assert "# changed: 2 types outside 0 to 7, now 0" in text
    assert_all_agree(tmp_path / "a.swc", found)


def test_the_header_says_unit_transform_and_roots(tmp_path: Path) -> None:
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
    header = swc.header(tmp_path / "a.swc")
    assert (header.unit, header.voxel_size) == ("voxel", (1.0, 0.33, 0.25))
    assert "# transform: voxel index = um / voxel size" in text
    swc.write(tmp_path / "b.swc", random_tree(0))
    assert swc.header(tmp_path / "b.swc").unit == "um"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    bad = random_tree(0)
    bad.points[3, 1] = np.nan
    for tree, says in ((bad, "no numbers"), (morphology.empty(), "no node")):
        with pytest.raises(InputError, match=says):
            swc.write(tmp_path / "out" / "a.swc", tree)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_file_keeps_its_own_nodes(tmp_path: Path) -> None:
    """Another program moved the nodes but kept the header: what it lists as added is no longer so."""
    swc.write(tmp_path / "a.swc", random_tree(0, 5))
    lines = (tmp_path / "a.swc").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    lines[first] = "1 1 500 500 500 1 -1"
    (tmp_path / "a.swc").write_text("\n".join(lines))
    assert len(swc.read(tmp_path / "a.swc")) == 6


# --- converting ------------------------------------------------------------------------------------------------------


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
    assert swc.transformed(tree, move).points[:, 1] == pytest.approx(19 - tree.points[:, 1])
    np.testing.assert_allclose(swc.transformed(swc.transformed(tree, move), move).points, tree.points)
    moved = swc.transformed(tree, swc.Transform(scale=(2, 1, 1), shift=(0, 0, 5)))
    np.testing.assert_allclose(moved.points, tree.points * [2, 1, 1] + [0, 0, 5])
    for bad in (swc.Transform(flip="y"), swc.Transform(flip="q", shape=(1, 2, 3)), swc.Transform(scale=(0, 1, 1))):
        with pytest.raises(InputError):
            swc.transformed(tree, bad)
