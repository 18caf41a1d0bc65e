"""The whole pipeline on synthetic neurons, killed on the way, and on folders that cannot be used."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import demo
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.data import swc
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from hpc_neuro.models.config import SavedStudent
from hpc_neuro.pipeline import STAGES

SMALL = [
    "teacher.model=random",
    "steps=8",
    "synthetic.volumes=3",
    "synthetic.shape=[16,64,64]",
    "train=[student.depth=1,'crop.size=[8,32,32]',optim.batch=1,optim.lr=0.01,optim.warmup=0.01,ema.window=0,"
    "validate.crops=2,tracker.wandb=disabled]",
    "infer=[trace.threshold=0.15,trace.root_snap=100,'block=[16,64,64]']",
    "evaluate=[draws=100]",
]
PUBLISHED = ("metrics.json", "metrics.csv", "report.html")


def command(out: Path, *keys: str) -> list[str]:
    return [sys.executable, "-m", "hpc_neuro", "demo", f"out={out}", *SMALL, *keys]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=280, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("synthetic", *STAGES):
        assert f"{stage} done in" in done.stderr
    assert "report: " in done.stderr
    assert "Dice of the foreground" in done.stderr
    return out


@pytest.mark.slow
def test_results_are_at_the_top_of_the_folder(finished_demo: Path) -> None:
    (held_out,) = json.loads((finished_demo / "store" / "dataset.json").read_text())["splits"]["test"]
    metrics = json.loads((finished_demo / "metrics.json").read_text())
    keys = {"dice", "cldice", "hd95_um", "precision_4vox", "recall_4vox", "f1_4vox", "esa", "dsa", "pds"}
    keys |= {"length_um", "tips", "branch_points"}
    for method in ("model", "otsu"):
        assert keys <= metrics["volumes"][held_out][method].keys()
        assert keys <= metrics["mean"][method].keys()
    assert len(swc.read(finished_demo / "swc" / f"{held_out}.swc"))
    assert len(swc.read(finished_demo / "swc" / f"{held_out}.voxel.swc"))
    assert (finished_demo / f"{held_out}.ome.zarr" / "zarr.json").exists()
    assert "random weights" in (finished_demo / "report.html").read_text()
    for stage in ("store", "cache", "train", "infer", "evaluate"):
        record = json.loads((finished_demo / stage / "run.json").read_text())
        assert record["exit"] == 0
        assert (finished_demo / stage / "config.yaml").exists()
        assert (finished_demo / stage / "log.txt").stat().st_size


@pytest.mark.slow
def test_a_second_call_says_complete_and_changes_nothing(finished_demo: Path) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in finished_demo.rglob("*") if p.is_file()}
    done = subprocess.run(command(finished_demo), capture_output=True, text=True, env=environment(), check=True)
    assert "already complete" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished_demo.rglob("*") if p.is_file()} == stamps


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_every_stage_it_ends_with_the_same_result(finished_demo: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment of each stage; the same command goes on."""
    rng, out = random.Random(1), tmp_path / "out"
    for stage in ("store", "cache", "train", "infer", "evaluate"):
        process = subprocess.Popen(command(out), stderr=subprocess.DEVNULL, env=environment())
        while not (out / stage / "run.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(out), check=True, capture_output=True, timeout=280, env=environment())
    for name in ("metrics.csv",):
        assert (out / name).read_bytes() == (finished_demo / name).read_bytes()
    for tree in (finished_demo / "swc").rglob("*.voxel.swc"):
        resumed, expected = (swc.read(p) for p in (out / tree.relative_to(finished_demo), tree))
        assert np.array_equal(resumed.points, expected.points)
    for file in ("store/syn_1.h5", "train/weights/last/model.safetensors"):
        assert (out / file).read_bytes() == (finished_demo / file).read_bytes()
    assert not list(out.rglob(".*.part"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "raw"
    write_dataset(folder, SyntheticConfig(volumes=3, shape=(16, 48, 48)))
    return folder


@pytest.mark.slow
def test_settings_of_evaluate_decide_what_is_printed(pairs: Path, tmp_path: Path) -> None:
    """Another tolerance, no Otsu; and of the user's own neurons, five stages run."""
    keys = [f"data={pairs}", "evaluate=[tolerance_vox=2,otsu=false,draws=100]"]
    small = [key for key in SMALL if not key.startswith(("synthetic.", "evaluate="))]
    done = subprocess.run(
        [sys.executable, "-m", "hpc_neuro", "demo", f"out={tmp_path / 'out'}", *small, *keys],
        capture_output=True, text=True, timeout=280, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for number, stage in enumerate(STAGES, start=1):
        assert f"[{number}/5] {stage} done in" in done.stderr
    assert "F1 of the tree at 2 voxels" in done.stderr
    assert "Otsu" not in done.stderr
    summary = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]
    assert set(summary) == {"model", "seconds"}
    assert set(summary["model"]) == {"dice", "f1_2vox", "esa", "hd95_um"}


@pytest.mark.slow
def test_the_demo_goes_on_from_a_trained_student(finished_demo: Path, pairs: Path, tmp_path: Path) -> None:
    """Its form and its crops come from there, and no teacher takes part."""
    keys = [f"data={pairs}", f"init={finished_demo}/train", "steps=3"]
    keys += ["train=[validate.crops=2,tracker.wandb=disabled]", *(key for key in SMALL if key.startswith("infer="))]
    done = subprocess.run(
        [sys.executable, "-m", "hpc_neuro", "demo", f"out={tmp_path / 'out'}", *keys, "evaluate=[draws=100]"],
        capture_output=True, text=True, timeout=280, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[4/4] evaluate done" in done.stderr
    assert "tensors come from" in done.stderr
    assert not (tmp_path / "out" / "cache").exists()

    first, second = (
        folder / "train" / "weights" / "best" / "student.yaml" for folder in (finished_demo, tmp_path / "out")
    )
    forms = [load(SavedStudent, path) for path in (first, second)]
    assert forms[0].student == forms[1].student
    assert forms[0].extra["window"] == forms[1].extra["window"] == [8, 32, 32]


@pytest.mark.parametrize(
    ("keys", "f1", "methods"),
    [
        ([], "f1_4vox", ["model", "otsu"]),
        (["tolerance_vox=2"], "f1_2vox", ["model", "otsu"]),
        (["tolerance_vox=1.5", "otsu=false"], "f1_1.5vox", ["model"]),
    ],
)
def test_the_closing_table_has_the_metrics_that_were_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: list[str], f1: str, methods: list[str]
) -> None:
    cfg = load(demo.DemoConfig, None, [f"out={tmp_path}", f"evaluate={json.dumps(keys)}"])
    mean = {method: {"dice": 0.8, f1: 0.9, "esa": 1.0, "hd95_um": 2.0} for method in methods}
    (tmp_path / "metrics.json").write_text(json.dumps({"volumes": {}, "mean": mean}))
    with caplog.at_level("INFO", "hpc_neuro"):
        demo._log_result(cfg)
    rows = [record.getMessage().split() for record in caplog.records]
    values = [row[-len(methods) :] for row in rows[1:5]]
    assert values == [[value] * len(methods) for value in ("0.800", "0.900", "1.000", "2.000")]
    assert ("Otsu" in caplog.text) == ("otsu" in methods)


def drop_image(folder: Path) -> None:
    (folder / "syn_1.tif").unlink()


def drop_swc(folder: Path) -> None:
    (folder / "syn_1.swc").unlink()


def drop_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def make_flat(folder: Path) -> None:
    tifffile.imwrite(folder / "syn_1.tif", np.arange(48 * 48, dtype=np.uint8).reshape(48, 48))


def make_constant(folder: Path) -> None:
    tifffile.imwrite(folder / "syn_1.tif", np.full((16, 48, 48), 7, np.uint8), photometric="minisblack")


def drop_trees(folder: Path) -> None:
    for path in folder.glob("*.swc"):
        path.unlink()


def add_nan(folder: Path) -> None:
    image = np.random.default_rng(0).random((16, 48, 48), dtype=np.float32)
    image[3, 4, 5] = np.nan
    tifffile.imwrite(folder / "syn_1.tif", image, photometric="minisblack")


def move_tree_outside(folder: Path) -> None:
    (folder / "syn_1.swc").write_text("1 2 400 400 4 1 -1\n2 2 410 400 4 1 1\n")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (drop_image, "syn_1"),
        (drop_swc, "syn_1"),
        (drop_all, "raw"),
        (drop_trees, r"holds no SWC tree; .* hpc-neuro trace \S+raw$"),
        (make_flat, "3D"),
        (move_tree_outside, "outside"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    pairs: Path, tmp_path: Path, damage: Callable[[Path], None], word: str
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(pairs, folder)
    damage(folder)
    cfg = load(demo.DemoConfig, None, [f"data={folder}", f"out={tmp_path / 'out'}", *SMALL])
    with pytest.raises((InputError, ConfigError), match=word):
        demo.run(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "word"), [(make_constant, "every voxel is 7"), (add_nan, "NaN")])
def test_an_image_that_cannot_be_used_is_left_out_and_named(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], word: str
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(pairs, folder)
    damage(folder)
    small = [key for key in SMALL if not key.startswith("synthetic.")]
    assert demo.run(load(demo.DemoConfig, None, [f"data={folder}", f"out={tmp_path / 'out'}", *small])) == 3
    assert word in caplog.text
    assert "syn_1.tif" in caplog.text
    # The others are trained on, and the one held out is scored.
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())["volumes"]) == {"syn_3"}


def test_trees_of_others_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "swc").mkdir()
    (tmp_path / "swc" / "mine.swc").write_text("1 2 0 0 0 1 -1\n")
    with pytest.raises(InputError, match="swc exists, but no demo wrote it"):
        demo.run(load(demo.DemoConfig, None, [f"out={tmp_path}"]))
    assert [p.name for p in tmp_path.rglob("*")] == ["swc", "mine.swc"]


