"""The documentation site builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed; `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_page_is_built_for_each_text(site: Path) -> None:
    pages = {page.stem for page in site.glob("*.html")} - {"404"}
    assert pages == {text.stem for text in (REPO / "docs").glob("*.md")}
    assert (site / "images" / "overview.png").is_file()


def test_the_generated_reference_is_part_of_it(site: Path) -> None:
    assert "trace.threshold" in (site / "settings.html").read_text(encoding="utf-8")
    assert 'id="trace_probability"' in (site / "api.html").read_text(encoding="utf-8")
    # A table directly after a comment must not be taken for text.
    for name in ("exit_codes", "metrics", "cluster_settings", "api"):
        assert "| ---" not in (site / f"{name}.html").read_text(encoding="utf-8")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="?(https?://[^" >]+)')
    for page in site.glob("*.html"):
        addresses = loads.findall(page.read_text(encoding="utf-8"))
        assert addresses == [], page.name
