"""The engine: nothing lost, nothing looked at for nothing, failures parked, several ranks, kills."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.task_queue import group_by_deaths
from hpc_neuro.data.run_journal import name_block
from hpc_neuro.data.store import Store
from hpc_neuro.infer import progress as progress_module
from hpc_neuro.infer.block_pipeline import EmptyRule, brightest_cell
from hpc_neuro.infer.tiling import Tiling, quantize
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student
from tests.helpers.journal import list_all_begun
from tests.helpers.small_volumes import WINDOW, ArrayVolume, open_run, predict_missing, probability


def test_what_is_written_is_the_whole_volumes_result(model: Path, store: Path, tmp_path: Path) -> None:
    volume = Store(store)["a"]
    run = open_run(model, volume, tmp_path)
    progress = predict_missing(run)
    assert progress.done == progress.total == run.tiling.count_all_windows(volume.shape)
    student, _ = load_student(model / "weights" / "best")
    whole = sliding_window.predict(student, volume.normalized_image(Box.whole(volume.shape)), WINDOW)
    off = np.abs(probability(tmp_path, "a").astype(int) - quantize(whole))
    assert off.max() <= 1  # 1e-4 may tip a rounding
    assert np.mean(off > 0) < 0.01


def test_a_block_that_always_fails_is_parked_and_tried_again(model: Path, store: Path, tmp_path: Path) -> None:
    volume, poison, calls = Store(store)["a"], True, 0

    def read(box: Box) -> np.ndarray:
        nonlocal calls
        calls += 1
        if poison and box.start == (0, 0, 0):
            raise OSError("bad sector")
        return volume.normalized_image(box)

    run = open_run(model, volume, tmp_path, read, tries=2)
    predict_missing(run)
    parked = run.markers.read_failed_blocks()
    assert parked
    assert all(p["error"] == "bad sector" and p["tries"] == 2 for p in parked)
    assert any("in read" in line for line in parked[0]["traceback"])
    assert calls == len(run.tiling.list_blocks(volume.shape)) + len(parked)  # a second try for those only
    before, poison = calls, False
    predict_missing(run)
    assert not run.markers.read_failed_blocks()
    assert calls - before == len(parked)  # only the failed ones ran again


def _scene() -> np.ndarray:
    """One bright and one dim place in the dark."""
    image = np.zeros((8, 160, 160), np.float32)
    image[2:5, 4:28, 4:28] = 0.9
    image[2:5, 132:156, 132:156] = 0.02
    return image


@pytest.mark.parametrize(("level", "dark"), [(0.0, 0.0), (0.05, 0.02), (None, -1.0)])
def test_empty_blocks_are_skipped_and_the_rule_is_recorded(
    model: Path, tmp_path: Path, level: float | None, dark: float
) -> None:
    image = _scene()
    run = open_run(model, ArrayVolume(image), tmp_path, empty=EmptyRule(level, 0))
    progress = predict_missing(run)
    blocks = run.tiling.list_blocks(image.shape)
    marks = list(run.markers.read_all(blocks))
    assert len(marks) == len(blocks) == 25
    predicted = [block for block, mark in zip(blocks, marks, strict=True) if not mark.skipped]
    assert progress.done == progress.total == sum(map(run.tiling.count_windows, predicted))
    for block, mark in zip(blocks, marks, strict=True):
        assert (mark.skipped is not None) == (image[block.read.slices].max() <= dark)
        if mark.skipped is not None:
            assert mark.skipped.level == level
            assert mark.skipped.brightest == pytest.approx(0 if level == 0 else mark.skipped.brightest)
            assert not probability(tmp_path, "a")[block.write.slices].any()


def test_a_rule_that_loses_something_is_found_out(model: Path, tmp_path: Path) -> None:
    """With the level above the neurite every block would be skipped; the proof on all of them says so."""
    image = _scene()
    run = open_run(model, ArrayVolume(image), tmp_path, empty=EmptyRule(0.95, 1))
    predict_missing(run)
    blocks = run.tiling.list_blocks(image.shape)
    proofs = [m for m in run.markers.read_all(blocks) if m.proof]
    assert proofs
    assert all((m.foreground > 0) == m.contradicts_rule for m in proofs)
    bright = [b.index for b in blocks if image[b.read.slices].max() > 0]
    assert {m.index for m in proofs} == set(bright)  # black blocks need no proof


def test_cells_set_a_thin_neurite_off_from_noise() -> None:
    draw = np.random.default_rng(0)
    noise = np.clip(draw.normal(0.05, 0.05, (31, 64, 65)), 0, 1).astype(np.float32)
    line = noise.copy()
    line[15, 30, :] = 0.8
    assert brightest_cell(noise, (2, 4, 4)) < 0.12 < noise.max() < 0.4
    assert brightest_cell(line, (2, 4, 4)) > 0.12
    cells = noise[:30, :, :64].reshape(15, 2, 16, 4, 16, 4).mean((1, 3, 5))
    assert brightest_cell(noise[:30, :, :64], (2, 4, 4)) == pytest.approx(float(cells.max()), rel=1e-5)
    assert brightest_cell(noise, (1, 1, 1)) == pytest.approx(float(noise.max()))


def test_a_volume_of_one_block_shows_progress(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_PER_LINE", 0.0)
    image = np.random.default_rng(0).random((8, 32, 64)).astype(np.float32)
    with caplog.at_level(logging.INFO, logger="hpc_neuro"):
        progress = predict_missing(open_run(model, ArrayVolume(image[:, :, :32]), tmp_path))
        assert progress.total == 1
        progress = predict_missing(open_run(model, ArrayVolume(image), tmp_path / "two"))
    lines = [r.getMessage() for r in caplog.records if "windows/s" in r.getMessage()]
    assert len(lines) == 1 + progress.total
    assert lines[-1].startswith(f"a: {progress.total}/{progress.total} windows")
    assert "(0 s left)" in lines[-1]


def test_the_finish_is_foretold_from_the_rate() -> None:
    progress = progress_module.WindowProgress("cell", 100, show=False)
    progress.advance(30)
    progress.skip(20)
    assert "30/80 windows, 3 windows/s" in progress.describe(10.0)
    assert "(17 s left)" in progress.describe(10.0)


def test_shares_are_of_equal_cost_and_cover_all(model: Path) -> None:
    plan = Tiling(WINDOW, 0.5, (4, 16, 16), (8, 32, 32), (4, 16, 16))
    blocks = plan.list_blocks((20, 200, 170))
    parts = [plan.take_share(blocks, (i, 3)) for i in range(3)]
    assert sorted(b.index for part in parts for b in part) == [b.index for b in blocks]
    costs = [sum(map(plan.count_windows, part)) for part in parts]
    assert max(costs) - min(costs) <= max(map(plan.count_windows, blocks))


def test_who_is_tried_when_by_deaths_and_a_stop_in_good_order_is_none(model: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((8, 64, 64)).astype(np.float32)

    class Stop(BaseException):
        pass

    def read(box: Box) -> np.ndarray:
        if box.stop == (8, 64, 64) and box.start[2] > 0 and box.start[1] > 0:
            raise Stop
        return image[box.slices]

    run = open_run(model, ArrayVolume(image), tmp_path, read)
    with pytest.raises(Stop):
        predict_missing(run)
    assert not list_all_begun(tmp_path)
    blocks = run.tiling.list_blocks(image.shape)
    for deaths, block in enumerate(blocks):
        for _ in range(deaths):
            run.markers.begin(name_block(block.index))
    fresh, suspects, last = group_by_deaths(blocks[:3], lambda b: run.markers.count_deaths(name_block(b.index)), 3)
    assert [b.index for b in (*fresh, *suspects, *last)] == [b.index for b in blocks[:3]]
    assert len(fresh) == len(suspects) == len(last) == 1
