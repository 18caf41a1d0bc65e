"""The name of a volume from that of its image file, alike in every verb."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

ENDINGS = (
    *(".tif", ".tiff", ".btf", ".tf8", ".lsm", ".nii", ".nii.gz", ".hdr", ".img", ".nrrd", ".nhdr", ".am", ".amira"),
    *(
        ".h5",
        ".hdf5",
        ".hdf",
        ".ims",
        ".n5h5",
        ".v3draw",
        ".raw",
        ".vaa3draw",
        ".v3dpbd",
        ".zarr",
        ".n5",
        ".precomputed",
    ),
)
"""Endings of image files and folders; a test keeps them complete."""
_SECOND_ENDINGS = (".ome",)
"""Endings before the last one: neuron.ome.tif is an image of `neuron`."""


_SYSTEM_BEGINNINGS = (".", "~$", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__MACOSX")
"""Begins of names: hidden files, those that are open in an office program, thumbnails of network drives, and bins."""


_RESULT_ENDINGS = (".voxel", ".deleted")
"""What stands between the name of a volume and .swc in some of its results."""


def strip_ending(path: Path) -> str:
    """The name of an image without its endings; other dots stay: brain.1.tif and brain.2.tif are two volumes."""
    name = path.name
    # The longest ending wins: .nii.gz before .gz.
    ending = max((e for e in ENDINGS if name.lower().endswith(e)), key=len, default="")
    for second in _SECOND_ENDINGS:
        if ending and name.lower().endswith(second + ending):
            ending = second + ending
    # A file that is named like an ending has no other name.
    return name[: len(name) - len(ending)] or name


def is_system_file(path: Path) -> bool:
    """Whether a file or folder is a system's or a program's own, such as `._NAME` of macOS on other disks."""
    return path.name.startswith(_SYSTEM_BEGINNINGS)


def find_clash(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Two different names whose results would be the same files, and why; None where all are distinct.

    The trees of NAME are NAME.swc and NAME.voxel.swc, what was deleted from it is NAME.deleted.swc. The reason follows
    the two names in a sentence. Names that differ in case only are two on some file systems and one on others.
    """
    owners: dict[str, str] = {}
    for name in dict.fromkeys(names):
        look = _fold(name)
        for form in (look, *(f"{look}{ending}" for ending in _RESULT_ENDINGS)):
            owner = owners.setdefault(form, name)
            if owner != name:
                return owner, name, _explain_clash(owner, name)
    return None


def _fold(name: str) -> str:
    """One text for all names that a file system may take for the same."""
    # macOS writes an accented letter as two characters, and takes both forms for one name.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _explain_clash(first: str, second: str) -> str:
    if unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second):
        return "look the same, and would share files"
    if _fold(first) == _fold(second):
        return "differ in capitals only, and would share files on a file system that ignores case"
    return "would share files"
