"""Fixtures of the SWC tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.swc_cases import Put


@pytest.fixture
def file(tmp_path: Path) -> Put:
    """Writes a file and gives its path."""

    def put(content: str | bytes, name: str = "a.swc") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put
