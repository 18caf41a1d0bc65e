"""Random trees, and what MorphIO, NeuroM and swcgeom measure of a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import morphio
import neurom
import numpy as np
import pytest
import swcgeom

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree

LIBRARIES = ("morphio", "neurom", "swcgeom")

Measures = tuple[float, int, int]
"""Cable length, tips, and forks that do not lie at the root."""


def random_tree(seed: int, count: int = 200, roots: int = 1, soma: bool = False) -> Tree:
    """A random forest of distinct points, parents first."""
    rng = np.random.default_rng(seed)
    parents = np.array([-1] * roots + [int(rng.integers(max(0, i - 6), i)) for i in range(roots, count)])
    types = np.full(count, 3)
    types[0] = 1 if soma else 3
    return Tree(rng.normal(0, 100, (count, 3)).round(4), rng.uniform(0.1, 3, count).round(4), parents, types)


def trees_equal(a: Tree, b: Tree, atol: float = 1e-6) -> bool:
    return (
        len(a) == len(b)
        and np.allclose(a.points, b.points, atol=atol, rtol=0)
        and np.allclose(a.radii, b.radii, atol=atol)
        and np.array_equal(a.parents, b.parents)
        and np.array_equal(a.types, b.types)
    )


def measure_tree(tree: Tree) -> Measures:
    forks = np.flatnonzero(morphology.child_counts(tree) > 1)
    forks = forks[np.any(np.abs(tree.points[forks] - tree.points[0]) > 1e-5, axis=1)]
    return morphology.length(tree), len(morphology.tips(tree)), len(forks)


def measure_with_libraries(path: Path, libraries: Sequence[str] = LIBRARIES) -> dict[str, Measures]:
    """The measures of a file by each library; any warning fails."""
    cell = load_with_morphio(path)
    root = cell.soma.points[0] if len(cell.soma.points) else np.full(3, np.nan)
    measures = {"morphio": _measure_morphio(cell, root)}
    if "neurom" in libraries:
        measures["neurom"] = _measure_neurom(path, root)
    if "swcgeom" in libraries:
        measures["swcgeom"] = _measure_swcgeom(path, root)
    return measures


def load_with_morphio(path: Path) -> morphio.Morphology:
    handler = morphio.WarningHandlerCollector()
    cell = morphio.Morphology(str(path), warning_handler=handler)
    assert not [str(e.warning.msg()) for e in handler.get_all()]
    return cell


def assert_all_agree(path: Path, tree: Tree, libraries: Sequence[str] = LIBRARIES) -> None:
    """The libraries open the file without a warning and measure the tree as we do; the tips of a lone point differ."""
    length, tips, forks = measure_tree(tree)
    for name, (their_length, their_tips, their_forks) in measure_with_libraries(path, libraries).items():
        assert their_length == pytest.approx(length, rel=1e-4, abs=1e-4), name
        assert their_forks == forks, name
        assert their_tips == tips or len(tree) == 1, name


def _measure_morphio(cell: morphio.Morphology, root: np.ndarray) -> Measures:
    sections = list(cell.iter())
    length = sum(np.linalg.norm(np.diff(s.points.astype(float), axis=0), axis=1).sum() for s in sections)
    tips = sum(not s.children for s in sections)
    forks = sum(len(s.children) > 1 and not np.allclose(s.points[-1], root) for s in sections)
    return float(length), tips, forks


def _measure_neurom(path: Path, root: np.ndarray) -> Measures:
    neuron = neurom.load_morphology(str(path))
    tips = sum(not s.children for s in neuron.sections)
    forks = sum(len(s.children) > 1 and not np.allclose(s.points[-1][:3], root) for s in neuron.sections)
    return float(sum(n.length for n in neuron.neurites)), tips, forks


def _measure_swcgeom(path: Path, root: np.ndarray) -> Measures:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        tree = swcgeom.Tree.from_swc(str(path))

    points, parents = tree.xyz(), tree.pid()
    child = np.flatnonzero(parents >= 0)
    children = np.bincount(parents[child], minlength=len(parents))
    is_apart = np.any(np.abs(points - root) > 1e-4 * (1 + np.abs(root)), axis=1)
    length = float(np.linalg.norm((points[child] - points[parents[child]]).astype(float), axis=1).sum())
    return length, int((children == 0).sum()), int(((children > 1) & is_apart).sum())
