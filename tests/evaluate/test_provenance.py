"""The chain of runs behind a result."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_neuro.report import provenance


def write(folder: Path, verb: str, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"verb": verb, "config": {k: str(v) for k, v in config.items()}}))
    return folder


def test_chain_follows_configs_and_names_what_is_gone(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "prepare", images="raw")
    train = write(tmp_path / "train", "train", store=store, cache=tmp_path / "cache")
    infer = write(tmp_path / "infer", "infer", model=train / "weights" / "best", store=store)
    links = provenance.follow_runs({"infer": infer, "prepare": store})
    assert [(run.verb, run.folder, run.record is None) for run in links] == [
        ("prepare", store, False),
        ("precompute", tmp_path / "cache", True),
        ("train", train, False),
        ("infer", infer, False),
    ]
    assert provenance.list_notices(links, {"a": "digest"}) == []


def test_a_random_teacher_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"verb": "train", "config": {"teacher": {"model": "random"}}}))
    (notice,) = provenance.list_notices(provenance.follow_runs({"train": folder}), {})
    assert "random weights" in notice


def test_neurons_that_the_model_has_seen_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"verb": "train", "config": {}, "inputs": {"a": "1a", "b": "2b", "split": "3c"}})
    )
    links = provenance.follow_runs({"train": folder})
    assert provenance.list_notices(links, {"c": "4d"}) == []
    assert provenance.list_notices(links, {"c": "4d", "renamed": "2b"}) == [
        "The model was trained or validated on renamed: this neuron is not held out."
    ]
