"""Commands that only check their input answer at once: they import no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_neuro.pipeline import VERBS

CONFIGURED = [name for name, verb in VERBS.items() if verb.config]
COMMANDS = {
    "help": (["--help"], 0),
    **{f"{name} help": ([name, "--help"], 0) for name in ("train", "infer")},
    **{f"{name} config error": ([name, "nosuchkey=1"], 2) for name in CONFIGURED},
    "swc check": (["swc", "check", "tree.swc"], 0),
    "info of a tree": (["info", "tree.swc"], 0),
    "info of a missing file": (["info", "nothing.tif"], 2),
    "runs": (["runs", "."], 0),
    "score": (["score", "tree.swc", "tree.swc"], 0),
}
HEAVY = {"torch", "deepspeed", "timm", "wandb", "matplotlib"}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_heavy_package_is_imported(name: str, tmp_path: Path) -> None:
    arguments, code = COMMANDS[name]
    (tmp_path / "tree.swc").write_text("1 1 0 0 0 5 -1\n2 3 6 0 0 1 1\n")
    command = [sys.executable, "-X", "importtime", "-m", "hpc_neuro", *arguments]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr[-1000:]

    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", process.stderr, re.MULTILINE))
    assert "hpc_neuro.cli" in imported
    assert not imported & HEAVY
