"""The Python API: lazy, typed, and named as documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

import hpc_neuro
from hpc_neuro import infer
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.tiling import quantize
from hpc_neuro.models.student import save_student
from hpc_neuro.pipeline import VERBS
from tests.helpers.bright_student import CONFIG, build_bright_student, save_bright_student
from tests.helpers.small_volumes import configure


def test_every_public_name_is_there_and_has_a_type() -> None:
    """The names in __all__, those that are imported lazily, and those that type checkers see are the same."""
    tree = ast.parse(Path(inspect.getsourcefile(hpc_neuro) or "").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    names = [
        alias.asname or alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(names) == sorted(hpc_neuro.__all__) == sorted(hpc_neuro._HOMES)
    assert all(getattr(hpc_neuro, name) is not None for name in hpc_neuro.__all__)
    assert set(hpc_neuro.__all__) <= set(dir(hpc_neuro))


def test_each_verb_with_a_config_has_its_class_and_its_function() -> None:
    for verb in VERBS.values():
        if verb.config:
            assert getattr(hpc_neuro, verb.config) is verb.load_config_class()
            assert getattr(hpc_neuro, verb.function) is verb.load_module().run


def test_subpackages_are_not_shadowed() -> None:
    from hpc_neuro import evaluate, infer, precompute, prepare, train

    assert all(inspect.ismodule(module) for module in (evaluate, infer, precompute, prepare, train))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        hpc_neuro.trian  # noqa: B018


def test_importing_takes_no_torch() -> None:
    names = "h.read_swc, h.score, h.trace, h.predict, h.trace_probability"
    code = f"import sys, hpc_neuro as h; {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_volumes_and_trees(tmp_path: Path) -> None:
    image = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    box = Box((1, 1, 1), (3, 4, 5))
    assert np.array_equal(hpc_neuro.open_volume(tmp_path / "a.tif")[box], image[box.slices])

    (tmp_path / "a.swc").write_text("1 1 0 0 0 5 -1\n2 3 6 0 0 1 1\n")
    tree = hpc_neuro.read_swc(tmp_path / "a.swc")
    hpc_neuro.write_swc(tmp_path / "b.swc", tree, unit="voxel")
    assert np.array_equal(hpc_neuro.read_swc(tmp_path / "b.swc").points, tree.points)


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (np.zeros((4, 4)), None, "a stack of three axes z, y, x is expected"),
        (np.zeros((0, 4, 4)), None, "each with at least one voxel"),
        (np.zeros((4, 4, 4), "complex64"), None, "holds complex64 values"),
        (np.full((8, 8, 8), np.nan), None, "voxel z=0 y=0 x=0 is NaN or infinite"),
        (np.full((8, 8, 8), 1e300), None, "a voxel is 1e\\+300, and intensities up to 1e\\+30 are computed with"),
        (np.eye(27).reshape(9, 9, 9), (1.0, 0.0, 1.0), "voxel_size .* must be three numbers above 0"),
    ],
)
def test_arrays_that_cannot_be_traced(image: np.ndarray, size: tuple[float, float, float] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hpc_neuro.trace(image, size)
    if size is None:
        with pytest.raises(InputError, match=message):
            hpc_neuro.predict(image, "bundled")


def test_scores_take_paths_and_trees(tmp_path: Path) -> None:
    (tmp_path / "a.swc").write_text("1 1 0 0 0 5 -1\n2 3 60 0 0 1 1\n")
    (tmp_path / "b.swc").write_text("1 1 0 1 0 5 -1\n2 3 60 1 0 1 1\n3 3 90 1 0 1 2\n")
    tree = hpc_neuro.read_swc(tmp_path / "a.swc")
    scores = hpc_neuro.score(tree, str(tmp_path / "b.swc"))
    assert scores == hpc_neuro.score(tmp_path / "a.swc", tmp_path / "b.swc", tolerance=4)
    assert list(scores) == ["f1", "precision", "recall", "esa", "dsa", "pds"]
    assert scores["precision"] == 1.0
    assert scores["recall"] == pytest.approx((60 + 4) / 90, abs=0.01)
    assert hpc_neuro.score(tree, tree) == {"f1": 1, "precision": 1, "recall": 1, "esa": 0, "dsa": 0, "pds": 0}
    with pytest.raises(ValueError, match="above 0"):
        hpc_neuro.score(tree, tree, tolerance=0)


def test_trees_in_different_units_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "raw.swc").write_text("1 1 0 0 0 5 -1\n2 3 60 0 0 1 1\n")
    tree = hpc_neuro.read_swc(tmp_path / "raw.swc")
    hpc_neuro.write_swc(tmp_path / "um.swc", tree, unit="um", voxel_size=(1.0, 1.0, 1.0))
    hpc_neuro.write_swc(tmp_path / "voxel.swc", tree, unit="voxel")
    with pytest.raises(InputError, match=r"um\.swc is in um and .*voxel\.swc is in voxel; .*swc convert"):
        hpc_neuro.score(tmp_path / "um.swc", tmp_path / "voxel.swc")
    assert hpc_neuro.score(tmp_path / "um.swc", tmp_path / "raw.swc")["f1"] == 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train folder whose student calls bright voxels neurite."""
    folder = tmp_path_factory.mktemp("train")
    save_bright_student(folder / "weights" / "best")
    return folder


def draw_neurite() -> np.ndarray:
    """[Z, Y, X] uint16, one straight neurite along x."""
    image = np.random.default_rng(0).integers(90, 110, (20, 48, 70), dtype=np.uint16)
    image[9:12, 20:24, 5:65] += 2000
    return image


def test_a_prediction_is_that_of_infer(model: Path, tmp_path: Path) -> None:
    image = draw_neurite()
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    probability = hpc_neuro.predict(image, model)
    assert probability.dtype == np.float32
    assert probability.shape == image.shape

    item = f"{{image: {tmp_path / 'a.tif'}, voxel_size: [1, 0.5, 0.5]}}"
    assert infer.run(configure(model, tmp_path / "out", f"inputs=[{item}]")) == 0
    written = ome_zarr.open_level(tmp_path / "out" / "a.ome.zarr").read().result()
    # A sum in another order may round to the next of 256 levels.
    assert np.abs(quantize(probability).astype(int) - np.asarray(written).astype(int)).max() <= 1
    assert np.array_equal(hpc_neuro.predict(tmp_path / "a.tif", str(model / "weights" / "best")), probability)


def test_a_prediction_becomes_a_tree(model: Path) -> None:
    probability = hpc_neuro.predict(draw_neurite(), model)
    (tree,) = hpc_neuro.trace_probability(probability, (1.0, 0.5, 0.5), roots=[(10, 21, 6)])
    assert np.allclose(tree.points[:, 0], 10, atol=1.5)
    assert tree.points[:, 2].max() - tree.points[:, 2].min() > 50


def test_the_range_of_a_prediction_can_be_given(model: Path) -> None:
    image = draw_neurite()
    dim = hpc_neuro.predict(image, model, intensity_range=(0.0, 60000.0))
    assert dim.max() < hpc_neuro.predict(image, model).max()


def test_what_cannot_be_predicted_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="three axes"):
        hpc_neuro.predict(np.zeros((4, 5)), model)
    with pytest.raises(InputError, match="holds no weights"):
        hpc_neuro.predict(draw_neurite(), tmp_path)
    save_student(tmp_path / "w", CONFIG, build_bright_student().state_dict(), {})
    with pytest.raises(ConfigError, match="does not say on what crop"):
        hpc_neuro.predict(draw_neurite(), tmp_path / "w")
