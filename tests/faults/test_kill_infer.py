"""Ranks of an inference are killed at random; the output is that of a quiet run on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kill_infer import drill
from tests.helpers.journal import list_all_begun


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(("in_parts", "kills"), [(False, 1), (True, 3)])
def test_killed_ranks_leave_the_bytes_of_a_quiet_run(tmp_path: Path, in_parts: bool, kills: int) -> None:
    facts = drill(tmp_path, kills, ranks=2, shape=(16, 100, 100), in_parts=in_parts)
    assert facts["kills"] == kills
    assert facts["equal"]
    assert facts["verified"]
    assert len(list(tmp_path.glob("killed/*.ome.zarr"))) == 2
    assert len(list(tmp_path.glob("killed/swc/*.swc"))) == 4  # there were trees to be killed at
    assert not list_all_begun(tmp_path / "killed") + list(tmp_path.glob("killed/strands"))
