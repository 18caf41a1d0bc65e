"""Every artifact of every verb, damaged: the next reader names it, and the command that a message names repairs it.

HPC_NEURO_FUZZ=2000 sets how many mutations of each JSON file are tried; each verb that reads the file gets them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from hpc_neuro.cli import main
from hpc_neuro.core.record_log import decode
from hpc_neuro.core.schema import InputError
from hpc_neuro.infer.viewer_layers import ViewerLayers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
MUTATIONS = int(os.environ.get("HPC_NEURO_FUZZ", "4"))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def run(demo: Path, verb: str, *more: str) -> int:
    """The verb again with the config in its folder."""
    folder = {"prepare": "store", "precompute": "cache"}.get(verb, verb)
    return main([verb, str(demo / folder / "config.yaml"), *more])


# --- Damage to what a complete run has written: the same command repairs it ---


def cut_file(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    """Another byte in the middle, the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(bytes(data))


SMALL, LARGE = (cut_file, empty, remove, flip), (cut_file, empty, remove)
OUTPUTS: list[tuple[str, str, tuple[Callable[[Path], None], ...]]] = [
    ("prepare", "store/dataset.json", SMALL),
    ("prepare", "store/*.h5", LARGE),
    ("prepare", "store/pictures/*.png", LARGE),
    ("precompute", "cache/manifest.json", SMALL),
    ("precompute", "cache/*.h5", LARGE),
    ("train", "train/weights/best/model.safetensors", SMALL),
    ("train", "train/weights/best/student.yaml", SMALL),
    ("train", "train/weights/last/model.safetensors", SMALL),
    ("infer", "infer/predictions.json", SMALL),
    ("infer", "infer/journal/*.log", LARGE),
    ("infer", "infer/*.ome.zarr/0/c/0/0/0", LARGE),
    ("evaluate", "evaluate/metrics.json", SMALL),
    ("evaluate", "evaluate/metrics.csv", SMALL),
    ("evaluate", "evaluate/report.html", SMALL),
    ("evaluate", "evaluate/pictures/*.jpg", LARGE),
]


