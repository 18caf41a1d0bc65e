"""`hpc-neuro runs`: rows from real records, whatever state the run is in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_neuro.cli import main
from hpc_neuro.core import run_folder
from hpc_neuro.core.schema import config
from hpc_neuro.runs import RunRow, read_row, render_page, sort_rows
from tests.helpers.browser import measure_excess


@config
class Checkpoint:
    """Section of `Settings`."""

    metric: str = "dice_best"


@config
class Settings:
    """What `runs` reads of the config of a training."""

    out: Path
    checkpoint: Checkpoint = Checkpoint()


@contextlib.contextmanager
def start(verb: str, out: Path, **arguments: Any) -> Iterator[run_folder.Run]:
    with run_folder.start(verb, Settings(out=out), out, {}, **arguments) as run:
        yield run


def finish(verb: str, out: Path, *arguments: Any) -> Path:
    with start(verb, out) as run:
        run.finish(*arguments)
    return out


def write_validations(out: Path, *scores: float | None) -> None:
    """One validation every 100 steps, from step 0 on, between the rows of training steps."""
    rows = [
        row
        for step, score in enumerate(scores)
        for row in (
            {"step": 100 * step, "kind": "val", "dice": 0.1, "dice_best": score},
            {"step": 100 * step + 1, "kind": "train", "dice_best": 0.99},
        )
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')


def list_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    main(["runs", *arguments, "--json"])
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `runs` in the working folder: trainings a and b, an evaluation and a stopped `infer`."""
    for name, scores in (("a", (0.9, 0.5, 0.7, 0.6)), ("b", (0.1, 0.8, None, 0.8))):
        write_validations(finish("train", tmp_path / "runs" / name, {"steps": 300}), *scores)

    means = {"model": {"dice": 0.6, "f1_3vox": 0.9, "f1_3vox_no_stub": 0.95}, "otsu": {"dice": 0.99}}
    finish("evaluate", tmp_path / "runs" / "c" / "evaluate", {"volumes": 2, "mean": means})
    with pytest.raises(SystemExit), start("infer", tmp_path / "runs" / "c" / "infer"):
        raise SystemExit(75)

    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_a_table_with_aligned_columns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--sort", "path"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "runs/a",
        "runs/b",
        "runs/c/evaluate",
        "runs/c/infer",
    ]
    assert [line[head.index("state") :].split()[0] for line in lines] == ["complete"] * 3 + ["stopped"]
    assert "validation Dice 0.7000, step 200" in lines[0]
    assert "Dice 0.6000, F1 0.9000" in lines[2]
    assert lines[3].endswith("by a signal or the time limit")
    assert all(run_folder.code_version() in line for line in lines)


def test_the_best_validation_is_that_of_the_metric_of_the_config(runs: Path) -> None:
    # Step 0 is the untrained student; of equal scores the first one counts.
    assert read_row(runs / "a").metrics == {"val_dice": 0.7, "step": 200}
    assert read_row(runs / "b").metrics == {"val_dice": 0.8, "step": 100}
    record = json.loads((runs / "a" / "run.json").read_text())
    record["config"]["checkpoint"]["metric"] = "dice"
    (runs / "a" / "run.json").write_text(json.dumps(record))
    assert read_row(runs / "a").metrics == {"val_dice": 0.1, "step": 100}


@pytest.mark.parametrize(
    ("verb", "summary", "metrics"),
    [
        ("demo", {"model": {"dice": 0.7, "f1_4vox": 1}, "otsu": {"dice": 0.8}, "seconds": 3}, {"dice": 0.7, "f1": 1.0}),
        ("infer", {"volumes": 2, "seconds": 4.5}, {"volumes": 2}),
        ("search", {"done": 3, "failed": 0}, {"done": 3, "failed": 0}),
        ("evaluate", {"mean": [3], "volumes": True}, {}),
        ("evaluate", {"mean": {"model": {"dice": None}}}, {}),
        ("train", {}, {}),
    ],
)
def test_scores_and_counts(tmp_path: Path, verb: str, summary: dict[str, Any], metrics: dict[str, float]) -> None:
    assert read_row(finish(verb, tmp_path, summary)).metrics == metrics


