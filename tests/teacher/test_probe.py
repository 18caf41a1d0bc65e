"""`teacher probe` and `doctor teacher=` print the same table, with the verdict as exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro import cli
from tests.helpers.tiny_store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("gate") / "store", {"a": "train", "b": "test"}, (12, 64, 160))


def test_the_table_is_that_of_the_doctor(store: Path, teacher_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [
        "teacher=trained",
        f"teacher.weights={teacher_run}",
        f"store={store}",
        "volumes=[b]",
        "samples=2",
        "copies=1",
    ]
    assert cli.main(["teacher", "probe", *keys]) == 3
    table = capsys.readouterr().out
    assert [line.split()[1:3] for line in table.splitlines()[1:4]] == [
        ["b", "trained"],
        ["b", "untrained"],
        ["b", "pixels"],
    ]
    assert "fails the gate on b" in table
    assert cli.main(["doctor", *keys]) == 3
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no key is not understood; usage:"),
        (["bundled"], "bundled is not understood; usage:"),
        (["teacher=bundled"], "teacher=bundled is not understood; usage:"),
        (["teacher=bundled", "store=none"], "none"),
        (["teacher=bundled", "store=none", "sample=3"], "sample: Unexpected keyword argument"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teacher", "probe", *words]) == 2
    assert message in capsys.readouterr().err


def test_verbs_of_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teacher", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"hpc-neuro teacher {verb}: " in text for verb in ("train", "continue", "probe"))
    assert cli.main(["teacher", "adapt"]) == 2
    error = capsys.readouterr().err
    assert "'teacher adapt' is not one of the verbs teacher train, teacher continue, teacher probe" in error
    assert cli.main(["teacher"]) == 2
