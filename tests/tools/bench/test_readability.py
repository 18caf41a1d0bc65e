"""The package stays as easy to read as it is."""

from __future__ import annotations

from tools.bench.readability import FOLDERS, ROOT, measure, read_functions


def test_the_package_is_within_the_limits() -> None:
    paths = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
    functions = [facts for path in paths for facts in read_functions(path)]
    figures = measure(paths, functions)

    assert figures["function_lines_median"] <= 10
    assert figures["function_lines_p90"] <= 35
    assert figures["function_lines_max"] <= 80
    assert figures["blank_share"] >= 0.06
    assert figures["own_line_comment_share"] >= 0.04
    assert figures["import_cycles"] == 0

    # The names themselves, so that a failure says which.
    assert [(facts.path, facts.name, sorted(facts.vague)) for facts in functions if facts.vague] == []
    assert [(facts.path, facts.name) for facts in functions if facts.is_participle] == []