def test_filters(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list_json(capsys, "--verb", "train", "--verb", "infer", "--sort", "path")
    assert [row["path"] for row in rows] == ["runs/a", "runs/b", "runs/c/infer"]
    assert [row["path"] for row in list_json(capsys, "--state", "stopped")] == ["runs/c/infer"]
    assert [row["verb"] for row in list_json(capsys, "runs/c", "--state", "complete", "runs")].count("evaluate") == 1
    assert list_json(capsys, "--verb", "prepare") == []
    assert main(["runs", "--verb", "prepare"]) == 0
    assert capsys.readouterr().out == "no runs to list\n"


def test_the_best_run_is_first_and_runs_without_scores_are_last(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list_json(capsys, "--sort", "best")
    assert [row["path"] for row in rows] == ["runs/b", "runs/a", "runs/c/evaluate", "runs/c/infer"]


def test_rows_in_every_order() -> None:
    rows = [
        RunRow("run_10", "train", "stopped", hours=0.5, date="2026-11-02", code="b"),
        RunRow("run_2", "infer", "complete", date="2026-11-03"),
        RunRow("run_1", "infer", "failed", hours=2.0, code="a"),
    ]
    orders = {key: [row.path[4:] for row in sort_rows(rows, key)] for key in ("date", "hours", "verb", "state", "code")}
    assert orders == {
        "date": ["2", "10", "1"],
        "hours": ["1", "10", "2"],
        "verb": ["1", "2", "10"],
        "state": ["2", "1", "10"],
        "code": ["1", "10", "2"],
    }
    assert [row.path for row in sort_rows(rows, "path")] == ["run_1", "run_2", "run_10"]


def test_states(tmp_path: Path) -> None:
    with start("infer", tmp_path / "at_work"):
        row = read_row(tmp_path / "at_work")
        assert (row.state, row.hours is not None) == ("running", True)
        assert f"process {os.getpid()}" in row.note
        # What a kill leaves: a record without an end, and the lock of a process that is gone.
        shutil.copytree(tmp_path / "at_work", tmp_path / "killed", ignore=shutil.ignore_patterns("run.lock"))
    row = read_row(tmp_path / "at_work")
    assert (row.state, row.note) == ("failed", "ended before it was finished; log.txt says why")
    row = read_row(tmp_path / "killed")
    assert (row.state, row.note, row.hours) == ("stopped", "killed: no end is recorded", None)

    for name, error in (("ctrl_c", KeyboardInterrupt()), ("bug", KeyError("x\ny")), ("exit", SystemExit(71))):
        with pytest.raises(type(error)), start("infer", tmp_path / name):
            raise error
    assert read_row(tmp_path / "ctrl_c").state == "stopped"
    assert (read_row(tmp_path / "bug").state, read_row(tmp_path / "bug").note) == ("failed", "KeyError: 'x\\ny'")
    assert (read_row(tmp_path / "exit").state, read_row(tmp_path / "exit").note) == ("failed", "exit code 71")

    row = read_row(finish("infer", tmp_path / "listed", {"volumes": 1}, ["brain: no root", "x"]))
    assert (row.state, row.note) == ("failed", "2 failures, the first: brain: no root")


def test_hours_are_the_sum_over_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 h, then 2 h, with three hours between them.
    times = (f"2026-11-30T{hour:02d}:00:00+00:00" for hour in (1, 2, 5, 7))
    monkeypatch.setattr(run_folder, "_now", lambda: next(times))
    with pytest.raises(KeyError), start("infer", tmp_path):
        raise KeyError
    finish("infer", tmp_path)
    row = read_row(tmp_path)
    assert (row.hours, row.has_all_hours, row.starts) == (3.0, True, 2)
    assert row.date == "2026-11-30T05:00:00+00:00"


def test_gpu_hours_count_the_gpus_of_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 h on four GPUs, then 2 h on two.
    times = (f"2026-11-30T{hour:02d}:00:00+00:00" for hour in (1, 2, 5, 7))
    gpus = iter((4, 2))
    monkeypatch.setattr(run_folder, "_now", lambda: next(times))
    monkeypatch.setattr(run_folder, "count_gpus", lambda: next(gpus))
    with pytest.raises(KeyError), start("infer", tmp_path):
        raise KeyError
    finish("infer", tmp_path)
    assert read_row(tmp_path).gpu_hours == 8.0

    # A record of a version that did not count them.
    record = json.loads((tmp_path / "run.json").read_text())
    del record["gpus"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_row(tmp_path).gpu_hours is None
    assert read_row(tmp_path).hours == 3.0


def test_hours_of_a_start_that_was_killed_are_said_to_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = (f"2026-11-30T{hour:02d}:00:00+00:00" for hour in (1, 2, 5, 7))
    monkeypatch.setattr(run_folder, "_now", lambda: next(times))
    with start("infer", tmp_path / "first"):
        shutil.copytree(tmp_path / "first", tmp_path / "run", ignore=shutil.ignore_patterns("run.lock"))
    finish("infer", tmp_path / "run")
    row = read_row(tmp_path / "run")
    assert (row.hours, row.has_all_hours, row.starts) == (2.0, False, 2)
    main(["runs", str(tmp_path / "run")])
    assert " 2.00+ " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "is not readable JSON"),
        ('{"verb": "train"}', "is not of the form it was written in (config: field required)"),
        ('{"verb": "train", "config": {}}', "names no checkpoint.metric"),
        ('{"verb": "infer", "config": {}, "starts": ["noon"]}', "holds 'noon' where a time is expected"),
    ],
)
def test_a_broken_record_is_a_row(runs: Path, capsys: pytest.CaptureFixture[str], content: str, fault: str) -> None:
    (runs / "a" / "run.json").write_text(content)
    assert main(["runs", "--verb", "evaluate"]) == 3
    _, whole, broken = capsys.readouterr().out.splitlines()
    assert whole.split()[:2] == ["runs/c/evaluate", "evaluate"]
    assert "broken" in broken
    assert "runs/a" in broken
    assert fault in broken
    assert [row["path"] for row in list_json(capsys, "--state", "broken")] == ["runs/a"]


