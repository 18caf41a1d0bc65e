"""The command line as its user meets it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import cli
from hpc_neuro.core import schema, stop_signals
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.pipeline import VERBS

CONFIGURED = [name for name, verb in VERBS.items() if verb.config]


@pytest.mark.parametrize("name", CONFIGURED)
def test_help_lists_every_key_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert VERBS[name].summary in text
    assert "  out " in text
    undocumented = [line for line in text.splitlines()[2:] if not line.strip()]
    assert not undocumented


@pytest.mark.parametrize("name", CONFIGURED)
def test_plain_help_lists_the_keys_that_people_set(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = VERBS[name]
    keys = [field.key for field in schema.describe(verb.load_config_class())]
    main_keys = verb.main_keys.split()
    assert set(main_keys) <= set(keys)
    assert 10 <= len(main_keys) <= 16
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.splitlines() if line[:2] == "  " and line[2] != " "]
    assert listed == [key for key in keys if key in main_keys]
    assert f"`hpc-neuro {name} --help all` lists every key" in text


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_fault_is_named_at_once_and_nothing_is_written(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([name, "nosuchkey=1", "out=[1,2]"]) == 2
    text = capsys.readouterr().err
    assert "nosuchkey: Unexpected keyword argument" in text
    assert "out: " in text
    assert not list(tmp_path.iterdir())


def test_usage_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in VERBS)
    assert cli.main([]) == 2


def test_an_unknown_verb_and_an_unknown_flag_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "'trian' is not one of the verbs prepare" in capsys.readouterr().err
    assert cli.main(["precompute", "--dryrun"]) == 2
    assert "--dryrun is not a flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EDQUOT, "the quota is used up; make room"),
        (errno.EFBIG, "raise the limit"),
        (errno.EROFS, "read-only; choose another `out`"),
        (errno.EACCES, "no permission; choose another `out`"),
        (errno.ENAMETOOLONG, "shorten the id or the path"),
        (errno.EEXIST, "a file has the place of a folder"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_sentence(
    number: int, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number), "store/OP_1.h5")

    monkeypatch.setattr(cli, "_run_verb", refuse)
    assert cli.main(["prepare"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("hpc-neuro prepare: store/OP_1.h5: ")
    assert advice in text
    assert text.count("\n") == 1


def write_pair(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    image = np.random.default_rng(0).integers(0, 50, (8, 32, 32)).astype(np.uint8)
    image[4, 16, 2:30] = 250
    tifffile.imwrite(folder / f"{name}.tif", image)
    (folder / f"{name}.swc").write_text("".join(f"{i} 2 {i + 1} 16 4 1 {i - 1 or -1}\n" for i in range(1, 28)))


def run_prepare(tmp_path: Path, name: str, out: str, before: str) -> subprocess.CompletedProcess[bytes]:
    write_pair(tmp_path / "raw", name)
    keys = f"images='{tmp_path / 'raw'}' out='{tmp_path / out}' voxel_size=[1,1,1] split.val_fraction=0"
    command = f"{before} {sys.executable} -m hpc_neuro prepare {keys} split.test_fraction=0 misaligned=warn"
    return subprocess.run(["bash", "-c", command], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["out is a file", "a part of out is a file", "file size limit", "long id", "not UTF-8"]
)
def test_prepare_where_it_cannot_write(case: str, tmp_path: Path) -> None:
    name, out, before = "n1", "out", ""
    if "out is a file" in case:
        (tmp_path / "file").touch()
        out = "file" if case == "out is a file" else "file/out"
    elif case == "file size limit":
        before = "ulimit -f 8;"
    elif case == "long id":
        name = "n" * 245
    else:
        name = os.fsdecode(b"n\xff1")

    done = run_prepare(tmp_path, name, out, before)
    text = done.stderr.decode(errors="replace")
    assert done.returncode == 2, text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob(".*.part"))


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_io_error(*_: object) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "_run_verb", raise_io_error)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["prepare"])


def test_an_interrupt_says_that_the_same_command_resumes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_verb", interrupt)
    assert cli.main(["train"]) == 75
    assert "the same command resumes" in capsys.readouterr().err


def test_config_errors_reach_the_user(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_config_error(*_: object) -> int:
        raise ConfigError("a: b")

    monkeypatch.setattr(cli, "_run_verb", raise_config_error)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "hpc-neuro train: a: b\n"


def test_doctor_reports_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", "MPI", "HDF5", "Slurm", "disk", "GPU"))
    assert (code == 3) == ("MISSING" in text)
    assert cli.main(["doctor", "x"]) == 2


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_verb_stops_between_two_items_when_it_is_asked_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cfg: object) -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return len(list(stop_signals.until_stopped([1, 2])))

    monkeypatch.setattr(VERBS[name].load_module(), "run", run)
    monkeypatch.setattr(schema, "load", lambda *_: None)
    before = signal.getsignal(signal.SIGUSR1)
    assert cli.main([name]) == 75
    assert signal.getsignal(signal.SIGUSR1) is before
