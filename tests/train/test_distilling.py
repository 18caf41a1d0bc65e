"""Training with a teacher: its weights, and its features from the cache."""

from __future__ import annotations

import logging

import pytest
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from tests.helpers.tiny_store import write_cache
from tests.train.conftest import rows


@pytest.fixture(scope="module")
def cache(store, tmp_path_factory):
    identity = load_teacher(TeacherConfig(model="random")).identity
    return write_cache(tmp_path_factory.mktemp("caches") / "cache", store, identity)


def test_transfer_and_distillation(tiny, cache, tmp_path, caplog):
    distil = [f"cache={cache}", "distill={axes: deformable}", "teacher.model=random", "transfer.rule=average"]
    out = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        assert train.run(tiny(out, *distil, "optim.batch=4", "optim.steps=5")) == 0
    assert "of the student's weights come from random" in caplog.text
    terms = [r["distill"] for r in rows(out)]
    assert all(t is None or 0 < t < 5 for t in terms)
    assert any(t is not None for t in terms)
    assert not any("distiller" in k for k in load_file(out / "weights/last/model.safetensors"))


def test_a_sharded_distiller_with_nothing_to_distil_in_a_pass(tiny, cache, tmp_path):
    """With one crop per pass some passes hold none to distil; stage 3 must go the same way and weigh it nothing."""
    distil = [f"cache={cache}", "distill={axes: deformable}", "teacher.model=random", "optim.steps=3", "ema.window=0"]
    runs = []
    for stage in (2, 3):
        out = tmp_path / str(stage)
        assert (
            train.run(tiny(out, *distil, "engine.micro_batch=1", f"engine.stage={stage}", "distill_fraction=0.2")) == 0
        )
        runs.append(rows(out))
    assert any(r["distill"] is None for r in runs[0])
    for two, three in zip(*runs, strict=True):
        assert three["distill"] == pytest.approx(two["distill"], abs=1e-5)
        assert three["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert three["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_distillation_weighs_each_sample_alike_however_it_is_cut(tiny, cache, tmp_path):
    distil = [
        f"cache={cache}",
        "distill={axes: none}",
        "teacher.model=random",
        "losses=[]",
        "optim.batch=4",
        "optim.steps=2",
    ]
    runs = []
    for micro in (4, 1):
        out = tmp_path / str(micro)
        assert train.run(tiny(out, *distil, f"engine.micro_batch={micro}")) == 0
        runs.append(rows(out))
    for one, four in zip(*runs, strict=True):
        assert one["distill"] == pytest.approx(four["distill"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)


def test_a_cache_of_another_teacher_is_refused(tiny, cache, tmp_path):
    keys = [f"cache={cache}", "distill={}", "teacher.model=random", "teacher.seed=1"]
    with pytest.raises(ConfigError, match="holds features of the teacher"):
        train.forecast(tiny(tmp_path / "run", *keys))
