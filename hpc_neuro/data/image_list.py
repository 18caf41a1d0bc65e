"""The images that a path of the command line names."""

from __future__ import annotations

from pathlib import Path

from hpc_neuro.core import run_folder
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import image_stem, open_volume
from hpc_neuro.data.remote_path import RemotePath


def expand_images(named: Path) -> list[Path]:
    """The images that a path of the command line names: itself, those of a folder in natural order, or of a pattern.

    Raises InputError for a pattern without a match and for a folder without images.
    """
    if isinstance(named, RemotePath):
        return [named]

    # A pattern reaches the program where the shell does not expand it.
    if not named.exists() and any(character in str(named) for character in "*?["):
        anchor = Path(named.anchor)
        paths = sorted(anchor.glob(str(named.relative_to(anchor))))
        if not paths:
            raise InputError(f"no file matches {named}; give the path of an image")
        return [path for path in paths if path.is_dir() or image_stem(path)]

    if not named.is_dir():
        return [named]

    # A folder is an image itself, such as an OME-Zarr or a series of slices, or it holds images.
    try:
        open_volume(named)
    except InputError:
        images = [path for path in named.iterdir() if not path.name.startswith(".") and image_stem(path)]
        if not images:
            raise
        return sorted(images, key=lambda path: run_folder.natural_key(path.name))
    return [named]
