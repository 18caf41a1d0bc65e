"""What an error tells the user to do is done, to the letter, and then the command works."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro.cli import main
from tests.faults.test_damaged_artifacts import cut_file, first, flip, flip_chunk, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def spoil_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{\n", *lines[1:]]))


def tear(path: Path) -> None:
    path.write_text("{")


def remove_line(demo: Path, text: str) -> None:
    number, path = re.findall(r"line (\d+) of (\S+) is no row of metrics; remove that line", text)[0]
    lines = Path(path).read_text().splitlines(keepends=True)
    del lines[int(number) - 1]
    Path(path).write_text("".join(lines))


def remove_path(demo: Path, text: str) -> None:
    path = Path(re.findall(r"remove (/[^\s;,]+)", text)[0])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_and_prepare(demo: Path, text: str) -> None:
    path = re.findall(r"(/\S+) is damaged .*; remove it and give the same `hpc-neuro prepare` again", text)[0]
    Path(path).unlink()
    assert run(demo, "prepare") == 0


def remove_record_and_run(demo: Path, text: str) -> None:
    path = Path(re.findall(r"(/\S+/run.json) .*; remove it and the config.yaml beside it, and run that stage", text)[0])
    config = (path.parent / "config.yaml").rename(demo / "kept.yaml")
    path.unlink()
    assert main([path.parent.name, str(config)]) == 0


def give_again(verb: str) -> Callable[[Path, str], None]:
    def obey(demo: Path, text: str) -> None:
        assert f"`hpc-neuro {verb}`" in text
        assert run(demo, verb) == 0

    return obey


def give_command(demo: Path, text: str) -> None:
    words = shlex.split(re.findall(r"`hpc-neuro ((?:infer|cache) verify [^`]+)`", text)[0])
    assert main(words) == 0


CASES: dict[str, tuple[str, Callable[[Path], None], list[str], Callable[[Path, str], None]]] = {
    "volume flipped": ("store/syn_1.h5", lambda p: flip_chunk(p, "image"), ["train", "out={new}"], remove_and_prepare),
    "volume cut": ("store/syn_1.h5", cut_file, ["train", "out={new}"], give_again("prepare")),
    "index cut": ("store/dataset.json", cut_file, ["train", "out={new}"], give_again("prepare")),
    "index flipped": ("store/dataset.json", flip, ["train", "out={new}"], give_again("prepare")),
    "shard flipped": ("cache/*.h5", lambda p: flip_chunk(p, "features"), ["train", "out={new}"], give_command),
    "shard cut": ("cache/*.h5", cut_file, ["train", "out={new}"], give_command),
    "shard missing": ("cache/*.h5", Path.unlink, ["train", "out={new}"], give_again("precompute")),
    "manifest cut": ("cache/manifest.json", cut_file, ["train", "out={new}"], give_again("precompute")),
    "manifest flipped": ("cache/manifest.json", flip, ["train", "out={new}"], give_again("precompute")),
    "weights flipped": ("train/weights/best/model.safetensors", flip, ["infer", "out={new}"], give_again("train")),
    "student cut": ("train/weights/best/student.yaml", cut_file, ["infer", "out={new}"], give_again("train")),
    "best gone": ("train/weights/best/model.safetensors", Path.unlink, ["infer", "out={new}"], give_again("train")),
    "row torn": ("train/metrics.jsonl", spoil_line, ["train", "optim.steps=9"], remove_line),
    "row torn, read": ("train/metrics.jsonl", spoil_line, ["evaluate", "out={new}"], remove_line),
    "predictions cut": ("infer/predictions.json", cut_file, ["evaluate", "out={new}"], give_again("infer")),
    "predictions flipped": ("infer/predictions.json", flip, ["evaluate", "out={new}"], give_again("infer")),
    "predictions gone": ("infer/predictions.json", Path.unlink, ["evaluate", "out={new}"], give_again("infer")),
    "journal damaged": ("infer/journal/*.log", spoil_line, ["evaluate", "out={new}"], give_command),
    "shard of a result gone": ("infer/*.ome.zarr/0/c/0/0/0", Path.unlink, ["evaluate", "out={new}"], give_command),
    "tree edited": ("infer/swc/*.voxel.swc", cut_file, ["evaluate", "out={new}"], give_command),
    "group torn": ("infer/*.ome.zarr/zarr.json", tear, ["infer", "batch=2"], remove_path),
    "record torn": ("evaluate/run.json", tear, ["evaluate"], remove_path),
    "record of infer torn": ("infer/run.json", tear, ["evaluate", "out={new}"], remove_record_and_run),
    "checkpoint flipped": (
        "train/checkpoints/step_*/rank_00000.safetensors",
        flip,
        ["train", "optim.steps=9"],
        remove_path,
    ),
    "state torn": ("train/checkpoints/step_*/training.json", tear, ["train", "optim.steps=9"], remove_path),
    "marker of a checkpoint torn": (
        "train/checkpoints/step_*/checkpoint.json",
        tear,
        ["train", "optim.steps=9"],
        remove_path,
    ),
}


@pytest.fixture(scope="module")
def whole(damaged_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, by which the demo is made as it was after each case."""
    copy = tmp_path_factory.mktemp("whole") / "out"
    shutil.copytree(damaged_demo, copy, symlinks=True)
    return copy


@pytest.mark.parametrize("name", CASES)
def test_advice_is_obeyed_and_works(
    name: str, damaged_demo: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pattern, damage, words, obey = CASES[name]
    verb, *keys = (word.format(demo=damaged_demo, new=tmp_path / "new") for word in words)
    # The config of a copy, as the advice may remove the folder.
    config = shutil.copy(damaged_demo / verb / "config.yaml", tmp_path)
    command = [verb, str(config), *keys]
    try:
        damage(first(damaged_demo, pattern))
        capfd.readouterr()
        assert main(command) == 2
        text = capfd.readouterr().err
        obey(damaged_demo, text)
        assert main(command) == 0, text
    finally:
        shutil.rmtree(damaged_demo)
        shutil.copytree(whole, damaged_demo, symlinks=True)
