"""Mutated text, JSON and YAML files: every verb that reads one ends with 0, 2 or 3, and never with a traceback.

HPC_NEURO_FUZZ sets the number of mutations of each file; the long run takes 2000.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from hpc_neuro.cli import main
from launch.__main__ import main as launch
from tests.faults import test_silent_image_errors as images
from tests.helpers.swc_cases import GOOD

COUNT = int(os.environ.get("HPC_NEURO_FUZZ", "60"))
"""Mutations of each file."""

PIECES = [
    *("nan", "inf", "-1", "0", "1e400", "9" * 40, "010", "12:00:00", "true", "null", "~", "[", "]", "{", "}", ":", ","),
    *(
        ";",
        "\t",
        "\n",
        "\r",
        "\0",
        "#",
        "&a",
        "*a",
        "<<",
        "!!x",
        '"',
        "'",
        "../../victim",
        "\ufeff",
        "µ",
        "\u2028",
        "-",
    ),
]

SWC = (
    "# All positions and radii in µm\n# Voxel separation (x,y,z): 0.33, 0.33, 1.0\n# id type x y z radius parent\n"
    + GOOD
)
INDEX = {
    "format": 1,
    "volumes": {"n1": {"shape": [8, 8, 8], "voxel_size_um": [1, 1, 1], "dtype": "uint8"}},
    "splits": {},
}
FILES = {
    "tree.swc": (SWC, [["swc", "check", "FILE"], ["swc", "fix", "FILE", "out=OUT"], ["info", "FILE"]]),
    "config.yaml": ("images: nowhere\nout: out\nsplit: {test: [007, 010]}\n", [["prepare", "FILE", "out=OUT"]]),
    "manifest.yaml": (
        "- {id: 010, image: n1.tif, swc: n1.swc, voxel_size: [1, 1, 1]}\n",
        [["prepare", "manifest=FILE", "out=OUT", "misaligned=warn"]],
    ),
    "manifest.csv": (
        "id,image,swc,voxel_size\n010,n1.tif,n1.swc,1 1 1\n",
        [["prepare", "manifest=FILE", "out=OUT", "misaligned=warn"]],
    ),
    "meta.json": (
        json.dumps({"n1": {"root_xyz": [1, 2, 3], "voxel_size_um_xyz": [1, 1, 1]}}),
        [["prepare", "images=FOLDER", "out=OUT", "misaligned=warn"]],
    ),
    "dataset.json": (json.dumps(INDEX), [["evaluate", "store=FOLDER", "predictions=FOLDER", "out=OUT"]]),
}
"""Name -> content, and the commands that read it."""


def mutate(text: str, rng: random.Random) -> bytes:
    """A text with some pieces removed, doubled, replaced or moved, or with damaged bytes."""
    for _ in range(rng.randint(1, 4)):
        begin = rng.randint(0, len(text))
        end = min(len(text), begin + rng.randint(0, 12))
        piece = rng.choice([*PIECES, "", text[begin:end] * 2, text[begin:]])
        text = text[:begin] + piece + text[end:]
    data = bytearray(text.encode("utf-8", errors="replace"))
    if data and rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_mutations_end_with_a_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, commands = FILES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    image = np.random.default_rng(0).integers(0, 255, (8, 16, 24), dtype=np.uint8)
    tifffile.imwrite(folder / "n1.tif", image, metadata={"axes": "ZYX"})
    (folder / "n1.swc").write_text("1 3 8 8 4 1 -1\n2 3 16 8 4 1 1\n")
    rng = random.Random(name)

    for number in range(COUNT):
        data = mutate(text, rng)
        (folder / name).write_bytes(data)
        for command in commands:
            values = {"FILE": folder / name, "FOLDER": folder, "OUT": tmp_path / "out" / str(number)}
            arguments = list(command)
            for word, value in values.items():
                arguments = [argument.replace(word, str(value)) for argument in arguments]
            try:
                code = main(arguments)
            except SystemExit as error:
                code = error.code
            # An error that the command line does not know leaves `main`, and fails the test by itself.
            assert code in (0, 2, 3), (data, capsys.readouterr().err)
        # Nothing is written beside the folders.
        assert {path.name for path in tmp_path.iterdir()} <= {"data", "out"}, data


def make_search(folder: Path) -> Path:
    """A search whose store is not there: its keys are checked before it is looked for."""
    tree = {
        "out": str(folder / "study"),
        "train": {"keys": [f"store={folder / 'store'}", "distill=null"]},
        "space": {"optim.lr": {"log": [1e-3, 1e-2]}, "seed": {"choice": [0, 1]}},
        "sampler": {"kind": "random"},
        "trials": 2,
        "asha": {"first": 2},
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(tree))
    return folder


def make_jobs(folder: Path) -> Path:
    (folder / "launch").mkdir()
    jobs = [{"id": "7", "on": "local", "verb": "infer", "share": ""}]
    (folder / "launch" / "jobs.json").write_text(json.dumps(jobs))
    return folder


def make_site(folder: Path) -> Path:
    site = {"partition": "gpu", "modules": ["cuda/12.1"], "environment": {"A_KEY": "x"}, "train": {"minutes": 60}}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return folder


def make_seeds(folder: Path) -> Path:
    for name, lines in (("a.marker", "3,4,5,0,1,x,y,255,0,0\n"), ("a.apo", "1,,1,x,3,4,5,0,0,0,50,1\n")):
        (folder / name).write_text(f"##x,y,z\n{lines}")
    image = np.random.default_rng(0).integers(0, 255, (8, 16, 24), dtype=np.uint8)
    tifffile.imwrite(folder / "a.tif", image, metadata={"axes": "ZYX"})
    return folder


def make_tree(folder: Path) -> Path:
    (folder / "a.swc").write_text(SWC)
    (folder / "b.swc").write_text(SWC)
    return folder


DESCRIPTIONS: dict[str, tuple[Callable[[Path], Path], str, list[list[str]]]] = {
    # What makes the folder or the image (PATH in the commands), the file in it that is mutated, and the commands.
    "OME-Zarr": (images.multiscales(lambda a: None), ".zattrs", [["info", "PATH"]]),
    "zarr 2": (images.filter_zarr(images.IMAGE, images.numcodecs.Delta("<u2")), ".zarray", [["info", "PATH"]]),
    "zarr 3": (images.filter_zarr(images.IMAGE, version=3), "zarr.json", [["info", "PATH"]]),
    "N5": (images.n5(resolution=[1, 1, 1], units=["um"] * 3), "attributes.json", [["info", "PATH"]]),
    "precomputed": (images.write_precomputed(lambda i: None), "info", [["info", "PATH"]]),
    "NHDR": (images.nhdr(images.IMAGE.tobytes()), "", [["info", "PATH"]]),
    "search": (
        make_search,
        "search.yaml",
        [["search", "PATH/search.yaml"], ["search", "PATH/search.yaml", "--dry-run"]],
    ),
    "jobs": (make_jobs, "launch/jobs.json", [["launch", "status", "PATH"]]),
    "site": (
        make_site,
        "site.yaml",
        [["launch", "evaluate", "store=x", "predictions=y", "--cluster", "PATH/site.yaml", "--dry-run"]],
    ),
    "trees": (
        make_tree,
        "a.swc",
        [
            ["swc", "convert", "PATH/a.swc", "voxel_size=1,1,1"],
            ["swc", "transform", "PATH/a.swc", "scale=2,1,1"],
            ["score", "PATH/a.swc", "PATH/b.swc"],
        ],
    ),
    "markers": (make_seeds, "a.marker", [["trace", "PATH/a.tif", "seeds=PATH/a.marker", "out=OUT", "--dry-run"]]),
    "apo": (make_seeds, "a.apo", [["trace", "PATH/a.tif", "seeds=PATH/a.apo", "out=OUT", "--dry-run"]]),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_mutated_descriptions_end_with_a_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, name, commands = DESCRIPTIONS[kind]
    (tmp_path / "data").mkdir()
    path = make(tmp_path / "data")
    file = path / name if name else path
    text = file.read_text()
    rng = random.Random(kind)
    monkeypatch.chdir(tmp_path / "data")

    for _ in range(COUNT if "HPC_NEURO_FUZZ" in os.environ else COUNT // 3):
        data = mutate(text, rng)
        file.write_bytes(data)
        for command in commands:
            words = [w.replace("PATH", str(path)).replace("OUT", str(tmp_path / "data" / "out")) for w in command]
            try:
                code = launch(words[1:]) if words[0] == "launch" else main(words)
            except SystemExit as error:
                code = error.code
            assert code in (0, 2, 3), (data, capsys.readouterr().err)
        assert [item.name for item in tmp_path.iterdir()] == ["data"], data
