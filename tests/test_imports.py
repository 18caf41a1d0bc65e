"""The one-way road: a module imports only from floors below its own, or from its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hpc_neuro"
FLOOR_0 = {"core", "pipeline"}
FLOOR_1 = {"data", "models", "losses", "tracing", "metrics", "report"}
FLOOR_2 = {
    "prepare",
    "precompute",
    "train",
    "infer",
    "evaluate",
    "search",
    "doctor",
    "info",
    "score_tool",
    "swc_tool",
    "history",
}
FLOOR_2 |= {"fetch_teacher"}
FLOOR_3 = {"demo", "cli", "__main__"}  # the demo walks through the other verbs
HOMES = {
    "deepspeed": {"train/deepspeed/internals.py"},
    "wandb": {"train/tracker.py"},
    "timm": {"models/teacher.py"},
    "mpi4py": {"core/distributed.py"},
    "h5py": {"data/store", "data/feature_cache", "data/formats", "doctor.py"},
    "tensorstore": {"data/formats", "data/ome_zarr.py"},
    "optuna": {"search/study.py"},
    "submitit": set(),
    "monai": set(),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            if node.module == "hpc_neuro":
                yield from (f"hpc_neuro.{alias.name}" for alias in node.names)


def floor(part: str) -> int:
    for number, names in enumerate((FLOOR_0, FLOOR_1, FLOOR_2, FLOOR_3)):
        if part in names:
            return number
    raise AssertionError(f"hpc_neuro/{part} is on no floor; add it to tests/test_imports.py and the architecture page")


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("hpc_neuro.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    here = floor(part)
    for other in ours(path) - {part}:
        there = floor(other)
        allowed = there < here or (here == there == 0) or (here == there == 3)
        assert allowed, f"{path.relative_to(PACKAGE)} (floor {here}) imports {other} (floor {there})"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_parties_stay_in_their_homes(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or any(where.startswith(h) for h in homes), f"{where} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_readable(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    long = [f"{n.name} in line {n.lineno}" for n in functions if (n.end_lineno or 0) - n.lineno + 1 > 80]
    assert not long
