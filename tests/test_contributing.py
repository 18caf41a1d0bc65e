"""CONTRIBUTING.md: adding a thing touches as many files as its table says, and the thing then works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"^\| (?P<thing>[a-z ]+) \| (?P<files>\d) \| ", re.MULTILINE)
COUNTS = {match["thing"]: int(match["files"]) for match in TABLE.finditer((REPO / "CONTRIBUTING.md").read_text())}


def add_loss(package: Path) -> str:
    path = package / "losses" / "segmentation.py"
    append_before(
        path,
        "Loss = Annotated[",
        '@config\nclass Nothing:\n    """Zero for every sample."""\n\n    kind: Literal["nothing"] = "nothing"\n'
        "    weight: float = 1.0\n\n    def __call__(self, output, batch):\n"
        '        """Zeros [B]."""\n        return output.logits.sum((1, 2, 3, 4)) * 0\n\n\n',
    )
    replace(path, "Loss = Annotated[", "Loss = Annotated[Nothing | ")
    return (
        "from hpc_neuro.core import schema; from hpc_neuro.train import TrainConfig\n"
        "keys = ['store=s', 'out=o', 'distill=null', 'losses=[{kind: nothing}]']\n"
        "print(schema.load(TrainConfig, None, keys).losses[0].kind)"
    )


def add_metric(package: Path) -> str:
    (package / "metrics" / "nothing.py").write_text(
        '"""A metric of nothing."""\n\nfrom hpc_neuro.metrics import voxel\nimport dataclasses\n\n'
        'NOTHING = dataclasses.replace(voxel.DICE, key="nothing")\n'
    )
    path = package / "metrics" / "__init__.py"
    replace(path, "import cable, ", "import nothing, cable, ")
    replace(path, "        voxel.DICE,\n", "        voxel.DICE,\n        nothing.NOTHING,\n")
    return (
        "from hpc_neuro.metrics import list_metrics\n"
        "print(*(metric.key for metric in list_metrics() if metric.key == 'nothing'))"
    )


def add_volume_format(package: Path) -> str:
    (package / "data" / "formats" / "nothing.py").write_text(
        '"""A format of one black volume."""\n\nimport numpy as np\n\n'
        "from hpc_neuro.data.formats.volume import StoredArray\n\n\n"
        "def matches(path, head):\n    return head.startswith(b'nothing')\n\n\n"
        "def open_source(path, dataset):\n"
        "    array = np.zeros((2, 3, 4), np.uint8)\n"
        "    return StoredArray('nothing', array.shape, 'ZYX', array.dtype, array.__getitem__)\n"
    )
    path = package / "data" / "formats" / "__init__.py"
    replace(path, "import amira, ", "import nothing, amira, ")
    replace(
        path, "READERS = (\n", 'READERS = (\n    Reader("nothing", nothing.matches, nothing.open_source, (".no",)),\n'
    )
    return (
        "from pathlib import Path; Path('a.no').write_bytes(b'nothing')\n"
        "import hpc_neuro; print('nothing', *hpc_neuro.open_volume('a.no').shape)"
    )


def add_augmentation(package: Path) -> str:
    path = package / "data" / "augment.py"
    append_before(
        path, "def _draw_specks(", "def _do_nothing(image, streams, cfg):\n    return image * 0 + cfg.nothing\n\n\n"
    )
    replace(path, '        ("noise", cfg.noise, _add_noise),\n', '        ("nothing", 1.0, _do_nothing),\n')
    source = (package / "data" / "config.py").read_text()
    start = source.index("class AugmentConfig")
    first_field = re.compile(r"\n    [a-z_]+: ").search(source, start)
    assert first_field is not None
    field = '\n    nothing: float = 0.25\n    """Value of every voxel."""'
    (package / "data" / "config.py").write_text(source[: first_field.start()] + field + source[first_field.start() :])
    return (
        "import torch; from hpc_neuro.core.types import Batch; from hpc_neuro.data.augment import augment\n"
        "from hpc_neuro.data.config import AugmentConfig\n"
        "one = torch.ones(1, 1, 4, 8, 8)\n"
        "batch = Batch(one, one.byte(), one.byte(), {}, torch.tensor([False]), torch.tensor([0]))\n"
        "print('nothing', float(augment(batch, AugmentConfig(), 0).image.mean()))"
    )


def add_verb(package: Path) -> str:
    (package / "nothing.py").write_text(
        '"""The verb `nothing`."""\n\nfrom hpc_neuro.core.schema import config\n\n\n@config\nclass NothingConfig:\n'
        '    """Nothing."""\n\n    much: int = 1\n    """How much."""\n\n\n'
        "def forecast(cfg):\n    return []\n\n\ndef run(cfg):\n    print('nothing', cfg.much)\n    return 0\n"
    )
    source = (package / "pipeline.py").read_text()
    row = re.compile(r"\n    Verb\(").search(source)
    assert row is not None
    text = '\n    Verb("nothing", "hpc_neuro.nothing", "nothing -> nothing", config="NothingConfig"),'
    (package / "pipeline.py").write_text(source[: row.start()] + text + source[row.start() :])
    return "from hpc_neuro.cli import main; main(['nothing', 'much=3'])"


def append_before(path: Path, anchor: str, text: str) -> None:
    replace(path, anchor, text + anchor)


def replace(path: Path, old: str, new: str) -> None:
    source = path.read_text()
    assert source.count(old) == 1, f"{path.name} has {source.count(old)} times {old!r}"
    path.write_text(source.replace(old, new))


ADDITIONS: dict[str, Callable[[Path], str]] = {
    "loss": add_loss,
    "metric": add_metric,
    "volume format": add_volume_format,
    "augmentation": add_augmentation,
    "verb": add_verb,
}


def test_every_row_of_the_table_is_tried() -> None:
    assert COUNTS.keys() == ADDITIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("thing", ADDITIONS)
def test_an_addition_touches_the_files_of_the_table_and_works(thing: str, tmp_path: Path) -> None:
    package = tmp_path / "hpc_neuro"
    shutil.copytree(REPO / "hpc_neuro", package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    before = {path: path.read_bytes() for path in package.rglob("*.py")}

    program = ADDITIONS[thing](package)
    touched = [path for path in package.rglob("*.py") if before.get(path) != path.read_bytes()]
    assert len(touched) == COUNTS[thing]

    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("nothing")
