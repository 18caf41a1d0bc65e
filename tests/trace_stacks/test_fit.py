"""The grid on which a student sees a stack: neurites as wide as in its training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.geometry import Box, Point
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.resample import Resampling
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.models.student_folder import fit_widths, format_widths
from hpc_neuro.trace_stacks import fit as module
from hpc_neuro.trace_stacks.fit import measure_image_widths
from tests.helpers.stacks import make_neuron, take_picture
from tests.trace_stacks.test_predictor import save_brightness_student

TRAINED = [[2.0, 2.5], [3.0, 3.5], [4.0, 5.0]]
"""Quartiles of the widths in a training, along z and in the plane."""


def zoom(image: NDArray[np.generic], factor: Point) -> NDArray[np.float32]:
    """The image with voxels `factor` times as large."""
    z, y, x = image.shape
    grid = Resampling((z, y, x), (1.0, 1.0, 1.0), factor)
    return grid.read_new(lambda box: image[box.slices])(Box.whole(grid.new_shape))


def measure(image: NDArray[np.generic]) -> tuple[float | None, float | None]:
    z, y, x = image.shape
    return measure_image_widths(measure_foreground(lambda box: image[box.slices], (z, y, x)).keep_probability()).median


def test_only_what_is_thinner_or_far_wider_than_the_training_is_resampled() -> None:
    def fit(depth: float | None, plane: float | None) -> Point | None:
        return fit_widths({"neurite_widths": TRAINED}, Path("m"), (depth, plane), "n.tif")

    for widths in ((2.0, 2.5), (3.0, 3.5), (16.0, 20.0), (None, 4.0), (4.0, None)):
        assert fit(*widths) == (1, 1, 1)
    assert fit(1.5, 3.5) == pytest.approx((0.5, 1, 1))
    assert fit(3.0, 1.75) == pytest.approx((1, 0.5, 0.5))
    assert fit(18.0, 21.0) == pytest.approx((6, 6, 6))
    assert fit(None, 21.0) == pytest.approx((1, 6, 6))
    with pytest.raises(InputError, match=r"n.tif are 30 \(along z 3\) voxels wide.* 3.5 \(along z 3\)"):
        fit(3.0, 30.0)

    # Nothing to compare.
    assert fit(None, None) is None
    assert fit_widths({}, Path("m"), (3.0, 3.0), "n.tif") is None
    assert fit_widths({"neurite_widths": None}, Path("m"), (3.0, 3.0), "n.tif") is None
    flat = {"neurite_widths": [[None, 2.5], [None, 3.5], [None, 5.0]]}
    assert fit_widths(flat, Path("m"), (0.5, 1.75), "n.tif") == pytest.approx((1, 0.5, 0.5))
    assert format_widths((None, 2.0)) == "2"


def test_widths_follow_the_voxels() -> None:
    picture = take_picture(make_neuron(3))
    depth, plane = measure(picture)
    assert depth is not None
    assert plane is not None
    assert measure(zoom(picture, (1.0, 0.5, 0.5))) == pytest.approx((depth, 2 * plane), rel=0.15)
    assert measure(zoom(picture, (0.5, 1.0, 1.0))) == pytest.approx((2 * depth, plane), rel=0.15)
    assert measure(picture.max() - picture) == pytest.approx((depth, plane), rel=0.1)


def test_widths_in_noise_are_unknown() -> None:
    noise = np.random.default_rng(0).normal(100, 20, (24, 96, 96)).astype(np.float32)
    assert measure(noise) == (None, None)


def test_where_too_little_cable_shows_the_stack_is_looked_at_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = zoom(take_picture(make_neuron(3), noise=0.0), (2.5, 2.5, 2.5))
    shown = measure(thin)
    monkeypatch.setattr(module, "_LOOKS", (1.0,))
    plain = measure(thin)
    monkeypatch.setattr(module, "_LOOKS", (0.5,))
    closer = measure(thin)
    assert shown == (closer if plain == (None, None) else plain)
    # Half as large voxels, but the same unit.
    assert closer[1] == pytest.approx(1.8, rel=0.25)
    monkeypatch.setattr(module, "_LOOKED_VOXELS", 0)
    assert measure(thin) == (None, None)


@pytest.fixture
def wide(tmp_path: Path) -> NDArray[np.float32]:
    """A stack whose neurites are about 12 voxels wide in the plane, in the file n.tif."""
    image = zoom(take_picture(make_neuron(3)), (1.0, 0.3, 0.3))
    tifffile.imwrite(tmp_path / "n.tif", image)
    return image


def trace(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, *keys: str
) -> tuple[int, str]:
    """Trace n.tif of a folder; the exit code and all that was said."""
    caplog.clear()
    code = cli.main(["trace", str(folder / "n.tif"), f"out={folder / out}", *keys])
    # An earlier test decides whether the log goes to the terminal or to pytest.
    return code, caplog.text + capsys.readouterr().err


def test_a_stack_without_a_voxel_size_is_resampled_by_its_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    coarse = (1.0, 2.0, 2.0)
    thin = zoom(take_picture(make_neuron(3)), coarse)
    tifffile.imwrite(tmp_path / "n.tif", thin)
    weights = save_brightness_student(tmp_path / "weights", neurite_widths=TRAINED)
    code, log = trace(tmp_path, "out", capsys, caplog, f"model={weights}")
    assert code == EXIT_DONE
    assert "resampled to" in log
    result = json.loads((tmp_path / "out" / "trace.json").read_text())["stacks"]["n"]
    z, y, x = result["resampled_shape"]
    assert y > 1.4 * thin.shape[1]
    assert x > 1.4 * thin.shape[2]
    assert result["resampled_voxel_size"] is None
    assert f"traced in {z} x {y} x {x} voxels" in (tmp_path / "out" / "trace.html").read_text()

    # The tree and the width are in voxels of the stack.
    tree = swc.read(tmp_path / "out" / "swc" / "n.voxel.swc")
    back = Resampling((40, 96, 128), (1.0, 1.0, 1.0), coarse).move_tree_back(tree)
    assert match_cable(back, make_neuron(3), 3.0).f1 > 0.9
    assert 1 < result["neurite_width_voxels"] < 2.6

    # Nothing is resampled on demand, and where the widths fit.
    code, log = trace(tmp_path, "plain", capsys, caplog, f"model={weights}", "any_voxel_size=true")
    assert code == EXIT_DONE
    assert "resampled to" not in log
    fitting = save_brightness_student(tmp_path / "fitting", neurite_widths=[[1, 1], [2, 2], [4, 4]])
    code, log = trace(tmp_path, "fits", capsys, caplog, f"model={fitting}")
    assert code == EXIT_DONE
    assert "resampled to" not in log
    one, other = (swc.read(tmp_path / out / "swc" / "n.voxel.swc") for out in ("plain", "fits"))
    np.testing.assert_array_equal(one.points, other.points)


def test_widths_overrule_voxel_sizes_where_both_are_known(
    wide: NDArray[np.float32], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    fitting = save_brightness_student(
        tmp_path / "fitting", voxel_sizes=sizes, neurite_widths=[[2, 8], [4, 12], [6, 14]]
    )
    # By its voxel size the stack would be refused, and the advice of the warning is followed.
    code, log = trace(tmp_path, "right", capsys, caplog, f"model={fitting}", "voxel_size=1,0.3,0.3")
    assert code == EXIT_DONE
    assert "WRONG VOXEL SIZE?" not in log
    code, log = trace(tmp_path, "out", capsys, caplog, f"model={fitting}", "voxel_size=50,20,20")
    assert code == EXIT_DONE
    assert "resampled to" not in log
    # Nobody's neurites are hundreds of micrometers wide.
    assert "WRONG VOXEL SIZE?" in log
    result = json.loads((tmp_path / "out" / "trace.json").read_text())["stacks"]["n"]
    assert "wider than 30 um" in result["warnings"][0]
    width = result["neurite_width_voxels"]
    assert f"the neurites are {20 * width:.3g}" in result["warnings"][0]

    # A width in the plane says nothing about voxels that are no squares.
    code, log = trace(tmp_path, "oblong", capsys, caplog, f"model={fitting}", "voxel_size=1,1,0.5")
    assert code == EXIT_DONE
    assert "voxels of 1 x 1 x 0.5 um are resampled to 1 x 1 x 1 um" in log


def test_neurites_that_no_grid_fits_are_refused(
    wide: NDArray[np.float32], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    weights = save_brightness_student(tmp_path / "weights", neurite_widths=[[1, 0.5], [1, 0.6], [3, 0.7]])
    code, log = trace(tmp_path, "out", capsys, caplog, f"model={weights}")
    assert code == EXIT_BAD_INPUT
    assert "any_voxel_size=true" in log
    assert not (tmp_path / "out" / "swc").exists()

    # The advice is followed.
    assert trace(tmp_path, "out", capsys, caplog, f"model={weights}", "any_voxel_size=true")[0] == EXIT_DONE
