"""Findings in SWC files, and their repair."""

from __future__ import annotations

from pathlib import Path

import morphio
import numpy as np
import pytest

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.data.swc.standardize import standardize
from tests.helpers.swc_cases import GOOD, REFUSED, TOLERATED, Put
from tests.helpers.swc_oracles import assert_all_agree, load_with_morphio, trees_equal

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
    "semicolon decimals": TOLERATED["semicolons and decimal commas"],
    "large id": f"{1 << 31} 3 0 0 0 1 -1\n{(1 << 32) + 1} 3 1 0 0 1 {1 << 31}\n",
}


BEYOND_REPAIR = {
    "empty",
    "comments only",
    "half an id",
    "NaN id",
    "thousands",
    "empty column",
    "empty column between semicolons",
    "semicolons and commas",
    "underscore",
    "id of 64 bits",
    "commas for both",
    "commas for both in all lines",
    "a blank for thousands",
    "lost line ends",
    "parents in another column",
}
"""Files of which no line is a node, or whose columns no rule tells apart."""


@pytest.mark.parametrize("kind", MILD)
def test_fix_settles_every_finding(file: Put, tmp_path: Path, kind: str) -> None:
    path = file(MILD[kind])
    assert kind in {f.kind for f in swc.check(path)}
    fixed = swc.fix(path)
    swc.write(tmp_path / "fixed.swc", fixed.tree)
    left = {f.kind for f in swc.check(tmp_path / "fixed.swc")}
    assert left == ({"single point"} if kind == "single point" else set())
    assert_all_agree(tmp_path / "fixed.swc", fixed.tree)
    if kind not in ("single point", "root mark", "negative id", "repeated line"):
        assert fixed.changes


def test_clean_file_has_no_findings(file: Put) -> None:
    assert swc.check(file(GOOD)) == []
    assert swc.fix(file(GOOD)).changes == ()


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in BEYOND_REPAIR])
def test_fix_makes_one_readable_tree(file: Put, tmp_path: Path, kind: str) -> None:
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


@pytest.mark.parametrize("kind", sorted(BEYOND_REPAIR))
def test_fix_refuses_what_no_rule_settles(file: Put, kind: str) -> None:
    with pytest.raises(InputError, match=r"no node|no rule"):
        swc.fix(file(REFUSED[kind][0]))


TWICE = "1 2 0 0 0 1 -1\n2 2 10 0 0 1 1\n3 2 20 0 0 1 2\n"


@pytest.mark.parametrize(
    "text",
    [
        TWICE * 2,
        TWICE.replace("3 2", "2 2 10 0 0 1 1\n3 2"),
        TWICE + "2 2 10 0 0 1 1\n",
        TWICE.replace("1 2 0", "1 2 0 0 0 1 -1\n1 2 0", 1),
    ],
)
def test_fix_reads_repeated_lines_as_read_does(file: Put, text: str) -> None:
    assert trees_equal(swc.fix(file(text)).tree, swc.read(file(text)))
    assert morphology.length(swc.fix(file(text)).tree) == 20


def test_fix_drops_repeats_of_any_row_of_an_id(file: Put) -> None:
    rows = "1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n2 3 0 5 0 1 1\n2 3 0 5 0 1 1\n3 3 0 6 0 1 2\n"
    tree = swc.fix(file(rows)).tree
    assert (len(tree), morphology.length(tree)) == (4, 1 + 5 + 1)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            "1 1 0 0 0 1 -1\n2 1 0 0 1 1 1\n3 1 0 0 2 1 2\n4 1 0 1 1 1 2\n5 3 0 0 6 1 3\n6 3 0 6 1 1 4\n",
            "soma branches",
        ),
        ("1 5 0 0 0 1 -1\n2 2 0 0 5 1 1\n3 2 0 0 9 1 2\n", "type turns from 5 to 2"),
        (f"{1 << 31} 3 0 0 0 1 -1\n1 3 0 0 1 1 {1 << 31}\n", "programs that keep ids in 32 bits"),
        (f"{1 << 32} 3 0 0 0 1 -1\n1 3 0 0 1 1 {1 << 32}\n", "the largest that MorphIO and NeuroM read"),
        ("01234567890123456789 1 0 0 1 .5 -1\n", "id 1234567890123456789 is above"),
    ],
)
def test_check_names_what_other_readers_refuse(file: Put, rows: str, text: str) -> None:
    assert any(text in finding.text for finding in swc.check(file(rows)))


