"""The second look in mirrors: nothing where the student sees the same, by hand where not, whatever the blocks are."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from torch import Tensor, nn

from hpc_neuro import infer
from hpc_neuro.core.geometry import Box, Point, Shape
from hpc_neuro.core.morphology import Tree, build_tree
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.core.types import StudentOutput
from hpc_neuro.data.resample import Resampling
from hpc_neuro.infer import flip_tta, predictor
from hpc_neuro.infer.predictor import Predictor
from hpc_neuro.infer.proofread import NodeConfidence
from hpc_neuro.infer.tiling import Tiling, quantize
from hpc_neuro.infer.trees import VolumeTrees, save_arrays
from hpc_neuro.infer.volumes import InputVolume
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student
from hpc_neuro.tracing import measure_confidence
from tests.helpers.journal import list_times
from tests.helpers.small_volumes import WINDOW, configure

TRACED = ["trees=true", "trace.min_voxels=1", "trace.threshold=0.5", "empty_level=null"]


class Sees(nn.Module):
    """The image is the probability, of which only `right` is seen in the right half of a window (along x)."""

    patch = (4, 16, 16)

    def __init__(self, right: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("gain", torch.where(torch.arange(WINDOW[2]) < WINDOW[2] // 2, 1.0, right))

    def forward(self, image: Tensor) -> StudentOutput:
        return StudentOutput(torch.logit(image * self.gain, eps=1e-6), {})


@pytest.fixture
def line(tmp_path: Path) -> str:
    """A neurite along x, as bright as 0.8, in a volume of one window."""
    image = np.zeros(WINDOW, np.uint8)
    image[3:6, 15:18, 2:30] = 204
    tifffile.imwrite(tmp_path / "line.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    return f"inputs=[{{image: {tmp_path / 'line.tif'}, voxel_size: [1, 1, 1], range: [0, 255], root: [4, 16, 2]}}]"


def _table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def _seen_by(monkeypatch: pytest.MonkeyPatch, student: nn.Module) -> None:
    monkeypatch.setattr(predictor, "load_student", lambda folder: (student, {"window": list(WINDOW)}))


def test_a_student_that_sees_the_same_in_mirrors_disagrees_nowhere(
    model: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _seen_by(monkeypatch, Sees())
    assert infer.run(configure(model, tmp_path / "o", line, *TRACED, "flips=[flip_x, flip_z+flip_y]")) == 0
    rows = _table(tmp_path / "o/proofread/line.confidence.csv")
    assert len(rows) > 10
    assert {r["disagreement"] for r in rows} == {"0.0"}
    assert all(r["mean"] == r["confidence"] == "0.8" for r in rows)
    assert not [p for p in _table(tmp_path / "o/proofread/line.csv") if p["kind"] == "unsteady"]
    assert [b["disagreement"] for b in _table(tmp_path / "o/proofread/line.blocks.csv")] == ["0.0"]
    assert not (tmp_path / "o/strands").exists()


def test_what_a_mirror_shows_otherwise_is_told_as_computed_by_hand(
    model: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.8 on the left and 0.56 on the right; in the mirror the other way round; a second mirror, along y, as plain."""
    _seen_by(monkeypatch, Sees(0.7))
    out = tmp_path / "o"
    keys = [*TRACED, "trace.low=0.3", "trace.threshold=0.6", "trace.smooth=0"]
    plain = configure(model, out, line, *keys)
    assert infer.run(plain) == 0
    before = _table(out / "proofread/line.confidence.csv")
    assert list(before[0]) == ["node", "confidence"]
    assert all(p["disagreement"] == "" for p in _table(out / "proofread/line.csv"))
    marks = list_times(out)
    assert marks
    assert infer.run(configure(model, out, line, *keys, "flips=[flip_x, flip_y]")) == 0  # in the same folder
    assert marks == list_times(out)
    rows = _table(out / "proofread/line.confidence.csv")
    assert [r["confidence"] for r in rows] == [r["confidence"] for r in before]
    left, right = rows[1:4], rows[-4:]  # with the edge to their parent in one half
    high, low = 204 / 255, round(0.8 * 0.7 * 255) / 255
    for selected, own, other in ((left, high, low), (right, low, high)):
        for row in selected:
            assert float(row["confidence"]) == pytest.approx(own, abs=1e-4)
            assert float(row["disagreement"]) == pytest.approx((high - low) / 2, abs=1e-4)
            assert float(row["mean"]) == pytest.approx((2 * own + other) / 3, abs=1e-4)
    unsteady = [p for p in _table(out / "proofread/line.csv") if p["kind"] == "unsteady"]
    assert len(unsteady) == 1  # sure on the left, but faint in a mirror
    assert float(unsteady[0]["x"]) < 16
    assert float(unsteady[0]["doubt"]) == pytest.approx((high - low) / 2, abs=1e-4)
    (neuron,) = _table(out / "proofread/line.neurons.csv")
    assert float(neuron["disagreement"]) == pytest.approx((high - low) / 2, abs=0.02)
    entry = json.loads((out / "predictions.json").read_text())["line"]
    assert entry["confidence"] == "proofread/line.confidence.csv"


