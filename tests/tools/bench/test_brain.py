"""The laws that a simulated run obeys."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from tools.bench import brain
from tools.bench.brain import Site, Stage, UnitCosts, make_shape, parse_time, plan_brain, simulate

STARTUP = (10.0, 100.0)


def make_stages() -> list[Stage]:
    seconds = np.random.default_rng(0).uniform(5, 50, 400)
    return [Stage("blocks", seconds, 35, 900), Stage("files", np.array([60.0]), 10, 3, is_serial=True)]


@pytest.mark.parametrize("limit", [np.inf, 600.0])
def test_more_ranks_are_not_slower_and_the_serial_share_grows(limit: float) -> None:
    outcomes = [simulate(make_stages(), Site(ranks, limit, queue=30.0), STARTUP) for ranks in (1, 2, 8, 64, 512)]
    walls = [outcome.wall for outcome in outcomes]
    assert walls == sorted(walls, reverse=True)
    shares = [outcome.serial / outcome.allocated for outcome in outcomes if outcome.starts == 1]
    assert shares == sorted(shares)
    assert walls[-1] >= 10 + 50 + 60, "no number of ranks shortens one task, nor what one rank does"


def test_one_rank_takes_the_sum_of_all_tasks() -> None:
    outcome = simulate(make_stages(), Site(1, metadata_rate=np.inf), STARTUP)
    assert outcome.wall == pytest.approx(10 + sum(stage.seconds.sum() for stage in make_stages()))
    assert outcome.serial == pytest.approx(10 + 60)
    assert (outcome.longest_serial_name, outcome.longest_serial) == ("files", 60)
    assert outcome.files == 903


def test_latency_costs_its_operations() -> None:
    sites = [Site(1, latency=latency, metadata_rate=np.inf) for latency in (0.0, 0.01)]
    quick, slow = (simulate(make_stages(), site, STARTUP) for site in sites)
    assert quick.operations == slow.operations == 100 + 400 * 35 + 10
    assert slow.wall - quick.wall == pytest.approx(0.01 * slow.operations)


def test_a_file_system_that_serves_few_operations_holds_all_ranks_up() -> None:
    stages = [Stage("blocks", np.zeros(1000), 35)]
    slow = simulate(stages, Site(500, metadata_rate=100.0), (0.0, 0.0))
    assert slow.wall == pytest.approx(1000 * 35 / 100)


def test_a_time_limit_costs_starts_and_what_is_in_hand() -> None:
    free = simulate(make_stages(), Site(8), STARTUP)
    cut = simulate(make_stages(), Site(8, 300.0, queue=30.0), STARTUP)
    assert free.starts == 1
    assert cut.starts > free.wall / 300
    assert cut.wall > free.wall + 30 * (cut.starts - 1)
    assert cut.files == free.files
    assert not cut.too_long


def test_a_task_longer_than_the_limit_is_named() -> None:
    outcome = simulate(make_stages(), Site(8, 65.0), STARTUP)
    assert outcome.too_long == ["files"]


def test_failures_cost() -> None:
    walls = []
    for hours in (np.inf, 2.0, 0.5):
        outcome = simulate(make_stages(), Site(16, 600.0, node_hours=hours, queue=30.0), STARTUP, seed=1)
        walls.append(outcome.wall)
        assert (outcome.failures > 0) == np.isfinite(hours)
    assert walls == sorted(walls)


def test_a_brain_of_ten_times_the_voxels_is_ten_times_the_work() -> None:
    assert np.prod(make_shape(1e12)) == pytest.approx(1e12, rel=0.01)
    work = []
    for voxels in (1e10, 1e11):
        stages, _ = plan_brain(voxels, 0.3, replace(UnitCosts(), draw=0.0), Site(64))
        work.append(sum(stage.seconds.sum() for stage in stages))
    assert work[1] / work[0] == pytest.approx(10, rel=0.25)


def test_no_stage_after_the_blocks_keeps_the_other_ranks_waiting() -> None:
    site = Site(512, 7200.0, latency=1e-3)
    stages, startup = plan_brain(1e12, 0.3, UnitCosts(), site)
    outcome = simulate(stages, site, startup)
    shares = {name: seconds / outcome.allocated for name, seconds in outcome.serial_stages.items() if name != "start"}
    assert {"groups", "order of trees", "order of rows", "record"} <= shares.keys()
    assert max(shares.values()) < 0.02


def test_times_are_read() -> None:
    assert [parse_time(text) for text in ("120m", "1ms", "2h", "30s", "5")] == [7200, 0.001, 7200, 30, 5]
    with pytest.raises(Exception, match="120m"):
        parse_time("soon")


def test_the_command_prints_its_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--voxels", "1e10", "--ranks", "64", "--limit", "20m", "--latency", "1ms"]
    monkeypatch.setattr(sys, "argv", ["brain", *arguments])
    brain.main()
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    assert facts["hours"] > 0
    assert facts["core_hours"] >= facts["busy_core_hours"]
    assert 0 <= facts["serial_share"] <= 1
    assert 0 < facts["costs"]["groups"] < 1e-3, "measured at the start"
    assert any("metadata operations per second" in line for line in lines)