@pytest.mark.parametrize(
    ("verb", "pattern", "damage"),
    [(verb, pattern, damage) for verb, pattern, damages in OUTPUTS for damage in damages],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_same_command_repairs_an_output(
    damaged_demo: Path, verb: str, pattern: str, damage: Callable[[Path], None]
) -> None:
    path = first(damaged_demo, pattern)
    before = path.read_bytes()
    damage(path)
    try:
        assert run(damaged_demo, verb) == 0
        # Reports and markers hold times.
        if path.suffix not in (".html", ".log"):
            assert path.read_bytes() == before
        # A repaired journal is written under another name.
        assert first(damaged_demo, pattern).stat().st_size > len(before) // 2
        assert main(["history", str(damaged_demo / pattern.partition("/")[0])]) == 0
    except BaseException:
        path.write_bytes(before)
        raise


def test_the_demo_repairs_its_stages(damaged_demo: Path) -> None:
    for pattern in ("store/*.h5", "evaluate/report.html", "metrics.csv"):
        cut_file(first(damaged_demo, pattern))
    assert main(["demo", str(damaged_demo / "config.yaml")]) == 0
    assert main(["history", str(damaged_demo)]) == 0


# --- A flipped bit: the next reader names the file ---


def flip_chunk(path: Path, name: str) -> None:
    """A bit in the values of a dataset."""
    with h5py.File(path, "r", locking=False) as file:
        data = file[name]
        offset = data.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.fixture
def demo_file(damaged_demo: Path) -> Iterator[Callable[[str], Path]]:
    """Gives files of the demo, which have their bytes again after the test."""
    saved: dict[Path, bytes] = {}

    def take(pattern: str) -> Path:
        path = first(damaged_demo, pattern)
        saved[path] = path.read_bytes()
        return path

    yield take
    for path, content in saved.items():
        if path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(content)


READERS: list[tuple[str, str, list[str]]] = [
    ("store/syn_1.h5", "image", ["train", "out={new}"]),
    ("store/syn_1.h5", "mask", ["train", "out={new}"]),
    ("store/syn_1.h5", "points/skeleton", ["train", "out={new}"]),
    ("store/syn_1.h5", "tree/points", ["history", "{demo}/store"]),
    ("store/syn_1.h5", "distance", ["history", "{demo}/store"]),
    ("cache/*.h5", "features", ["train", "out={new}"]),
    ("cache/*.h5", "features", ["history", "{demo}/cache"]),
    ("store/dataset.json", "", ["train", "out={new}"]),
    ("cache/manifest.json", "", ["train", "out={new}"]),
    ("train/weights/best/model.safetensors", "", ["infer", "out={new}"]),
    ("train/weights/best/student.yaml", "", ["infer", "out={new}"]),
    ("train/checkpoints/step_*/rank_00000.safetensors", "", ["train", "optim.steps=10"]),
    ("train/checkpoints/step_*/training.json", "", ["train", "optim.steps=10"]),
    ("train/checkpoints/step_*/rank_00000.safetensors", "", ["history", "{demo}/train"]),
    ("infer/predictions.json", "", ["evaluate", "out={new}"]),
    ("infer/*.ome.zarr/0/c/0/0/0", "", ["infer", "verify", "{demo}/infer", "--check"]),
    ("infer/*.ome.zarr/0/c/0/0/0", "", ["history", "{demo}/infer"]),
    ("evaluate/metrics.csv", "", ["history", "{demo}/evaluate"]),
]


@pytest.mark.parametrize(("pattern", "dataset", "words"), READERS, ids=lambda value: str(value))
def test_a_flipped_bit_is_named_by_the_next_reader(
    damaged_demo: Path,
    tmp_path: Path,
    pattern: str,
    dataset: str,
    words: list[str],
    demo_file: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = demo_file(pattern)
    if dataset:
        flip_chunk(path, dataset)
    else:
        flip(path)
    verb, *rest = (word.format(demo=damaged_demo, new=tmp_path / "new") for word in words)
    is_run = verb in ("train", "infer", "evaluate") and "verify" not in rest
    code = run(damaged_demo, verb, *rest) if is_run else main([verb, *rest])
    captured = capfd.readouterr()
    assert code in (2, 3), captured.err[-2000:]
    # What is logged goes to the standard error of the first test.
    assert path.name in captured.out + captured.err or "verify" in rest


# --- JSON of another form: a sentence, never a traceback ---

WHOLE_FILES: list[bytes] = [
    b"[]",
    b"null",
    b"{}",
    b"3",
    b'{"verb": "prepare"}',
    b'{"syn_3": {}, "format": 1}',
    b'{"a": "\xff\xfe"}',
    b"[" * 200_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b"",
]
JSON_FILES: list[tuple[str, list[list[str]]]] = [
    ("store/run.json", [["prepare"], ["history", "{demo}/store"]]),
    ("train/run.json", [["train"], ["history", "{demo}/train"], ["evaluate", "--dry-run"]]),
    ("infer/run.json", [["infer"], ["infer", "verify", "{demo}/infer", "--check"], ["evaluate", "--dry-run"]]),
    ("store/dataset.json", [["train", "--dry-run"], ["precompute", "--dry-run"], ["history", "{demo}/store"]]),
    ("cache/manifest.json", [["train", "--dry-run"], ["cache", "info", "{demo}/cache"], ["history", "{demo}/cache"]]),
    ("infer/predictions.json", [["evaluate", "--dry-run"], ["history", "{demo}/infer"], ["serve"]]),
    ("infer/entries/*.json", [["infer", "verify", "{demo}/infer", "--check"]]),
    ("infer/journal/*.log", [["evaluate", "--dry-run"], ["history", "{demo}/infer"]]),
    ("infer/*.ome.zarr/zarr.json", [["infer", "verify", "{demo}/infer", "--check"], ["history", "{demo}/infer"]]),
    ("infer/proofread/*.neuroglancer.json", [["serve"]]),
    ("train/checkpoints/step_*/checkpoint.json", [["train", "optim.steps=10"], ["history", "{demo}/train"]]),
    ("train/checkpoints/step_*/training.json", [["train", "optim.steps=10"]]),
    ("train/metrics.jsonl", [["evaluate", "--dry-run"]]),
    ("evaluate/metrics.json", [["history", "{demo}/evaluate"], ["history", "{demo}"]]),
    ("evaluate/scores/model.0/*.json", [["history", "{demo}/evaluate"]]),
]


def mutate(draw: random.Random, value: Any) -> Any:
    """A copy of JSON data with one part replaced or removed."""
    junk = [None, [], {}, "x", "../../victim", -1, 0, 10**30, 1e308, True, [1, 2, 3], {"a": {}}]
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(junk)
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    key, inner = draw.choice(items)
    if draw.random() < 0.2:
        items = [item for item in items if item[0] != key]
        return dict(items) if isinstance(value, dict) else [item for _, item in items]
    changed = {**dict(items), key: mutate(draw, inner)}
    return changed if isinstance(value, dict) else list(changed.values())


def list_contents(path: Path) -> list[bytes]:
    draw = random.Random(path.name)
    content = path.read_bytes()
    torn = [content[: draw.randrange(len(content))] for _ in range(max(1, MUTATIONS // 4))]
    if path.suffix == ".log":
        # Records with the checksum of what they hold, which is of another form.
        records = [record for line in content.splitlines(keepends=True) if (record := decode(line, path.name))]
        block = next(record for record in records if record.kind == "block")
        bodies = [json.dumps(item).encode() for item in list_mutations(draw, json.loads(block.body))]
        mutations = [block._replace(body=body).encode() for body in bodies]
    else:
        value = json.loads(content.splitlines()[0] if path.suffix == ".jsonl" else content)
        mutations = [json.dumps(item).encode() for item in list_mutations(draw, value)]
    # Short files have few mutations, and many of these come more than once.
    return list(dict.fromkeys([*WHOLE_FILES, *mutations, *torn]))


def list_mutations(draw: random.Random, value: Any) -> list[Any]:
    """The data without each of its keys in turn, and random changes of it.

    A random change of a long record rarely drops the one key that a reader takes for granted.
    """
    incomplete = [{key: item for key, item in value.items() if key != dropped} for dropped in value]
    return [*incomplete, *(mutate(draw, value) for _ in range(MUTATIONS))]


def call(demo: Path, words: list[str]) -> int:
    verb, *rest = (word.format(demo=demo) for word in words)
    if verb == "serve":
        try:
            layers = ViewerLayers(demo / "infer")
            for name in layers.names:
                for kind in (".json", ".image/zarr.json", ".trees/1"):
                    layers.get(name + kind, "http://localhost")
        except (InputError, OSError, ValueError):
            return 2
        return 0
    is_run = verb in ("prepare", "precompute", "train", "infer", "evaluate") and rest[:1] != ["verify"]
    return run(demo, verb, *rest) if is_run else main([verb, *rest])


@pytest.fixture
def kept_training(damaged_demo: Path) -> Iterator[None]:
    """The files of the training after the test are those before it: a changed record may rightly train on."""
    folder = damaged_demo / "train"
    saved = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    yield
    for file in [file for file in folder.rglob("*") if file.is_file() and file not in saved]:
        file.unlink()
    for file, content in saved.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.mark.usefixtures("kept_training")
@pytest.mark.parametrize(("pattern", "commands"), JSON_FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_json_of_another_form_is_a_sentence(
    damaged_demo: Path, pattern: str, commands: list[list[str]], demo_file: Callable[[str], Path]
) -> None:
    path = demo_file(pattern)
    extra = demo_file("train/run.json"), demo_file("infer/run.json"), demo_file("store/run.json")
    saved = {file: file.read_bytes() for file in extra if file != path}
    for content in list_contents(path):
        for words in commands:
            path.write_bytes(content)
            assert call(damaged_demo, words) in (0, 2, 3), (words, content[:200])
            for file, before in saved.items():
                file.write_bytes(before)


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in JSON_FILES if "run.json" in pattern])
def test_a_folder_in_the_place_of_a_record(
    damaged_demo: Path, pattern: str, demo_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = demo_file(pattern)
    commands = dict(JSON_FILES)[pattern]
    path.unlink()
    path.mkdir()
    assert call(damaged_demo, commands[0]) == 2
    assert "Is a directory" in capsys.readouterr().err
    # Not every reader needs the record.
    assert {call(damaged_demo, words) for words in commands[1:]} <= {0, 2, 3}


# --- Ids of elsewhere: nothing outside the folder is read as a result, written or removed ---


@pytest.mark.parametrize("pattern", ["infer/predictions.json", "store/dataset.json", "infer/run.json"])
@pytest.mark.parametrize(
    "words", [["evaluate", "out={new}"], ["history", "{demo}/infer"], ["infer", "verify", "{demo}/infer"]]
)
def test_ids_that_lead_elsewhere(
    damaged_demo: Path, tmp_path: Path, pattern: str, words: list[str], demo_file: Callable[[str], Path]
) -> None:
    # From a run folder, and from a folder in it.
    victims = [damaged_demo.parent / "victim", damaged_demo / "victim"]
    for victim in victims:
        victim.mkdir(exist_ok=True)
        (victim / "precious").write_text("kept")
    path = demo_file(pattern)
    saved = demo_file("infer/predictions.json"), demo_file("infer/run.json")
    name = next(iter(json.loads((damaged_demo / "infer" / "predictions.json").read_text())))
    path.write_text(path.read_text().replace(f'"{name}"', '"../../victim"'))
    before = sorted(damaged_demo.parent.rglob("*victim*"))

    code = call(damaged_demo, [word.replace("{new}", str(tmp_path / "new")) for word in words])
    # Verifying makes a damaged index anew; the record of a run is no list of ids.
    assert code in ((0, 2, 3) if "verify" in words or "run.json" in pattern else (2, 3))
    assert all((victim / "precious").read_text() == "kept" for victim in victims)
    assert sorted(damaged_demo.parent.rglob("*victim*")) == before
    assert all(file.is_file() for file in saved)