def test_three_point_soma_is_clean(file: Put) -> None:
    rows = "1 1 0 0 0 2 -1\n2 1 0 -2 0 2 1\n3 1 0 2 0 2 1\n4 3 0 0 6 1 1\n5 3 0 0 9 1 4\n"
    assert swc.check(file(rows)) == []


@pytest.mark.parametrize("seed", range(3))
def test_clean_trees_open_in_other_readers(tmp_path: Path, seed: int) -> None:
    """Small random trees: MorphIO, and with it NeuroM, opens what `check` calls clean, and what `fix` wrote."""
    rng = np.random.default_rng(seed)
    path, fixed = tmp_path / "a.swc", tmp_path / "fixed.swc"
    for _ in range(60):
        rows = []
        for i in range(1, int(rng.integers(2, 9))):
            parent = -1 if i == 1 or rng.random() < 0.05 else int(rng.integers(1, i))
            x, y, z = rng.integers(0, 4, 3)
            rows.append(f"{i} {rng.choice([1, 1, 3, 3, 2, 0])} {x} {y} {z} 1 {parent}\n")
        path.write_text("".join(rows))
        if not swc.check(path):
            # It warns of a missing soma, but reads.
            morphio.Morphology(str(path), warning_handler=morphio.WarningHandlerCollector())
        tree = swc.fix(path).tree
        swc.write(fixed, tree)
        if len(tree) > 1:
            assert swc.check(fixed) == []
            load_with_morphio(fixed)


def test_fix_reports_what_it_does(file: Put) -> None:
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


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        ("1 3 0 0 0 1 -2\n2 3 9 0 0 1 1\n", "1 mark of a root, now -1"),
        ("1 3 0 0 0 1 0\n2 3 9 0 0 1 1\n", "1 mark of a root, now -1"),
        ("1 3 0 0 0 1 -1\n-4 3 9 0 0 1 1\n", "1 negative id replaced"),
    ],
)
def test_fix_says_what_check_names(file: Put, tmp_path: Path, rows: str, change: str) -> None:
    path = file(rows)
    assert swc.check(path)
    repair = swc.fix(path)
    assert change in repair.changes
    swc.write(tmp_path / "fixed.swc", repair.tree)
    assert swc.check(tmp_path / "fixed.swc") == []


def test_fix_refuses_a_place_that_no_neuron_reaches(file: Put) -> None:
    with pytest.raises(InputError, match=r"node 2 lies at 1e\+308, .*; correct it"):
        swc.fix(file("1 3 0 0 0 1 -1\n2 3 1e308 0 0 1 1\n"))


def test_roots_are_joined_kept_or_dropped(file: Put) -> None:
    rows = "1 3 0 0 0 1 -1\n2 3 10 0 0 1 1\n3 3 10 2 0 1 -1\n4 3 10 9 0 1 3\n5 3 10 30 0 1 4\n6 3 50 30 0 1 -1\n"
    path = file(rows)
    assert morphology.length(swc.fix(path, "keep").tree) == 10 + 28
    assert len(swc.fix(path, "keep").tree.roots) == 3
    assert morphology.length(swc.fix(path, "largest").tree) == 28
    joined = swc.fix(path)
    assert len(joined.tree.roots) == 1
    assert morphology.length(joined.tree) == 10 + 28 + 2 + 40
    assert sum("joined by an edge" in c for c in joined.changes) == 2
    parts = swc.split_by_length(swc.read(path))
    assert [round(morphology.length(p)) for p in parts] == [28, 10, 0]


def test_joining_reroots_a_tree_at_its_nearest_node(file: Put) -> None:
    rows = "1 3 0 0 0 1 -1\n2 3 10 0 0 1 1\n3 3 12 -20 0 1 -1\n4 3 12 0 0 1 3\n5 3 12 20 0 1 4\n"
    tree = swc.fix(file(rows)).tree
    assert morphology.length(tree) == 10 + 40 + 2
    assert len(morphology.tips(tree)) == 2
    assert len(morphology.branch_points(tree)) == 1


def test_soma_becomes_the_root(file: Put) -> None:
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
    tree, changes = standardize(three)
    assert len(tree) == 3
    assert changes == ["a soma of 3 points, now its first point alone"]
    chain = Tree(np.arange(30.0).reshape(10, 3), np.full(10, 0.5), np.arange(-1, 9), np.full(10, 1))
    kept, changes = standardize(chain)
    assert morphology.length(kept) == pytest.approx(morphology.length(chain))  # no cable is lost to a wrong type
    assert set(kept.types) == {0}
    assert "all 10 nodes were soma" in changes[0]