def _zigzag(shape: Shape) -> Tree:
    """A path that crosses every block border of a volume."""
    draw = np.random.default_rng(2)
    corners = draw.uniform(0, np.array(shape) - 1, (8, 3))
    ways = [a + (b - a) * s for a, b in itertools.pairwise(corners) for s in np.linspace(0, 1, 30)]
    return build_tree(np.array(ways), np.arange(-1, len(ways) - 1))


@pytest.mark.parametrize(
    ("block", "overlap", "factor"),
    [
        ([8, 32, 32], 0.5, None),
        ([16, 64, 64], 0.25, None),
        ([8, 32, 32], 0.5, (1.0, 0.6, 0.6)),
        ([16, 64, 64], 0.25, (0.5, 1.7, 1.7)),
    ],
)
def test_blocks_do_not_show_in_the_second_look(
    model: Path, tmp_path: Path, block: list[int], overlap: float, factor: Point | None
) -> None:
    """It is what the mirrored windows of the whole volume give at once, on the grid that the student sees."""
    image = np.random.default_rng(1).random((16, 48, 70)).astype(np.float32)
    shape, tree = image.shape, _zigzag(image.shape)
    cfg = configure(
        model,
        tmp_path,
        "store=x",
        "trees=true",
        f"block={block}",
        f"overlap={overlap}",
        "flips=[flip_x, flip_z+flip_y]",
    )
    predictor = Predictor(cfg)
    source = InputVolume("v", "v", shape, (1.0, 1.0, 1.0), (), "d", lambda box: image[box.slices])
    grid = None if factor is None else Resampling(shape, (1.0, 1.0, 1.0), factor)
    if grid is not None:
        source = replace(source, resampling=grid, read_resampled=grid.read_new(source.read))
    trees = VolumeTrees(cfg, predictor.open_volume(source, 0.0))
    tiling = trees.volume.tiling
    save_arrays(trees.scratch / "forest.npz", tree)
    flip_tta.keep_samples(trees, 0)
    windows, expected_windows = 0, 0

    def count_window(count: int) -> None:
        nonlocal windows
        windows += count

    for number in range(2):
        todo = flip_tta.list_missing_blocks(trees)
        assert bool(todo) == (number == 0)  # what was looked at is not looked at again
        for one in todo:
            expected_windows += 2 * one.windows
            flip_tta.predict_views(trees, predictor, one, count_window)
    values = flip_tta.load_views(trees, tree)
    student, _ = load_student(model / "weights" / "best")
    for row, flip in zip(values, [(2,), (0, 1)], strict=True):
        shown = image if grid is None else source.show(Box.whole(grid.new_shape))
        seen = sliding_window.predict(student, shown, WINDOW, overlap, flip=flip)
        whole = quantize(
            seen if grid is None else grid.read_back(lambda box, seen=seen: seen[box.slices])(Box.whole(shape))
        )
        off = np.abs(row - measure_confidence(tree, lambda box, whole=whole: whole[box.slices], shape))
        assert off.max() <= 1 / 255 + 1e-9  # 1e-4 may tip a rounding
        assert np.mean(off > 0) < 0.02
    assert np.abs(values[0] - values[1]).max() > 0.01
    assert windows == expected_windows < 2 * sum(map(tiling.count_windows, tiling.list_flip_blocks(shape)))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_a_second_look_reads_all_that_the_voxels_next_to_a_block_depend_on(overlap: float) -> None:
    plan, shape = Tiling((8, 32, 32), overlap, (4, 16, 16), (8, 32, 48), (4, 16, 16)), (16, 80, 110)
    for block in plan.list_flip_blocks(shape):
        assert all(start % step == 0 for start, step in zip(block.read.start, plan.step, strict=True))
        around = block.write.grow((1, 1, 1)).clip(Box.whole(shape))
        for corner in itertools.product(*(range(0, n, s) for n, s in zip(shape, plan.step, strict=True))):
            window = Box.at(corner, plan.window).clip(Box.whole(shape))
            assert block.read.contains(window) or not window.clip(around).size


