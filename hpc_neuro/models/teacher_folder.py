"""A folder that holds one teacher: its weights, `teacher.json` and LICENCE.txt. Needs no network and no timm."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError

NOTE = "teacher.json"
LICENCE = "LICENCE.txt"


@dataclass(frozen=True)
class _Note:
    """What teacher.json says of the weights; see `keep` for the rest."""

    name: str
    file: str
    sha256: str


def advice(name: str) -> str:
    """How to get the weights of a teacher to where there is no internet."""
    return (
        f"where there is internet run `hpc-neuro fetch-teacher {name} out=FOLDER` and give teacher.weights=FOLDER, or "
        "use teacher.model=bundled"
    )


def weights_of(path: Path, name: str) -> tuple[Path, str | None]:
    """The weights file that `path` is, or holds as a fetched folder, and the sha256 it must have (None: not stated).

    Raises InputError for a folder that is no teacher's, or another teacher's.
    """
    if not path.is_dir():
        return path, None

    note = files.read_json(path / NOTE, advice(name), _Note)
    # Another teacher's weights can have the same shapes and would load without a word.
    if note.name != name:
        raise InputError(
            f"{path} holds the teacher {note.name}, but teacher.model is {name}; set it to that, or " + advice(name)
        )

    return files.resolve_inside(path, note.file, path / NOTE, advice(name)), note.sha256


def find_weights(out: Path, name: str) -> list[str]:
    """A line for people when the folder `out` already holds the teacher, unchanged; nothing when it is to be fetched.

    Raises InputError when `out` is there and is something else.
    """
    if not out.exists():
        return []

    file, digest = weights_of(out, name) if (out / NOTE).exists() else (out, None)
    if digest is None:
        raise InputError(f"{out} is there and holds no fetched teacher; give another out=FOLDER")

    # A damaged file counts as missing, so that it is fetched again.
    sound = file.exists() and files.sha256(file) == digest
    return [f"{out} already holds {name}, sha256 {digest}"] if sound else []


def keep(out: Path, name: str, source: Path, card: Mapping[str, Any]) -> list[str]:
    """Copy weights into the folder `out`, which appears whole or not at all; returns lines for people.

    card: timm's description of the weights.
    """
    digest, terms = files.sha256(source), str(card.get("license") or "not stated by timm")
    origin = str(card.get("hf_hub_id") or card.get("url") or "not stated by timm")

    # A full disk is noticed before the copy begins.
    files.require_space(out.parent, source.stat().st_size, f"the teacher {name}")
    with files.explain_full_disk(out.parent, f"the teacher {name}"), files.atomic(out) as part:
        part.mkdir()
        shutil.copyfile(source, part / f"model{source.suffix}")

        files.write_json(
            part / NOTE,
            {
                "name": name,
                "file": f"model{source.suffix}",
                "sha256": digest,
                "origin": origin,
                "licence": terms,
                "fetched": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            },
        )

        # The license goes where the weights go, because their users may never see the hub's page.
        files.write_text(
            part / LICENCE,
            f"Weights of {name}, from {origin}.\nLicense, as timm states it: {terms}.\n"
            f"Paper: {card.get('paper_name') or 'not stated'} {card.get('paper_ids') or ''}\n"
            "Read the license at the origin before you publish or sell what was trained with these weights.\n",
        )

    return [
        f"{name}: {files.format_bytes(source.stat().st_size)}, sha256 {digest}, license {terms}, in {out}",
        f"use it with  teacher.model={name} teacher.weights={out}",
    ]
