"""The tables of docs/ are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

import hpc_neuro
from hpc_neuro.core import schema
from hpc_neuro.pipeline import VERBS
from tools import write_docs


@pytest.mark.parametrize("path", sorted(write_docs.DOCS.glob("*.md")), ids=lambda path: path.name)
def test_a_page_holds_the_tables_that_the_code_has(path: Path) -> None:
    hint = "run `python -m tools.write_docs` and commit the pages"
    assert path.read_text(encoding="utf-8") == write_docs.render_page(path), hint


def test_every_table_stands_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in write_docs.DOCS.glob("*.md"))
    assert [name for name in write_docs.TABLES if f"<!-- table: {name} -->" not in text] == []


def test_an_edit_by_hand_is_found_and_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "exit_codes.md"
    whole = (write_docs.DOCS / page.name).read_text(encoding="utf-8")
    page.write_text(whole.replace("| 75 |", "| 76 |"), encoding="utf-8")
    monkeypatch.setattr(write_docs, "DOCS", tmp_path)
    assert write_docs.main(["--check"]) == 1
    assert page.read_text(encoding="utf-8") != whole
    assert write_docs.main([]) == 0
    assert page.read_text(encoding="utf-8") == whole


def test_the_python_api_is_described_whole() -> None:
    page = (write_docs.DOCS / "api.md").read_text(encoding="utf-8")
    configs = [name for name in hpc_neuro.__all__ if name.endswith("Config") and name != "TraceConfig"]
    headings = [name for name in hpc_neuro.__all__ if not name.startswith("run_") and name not in configs]
    assert [name for name in headings if f"\n### {name}\n" not in page] == []
    assert [name for name in hpc_neuro.__all__ if name.startswith("run_") and f"`{name}(cfg)`" not in page] == []
    assert "weights: Literal['best', 'last'] = 'best'," in page
    assert "| `points` | [N, 3] z y x. |" in page
    assert "__" not in page


def test_every_key_of_every_verb_is_described() -> None:
    page = (write_docs.DOCS / "settings.md").read_text(encoding="utf-8")
    for verb in VERBS.values():
        if verb.config:
            section = page.split(f"\n## {verb.name}\n")[1].split("\n## ")[0]
            keys = [field.key for field in schema.describe(verb.load_config_class())]
            assert [key for key in keys if f"| `{key}` |" not in section] == []
