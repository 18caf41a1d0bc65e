"""The chain of runs behind a result."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_neuro.evaluate import record


def write(folder: Path, verb: str, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"verb": verb, "config": {k: str(v) for k, v in config.items()}}))
    return folder


def test_chain_follows_configs_and_names_what_is_gone(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "prepare", images="raw")
    train = write(tmp_path / "train", "train", store=store, cache=tmp_path / "cache")
    infer = write(tmp_path / "infer", "infer", model=train / "weights" / "best", store=store)
    links = record.chain({"infer": infer, "prepare": store})
    assert [(k.name, k.path, k.record is None) for k in links] == [
        ("prepare", store, False),
        ("cache", tmp_path / "cache", True),
        ("train", train, False),
        ("infer", infer, False),
    ]
    assert not record.teacher_is_random(links)


def test_a_random_teacher_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"verb": "train", "config": {"teacher": {"model": "random"}}}))
    assert record.teacher_is_random(record.chain({"train": folder}))
