"""Places that cannot be used, for commands that write or read there: one sentence, exit code 2, nothing beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro.cli import main
from hpc_neuro.core import run_folder
from launch.__main__ import main as launch

TREE = "1 3 4 8 4 1 -1\n2 3 16 8 4 1 1\n3 3 27 8 4 1 2\n"
ONE_PAIR = ["images=DATA", "voxel_size=[1,1,1]", "misaligned=warn"]

COMMANDS: dict[str, list[str]] = {
    "prepare": ["prepare", *ONE_PAIR, "out=PLACE"],
    "trace": ["trace", "DATA/n1.tif", "model=none", "out=PLACE"],
    "swc fix": ["swc", "fix", "DATA/n1.swc", "out=PLACE"],
    "swc convert": ["swc", "convert", "DATA/n1.swc", "voxel_size=1,1,1", "out=PLACE"],
    "info": ["info", "DATA/n1.tif", "picture=PLACE.png"],
    "launch": ["launch", "prepare", *ONE_PAIR, "out=PLACE", "--on", "local"],
    "launch status": ["launch", "status", "PLACE"],
    "launch logs": ["launch", "logs", "PLACE"],
    "launch cancel": ["launch", "cancel", "PLACE"],
    "history": ["history", "PLACE"],
    "runs": ["runs", "PLACE"],
}


def link_in_circles(folder: Path) -> Path:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a" / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file" / "out"


def name_too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


def path_too_long(folder: Path) -> Path:
    return folder.joinpath(*["y" * 200] * 25)


@pytest.mark.parametrize("make", [link_in_circles, below_a_file, name_too_long, path_too_long])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_used(
    command: str, make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    image = np.random.default_rng(0).integers(0, 30, (8, 32, 32), dtype=np.uint8)
    image[4, 8:10, 4:28] = 220
    tifffile.imwrite(data / "n1.tif", image, metadata={"axes": "ZYX"})
    (data / "n1.swc").write_text(TREE)
    (tmp_path / "work").mkdir()
    place = make(tmp_path / "work")
    before = sorted((tmp_path / "work").iterdir())

    words = [word.replace("DATA", str(data)).replace("PLACE", str(place)) for word in COMMANDS[command]]
    code = launch(words[1:]) if words[0] == "launch" else main(words)
    captured = capsys.readouterr()
    assert code == 2, captured.out + captured.err
    assert "Traceback" not in captured.err
    assert sorted((tmp_path / "work").iterdir()) == before


def test_links_that_are_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice: with links that lead somewhere, the same command works."""
    place = link_in_circles(tmp_path)
    (tmp_path / "n1.swc").write_text(TREE)
    words = ["swc", "fix", str(tmp_path / "n1.swc"), f"out={place}"]
    assert main(words) == 2
    assert "links" in capsys.readouterr().err
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    assert main(words) == 0


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    """The kernel's error of a write names no file: the limit on the size of files, a full disk, a quota."""
    code = "import sys; from hpc_neuro.cli import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "n1.swc").write_text("1 3 0 0 0 1 -1\n" + "".join(f"{n} 3 {n} 0 0 1 {n - 1}\n" for n in range(2, 500)))
    words = [sys.executable, "-c", code, "swc", "fix", str(tmp_path / "n1.swc"), f"out={tmp_path / 'out'}"]
    limited = ["bash", "-c", 'ulimit -f 2; exec "$@"', "bash", *words]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path / 'out' / 'n1.fixed.swc'}: the file would be larger" in done.stderr
    assert not list((tmp_path / "out").iterdir())
    assert subprocess.run(words, capture_output=True, check=False, timeout=120).returncode == 0


def test_a_checkout_is_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the code is asked of git without its locks, which a killed process would leave behind."""
    commands: list[list[str]] = []

    def answer(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(words)
        return subprocess.CompletedProcess(words, 0, stdout="abc", stderr="")

    monkeypatch.setattr(run_folder.subprocess, "run", answer)
    run_folder.code_version.__wrapped__()
    assert all("--no-optional-locks" in words for words in commands)
    # An installed package has no checkout to ask.
    assert len(commands) == 2 or not (Path(run_folder.__file__).parents[2] / ".git").exists()
