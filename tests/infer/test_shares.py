"""Shares of prepare, infer and evaluate, then the run that gathers: the same files as one run makes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from hpc_neuro import evaluate, infer, prepare
from hpc_neuro.core import files, run_folder
from hpc_neuro.core.schema import ConfigError, config, load
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student, save_student

COUNT = 3  # shares of two volumes: one is empty


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "raw"
    write_dataset(folder, SyntheticConfig(volumes=2, shape=(16, 48, 48)))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    cfg = StudentConfig(depth=1, patch=(4, 16, 16))
    state = build_student(cfg).state_dict()
    state["decoder.head.bias"].zero_()  # else next to nothing is foreground
    save_student(folder, cfg, state, {"window": [8, 32, 32], "threshold": 0.45})
    return folder


def in_shares(run, cfg) -> None:
    for index in range(COUNT):
        assert run(dataclasses.replace(cfg, share=(index, COUNT))) == 0
        assert json.loads((cfg.out / "shares" / f"000{index}_of_0003" / "run.json").read_text())["exit"] == 0
    assert not (cfg.out / "run.json").exists()
    assert run(cfg) == 0


@pytest.mark.slow
def test_shares_and_one_run_make_the_same(raw: Path, weights: Path, tmp_path: Path):
    results = {}
    for name in ("whole", "shared"):
        root = tmp_path / name
        make = (lambda run, cfg: run(cfg)) if name == "whole" else in_shares
        cfg = load(prepare.PrepareConfig, None, [f"images={raw}", f"out={root / 'store'}", "split.test=[syn_1,syn_2]"])
        make(prepare.run, cfg)
        keys = [f"model={weights}", f"store={root / 'store'}", f"out={root / 'infer'}", "trace.threshold=0.02"]
        make(infer.run, load(infer.InferConfig, None, [*keys, "trace.root_snap=100", "block=[16,48,48]"]))
        keys = [f"store={root / 'store'}", f"predictions={root / 'infer'}", f"out={root / 'evaluate'}", "draws=100"]
        make(evaluate.run, load(evaluate.EvaluateConfig, None, [*keys, "pictures=0"]))
        kept = ["store/syn_1.h5", "store/syn_2.h5", "evaluate/metrics.csv"]
        results[name] = [(root / file).read_bytes() for file in kept]
        index = json.loads((root / "infer" / "predictions.json").read_text())
        results[name].append({k: (v["trees"], v["foreground_voxels"]) for k, v in index.items()})
    assert results["whole"] == results["shared"]


@pytest.mark.parametrize("share", [(3, 3), (-1, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="share"):
        run_folder.take_share([1, 2, 3], share)


def test_shares_cover_each_item_once():
    items = list(range(7))
    assert sorted(i for k in range(3) for i in run_folder.take_share(items, (k, 3))) == items
    assert run_folder.take_share(items, None) == items


@config
class Cfg:
    """A config whose result `steps` decides, and `page` does not."""

    out: Path
    steps: int = 1
    page: bool = True
    share: tuple[int, int] | None = None


@pytest.mark.parametrize(
    ("keys", "inputs", "says"),
    [
        (["steps=2"], {"a": "1"}, "steps: 1 -> 2"),
        ([], {"a": "2", "c": "3"}, "the input a"),
    ],
)
def test_shares_and_what_gathers_them_are_of_one_run(
    tmp_path: Path, keys: list[str], inputs: dict[str, str], says: str
) -> None:
    def start(inputs_of: dict[str, str], *more: str) -> None:
        cfg = load(Cfg, None, [f"out={tmp_path}", *more])
        with run_folder.start(
            "test", cfg, run_folder.share_folder(cfg.out, cfg.share), inputs_of, may_change=("page",)
        ) as run:
            run.finish({})

    start({"a": "1"}, "share=[0,2]")
    start({"b": "2"}, "share=[1,2]", "page=false")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for share in ([], ["share=[1,3]"]):
        with pytest.raises(ConfigError, match="0000_of_0002 was made with other settings") as caught:
            start(inputs, *keys, *share)
        assert says in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    start({"a": "1", "b": "2"})


def test_an_array_of_twice_as_many_tasks_reads_twice_as_many_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = list[Path]()
    read_json = files.read_json

    def count(path: Path, hint: str, *form: object) -> object:
        paths.append(path)
        return read_json(path, hint, *form)

    monkeypatch.setattr(files, "read_json", count)
    reads = []
    for tasks in (20, 40):
        paths.clear()
        for task in range(tasks):
            start_share(tmp_path / str(tasks), (task, tasks), {"weights": "1", f"volume {task}": "2"})
        reads.append(len(paths))
    assert 0 < reads[1] <= 2 * reads[0]


def test_shares_that_took_the_place_of_others_agree_anew(tmp_path: Path) -> None:
    start_share(tmp_path, (0, 2), {"weights": "1"})
    with pytest.raises(ConfigError, match="0000_of_0002 was made with other settings"):
        start_share(tmp_path, (1, 2), {"weights": "2"})

    # The advice: remove what does not belong together.
    shutil.rmtree(run_folder.share_folder(tmp_path, (0, 2)))
    start_share(tmp_path, (1, 2), {"weights": "2"})
    with pytest.raises(ConfigError, match="0001_of_0002 was made with other settings"):
        start_share(tmp_path, (0, 2), {"weights": "1"})


def test_inputs_that_only_some_shares_have_are_compared(tmp_path: Path) -> None:
    for task, volume in enumerate(("a", "b", "a")):
        start_share(tmp_path, (task, 4), {"weights": "1", f"volume {volume}": "1"})
    with pytest.raises(ConfigError, match="the input volume b"):
        start_share(tmp_path, (3, 4), {"weights": "1", "volume b": "2"})


def test_shares_of_an_earlier_version_are_compared(tmp_path: Path) -> None:
    start_share(tmp_path, (0, 4), {"weights": "1", "volume a": "1"})
    shutil.rmtree(tmp_path / "shares" / ".agreed")
    with pytest.raises(ConfigError, match="0000_of_0004 was made with other settings"):
        start_share(tmp_path, (1, 4), {"weights": "2"})
    start_share(tmp_path, (2, 4), {"weights": "1"})
    with pytest.raises(ConfigError, match="the input volume a"):
        start_share(tmp_path, (3, 4), {"weights": "1", "volume a": "2"})


def start_share(out: Path, share: tuple[int, int], inputs: dict[str, str]) -> None:
    cfg = load(Cfg, None, [f"out={out}", f"share=[{share[0]},{share[1]}]"])
    with run_folder.start("test", cfg, run_folder.share_folder(out, share), inputs) as run:
        run.finish({})
