"""`hpc-neuro score`: one JSON object, or a sentence and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_neuro.cli import main
from hpc_neuro.data import swc
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.metrics.tree import distances

PREDICTED = "1 1 0 0 0 5 -1\n2 3 60 0 0 1 1\n"
GOLD = "1 1 0 3 0 5 -1\n2 3 60 3 0 1 1\n3 3 90 3 0 1 2\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a.swc").write_text(PREDICTED)
    (tmp_path / "b.swc").write_text(GOLD)
    (tmp_path / "cycle.swc").write_text("1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 2 0 0 1 2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [[], ["json=yes"], ["tolerance=4", "json=yes"]])
def test_one_json_object(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["score", "a.swc", "b.swc", *arguments]) == 0
    scores = json.loads(capsys.readouterr().out)
    predicted, gold = swc.read("a.swc"), swc.read("b.swc")
    match = match_cable(predicted, gold, 4)
    assert scores == {
        "f1": match.f1,
        "precision": match.precision,
        "recall": match.recall,
        **distances(predicted, gold),
    }


def test_the_tolerance_decides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "a.swc", "b.swc", "tolerance=2"]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == 0.0


def test_lines_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "a.swc", "a.swc", "json=no"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["f1", "1.0000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.swc"], "score got 1 file"),
        (["a.swc", "b.swc", "a.swc"], "score got 3 files, expected two"),
        (["a.swc", "none.swc"], "none.swc does not exist"),
        (["cycle.swc", "b.swc"], "cycle.swc is not a usable SWC file"),
        (["a.swc", "b.swc", "tolerance=0"], "tolerance=0 is not a number above 0"),
        (["a.swc", "b.swc", "tolerance=nan"], "tolerance=nan is not a number above 0"),
        (["a.swc", "b.swc", "tolerance=1_0"], "tolerance=1_0 is not a number above 0"),
        (["a.swc", "b.swc", "tolerance=four"], "tolerance=four is not a number above 0"),
        (["a.swc", "b.swc", "json=maybe"], "json=maybe is not yes or no"),
        (["a.swc", "b.swc", "tolerance=4", "tolerance=2"], "score got tolerance= twice; give it once"),
        (["a.swc", "b.swc", "tol=4"], "score does not know tol=; its keys are tolerance= and json="),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["score", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--help"]) == 0
    assert "usage: hpc-neuro score PRED.swc GOLD.swc" in capsys.readouterr().out
    assert main(["score"]) == 2


def test_a_file_without_a_unit_beside_one_in_um_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "1 3 8 8 4 1 -1\n2 3 16 8 4 1 1\n"
    (tmp_path / "plain.swc").write_text(rows)
    (tmp_path / "um.swc").write_text(f"# unit: um\n{rows}")
    for pair, is_said in ((("plain", "um"), True), (("um", "plain"), True), (("um", "um"), False)):
        assert main(["score", *(str(tmp_path / f"{name}.swc") for name in pair)]) == 0
        captured = capsys.readouterr()
        assert ("plain.swc does not state its unit" in captured.err) == is_said
        assert captured.out.startswith('{"f1": 1.0')


def test_trees_in_nm_need_a_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.swc"
    path.write_text("# units nm\n1 0 0 0 0 1 -1\n2 0 9000 0 0 1 1\n")
    assert main(["score", str(path), str(path)]) == 2
    assert "give tolerance= in nm" in capsys.readouterr().err
    assert main(["score", str(path), str(path), "tolerance=4000"]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == 1.0
