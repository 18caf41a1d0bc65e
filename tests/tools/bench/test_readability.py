"""The code stays as easy to read as it is."""

from __future__ import annotations

from collections.abc import Sequence

from tools.bench.readability import FOLDERS, ROOT, FunctionFacts, measure, read_functions


def read_folders(names: Sequence[str]) -> tuple[list[FunctionFacts], dict[str, float]]:
    """The functions of some folders, and their figures."""
    paths = sorted(path for name in names for path in (ROOT / name).rglob("*.py"))
    functions = [facts for path in paths for facts in read_functions(path)]
    return functions, measure(paths, functions)


def check_lengths(figures: dict[str, float]) -> None:
    assert figures["function_lines_median"] <= 10
    assert figures["function_lines_p90"] <= 35
    assert figures["function_lines_max"] <= 80
    assert figures["blank_share"] >= 0.06


def check_names(functions: Sequence[FunctionFacts]) -> None:
    # The names themselves, so that a failure says which.
    assert [(facts.path, facts.name, sorted(facts.vague)) for facts in functions if facts.vague] == []
    assert [(facts.path, facts.name) for facts in functions if facts.is_participle] == []


def test_the_package_is_within_the_limits() -> None:
    functions, figures = read_folders(FOLDERS)
    check_lengths(figures)
    check_names(functions)
    assert figures["own_line_comment_share"] >= 0.04
    assert figures["import_cycles"] == 0


def test_the_tools_are_within_the_limits() -> None:
    functions, figures = read_folders(["tools"])
    check_lengths(figures)
    check_names(functions)
    assert figures["import_cycles"] == 0


def test_the_tests_have_names() -> None:
    functions, _ = read_folders(["tests"])
    check_names(functions)
