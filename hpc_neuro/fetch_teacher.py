"""`hpc-neuro fetch-teacher NAME out=FOLDER`: download a teacher's weights into a folder, for nodes without internet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.models.teacher import fetch

log = logging.getLogger(__name__)
HELP = """usage: hpc-neuro fetch-teacher NAME out=FOLDER

Run it where there is internet, such as a login node. NAME is a timm ViT, such as vit_small_patch16_224.dino. FOLDER
gets the weights, teacher.json (name, sha256, origin) and LICENCE.txt (what the weights may be used for). Then give
precompute and train  teacher.model=NAME teacher.weights=FOLDER : they use no network any more.
A folder that already holds NAME, with the sha256 it was fetched with, is left as it is."""


def main(argv: Sequence[str]) -> int:
    """Fetch one teacher. Raises ConfigError for wrong arguments, InputError if the weights cannot be downloaded."""
    names = [argument for argument in argv if "=" not in argument]
    if not names or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return EXIT_DONE if argv else EXIT_BAD_INPUT

    keys = [argument for argument in argv if "=" in argument]
    if len(names) != 1 or len(keys) != 1 or not keys[0].startswith("out=") or keys[0] == "out=":
        raise ConfigError(f"fetch-teacher {' '.join(argv)}: expected  hpc-neuro fetch-teacher NAME out=FOLDER")

    # What was fetched, and the keys under which the verbs use it.
    for line in fetch(names[0], Path(keys[0].removeprefix("out="))):
        log.info(line)
    return EXIT_DONE
