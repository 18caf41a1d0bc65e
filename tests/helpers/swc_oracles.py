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


def random_tree(seed: int, count: int = 200, roots: int = 1, soma: bool = False) -> Tree:
    """A random forest of distinct points, parents first."""
    rng = np.random.default_rng(seed)
    parents = np.array([-1] * roots + [int(rng.integers(max(0, i - 6), i)) for i in range(roots, count)])
    types = np.full(count, 3)
    types[0] = 1 if soma else 3
    return Tree(rng.normal(0, 100, (count, 3)).round(4), rng.uniform(0.1, 3, count).round(4), parents, types)


def same(a: Tree, b: Tree, atol: float = 1e-6) -> bool:
    return (
        len(a) == len(b)
        and np.allclose(a.points, b.points, atol=atol, rtol=0)
        and np.allclose(a.radii, b.radii, atol=atol)
        and np.array_equal(a.parents, b.parents)
        and np.array_equal(a.types, b.types)
    )


def others(
    path: Path, libraries: Sequence[str] = ("morphio", "neurom", "swcgeom")
) -> dict[str, tuple[float, int, int]]:
    """Cable length, tips and forks (off the root) as three other libraries measure them; any warning fails."""
    handler = morphio.WarningHandlerCollector()
    cell = morphio.Morphology(str(path), warning_handler=handler)
    assert not [str(e.warning.msg()) for e in handler.get_all()]
    sections = list(cell.iter())
    length = sum(np.linalg.norm(np.diff(s.points.astype(float), axis=0), axis=1).sum() for s in sections)
    tips = sum(not s.children for s in sections)
    root = cell.soma.points[0] if len(cell.soma.points) else np.full(3, np.nan)
    forks = sum(len(s.children) > 1 and not np.allclose(s.points[-1], root) for s in sections)
    found = {"morphio": (float(length), tips, forks)}
    if "neurom" in libraries:
        neuron = neurom.load_morphology(str(path))
        ends = sum(not s.children for s in neuron.sections)
        forked = sum(len(s.children) > 1 and not np.allclose(s.points[-1][:3], root) for s in neuron.sections)
        found["neurom"] = (float(sum(n.length for n in neuron.neurites)), ends, forked)
    if "swcgeom" in libraries:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            tree = swcgeom.Tree.from_swc(str(path))
        points, parents = tree.xyz(), tree.pid()
        edge = np.flatnonzero(parents >= 0)
        children = np.bincount(parents[edge], minlength=len(parents))
        apart = np.any(np.abs(points - root) > 1e-4 * (1 + np.abs(root)), axis=1)
        reach = float(np.linalg.norm((points[edge] - points[parents[edge]]).astype(float), axis=1).sum())
        found["swcgeom"] = (reach, int((children == 0).sum()), int(((children > 1) & apart).sum()))
    return found


def ours(tree: Tree) -> tuple[float, int, int]:
    forks = np.flatnonzero(morphology.child_counts(tree) > 1)
    forks = forks[np.any(np.abs(tree.points[forks] - tree.points[0]) > 1e-5, axis=1)]
    return morphology.length(tree), len(morphology.tips(tree)), len(forks)


def assert_all_agree(path: Path, tree: Tree, libraries: Sequence[str] = ("morphio", "neurom", "swcgeom")) -> None:
    """The libraries open the file in silence and measure what we do; what a lone point's tips are is left to them."""
    length, tips, forks = ours(tree)
    for name, (a, b, c) in others(path, libraries).items():
        assert a == pytest.approx(length, rel=1e-4, abs=1e-4), name
        assert c == forks, name
        assert b == tips or len(tree) == 1, name