def test_a_folder_in_the_place_of_a_record_is_a_row(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "a" / "run.json").unlink()
    (runs / "a" / "run.json").mkdir()
    assert main(["runs", "--state", "broken"]) == 3
    assert "runs/a/run.json cannot be read (Is a directory)" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_a_row(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: str) -> Any:
        if path == "runs/c":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["runs"]) == 3
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:2] == ["runs/c", "broken"]
    assert "the folder cannot be read (Permission denied); ask its owner" in line


def test_folders_that_hold_no_other_run_are_not_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish("infer", tmp_path / "one" / "infer")
    # A stage writes millions of files below its folder; volumes and hidden folders hold none of ours.
    for inside in ("one/infer/blocks/x", "one/.cache/x", "one/a.ome.zarr/x"):
        finish("train", tmp_path / inside)
    assert [row["verb"] for row in list_json(capsys, str(tmp_path))] == ["infer"]


def test_trials_and_the_best_run_of_a_study_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish("search", tmp_path)
    for name in ("trials/0000/train", "best"):
        finish("train", tmp_path / name)
    paths = [row["path"] for row in list_json(capsys, str(tmp_path), "--sort", "path")]
    assert paths == [str(tmp_path), str(tmp_path / "best"), str(tmp_path / "trials/0000/train")]


def test_shares_stand_for_their_run_until_they_are_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "infer"
    for share in ((0, 2), (1, 2)):
        finish("infer", run_folder.share_folder(out, share))
    finish("train", out / "blocks" / "x")
    names = [Path(row["path"]).name for row in list_json(capsys, str(tmp_path), "--sort", "path")]
    assert names == ["0000_of_0002", "0001_of_0002"]
    finish("infer", out)
    assert [row["path"] for row in list_json(capsys, str(tmp_path))] == [str(out)]


def test_a_page_with_a_table_that_can_be_sorted(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "b" / "run.json").write_text("{")
    assert main(["runs", "--html", "pages/runs.html", "--sort", "path"]) == 3
    assert "runs/c/evaluate" in capsys.readouterr().out
    page = Path("pages/runs.html").read_text()
    assert '<table class="sortable">' in page
    assert "4 runs: 2 complete, 1 stopped, 1 broken" in page
    assert 'data-value="0.7"' in page
    assert not [word for word in ("http:", "https:", "src=") if word in page.partition("<script>")[0]]


def test_the_page_shows_paths_from_the_common_folder_and_no_empty_column() -> None:
    rows = [RunRow(f"/data/runs/{name}/train", "train", "complete", {"val_dice": 0.5}, 1.0) for name in ("a", "b")]
    page = render_page(rows)
    assert "paths from /data/runs" in page
    assert ">a/train<" in page
    # A machine without GPUs has no hours of them, and runs that ended well have no notes.
    assert "GPU hours" not in page
    assert ">note<" not in page
    assert "GPU hours" in render_page([RunRow("a", "train", "complete", hours=1.0, gpu_hours=2.0)])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 700])
def test_the_table_of_the_page_fits_the_screen(tmp_path: Path, width: int) -> None:
    note = (
        "1 failure, the first: /data/microscope_3/2026/neuron_1.tif: every voxel is 7; check the file and its channel"
    )
    names = ("crossed_neurites", "a_folder_with_a_much_longer_name_than_others")
    paths = [f"/data/lab/runs_of_2026/{name}/precompute" for name in names]
    date = "2026-11-30T20:41:25+00:00"
    rows = [
        RunRow(path, "precompute", "complete", {"volumes": 40}, 10.25, 41.0, True, 12, date, "0.1.0 0123456789ab", note)
        for path in paths
    ]
    tables, page = measure_excess(render_page(rows), width, tmp_path)
    assert max(tables) <= 0
    assert page <= 0


def test_text_in_a_page_is_escaped() -> None:
    assert "<b>" not in render_page([RunRow("<b>", "<b>", "failed", code="<b>", note="<b>")])


def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish("infer", tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / os.fsdecode(b"a\xff"))
    assert main(["runs", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert "a\\xff" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none does not exist; give the folder that holds your runs: hpc-neuro runs FOLDER"),
        (["file"], "file is not a folder"),
        (["--verb", "trian"], "invalid choice: 'trian'"),
        (["--state", "done"], "invalid choice: 'done'"),
        (["--sort", "speed"], "invalid choice: 'speed'"),
        (["--htm", "a.html"], "unrecognized arguments: --htm"),
        (["--html", "runs/a/run.json"], "--html runs/a/run.json is not named as a page"),
    ],
)
def test_bad_input_is_exit_code_2(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("file").touch()
    before = (runs / "a" / "run.json").read_bytes()
    assert main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert (runs / "a" / "run.json").read_bytes() == before


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--verb", "--state", "--sort", "--json", "--html"))
    assert all(state in text for state in ("complete", "running", "stopped", "failed", "broken"))
