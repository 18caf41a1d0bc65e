"""The driver of a sweep, with stand-in trials in real processes: budget, early stopping, deaths of both."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from hpc_neuro.core.schema import InputError
from hpc_neuro.search import trial
from hpc_neuro.search.trial import Attempt
from launch.executors import JobState
from launch.executors.local import LocalExecutor
from tests.faults.stand_in_trial import dice
from tests.helpers.sweep_runs import make_driver, make_search, read_events, step_until


def list_states(driver):
    return [t.state for t in sorted(driver.trials.values(), key=lambda t: t.number)]


def kill_job(job: str) -> None:
    os.killpg(int(job.split(":")[1]), signal.SIGKILL)


def test_every_trial_runs_once_in_a_folder_of_its_own_and_the_queue_stays_short(tmp_path):
    cfg = make_search(tmp_path / "study")
    driver, counts = make_driver(cfg), []

    def count_jobs(seconds: float) -> None:
        counts.append(sum(t.job is not None for t in driver.trials.values()))
        if not driver.is_finished:
            time.sleep(seconds)

    assert driver.run(sleep=count_jobs)
    assert list_states(driver) == ["done"] * 6
    assert max(counts) == cfg.concurrent
    assert read_events(cfg) == {f"{n:04d}": ["begins"] for n in range(6)}
    for t in driver.trials.values():
        assert t.value == pytest.approx(dice(t.values["lr"], 12, 12))
        assert [a.reason for a in t.attempts] == ["finished"]
    assert trial.load_trials(cfg.out) == [driver.trials[n] for n in range(6)]


def test_a_driver_that_died_is_succeeded_by_one_that_goes_on_with_running_trials(tmp_path):
    cfg = make_search(tmp_path / "study", trials=4)
    first = make_driver(cfg, seconds=1.0)
    first.step()
    jobs = [t.job for t in first.trials.values()]
    second = make_driver(cfg, seconds=1.0)  # the first one is never heard of again
    assert [t.job for t in second.trials.values()] == jobs
    second.run()
    assert list_states(second) == ["done"] * 4
    assert set(map(tuple, read_events(cfg).values())) == {("begins",)}
    assert [t.values for t in second.trials.values()][:2] == [t.values for t in first.trials.values()]


def test_a_driver_killed_around_a_submission_submits_neither_twice_nor_never(tmp_path):
    cfg = make_search(tmp_path / "study", trials=2)
    first = make_driver(cfg, seconds=0.5)
    first.step()
    noted, forgotten = first.trials[0], first.trials[1]
    job = noted.job
    noted.attempts[-1].job = None  # killed between submission and note
    noted.save()
    kill_job(str(forgotten.job))  # killed between note and submission: nothing was ever started
    (forgotten.folder / f"{forgotten.attempt_name}.job").unlink()
    forgotten.attempts[-1].job = None
    forgotten.save()
    second = make_driver(cfg, seconds=0.5)
    assert second.trials[0].job == job
    assert second.trials[1].state == "waiting"
    second.run()
    assert list_states(second) == ["done", "done"]
    assert read_events(cfg)["0000"] == ["begins"]


def test_a_driver_killed_after_asking_makes_the_folder(tmp_path):
    cfg = make_search(tmp_path / "study", trials=1)
    number, values = make_driver(cfg).study.ask()
    driver = make_driver(cfg)
    assert driver.trials[number].values == values
    driver.run()
    assert list_states(driver) == ["done"]


def test_losers_are_cancelled_at_a_rung_and_counted_as_pruned(tmp_path):
    cfg = make_search(
        tmp_path / "study",
        space={"lr": {"choice": [1e-3, 1e-5, 1e-1]}, "seed": {"choice": [0, 1]}},
        sampler={"kind": "grid"},
        trials=None,
        asha={"first": 4, "factor": 3},
        concurrent=2,
    )
    driver = make_driver(cfg, seconds=4)
    driver.run()
    by_lr = {(t.values["lr"], t.values["seed"]): t for t in driver.trials.values()}
    assert by_lr[1e-3, 0].state == by_lr[1e-3, 1].state == "done"
    losers = [t for t in driver.trials.values() if t.values["lr"] != 1e-3]
    assert {t.state for t in losers} == {"pruned"}
    assert all(t.step < 12 and t.value is None and set(t.rungs) == {4} for t in losers)
    assert "is not among the best of" in losers[0].note
    assert make_driver(cfg).study.read_states()[losers[0].number] == "pruned"


def test_a_killed_trial_goes_on_where_it_was_until_it_was_killed_too_often(tmp_path):
    cfg = make_search(tmp_path / "study", trials=2, requeue=2)
    driver = make_driver(cfg, seconds=1.0)
    driver.step()
    lucky, unlucky = driver.trials[0], driver.trials[1]
    step_until(driver, lambda: lucky.step >= 4)
    kill_job(str(lucky.job))
    for attempt in (1, 2, 3):
        step_until(driver, lambda n=attempt: len(unlucky.attempts) == n and unlucky.job is not None)
        kill_job(str(unlucky.job))
    step_until(driver, lambda: driver.is_finished)
    assert (lucky.state, unlucky.state) == ("done", "failed")
    assert len(lucky.attempts) == 2
    assert len(unlucky.attempts) == 3
    assert "killed" in unlucky.note
    steps = [json.loads(r)["step"] for r in (lucky.folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "it began anew"
    assert make_driver(cfg).study.read_states()[1] == "failed"


@pytest.mark.parametrize(("code", "attempts"), [(1, 1), (2, 1), (75, 3)])
def test_bugs_and_bad_input_are_not_tried_again_but_stops_are(tmp_path, code, attempts):
    cfg = make_search(tmp_path / "study", trials=1, requeue=2)
    driver = make_driver(cfg, seconds=0.02, exit=code)
    driver.run()
    assert list_states(driver) == ["failed"]
    assert len(driver.trials[0].attempts) == attempts


def test_a_trial_without_the_objective_has_failed(tmp_path):
    cfg = make_search(tmp_path / "study", trials=1, objective={"key": "val.recall"})
    driver = make_driver(cfg, seconds=0.02)
    driver.run()
    assert driver.trials[0].note == "it left no val.recall"


def test_a_scheduler_that_does_not_answer_is_asked_again(tmp_path):
    cfg = make_search(tmp_path / "study", trials=1)
    driver, calls = make_driver(cfg, seconds=0.02), []
    poll_jobs = driver.executor.poll

    def poll(jobs):
        calls.append(len(jobs))
        if len(calls) == 2:
            raise InputError("slurmctld is being restarted")
        return poll_jobs(jobs)

    driver.executor.poll = poll  # injected: the failure of a scheduler
    assert driver.run()
    assert list_states(driver) == ["done"]
    assert len(calls) > 2


def test_one_call_asks_for_all_jobs(tmp_path):
    class Counted(LocalExecutor):
        polled: list[int]

        def poll(self, jobs):
            self.polled.append(len(jobs))
            return {job: JobState("running") for job in jobs}

    cfg = make_search(tmp_path / "study", trials=5, concurrent=5)
    driver = make_driver(cfg, seconds=0.02)
    counted = Counted()
    counted.polled = []
    driver.executor = counted
    driver.step()
    driver.step()
    assert counted.polled == [0, 5]


def test_a_stopped_driver_leaves_trials_running_and_cancelling_ends_them(tmp_path):
    cfg = make_search(tmp_path / "study", trials=2)
    driver = make_driver(cfg, seconds=30)
    driver.step()
    assert not driver.run(stop=lambda: True)
    jobs = {str(t.job): t.folder / t.attempt_name for t in driver.trials.values()}
    assert {s.kind for s in driver.executor.poll(jobs).values()} == {"running"}
    assert make_driver(cfg).cancel_all() == 2
    step_until(driver, lambda: len(driver.trials[0].attempts) == 2)  # ended by a signal: to be sent again
    driver.cancel_all()


def test_times_add_up_over_attempts(tmp_path):
    t = trial.Trial(0, {}, tmp_path, attempts=[Attempt("a", 1.0, 3.0), Attempt("b", 10.0, 14.0), Attempt("c", 20.0)])
    assert t.seconds == 6.0
    assert t.job == "c"
