"""Which stored axis is z, y, x or channel. An ambiguous array is refused with the `axes=` that settles it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError

_NAMES = {"Z": "z", "Y": "y", "X": "x", "C": "channel", "T": "time", "S": "color sample", "Q": "unnamed"}
_LETTERS = {
    "z": "Z",
    "depth": "Z",
    "plane": "Z",
    "slice": "Z",
    "y": "Y",
    "height": "Y",
    "row": "Y",
    "x": "X",
    "width": "X",
    "column": "X",
    "c": "C",
    "channel": "C",
    "channels": "C",
    "t": "T",
    "time": "T",
}
"""Names of axes as files write them. Any other name leaves open what the axis is: `zoom` is no z."""
_MAX_COLORS = 4
"""An unnamed axis of at most this length may be colors as well as slices."""


@dataclass(frozen=True)
class AxisOrder:
    """How the stored axes become z y x: which three they are, and the index taken on every other axis."""

    axes: str
    """One letter per stored axis."""
    zyx: tuple[int, int, int]
    """Stored axis of z, of y and of x."""
    fixed: tuple[int, ...]
    """Index taken along each stored axis (ignored for z, y, x)."""
    channel: int | None
    """The channel that is read; None where the array has no channel axis."""
    notes: tuple[str, ...] = ()

    @property
    def transposition(self) -> tuple[int, ...]:
        """Order of stored axes with the fixed ones (length 1) first, then z y x."""
        rest = [i for i in range(len(self.axes)) if i not in self.zyx]
        return (*rest, *self.zyx)

    def index(self, box: Box) -> tuple[slice, ...]:
        """The index of `box` in the stored array."""
        parts = [slice(i, i + 1) for i in self.fixed]
        for axis, part in zip(self.zyx, box.slices, strict=True):
            parts[axis] = part
        return tuple(parts)


def resolve_axes(
    path: Path,
    stored: str,
    shape: Sequence[int],
    *,
    axes: str | None,
    channel: int | None,
    names: Sequence[str] = (),
) -> AxisOrder:
    """Decide what the axes of a stored array of `shape` are; the file names them `stored`.

    `names` are the file's own words where they are longer. `axes` overrules the file; `channel` picks one of several.
    Raises InputError for a 2D image, for several time
    points, for an axis without a name, for color samples, and for several channels of which none is chosen.
    """
    # The user's word is final; the file's own names may be missing or ambiguous.
    content = _describe_array(stored, shape, names)
    if axes is None:
        letters = _check_stored_axes(path, stored, content, shape)
    else:
        letters = _check_user_axes(path, axes, content, shape)

    if any(a not in letters for a in "ZYX"):
        raise InputError(f"{path} holds {content}, a 2D image; a 3D stack is wanted{_advise_for_2d(stored, shape)}")

    # ImageJ saves many a stack of slices as time points.
    times = shape[letters.index("T")] if "T" in letters else 1
    if times > 1:
        as_slices = letters.translate(str.maketrans("TZ", "ZT"))
        raise InputError(
            f"{path} holds {content}: {times} time points; one is wanted. If they are slices, say "
            f"axes={as_slices}; otherwise save one time point"
        )

    # Color samples are read one at a time, as channels are.
    chosen, fixed = None, [0] * len(shape)
    for name in "CS":
        if name in letters:
            chosen = _choose_channel(path, content, shape[letters.index(name)], channel, name)
            fixed[letters.index(name)] = chosen
    if chosen is None and channel not in (None, 0):
        raise InputError(f"{path} holds {content}, which has no channel {channel}; leave `channel` out")

    # A note wherever the axes that are read are not those that the file names.
    notes = (f"axes {stored} taken as {letters}",) if letters != stored else ()
    zyx = (letters.index("Z"), letters.index("Y"), letters.index("X"))
    return AxisOrder(letters, zyx, tuple(fixed), chosen, notes)


def default_axes(shape: Sequence[int]) -> str:
    """Axes of an array whose format does not name them: z y x if there are three and the last is not colors."""
    if len(shape) == 2:
        return "YX"

    # 600 x 800 x 3 is more likely a color image than a stack of three columns.
    if len(shape) == 3 and not shape[2] <= _MAX_COLORS < min(shape[:2]):
        return "ZYX"
    return "Q" * len(shape)


def letters_of_names(names: Sequence[object]) -> str:
    """One letter per axis name, Q for a name that is no name of an axis."""
    return "".join(_LETTERS.get(str(name).strip().strip('"').lower(), "Q") for name in names)


def _check_stored_axes(path: Path, stored: str, content: str, shape: Sequence[int]) -> str:
    """The file's own names, without unnamed axes of length 1; InputError for axes that can be read in two ways."""
    letters = _neutralize_single_axes(stored, shape)

    if repeated := [a for a in "ZYXCTS" if letters.count(a) > 1]:
        raise InputError(
            f"{path} holds {content} and names the axis {_NAMES[repeated[0]]} {letters.count(repeated[0])} times; "
            f"say which axes they are, such as axes={_suggest_axes('Q' * len(letters))}"
        )

    # An unnamed axis may be slices, channels or time points.
    if letters.count("Q") or any(a not in _NAMES for a in letters):
        raise InputError(
            f"{path} holds {content} and does not name {'its axes' if set(letters) == {'Q'} else 'all of them'}; "
            f"say which they are, such as axes={_suggest_axes(letters)}"
        )

    # Some writers save a stack of 3 or 4 slices as one RGB or RGBA image.
    if "S" in letters and "Z" not in letters and 1 < shape[letters.index("S")] <= _MAX_COLORS:
        count = shape[letters.index("S")]
        raise InputError(
            f"{path} holds {content}, saved as colors: a 2D color image, or a stack of {count} slices that a writer "
            f"took for one; a 3D stack is wanted. If they are slices, say axes={letters.replace('S', 'Z')}"
        )
    return letters