def test_the_exit_code_of_a_stage_that_stops_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_run_stage", lambda *arguments: 75)
    assert demo.run(demo.DemoConfig(out=tmp_path)) == 75
    assert json.loads((tmp_path / "run.json").read_text())["exit"] == 75


def test_faulty_keys_of_every_stage_come_at_once_before_the_first(tmp_path: Path) -> None:
    keys = ["prepare=[radus=1]", "precompute=[views=q]", "train=[optim.lrr=1]", "infer=[blok=1]", "evaluate=[draw=1]"]
    cfg = load(demo.DemoConfig, None, [f"out={tmp_path / 'out'}", *keys])
    with pytest.raises(ConfigError, match=r"(?s)radus.*views.*optim\.lrr.*blok.*draw"):
        demo.run(cfg)
    assert not (tmp_path / "out").exists()


def test_voxel_size_and_channel_hold_for_the_images_of_data(tmp_path: Path) -> None:
    cfg = load(demo.DemoConfig, None, [f"data={tmp_path}", "voxel_size=1,0.3,0.2", "channel=1"])
    prepare = demo.stage_config(cfg, "prepare", tmp_path)
    assert (prepare.voxel_size, prepare.channel) == ((1.0, 0.3, 0.2), 1)

    # What is written in the stage's own list is more special.
    cfg = load(demo.DemoConfig, None, [f"data={tmp_path}", "channel=1", "prepare=[channel=0]"])
    assert demo.stage_config(cfg, "prepare", tmp_path).channel == 0

    with pytest.raises(ConfigError, match="give their folder with data=FOLDER"):
        load(demo.DemoConfig, None, ["voxel_size=1,1,1"])


