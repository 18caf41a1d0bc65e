"""A whole chain, then the same chain broken at every link: each break must be named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro.cli import main
from hpc_neuro.core import run_folder
from tests.helpers.journal import drop_block, edit_block, open_journal
from tests.test_demo import command, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("history") / "out"
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=280, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["history", str(out)]) == 0
    return out.rename(out.with_name("moved"))  # what a copy lacks must not be found where it was written


@pytest.fixture
def copy(finished_demo: Path, tmp_path: Path) -> Path:
    """A copy to break: its links must lead inside the copy, as the folder was moved whole."""
    shutil.copytree(finished_demo, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_the_chain_is_whole_from_raw_to_metrics(finished_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", str(finished_demo)]) == 0
    output = capsys.readouterr().out
    stages = [line.split()[1].rstrip(":") for line in output.splitlines() if line[:1].isdigit()]
    assert stages == ["raw", "prepare", "precompute", "train", "infer", "evaluate", "demo"]
    assert "the chain is whole" in output
    assert "not compared" not in output
    index = json.loads((finished_demo / "store" / "dataset.json").read_text())
    for volume in index["volumes"].values():
        assert volume["sha256"]["image"][:12] in output
        assert volume["digest"][:12] in output
    for word in ("syn_1.tif", "teacher random", "shards", "checkpoint of step 8", "weights", "1 blocks", "dice 0"):
        assert word in output


def test_a_moved_folder_and_a_file_in_it(copy: Path, finished_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = next((copy / "swc").glob("*[0-9].swc"))
    assert main(["history", str(tree)]) == 0
    output = capsys.readouterr().out
    assert str(finished_demo) not in output
    assert f"asked for: {tree}" in output
    tree.write_text(tree.read_text() + "# one more line\n")
    assert main(["history", str(tree), "quick=true"]) == 3
    assert f"{tree.name} was changed" in capsys.readouterr().out


def test_a_relative_path_and_another_working_folder(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copy.parent)
    assert main(["history", "copy/train", "quick=true"]) == 0
    assert "evaluate" not in capsys.readouterr().out


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    """Another byte in the middle, the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "raw image changed": (lambda c: flip(c / "raw" / "syn_2.tif"), "syn_2.image was changed"),
    "raw tree missing": (lambda c: (c / "raw" / "syn_1.swc").unlink(), "syn_1.swc is missing"),
    "volume missing": (lambda c: first(c / "store", "*.h5").unlink(), "lacks the files of"),
    "volume truncated": (lambda c: os.truncate(first(c / "store", "*.h5"), 999), "cannot be read as HDF5"),
    "index changed": (lambda c: append(c / "store" / "dataset.json"), "dataset.json was changed"),
    "index broken": (lambda c: (c / "store" / "dataset.json").write_text("{"), "dataset.json is not readable JSON"),
    "index of another form": (
        lambda c: (c / "store" / "dataset.json").write_text('{"volumes": null}'),
        "dataset.json is not of the form it was written in",
    ),
    "block mark of another form": (
        lambda c: edit_block(c / "infer", open_journal(c / "infer").list_volumes()[0], "0_0_0", sha256=0),
        "is not of the form it was written in",
    ),
    "store gone": (lambda c: shutil.rmtree(c / "store"), "store is missing"),
    "store written again": (
        lambda c: edit(c / "store" / "dataset.json", '"digest": "', '"digest": "0'),
        "volume syn_1 of",
    ),
    "shard damaged": (lambda c: flip(first(c / "cache", "*.h5")), "does not have the checksum"),
    "shard missing": (lambda c: first(c / "cache", "*.h5").unlink(), "lacks 1 of its"),
    "manifest changed": (
        lambda c: edit(c / "cache" / "manifest.json", '"random_teacher": true', '"random_teacher": false'),
        "the cache's manifest is",
    ),
    "config edited": (lambda c: edit(c / "train" / "config.yaml", "seed: 0", "seed: 1"), "config.yaml was changed"),
    "weights changed": (lambda c: flip(c / "train/weights/best/model.safetensors"), "weights was changed"),
    "weights missing": (lambda c: (c / "train/weights/best/model.safetensors").unlink(), "best weights are missing"),
    "training stopped": (lambda c: edit(c / "train" / "run.json", '"exit": 0', '"exit": 75'), "is not complete"),
    "record gone": (lambda c: (c / "train" / "run.json").unlink(), "train"),
    "block missing": (lambda c: shutil.rmtree(first(c / "infer", "*.ome.zarr/0/c")), "does not have the checksum"),
    "block unmarked": (
        lambda c: drop_block(c / "infer", open_journal(c / "infer").list_volumes()[0]),
        "was never finished",
    ),
    "tree changed": (lambda c: append(first(c / "infer", "swc/*[0-9].swc")), "was changed"),
    "predictions changed": (lambda c: append(c / "infer" / "predictions.json"), "predictions was changed"),
    "metrics edited": (lambda c: edit(c / "evaluate/metrics.json", '"dice": 0.', '"dice": 1.'), "metrics.json"),
    "report swapped": (lambda c: append(c / "report.html"), "report.html was changed"),
    "report missing": (lambda c: (c / "evaluate" / "report.html").unlink(), "report.html is missing"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_link_is_named(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_link, message = BREAKS[name]
    break_link(copy)
    assert main(["history", str(copy)]) == 3
    output = capsys.readouterr().out
    assert message in output.partition(" broken link")[2], output[-2000:]


def test_a_damaged_record_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[]", '{"verb": "infer", "config": 3}', '{"verb": "infer", "config": {"model": 3, "store": []}}'):
        (copy / "infer" / "run.json").write_text(text)
        assert main(["history", str(copy)]) == 2
        assert "infer/run.json" in capsys.readouterr().err


def test_a_run_of_an_unknown_verb_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_folder.start("prepared", {}, tmp_path, {}) as run:
        run.finish({})
    assert main(["history", str(tmp_path)]) == 3
    assert "run.json names 'prepared', which is no verb of this version" in capsys.readouterr().out


def test_a_path_outside_of_any_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", str(tmp_path / "nothing")]) == 2
    assert main(["history", str(tmp_path)]) == 2
    assert "no run.json" in capsys.readouterr().err
    assert main(["history", str(tmp_path), "deep=1"]) == 2
    assert main(["history", "--help"]) == 0
    assert "BROKEN" in capsys.readouterr().out
