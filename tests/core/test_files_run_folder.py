"""Atomic files and the run folder."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.schema import ConfigError, InputError, config


@config
class Cfg:
    """A config for tests."""

    out: Path
    steps: int = 1
    data: str = "a"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "f.txt"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.atomic(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_was_written_for_the_owner_alone_becomes_what_the_umask_allows(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with files.atomic(tmp_path / "folder") as part:
            part.mkdir()
            save_file({"a": torch.zeros(1)}, part / "weights.safetensors")
            (part / "run.sh").touch(0o755)
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "weights.safetensors").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder" / "run.sh").stat().st_mode & 0o777 == 0o755 & ~umask
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "d"
    for content in ("one", "two"):
        with files.atomic(target) as part:
            part.mkdir()
            (part / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["two"]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "precious").write_text("years of work")
    with pytest.raises(InputError, match="d is a folder; give the name of a file"):
        files.write_text(tmp_path / "d", "text")
    with pytest.raises(InputError, match="precious is not a folder and cannot become one"):
        files.write_text(tmp_path / "d" / "precious" / "f", "text")
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "precious"]


def test_space_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are free there; make room"):
        files.require_space(tmp_path / "new", 10**18, "the store")
    assert not (tmp_path / "new").exists()


def test_folder_hash_depends_on_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = files.sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = files.sha256(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, files.sha256(tmp_path)}) == 3


def test_a_run_is_recorded_resumed_and_then_complete(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "in.txt"
    source.write_text("x")
    with pytest.raises(KeyError), run_folder.start("train", Cfg(out=out), out, {"in": source}) as run:
        logging.getLogger("hpc_neuro").warning("hello")
        raise KeyError("boom")
    record = json.loads((out / "run.json").read_text())
    assert (record["exit"], record["stops"]) == ("KeyError: 'boom'", [])
    first_end = record["end"]
    assert "hello" in (out / "log.txt").read_text()
    with run_folder.start("train", Cfg(out=out), out, {"in": source}) as run:
        assert not run.complete
        run.finish({"dice": 1})
    record = json.loads((out / "run.json").read_text())
    assert (record["exit"], len(record["starts"]), record["summary"]) == (0, 2, {"dice": 1})
    assert record["stops"] == [first_end]
    with run_folder.start("train", Cfg(out=out), out, {"in": source}) as run:
        assert run.complete
    with run_folder.start("train", Cfg(out=out), out, {"in": source}, whole=False) as run:
        assert not run.complete


def test_another_config_or_input_or_verb_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_folder.start("train", Cfg(out=out), out, {"in": "digest"}) as run:
        run.finish()
    with pytest.raises(ConfigError, match="data: a -> b"), run_folder.start("train", Cfg(out=out, data="b"), out, {}):
        pass
    with (
        pytest.raises(ConfigError, match="the input in changed"),
        run_folder.start("train", Cfg(out=out), out, {"in": "x"}),
    ):
        pass
    with pytest.raises(ConfigError, match="holds a `train` run"), run_folder.start("infer", Cfg(out=out), out, {}):
        pass
    grown = Cfg(out=out, steps=9)
    with run_folder.start("train", grown, out, {"in": "digest"}, may_change=["steps"]) as run:
        assert not run.complete


def test_a_config_that_no_run_wrote_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with (
        pytest.raises(ConfigError, match=r"config\.yaml is of no run"),
        run_folder.start("train", Cfg(out=tmp_path), tmp_path, {}),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


def test_a_moved_folder_is_still_the_same_run(tmp_path: Path) -> None:
    with run_folder.start("train", Cfg(out=tmp_path / "a"), tmp_path / "a", {}) as run:
        run.finish()
    (tmp_path / "a").rename(tmp_path / "b")
    with run_folder.start("train", Cfg(out=tmp_path / "b"), tmp_path / "b", {}) as run:
        assert run.complete


def test_progress_passes_everything_through() -> None:
    assert list(run_folder.track_progress(range(5), "x")) == [0, 1, 2, 3, 4]
