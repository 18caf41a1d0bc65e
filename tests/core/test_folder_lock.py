"""One process at a time works in a run folder; a lock whose owner is gone is taken over, and the log says so."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_neuro.core import files, folder_lock, run_folder
from hpc_neuro.core.folder_lock import LOCK, Owner, describe_holder, hold_folder, require_idle
from hpc_neuro.core.schema import InputError, config


@config
class Settings:
    out: Path
    share: tuple[int, int] | None = None


def write_owner(folder: Path, age: float = 0.0, **changes: object) -> Owner:
    """A lock of another process, last touched `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = dataclasses.replace(Owner(), **changes)  # type: ignore[arg-type]
    files.write_json(folder / LOCK, dataclasses.asdict(owner))
    os.utime(folder / LOCK, (time.time() - age,) * 2)
    return owner


def test_the_lock_is_there_while_it_is_held_and_may_be_entered_again(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with hold_folder(out), hold_folder(out):
        assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
    assert not list(out.iterdir())


def test_a_second_process_is_refused_until_the_first_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "import sys, time; from pathlib import Path; from hpc_neuro.core.folder_lock import hold_folder\n"
        "with hold_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        refusal = f"process {first.pid} on .* wait until it ends, or choose another `out`"
        with pytest.raises(InputError, match=refusal), hold_folder(tmp_path):
            pass
        with pytest.raises(InputError, match=f"process {first.pid}"):
            require_idle(tmp_path)
    finally:
        first.kill()
        first.wait()

    assert (tmp_path / LOCK).exists()
    require_idle(tmp_path)
    with hold_folder(tmp_path):
        assert f"taken over from process {first.pid} on" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"started": "1"},  # this process id, of a process before
        {"system": "another boot", "job": "77", "restart": "0"},  # the start before of this Slurm job
    ],
)
def test_an_owner_that_is_known_to_be_gone_is_not_waited_for(
    tmp_path: Path, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 1e9)
    write_owner(tmp_path, **changes)
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["restart"] == "1"


def test_a_process_elsewhere_is_gone_when_it_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_owner(tmp_path, age=61, system="another boot")
    with hold_folder(tmp_path):
        pass

    # It is waited for, and has a sign of life.
    owner = write_owner(tmp_path, age=30, system="another boot", host="node7")
    monkeypatch.setattr(folder_lock.time, "sleep", lambda seconds: os.utime(tmp_path / LOCK))
    with pytest.raises(InputError, match="on node7"), hold_folder(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["token"] == owner.token


def test_the_holder_of_a_folder_is_named_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(folder_lock.time, "sleep")
    assert describe_holder(tmp_path) is None
    with hold_folder(tmp_path):
        assert f"process {os.getpid()} on" in str(describe_holder(tmp_path))

    # Its process has ended, although the lock is young.
    write_owner(tmp_path, started="0")
    assert describe_holder(tmp_path) is None

    # Of a process elsewhere, the age of the lock tells.
    write_owner(tmp_path, age=30, system="another boot", host="node7")
    assert "on node7" in str(describe_holder(tmp_path))
    write_owner(tmp_path, age=61, system="another boot", host="node7")
    assert describe_holder(tmp_path) is None

    (tmp_path / LOCK).write_text("{")
    assert describe_holder(tmp_path) == "a process that left no name"
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_torn_lock_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    os.utime(tmp_path / LOCK, (time.time() - 100,) * 2)
    with hold_folder(tmp_path):
        pass


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    write_owner(tmp_path, system="another boot", age=100)
    with hold_folder(tmp_path):
        pass


def test_runs_and_their_shares(tmp_path: Path) -> None:
    """Shares work beside one another; the run that gathers them, and they while it is at work, are refused."""
    alive = {"pid": os.getppid(), "started": folder_lock._read_start_time(os.getppid())}
    shares = [run_folder.share_folder(tmp_path, (i, 2)) for i in range(2)]
    write_owner(shares[0], **alive)

    cfg = Settings(out=tmp_path)
    with run_folder.start("infer", dataclasses.replace(cfg, share=(1, 2)), shares[1], {}) as run:
        assert not run.complete
    with pytest.raises(InputError, match="0000_of_0002"), run_folder.start("infer", cfg, tmp_path, {}):
        pass

    (shares[0] / LOCK).unlink()
    write_owner(tmp_path, **alive)
    first = run_folder.start("infer", dataclasses.replace(cfg, share=(0, 2)), shares[0], {})
    with pytest.raises(InputError, match="two at once"), first:
        pass


def test_a_place_without_folders_is_refused() -> None:
    with (
        pytest.raises(InputError, match="no folder can be made at /proc/x; give another `out`"),
        hold_folder(Path("/proc/x")),
    ):
        pass


def test_parts_of_people_stay(tmp_path: Path) -> None:
    for name in (".x.part", ".notes.draft.part", ".report.html.0123abcd.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    files.remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.draft.part", ".x.part"]