def test_a_kill_in_the_second_look_changes_nothing(
    model: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _seen_by(monkeypatch, Sees(0.7))
    keys = [line, *TRACED, "block=[8,16,16]", "overlap=0.5", "trace.threshold=0.6", "flips=[flip_x]"]

    def outcome(out: Path) -> dict[str, bytes]:
        kinds = ("*.ome.zarr/**/*", "swc/**/*", "proofread/*", "predictions.json")
        return {p.relative_to(out).as_posix(): p.read_bytes() for k in kinds for p in out.glob(k) if p.is_file()}

    quiet, killed = configure(model, tmp_path / "quiet", *keys), configure(model, tmp_path / "killed", *keys)
    assert infer.run(quiet) == 0

    class Killed(BaseException):
        pass

    predict_views, calls = flip_tta.predict_views, 0

    def struck(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise Killed
        predict_views(*given)

    monkeypatch.setattr(flip_tta, "predict_views", struck)
    for _ in range(2):
        with pytest.raises(Killed):
            infer.run(killed)
        assert list((tmp_path / "killed/strands").rglob("view_*.npz"))
    assert infer.run(killed) == 0
    assert calls > 4
    assert outcome(killed.out) == outcome(quiet.out)


def test_the_forecast_says_what_mirrors_cost(model: Path, line: str, tmp_path: Path) -> None:
    def forecast(*keys: str) -> str:
        return "\n".join(infer.forecast(configure(model, tmp_path / "o", line, "trees=true", *keys)))

    assert "mirrored" not in forecast()
    assert "once more in 2 mirrored views: at most 2 windows" in forecast("flips=[flip_x, flip_y]")  # one block


@pytest.mark.parametrize(
    "flips", ["[rot90]", "[flip_w]", "[flip_x, flip_x]", "[rot180, flip_y+flip_x]", "[flip_x+flip_x]"]
)
def test_what_is_no_mirror_is_refused(model: Path, tmp_path: Path, flips: str) -> None:
    with pytest.raises(ConfigError, match=r"flips|no orientation"):
        configure(model, tmp_path, "store=x", "trees=true", f"flips={flips}")


def test_mirrors_want_trees_and_a_student_that_knows_them(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flips looks at trees"):
        configure(model, tmp_path, "store=x", "flips=[flip_x]")
    student = shutil.copytree(model / "weights" / "best", tmp_path / "student")
    saved = yaml.safe_load((student / "student.yaml").read_text())
    saved["extra"]["mirrored"] = False
    (student / "student.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match="trained without mirrored crops"):
        Predictor(configure(student, tmp_path / "o", "store=x", "trees=true", "flips=[flip_x]"))
    Predictor(configure(student, tmp_path / "o", "store=x"))
    with pytest.raises(ConfigError, match="holds weights itself and no `last`"):
        Predictor(configure(student, tmp_path / "o", "store=x", "weights=last"))


def test_views_are_summed_up_per_node() -> None:
    confidence = NodeConfidence(np.array([0.9, 0.2]), np.array([[0.9, 0.5], [0.6, 0.1]]), 0.3, 0.5)
    assert confidence.disagreement is not None
    np.testing.assert_allclose(confidence.disagreement, [0.15, 0.2])
    np.testing.assert_allclose(confidence.mean, [0.8, 0.8 / 3])
    np.testing.assert_allclose(confidence.lowest, [0.6, 0.1])
    assert NodeConfidence(confidence.plain, np.zeros((0, 2)), 0.3, 0.5).disagreement is None
