"""The ablation in small: real verbs on a tiny store; and what a recipe refuses before anything runs."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hpc_neuro import search
from hpc_neuro.core import run_folder, schema
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.core.types import StudentOutput
from hpc_neuro.losses import sum_losses
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.search import trial
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import format_keys, list_grid_points
from hpc_neuro.train import TrainConfig, setup
from hpc_neuro.train.deepspeed.engine import build_module
from launch.executors import JobState
from launch.sweep import trial as runner
from launch.sweep.driver import SweepDriver
from launch.sweep.recipe import TrialRecipe
from tests.conftest import REPO
from tests.helpers.tiny_store import write_cache, write_store
from tests.train.conftest import TINY

SMALL = [k for k in TINY if not k.startswith(("transfer", "distill", "optim.steps", "checkpoint", "validate.every"))]


class InThisProcess:
    """Runs a trial as soon as it is submitted, in the process of the test: its ten seconds of imports are paid once."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        job = f"{folder.name}/{name}"
        self.codes[job] = runner.main([command[-1]])
        return job

    def find(self, folder: Path, name: str) -> str | None:
        return None

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        return {job: JobState("ended", self.codes[job]) for job in jobs}

    def cancel(self, jobs: Sequence[str]) -> None:
        pass


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    """A finished ablation of 2 rules x 2 modes x 1 seed: the shipped one with fewer values and few steps."""
    folder = tmp_path_factory.mktemp("ablation")
    store = write_store(folder / "store", {"a": "train", "b": "train", "c": "test", "d": "test"})
    cache = write_cache(folder / "cache", store, load_teacher(TeacherConfig(model="random")).identity)
    tree = yaml.safe_load((REPO / "configs" / "search" / "ablation.yaml").read_text())
    tree["out"] = str(folder / "study")
    tree["train"] = {"keys": [f"store={store}", f"cache={cache}", "teacher.model=random", "optim.steps=3", *SMALL]}
    tree["evaluate"] = {"keys": ["pictures=0", "draws=100"]}
    tree["space"]["seed"]["choice"] = [0]
    keep = {"transfer": ("scratch", "deformable_tubular"), "distillation": ("none", "deformable")}
    for name, options in keep.items():
        tree["space"][name]["bundle"] = {k: tree["space"][name]["bundle"][k] for k in options}
    (folder / "ablation.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    cfg = schema.load(SearchConfig, folder / "ablation.yaml")
    recipe = TrialRecipe(cfg)
    assert [c.transfer.rule for c in recipe.load_train_configs()] == ["scratch", "deformable_tubular"]
    driver = SweepDriver(cfg, recipe.steps, recipe.write_trial, InThisProcess())
    with run_folder.start("search", cfg, cfg.out, {}):
        assert driver.run(sleep=lambda seconds: None)
    assert search.run(cfg) == 0
    return cfg


@pytest.mark.slow
def test_every_combination_is_trained_traced_and_scored(study):
    trials = trial.load_trials(study.out)
    assert [t.state for t in trials] == ["done"] * 4
    combinations = {(t.values["transfer"], t.values["distillation"]) for t in trials}
    assert len(combinations) == 4
    for t in trials:
        config = json.loads((t.folder / "train" / "run.json").read_text())["config"]
        assert config["transfer"]["rule"] == t.values["transfer"]
        assert (config["student"]["tokenizer"]["kind"] == "tubular") == ("tubular" in t.values["transfer"])
        assert (config["distill"] or {}).get("axes", "none") == t.values["distillation"]
        assert config["tracker"]["group"] == "study"
        scored = json.loads((t.folder / "evaluate" / "metrics.json").read_text())
        assert t.value == scored["mean"]["model"]["dice"]
    caches = {json.loads((t.folder / "train" / "run.json").read_text())["config"]["cache"] for t in trials}
    assert len(caches) == 1


@pytest.mark.slow
def test_its_table_holds_what_evaluate_wrote(study):
    rows = list(csv.DictReader((study.out / "comparison.csv").open()))
    assert len(rows) == 4 * 2
    assert {r["neuron"] for r in rows} == {"c", "d"}
    for t in trial.load_trials(study.out):
        scored = json.loads((t.folder / "evaluate" / "metrics.json").read_text())["volumes"]
        setting = [t.values["transfer"], t.values["distillation"]]
        own = [r for r in rows if [r["transfer"], r["distillation"]] == setting]
        assert len(own) == 2
        for r in own:
            for key in ("dice", "hd95_um", "esa", "f1_4vox"):
                assert float(r[key]) == scored[r["neuron"]]["model"][key]
    page = (study.out / "report.html").read_text()
    for word in ("Comparison", "HD95 [µm] ↓", "deformable_tubular", "Held-out neurons", "Otsu", 'class="bar s0"'):
        assert word in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_the_best_config_trains_as_it_is(study):
    best = schema.load(TrainConfig, study.out / "best.yaml")
    winner = max(trial.load_trials(study.out), key=lambda t: t.value)
    assert best.transfer.rule == winner.values["transfer"]
    assert best.out == study.out / "best"
    assert best.store.is_absolute()
    assert search.forecast(study)
    from hpc_neuro import train

    assert train.forecast(best)


@pytest.mark.slow
def test_going_on_with_a_finished_study_starts_nothing(study):
    before = {p: p.stat().st_mtime_ns for p in (study.out / "trials").rglob("run.json")}
    recipe = TrialRecipe(study)
    driver = SweepDriver(study, recipe.steps, recipe.write_trial, InThisProcess())
    assert driver.run(sleep=lambda seconds: None)
    assert {p: p.stat().st_mtime_ns for p in (study.out / "trials").rglob("run.json")} == before


@pytest.mark.parametrize("name", ["ablation", "ablation_cpu"])
def test_the_shipped_ablations_are_five_rules_by_four_modes_by_three_seeds(monkeypatch, name):
    monkeypatch.chdir(REPO)
    cfg, whole = (schema.load(SearchConfig, REPO / "configs" / "search" / f"{n}.yaml") for n in (name, "ablation"))
    TrialRecipe(cfg)  # TrainConfig takes every point
    points = list_grid_points(cfg.space)
    assert points == list_grid_points(whole.space)
    assert cfg.space == whole.space
    assert len(points) == 60
    assert [p["seed"] for p in points] == sorted(p["seed"] for p in points)


@pytest.mark.slow
def test_each_of_the_twenty_settings_does_something_else(tmp_path, monkeypatch):
    """With one seed and one batch: alike at the start, to the bit, wherever the settings agree; all apart after it."""
    store = write_store(tmp_path / "store", {"a": "train"})
    monkeypatch.setattr(setup, "load_teacher", functools.cache(load_teacher))
    cache = write_cache(tmp_path / "cache", store, setup.load_teacher(TeacherConfig(model="random")).identity)
    cfg = schema.load(SearchConfig, REPO / "configs" / "search" / "ablation.yaml")
    given = [f"store={store}", f"cache={cache}", f"out={tmp_path / 'run'}", "teacher.model=random", *SMALL]

    def load_config(point):
        return schema.load(TrainConfig, None, [*given, "distill_fraction=1.0", *format_keys(cfg.space, point)])

    points = [p for p in list_grid_points(cfg.space) if p["seed"] == 0]
    crops = setup.build_parts(load_config(next(p for p in points if p["distillation"] == "point"))).crops
    batch = crops.collate([crops[0], crops[1]])
    first, heads, rest, later = {}, {}, {}, {}
    for point in points:
        setting = point["transfer"], point["distillation"]
        parts = setup.build_parts(load_config(point))
        module = build_module(parts.make, parts.values).train()
        named = dict(module.named_parameters())
        assert parts.lr_scales.keys() <= named.keys()
        assert bool(parts.lr_scales) == (point["transfer"] != "scratch")
        rest[setting] = [
            p.detach().clone() for n, p in named.items() if n.startswith(("student.encoder.", "student.decoder."))
        ]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for step in range(2):
            logits, distillation, _ = module(dict(vars(batch)))
            if step == 0:
                first[setting] = logits.detach()
                heads[setting] = None if distillation is None else float(distillation.detach())
            loss = sum_losses(load_config(point).losses, StudentOutput(logits, {}), batch)[0]
            optimizer.zero_grad()
            (loss if distillation is None else loss + distillation).backward()
            optimizer.step()
        with torch.no_grad():
            later[setting] = module.student(batch.image).logits

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    rules, modes = (list(cfg.space[name].bundle) for name in ("transfer", "distillation"))
    assert all(same(parts, rest["scratch", "none"]) for parts in rest.values())
    for rule in rules:
        assert all(torch.equal(first[rule, mode], first[rule, "none"]) for mode in modes)
        assert heads[rule, "none"] is None
        assert heads[rule, "straight"] == heads[rule, "deformable"] != heads[rule, "point"]
    for one, other in itertools.combinations(rules, 2):
        straight_yet = {one, other} == {"tubular", "deformable_tubular"}  # tubes bend only once they have learned to
        assert torch.equal(first[one, "none"], first[other, "none"]) == straight_yet
    assert not [pair for pair in itertools.combinations(later, 2) if torch.equal(later[pair[0]], later[pair[1]])]


def test_the_shipped_search_is_usable(monkeypatch):
    monkeypatch.chdir(REPO)
    assert TrialRecipe(schema.load(SearchConfig, REPO / "configs" / "search" / "learning_rate.yaml")).steps == 1500


def test_all_refused_values_are_named_at_once(tmp_path):
    keys = ["store=s", "cache=c"]
    space = {
        "optim.lrr": {"log": [1e-4, 1e-2]},
        "optim.lr": {"range": [-1, 1]},
        "transfer.rule": {"choice": ["average", "centre"]},
    }
    tree = {"out": tmp_path, "train": {"keys": keys}, "space": space, "trials": 3}
    cfg = schema.TypeAdapter(SearchConfig).validate_python(tree)
    with pytest.raises(ConfigError) as caught:
        TrialRecipe(cfg)
    for word in ("optim.lrr: ", "optim.lr=-1.0", "'centre'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": {"keys": ["store=s", "cache=c", "out=mine"]}}, "train: out=mine is filled in"),
        ({"asha": {"first": 5000}}, "no trial would ever be stopped"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, more, message):
    tree = {"out": tmp_path, "train": {"keys": ["store=s", "cache=c"]}, "trials": 3} | more
    tree["space"] = {"optim.lr": {"log": [1e-4, 1e-2]}}
    with pytest.raises(ConfigError, match=message):
        TrialRecipe(schema.TypeAdapter(SearchConfig).validate_python(tree))


def test_a_second_process_in_a_trials_folder_is_turned_away(tmp_path):
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from launch.sweep.trial import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), 0.1) as ours: print(ours)"
    )
    with runner.lock_folder(tmp_path) as ours:
        other = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert (ours, other.stdout.strip()) == (True, "False")


def test_intervals_are_crossed_over_seeds_and_neurons():
    from hpc_neuro.metrics.statistics import crossed_interval, mean_interval

    values = np.random.default_rng(0).normal(size=(1, 12))
    one, plain = crossed_interval(values), mean_interval(values[0])
    assert one.mean == pytest.approx(plain.mean)
    assert one.low == pytest.approx(plain.low, abs=0.03)
    assert one.high == pytest.approx(plain.high, abs=0.03)
    seeds = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])  # neurons agree, seeds do not: the interval must show it
    wide = crossed_interval(seeds)
    assert (wide.low, wide.high) == (0.0, 1.0)
    alone = crossed_interval(np.array([[0.5]]))
    assert (alone.mean, alone.low, alone.high) == (0.5, None, None)
    with pytest.raises(ValueError, match="finite"):
        crossed_interval(np.array([[np.nan, 1.0]]))