def _neutralize_single_axes(stored: str, shape: Sequence[int]) -> str:
    """Unnamed, unknown or repeated letters on axes of length 1 become T: a single time point changes nothing."""
    letters = ""
    for letter, count in zip(stored, shape, strict=True):
        # `is_open`: nothing tells what the axis is.
        is_open = letter not in "ZYXCTS" or letter in letters
        letters += "T" if count == 1 and is_open else letter
    return letters


def _suggest_axes(letters: str) -> str:
    """An `axes=` value for the advice in an error; a single open axis is z, else channel, else time."""
    unused = [a for a in "ZCT" if a not in letters]
    if letters.count("Q") == 1 and unused and len(letters) > 2:
        return letters.replace("Q", unused[0])
    return {3: "ZYX, YXC or CYX", 4: "CZYX, ZCYX or TZYX"}.get(len(letters), "TCZYX")


def _check_user_axes(path: Path, axes: str, content: str, shape: Sequence[int]) -> str:
    """The `axes` option in capitals; InputError unless it names each stored axis once."""
    letters = axes.upper()

    # Q is no choice: the option is there to name every axis.
    is_bad = any(a not in "ZYXCTS" or letters.count(a) > 1 for a in letters)
    if is_bad or len(letters) != len(shape):
        raise InputError(
            f"axes={axes} does not fit {path}, which holds {content}; give {len(shape)} different letters of Z Y X C "
            "T, in the order the sizes are listed"
        )
    return letters


def _choose_channel(path: Path, content: str, count: int, channel: int | None, name: str) -> int:
    """The channel to read of `count`; InputError when several are there and none of them is chosen."""
    if channel is None and count == 1:
        return 0

    # The first of several channels is not taken silently: it need not be the neuron's.
    if channel is None or not 0 <= channel < count:
        kind = "channels" if name == "C" else "color samples"
        wrong = "" if channel is None else f"; {channel} is not one of them"
        raise InputError(f"{path} holds {content}: {count} {kind}{wrong}; choose one with channel=0 to {count - 1}")
    return channel


def _advise_for_2d(stored: str, shape: Sequence[int]) -> str:
    """The end of the sentence that refuses a 2D image: the option that opens it as a stack."""
    # The usual reason is a writer that put slices on another axis.
    for name in "CTQS":
        if name in stored and shape[stored.index(name)] > 1:
            return f"; if the {_NAMES[name]} axis is slices, say axes={stored.replace(name, 'Z')}"
    return "; a folder of slices opens by its own path, and axes=ZYX takes this as a stack of one slice"


def _describe_array(stored: str, shape: Sequence[int], names: Sequence[str]) -> str:
    words = names if len(names) == len(shape) else [_NAMES.get(a, a) for a in stored]
    sizes = ", ".join(f"{word} {n}" for word, n in zip(words, shape, strict=True))
    return f"an array of shape {tuple(shape)} with axes {stored} ({sizes})"