def test_a_folder_that_has_changed_is_no_longer_the_same_demo(pairs: Path, tmp_path: Path) -> None:
    pairs = shutil.copytree(pairs, tmp_path / "pairs")
    before = demo.digest_pairs(pairs)
    assert demo.digest_pairs(pairs) == before
    tree = next(pairs.glob("*.swc"))
    tree.write_text(tree.read_text() + "# mended\n")
    changed = demo.digest_pairs(pairs)
    shutil.copy(tree, pairs / "new.swc")
    assert len({before, changed, demo.digest_pairs(pairs)}) == 3


def test_the_forecast_names_the_stages_and_the_steps_of_training(pairs: Path, tmp_path: Path) -> None:
    keys = [f"data={pairs}", f"out={tmp_path / 'out'}", "steps=7"]
    last = demo.forecast(load(demo.DemoConfig, None, keys))[-1]
    assert last.startswith(
        "then precompute, train, infer, evaluate; train does 7 steps of 4 crops of 16 x 96 x 96 voxels"
    )
    assert not (tmp_path / "out").exists()


def test_the_held_out_neurons_are_chosen_as_documented(tmp_path: Path) -> None:
    for number in (1, 2, 3, 6, 7, 9, 10):
        (tmp_path / f"OP_{number}.swc").touch()
    cfg = load(demo.DemoConfig, None, [f"data={tmp_path}"])
    assert demo.choose_held_out(cfg, tmp_path) == ["OP_6"]
    for number in (9, 10):
        (tmp_path / f"OP_{number}.swc").unlink()
    assert demo.choose_held_out(load(demo.DemoConfig, None, [f"data={tmp_path}", "test=[OP_3]"]), tmp_path) == ["OP_3"]
    with pytest.raises(ConfigError, match=r"has no OP_8.swc"):
        demo.choose_held_out(load(demo.DemoConfig, None, [f"data={tmp_path}", "test=[OP_8]"]), tmp_path)
