"""Doubtful places: found where they are, the worst first, in files that others open."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.morphology import Tree, build_tree
from hpc_neuro.data import swc
from hpc_neuro.infer import proofread
from hpc_neuro.infer.proofread import NodeConfidence
from hpc_neuro.tracing import Contact

SHAPE, SIZE = (40, 60, 120), (2.0, 0.5, 0.5)


def _make_confidence(sure: np.ndarray, *views: np.ndarray) -> NodeConfidence:
    return NodeConfidence(sure, np.array(views).reshape(-1, len(sure)), 0.3, 0.5)


def _cell() -> tuple[Tree, np.ndarray]:
    """A trunk along x with a gap at 40, a faint stretch near its end, and a branch that turns back; then a speck."""
    trunk = [(20.0, 30.0, float(x)) for x in range(10, 100)]
    branch = [(20.0, 30.0 + i, 70.0) for i in range(1, 15)] + [(20.0, 44.0, 70.0 + i) for i in range(1, 15)]
    other = [(5.0, 5.0, float(x)) for x in range(1, 30)]
    parents = [*range(-1, 89), 60, *range(90, 90 + 27), -1, *range(118, 118 + 28)]
    points = np.array(trunk + branch + other)
    sure = np.full(len(points), 0.95)
    sure[30:36] = 0.1  # x 40 to 45
    sure[80:83] = 0.4
    return build_tree(points, np.array(parents)), sure


def test_places_are_found_and_the_gap_with_most_behind_it_comes_first() -> None:
    tree, sure = _cell()
    places = proofread.find_places(tree, _make_confidence(sure), SHAPE, SIZE)
    assert [p.rank for p in places] == list(range(1, len(places) + 1))
    first = places[0]
    assert (first.kind, first.neuron, first.doubt) == ("gap", 1, 0.9)
    assert 40 <= first.x <= 45
    assert abs(first.cable_um - (99 - first.x + 28) * 0.5) < 1.1
    kinds = {p.kind: p for p in places}
    assert 89 <= kinds["faint"].x <= 93
    assert abs(kinds["turn"].y - 44) <= 6
    assert abs(kinds["turn"].x - 70) <= 6
    ends = [p for p in places if p.kind == "end"]
    assert sorted(round(p.x) for p in ends) == [29, 84, 99]


def test_contacts_are_places_at_the_nearest_node_with_the_cable_that_was_cut_off() -> None:
    tree, sure = _cell()
    contacts = [Contact((21.0, 33.0, 20.0), 0.9, 50.0), Contact((6.0, 6.0, 10.0), 0.5, 8.0)]
    contacts.append(Contact((6.0, 6.0, 12.0), 0.75, 3.0, is_cut=False))
    places = proofread.find_places(tree, _make_confidence(sure), SHAPE, SIZE, contacts)
    first, second = (place for place in places if place.kind == "contact")
    assert (first.neuron, first.y, first.x, first.doubt, first.cable_um) == (2, 5.0, 10.0, 1.0, 8.0)
    assert (second.neuron, second.y, second.x, second.doubt, second.cable_um) == (1, 30.0, 20.0, 0.2, 50.0)
    (touch,) = (place for place in places if place.kind == "touch")
    assert (touch.doubt, touch.cable_um) == (0.5, 3.0)


def test_neurons_are_ranked_by_how_much_of_them_is_sure() -> None:
    tree, sure = _cell()
    a, b = proofread.score_neurons(tree, _make_confidence(sure), SIZE)
    assert (a.neuron, b.neuron, b.score, b.gaps) == (1, 2, 1.0, 0)
    assert (a.gaps, a.gap_um) == (1, 3.0)
    assert a.cable_um == (89 + 28) * 0.5
    assert abs(a.score - (1 - 9 / 117)) < 1e-3


def test_files_open_and_agree(tmp_path: Path) -> None:
    tree, sure = _cell()
    doubtful, _ = proofread.write_tables(tmp_path, "cell", tree, _make_confidence(sure), SHAPE, SIZE, (20, 60, 60))
    folder = tmp_path / "proofread"
    rows = list(csv.DictReader((folder / "cell.csv").open()))
    assert [int(r["rank"]) for r in rows] == [p.rank for p in doubtful]
    back = swc.read(folder / "cell.swc")
    assert set(np.flatnonzero(back.types == proofread.DOUBTFUL_TYPE)) == set(range(90))  # the trunk's two sections
    swc.write(tmp_path / "all.swc", tree, unit="voxel")
    lines = [line.split() for line in (tmp_path / "all.swc").read_text().splitlines() if not line.startswith("#")]
    places = {int(i): tuple(map(float, zyx)) for i, _, *zyx, _, _ in (line for line in lines)}
    for row in rows:  # the id that a viewer shows: nodes which the file adds for its readers count
        assert places[int(row["node"])] == pytest.approx([float(row[k]) for k in "xyz"], abs=0.01)
    state = json.loads((folder / "cell.neuroglancer.json").read_text())
    assert list(state["dimensions"]) == ["z", "y", "x"]
    assert state["layers"][2]["annotations"][0]["point"] == [doubtful[0].z, doubtful[0].y, doubtful[0].x]
    table = list(csv.DictReader((folder / "cell.confidence.csv").open()))
    assert len(table) == len(sure)
    for row, point in zip(table, tree.points, strict=True):
        assert places[int(row["node"])] == pytest.approx(point[::-1])
