"""The study: asking and telling in a journal that survives every kill, one driver at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from pydantic import TypeAdapter

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import list_grid_points
from hpc_neuro.search.study import JOURNAL_FILE, Study, compute_importances, lock_study

SPACE = {
    "rule": {"choice": ["scratch", "average"]},
    "lr": {"log": [1e-4, 1e-2]},
    "share": {"range": [0, 1], "when": {"rule": ["average"]}},
    "size": {"choice": [[1, 2], [3, 4]]},
    "batch": {"integer": [2, 6], "step": 2},
}


def search(out: Path, **more: object) -> SearchConfig:
    tree = {"out": out, "space": SPACE, "sampler": {"kind": "tpe", "startup": 4}, "trials": 12, **more}
    return TypeAdapter(SearchConfig).validate_python(tree)


def ask_for_all(cfg: SearchConfig, reopen: bool) -> list[dict]:
    """Ask for all trials, telling each a value; `reopen`: as if the driver died after every one."""
    study, points = Study(cfg), []
    while (proposal := study.ask()) is not None:
        number, point = proposal
        assert number == len(points)
        points.append(point)
        study.tell(number, "done", point["lr"], {})
        study = Study(cfg) if reopen else study
    assert list(study.read_points().values()) == points
    return points


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_what_is_asked_does_not_depend_on_restarts(tmp_path, kind):
    one, other = (search(tmp_path / n, sampler={"kind": kind}) for n in "ab")
    points = ask_for_all(one, reopen=False)
    assert points == ask_for_all(other, reopen=True)
    assert len({p["lr"] for p in points}) == len(points)
    assert all(("share" in p) == (p["rule"] == "average") for p in points)
    assert all(p["size"] in ([1, 2], [3, 4]) and p["batch"] in (2, 4, 6) for p in points)


def test_a_grid_is_asked_in_order_across_restarts(tmp_path):
    space = {k: v for k, v in SPACE.items() if k not in ("lr", "share")}
    cfg = search(tmp_path, space=space, sampler={"kind": "grid"}, trials=None)
    study, points = Study(cfg), []
    while (proposal := study.ask()) is not None:
        points.append(proposal[1])
        study = Study(cfg)
    assert points == list_grid_points(cfg.space)
    assert study.trial_count == 12


def test_a_trial_half_asked_for_is_asked_to_its_end(tmp_path):
    cfg = search(tmp_path / "a", sampler={"kind": "random"})
    whole = search(tmp_path / "b", sampler={"kind": "random"})
    study = Study(cfg)
    study._study.sampler = optuna.samplers.RandomSampler(seed=9)
    half = study._study.ask()  # a driver was killed after the first value
    half.suggest_categorical("rule", ["scratch", "average"])
    number, point = Study(cfg).ask()
    assert number == 0
    assert point["rule"] == half.params["rule"]
    assert {"lr", "size", "batch"} <= set(point)
    assert Study(cfg).ask()[1] == ask_for_all(whole, reopen=False)[1]


def test_a_torn_journal_and_a_stale_lock_are_mended(tmp_path):
    cfg = search(tmp_path)
    first = Study(cfg).ask()
    with (tmp_path / JOURNAL_FILE).open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    (tmp_path / f"{JOURNAL_FILE}.lock").symlink_to(tmp_path / JOURNAL_FILE)
    study = Study(cfg)
    assert study.read_points() == {0: first[1]}
    assert study.ask()[0] == 1
    assert set(Study(cfg).read_points()) == {0, 1}


def test_telling_twice_changes_nothing_and_rungs_are_kept(tmp_path):
    cfg = search(tmp_path)
    study = Study(cfg)
    for state, value in (("pruned", None), ("done", 0.5), ("failed", None)):
        number, _ = study.ask()
        for _ in range(2):
            study.tell(number, state, value, {10: 0.25})
    trials = Study(cfg)._study.get_trials()
    assert [t.state.name for t in trials] == ["PRUNED", "COMPLETE", "FAIL"]
    assert [t.intermediate_values for t in trials] == [{10: 0.25}] * 3
    study.tell(1, "done", 0.9, {})
    assert Study(cfg)._study.get_trials()[1].value == 0.5


def test_what_decides_is_found_important(tmp_path):
    cfg = search(tmp_path, trials=60, sampler={"kind": "random"})
    study = Study(cfg)
    while (proposal := study.ask()) is not None:
        number, point = proposal
        study.tell(number, "done", -abs(point["batch"] - 4) + 0.01 * point["lr"], {})
    importances = compute_importances(tmp_path, list(SPACE))
    assert next(iter(importances)) == "batch"
    assert sum(importances.values()) == pytest.approx(1)


def test_a_second_driver_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    hold = (
        "import sys,time; from pathlib import Path; from hpc_neuro.search.study import lock_study\n"
        "with lock_study(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(ConfigError, match=f"already driven by process {other.pid}"), lock_study(tmp_path):
            pass
        other.kill()
    with lock_study(tmp_path):
        pass
