"""Arrays on a real Slurm: cut to its MaxArraySize, and only what is missing is sent again."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.core.schema import load
from hpc_neuro.infer import InferConfig
from launch import slurm, submit
from launch.site import load_site
from tests.slurm.conftest import wait_all

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_only_missing_shares_run_the_second_time(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = load_site("dev", ["container=env INSIDE=container"])  # words before the command, as of a container
    monkeypatch.setattr(slurm, "read_configuration", lambda: {"MaxArraySize": "3"})
    out, gate = tmp_path / "out", tmp_path / "gate"
    cfg = load(InferConfig, None, ["model=x", "store=y", f"out={out}"])
    # each share leaves a line; odd ones fail until the gate is open
    script = f'echo "$1 $INSIDE" >> {tmp_path}/ran; case "$1" in *[1357],*) test -e {gate};; esac'
    command = ["sh", "-c", script, "share"]
    first = submit.submit_verb("infer", cfg, site, "slurm", [], None, 5, command)
    assert len({job.id.partition("_")[0] for job in first}) == 2  # 5 shares in arrays of at most 3
    assert sorted(wait_all(first).values()) == ["done", "done", "done", "failed", "failed"]
    assert [i for i, _ in submit.find_missing_shares(out, 5)] == [1, 3]
    gate.touch()
    second = submit.submit_verb("infer", cfg, site, "slurm", [], None, 5, command)
    assert [job.share for job in second] == [submit.share_name(1, 5), submit.share_name(3, 5)]
    assert set(wait_all(second).values()) == {"done"}
    ran = (tmp_path / "ran").read_text().splitlines()
    assert sorted(ran) == sorted([f"share=[{i},5] container" for i in (0, 1, 2, 3, 4, 1, 3)])
    assert submit.find_missing_shares(out, 5) == []
