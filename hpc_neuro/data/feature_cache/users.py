"""Which trainings read a cache: one small file each, so that many may start at once."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import platform
from pathlib import Path
from typing import Any

from hpc_neuro.core import files
from hpc_neuro.data.feature_cache.layout import USES

log = logging.getLogger(__name__)


def record_use(cache: Path, out: Path) -> None:
    """Note that the training in `out` reads `cache`; a second start of it keeps the first date."""
    where = str(out.resolve())
    path = cache / USES / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    try:
        files.write_json(path, {"out": where, "host": platform.node(), "first": now})
    except PermissionError:
        log.info("%s is read-only: `hpc-neuro cache info` will not list this training", cache)


def list_uses(cache: Path) -> list[dict[str, Any]]:
    """What `record_use` wrote, the earliest first: {"out", "host", "first"}."""
    found = [files.read_json(p, "remove it") for p in (cache / USES).glob("*.json")]
    return sorted(found, key=lambda use: str(use["first"]))
