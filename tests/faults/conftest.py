"""A finished demo that the tests of damage share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.test_demo import command, environment


@pytest.fixture(scope="session")
def damaged_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo, to be damaged and repaired in place: configs name folders by absolute paths."""
    out = tmp_path_factory.mktemp("damage") / "out"
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=280, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out
