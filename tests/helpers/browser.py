"""Pages in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_PROBE = """<script>
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const over = [...document.querySelectorAll(".scroll")].map((s) => s.scrollWidth - s.clientWidth);
  document.body.dataset.over = over.join(" ");
  document.body.dataset.page = document.documentElement.scrollWidth - innerWidth;
</script></body>"""
"""Opens all parts of a page and measures how far its tables, and the page itself, are wider than the screen."""


def measure_excess(page: str, width: int, folder: Path) -> tuple[list[int], int]:
    """[pixel] How far each table of a page exceeds its place on a screen of this width, and how far the page does.

    page: its text. folder: for files of the browser. Skips the test where there is no Chromium.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here; install it (apt-get install chromium) to run this test")

    file = folder / "page.html"
    file.write_text(page.replace("</body>", _PROBE), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command = [browser, *flags, f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    tables = re.search(r'data-over="([^"]+)"', run.stdout)
    whole = re.search(r'data-page="(-?\d+)"', run.stdout)
    assert tables, run.stderr[-2000:]
    assert whole, run.stderr[-2000:]
    return [int(pixels) for pixels in tables[1].split()], int(whole[1])
