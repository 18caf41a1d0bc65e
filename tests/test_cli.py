"""The command line as its user meets it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

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


def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_full_disk(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "store/OP_1.h5")

    monkeypatch.setattr(cli, "_run_verb", raise_full_disk)
    assert cli.main(["prepare"]) == 2
    assert "no space left on the disk (store/OP_1.h5)" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_io_error(*_: object) -> int:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(cli, "_run_verb", raise_io_error)
    with pytest.raises(OSError, match="I/O error"):
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
