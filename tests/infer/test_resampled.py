"""Volumes whose voxels a student does not know: resampled for it, block by block, with results on their own grid."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import cli, infer
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.geometry import Box, Point, Shape
from hpc_neuro.data import swc
from hpc_neuro.data.resample import Resampling
from hpc_neuro.data.store import Store
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student
from tests.helpers.bright_student import save_bright_student
from tests.helpers.small_volumes import KEYS, WINDOW, configure, probability


@pytest.mark.parametrize("factor", [(1.0, 0.5, 0.5), (1.0, 2.0, 2.0), (0.6, 1.7, 1.0), (2.0, 0.25, 0.25)])
@pytest.mark.parametrize(("block", "overlap"), [((8, 32, 32), 0.5), ((8, 48, 32), 0.25), ((64, 64, 64), 0.0)])
def test_blocks_do_not_show(model: Path, store: Path, factor: Point, block: Shape, overlap: float) -> None:
    """The blocked float probability is that of the whole volume, resampled and predicted at once."""
    student, _ = load_student(model / "weights" / "best")
    volume = Store(store)["a"]
    grid = Resampling(volume.shape, volume.voxel_size, factor)
    tiling = Tiling(WINDOW, overlap, student.patch, block, (4, 16, 16), grid)
    read = grid.read_new(volume.normalized_image)

    seen = sliding_window.predict(student, read(Box.whole(grid.new_shape)), WINDOW, overlap)
    whole = grid.read_back(lambda box: seen[box.slices])(Box.whole(volume.shape))
    parts = np.zeros_like(whole)
    for b in tiling.list_blocks(volume.shape):
        predicted = sliding_window.predict(student, read(b.read), WINDOW, overlap)
        parts[b.write.slices] = tiling.select_own(b, predicted)
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert whole.std() > 1e-4


def test_blocks_of_a_finer_grid_are_smaller() -> None:
    """Memory does not grow with the factor."""
    shape = (400, 2000, 2000)
    plain = Tiling((24, 96, 96), 0.25, (4, 8, 8), (128, 512, 512), (32, 64, 64))
    most = max(block.read.size for block in plain.list_blocks(shape))
    for factor in ((1 / 8, 1 / 8, 1 / 8), (1.0, 1 / 8, 1 / 8), (0.5, 2.0, 2.0), (8.0, 8.0, 8.0)):
        grid = Resampling(shape, (1.0, 1.0, 1.0), factor)
        tiling = Tiling(plain.window, plain.overlap, plain.patch, plain.block, plain.chunk, grid)
        assert max(block.read.size for block in tiling.list_blocks(shape)) <= 2.5 * most
        assert np.prod(tiling.write, dtype=np.int64) <= np.prod(plain.write, dtype=np.int64)


@pytest.fixture
def train_folder(tmp_path: Path) -> Path:
    """A train folder whose student was trained on voxels of 1 um."""
    folder = tmp_path / "train"
    save_bright_student(folder / "weights" / "best", voxel_sizes=[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    return folder


def write_bar(path: Path, zoom: int) -> str:
    """Write a bright bar, with voxels 1 / `zoom` um wide in the plane."""
    image = np.zeros((16, 64, 64), dtype=np.uint8)
    image[7:10, 30:33, 8:56] = 200
    tifffile.imwrite(path, image.repeat(zoom, axis=1).repeat(zoom, axis=2), photometric="minisblack")
    return f"inputs=[{{image: {path}, voxel_size: [1, {1 / zoom}, {1 / zoom}], range: [0, 200]}}]"


def test_the_probability_and_the_trees_are_on_the_grid_of_the_image(
    train_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, fine = write_bar(tmp_path / "plain.tif", 1), write_bar(tmp_path / "fine.tif", 4)
    trees = {}
    for name, inputs in (("plain", plain), ("fine", fine)):
        out = tmp_path / f"out_{name}"
        words = ["infer", f"model={train_folder}", f"out={out}", inputs, *KEYS, "trees=true"]
        assert cli.main(words) == EXIT_DONE
        # An earlier test decides whether the log goes to the terminal or to pytest.
        log = caplog.text + capsys.readouterr().err
        is_resampled = "voxels of 1 x 0.25 x 0.25 um are resampled to 1 x 1 x 1 um" in log
        assert is_resampled is (name == "fine")
        trees[name] = swc.read(out / "swc" / f"{name}.swc")

    # Linear between the centers of what the image of coarse voxels has, whose means are the same numbers.
    coarse, own = probability(tmp_path / "out_plain", "plain"), probability(tmp_path / "out_fine", "fine")
    assert own.shape == (16, 256, 256)
    grid = Resampling((16, 256, 256), (1.0, 0.25, 0.25), (1.0, 4.0, 4.0))
    between = grid.read_back(lambda box: coarse[box.slices])(Box.whole(grid.shape))
    assert np.abs(between - own).max() <= 1
    assert own.max() > 200

    # The same cable in micrometers: both grids begin at the corner of the first voxel.
    ends = {name: (tree.points.min(axis=0), tree.points.max(axis=0)) for name, tree in trees.items()}
    shift = np.array([0, 0.375, 0.375])
    for fine_end, plain_end in zip(ends["fine"], ends["plain"], strict=True):
        np.testing.assert_allclose(fine_end, plain_end + shift, atol=2.0)

    # Without its image the same command predicts all blocks again.
    assert cli.main(words) == EXIT_DONE
    shutil.rmtree(tmp_path / "out_fine" / "fine.ome.zarr")
    assert cli.main(words) == EXIT_DONE
    np.testing.assert_array_equal(probability(tmp_path / "out_fine", "fine"), own)


def test_what_fits_or_shall_stay_is_not_resampled(train_folder: Path, tmp_path: Path) -> None:
    """Without a factor, and with any_voxel_size, the same bytes as from a student that knows no voxel size."""
    free = tmp_path / "free"
    save_bright_student(free / "weights" / "best")
    for zoom, key in ((1, "any_voxel_size=false"), (4, "any_voxel_size=true")):
        inputs = write_bar(tmp_path / f"n{zoom}.tif", zoom)
        for model in (train_folder, free):
            assert infer.run(configure(model, tmp_path / f"{zoom}_{model.name}", inputs, key)) == EXIT_DONE
        one, other = (probability(tmp_path / f"{zoom}_{model.name}", f"n{zoom}") for model in (train_folder, free))
        np.testing.assert_array_equal(one, other)


def test_mirrored_views_of_a_resampled_image(train_folder: Path, tmp_path: Path) -> None:
    """A student that sees the same in mirrors is as sure as without; see also test_flip_tta."""
    confidence = {}
    for name, key in (("views", "flips=[flip_x]"), ("plain", "flips=[]")):
        out = tmp_path / name
        inputs = write_bar(tmp_path / "fine.tif", 4)
        assert infer.run(configure(train_folder, out, inputs, "trees=true", key)) == EXIT_DONE
        assert json.loads((out / "predictions.json").read_text())["fine"]["trees"] >= 1
        confidence[name] = list(csv.DictReader((out / "proofread" / "fine.confidence.csv").open()))
    views, plain = confidence["views"], confidence["plain"]
    assert [row["confidence"] for row in views] == [row["confidence"] for row in plain]
    assert max(float(row["disagreement"]) for row in views) < 0.2


def test_voxels_beyond_eight_times_are_refused(
    train_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bar(tmp_path / "n.tif", 1)
    words = ["infer", str(tmp_path / "n.tif"), "range=0,200", f"model={train_folder}", f"out={tmp_path / 'out'}", *KEYS]
    assert cli.main([*words, "voxel_size=1,9,9"]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "up to 8 times" in message
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "voxel_size=1,9,9", "any_voxel_size=true"]) == EXIT_DONE


def test_shares_and_repairs_are_those_of_one_run(train_folder: Path, tmp_path: Path) -> None:
    inputs = write_bar(tmp_path / "fine.tif", 4)
    keys = [f"model={train_folder}", inputs, "block=[8,64,64]", "chunk=[4,32,32]", "page=false"]
    one, shared = tmp_path / "one", tmp_path / "shared"
    assert cli.main(["infer", *keys, f"out={one}"]) == EXIT_DONE
    for number in (0, 1):
        assert cli.main(["infer", *keys, f"out={shared}", f"share=[{number},2]"]) == EXIT_DONE
    assert cli.main(["infer", *keys, f"out={shared}"]) == EXIT_DONE
    np.testing.assert_array_equal(probability(shared, "fine"), probability(one, "fine"))

    # A shard that is lost is found missing, and predicted again.
    shard = max(
        (shared / "fine.ome.zarr" / "0" / "c").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    shard.unlink()
    assert cli.main(["infer", "verify", str(shared), "--check"]) == EXIT_FAILURES
    assert cli.main(["infer", "verify", str(shared)]) == EXIT_DONE
    np.testing.assert_array_equal(probability(shared, "fine"), probability(one, "fine"))
    trees = [(folder / "swc" / "fine.swc").read_text().split("\n", 1)[1] for folder in (one, shared)]
    assert trees[0] == trees[1]
