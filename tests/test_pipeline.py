"""The table of verbs: its rows name what exists, and nothing else lists the verbs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_neuro.data import feature_cache, store
from hpc_neuro.demo import DemoConfig
from hpc_neuro.evaluate import predictions
from hpc_neuro.history import checks
from hpc_neuro.pipeline import LAUNCHABLE, STAGES, VERBS, stages_from
from launch.site import Resources, Site

REPO = Path(__file__).resolve().parent.parent
CONFIGURED = [name for name, verb in VERBS.items() if verb.config]
MODULES = [path for folder in ("hpc_neuro", "launch", "tools") for path in sorted((REPO / folder).rglob("*.py"))]


@pytest.mark.parametrize("name", VERBS)
def test_a_row_names_a_module_with_the_functions_of_a_verb(name: str) -> None:
    verb = VERBS[name]
    functions = ("run", "forecast") if verb.config else ("main",)
    assert all(callable(getattr(verb.load_module(), function)) for function in functions)
    assert all(callable(importlib.import_module(module).main) for _, module in verb.commands)
    assert verb.history_check is None or callable(getattr(checks, verb.history_check))


@pytest.mark.parametrize("name", CONFIGURED)
def test_keys_of_a_row_are_keys_of_the_config(name: str) -> None:
    verb = VERBS[name]
    keys = {field.name for field in dataclasses.fields(verb.load_config_class())}
    assert {"out", *(item.key for item in verb.inputs)} <= keys
    assert ("share" in keys) == verb.divisible


def test_inputs_are_written_by_earlier_stages() -> None:
    names = list(STAGES)
    for name, verb in STAGES.items():
        assert all(item.verb in names[: names.index(name)] for item in verb.inputs)


def test_configs_have_a_section_for_each_verb_of_the_table() -> None:
    sections = [f.name for f in dataclasses.fields(Site) if f.default_factory is Resources or f.name in VERBS]
    assert sections == list(LAUNCHABLE)
    assert [f.name for f in dataclasses.fields(DemoConfig) if f.name in VERBS] == list(STAGES)


def test_index_files_are_those_that_the_verbs_write() -> None:
    assert STAGES["prepare"].index == store.INDEX
    assert STAGES["precompute"].index == feature_cache.MANIFEST
    assert STAGES["infer"].index == predictions.INDEX


def test_folders_under_a_root(tmp_path: Path) -> None:
    folders = STAGES["evaluate"].folders_under(tmp_path)
    assert folders == {
        "out": tmp_path / "evaluate",
        "predictions": tmp_path / "infer",
        "store": tmp_path / "store",
    }
    assert STAGES["evaluate"].folders_under(tmp_path, present=["train"])["train"] == tmp_path / "train"
    (tmp_path / "train").mkdir()
    assert STAGES["evaluate"].folders_under(tmp_path)["train"] == tmp_path / "train"


def test_stages_from_one_on() -> None:
    assert stages_from("train") == ("train", "infer", "evaluate")


def listed_verbs(node: ast.AST) -> set[str]:
    """Verbs that a literal tuple, list, set or dict (or a Literal[...] type) lists."""
    items: list[ast.expr | None] = []
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        items = list(node.elts)
    elif isinstance(node, ast.Dict):
        items = list(node.keys)
    return {item.value for item in items if isinstance(item, ast.Constant) and item.value in VERBS}


def second_lists(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        if len(listed_verbs(node)) >= 3:
            yield node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPO)))
def test_no_other_module_lists_the_verbs(path: Path) -> None:
    if path.name == "pipeline.py":
        return
    lines = list(second_lists(path.read_text()))
    assert not lines, f"{path.relative_to(REPO)}, line {lines}: read hpc_neuro.pipeline instead of listing verbs again"


def test_a_second_list_would_be_noticed() -> None:
    assert list(second_lists("a = ('train', 'infer', 'evaluate')\nb = {'prepare': 1, 'train': 2}")) == [1]
    assert list(second_lists("x: Literal['train', 'infer', 'evaluate']")) == [1]
