"""`hpc-neuro fetch-teacher NAME out=FOLDER`: a teacher's weights into a folder, for nodes without internet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.models.teacher import fetch

log = logging.getLogger(__name__)
HELP = """usage: hpc-neuro fetch-teacher NAME out=FOLDER

Run it where there is internet, such as a login node. NAME is a timm ViT, such as vit_small_patch16_224.dino. FOLDER
gets the weights, teacher.json (name, sha256, where from) and LICENCE.txt (what the weights may be used for). Then give
precompute and train  teacher.model=NAME teacher.weights=FOLDER : nothing is looked up on the network any more.
A folder that already holds NAME, with the sha256 it was fetched with, is left as it is."""


def main(argv: Sequence[str]) -> int:
    """Fetch one teacher. Raises ConfigError for wrong words, InputError when the weights cannot be had."""
    words = [a for a in argv if "=" not in a]
    if not words or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return 0 if argv else 2
    keys = [a for a in argv if "=" in a]
    if len(words) != 1 or len(keys) != 1 or not keys[0].startswith("out=") or keys[0] == "out=":
        raise ConfigError(f"fetch-teacher {' '.join(argv)}: want  hpc-neuro fetch-teacher NAME out=FOLDER")
    out = Path(keys[0].removeprefix("out="))
    for line in fetch(words[0], out):
        log.info(line)
    return 0
