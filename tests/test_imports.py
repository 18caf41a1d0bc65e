"""Layers: a module imports only from layers below its own, or from its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_neuro.pipeline import VERBS

PACKAGE = Path(__file__).resolve().parent.parent / "hpc_neuro"
# The demo, `trace`, `teacher` and the doctor use the other verbs, so they are above them.
TOP = {"demo", "doctor", "teacher", "trace_stacks", "api", "napari_plugin", "cli", "__main__"}
LAYERS = (
    {"core", "pipeline"},
    {"data", "models", "losses", "tracing", "metrics", "report"},
    {verb.module.split(".")[1] for verb in VERBS.values()} - TOP,
    TOP,
)
HOMES = {
    "deepspeed": {"train/deepspeed/internals.py"},
    "wandb": {"train/tracker.py"},
    "timm": {"models/teacher.py"},
    "mpi4py": {"core/distributed.py"},
    "h5py": {"data/store", "data/feature_cache", "data/formats", "doctor.py"},
    "tensorstore": {"data/formats", "data/ome_zarr.py", "data/remote_path.py"},
    "optuna": {"search/study.py"},
    "napari": {"napari_plugin"},
    "qtpy": {"napari_plugin/places_table.py"},
    "submitit": set(),
    "monai": set(),
}
"""Package -> the only files and folders that import it; an empty set: tests and `launch` only."""
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 80
"""Lines of a function."""


def list_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            if node.module == "hpc_neuro":
                yield from (f"hpc_neuro.{alias.name}" for alias in node.names)


def find_layer(part: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise AssertionError(f"hpc_neuro/{part} is in no layer; add it to LAYERS in tests/test_imports.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    # The package itself imports its public names lazily, from every layer.
    if part == "__init__":
        return
    layer = find_layer(part)
    parts = {name.split(".")[1] for name in list_imports(path) if name.startswith("hpc_neuro.")}

    for other in parts - {part}:
        other_layer = find_layer(other)
        # The parts of the lowest and of the highest layer may import one another.
        is_allowed = other_layer < layer or (layer == other_layer and layer in (0, len(LAYERS) - 1))
        assert is_allowed, f"{path.relative_to(PACKAGE)} (layer {layer}) imports {other} (layer {other_layer})"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_homes(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    for name in list_imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or any(place.startswith(home) for home in homes), f"{place} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_readable(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {f"{node.name} in line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert not [name for name, length in lengths.items() if length > MAX_LINES]
