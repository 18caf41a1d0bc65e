"""Which stored axis is z, y, x or channel: never guessed where it could be otherwise, the error names the `axes=`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError

_NAMES = {"Z": "z", "Y": "y", "X": "x", "C": "channel", "T": "time", "S": "colour sample", "Q": "unnamed"}
_FEW = 4  # an unnamed axis this short may be colours as well as slices


@dataclass(frozen=True)
class AxisOrder:
    """How the stored axes become z y x: which three they are, and the fixed index on every other."""

    axes: str
    order: tuple[int, int, int]  # stored axis of z, y, x; z is len(axes) - like every axis - of the stored array
    fixed: tuple[int, ...]  # index taken along each stored axis (ignored for z, y, x)
    channel: int | None
    notes: tuple[str, ...] = ()

    @property
    def transposition(self) -> tuple[int, ...]:
        """Order of stored axes that puts the fixed ones (length 1) first, then z y x."""
        rest = [i for i in range(len(self.axes)) if i not in self.order]
        return (*rest, *self.order)

    def index(self, box: Box) -> tuple[slice, ...]:
        """The part of the stored array that is `box`."""
        parts = [slice(i, i + 1) for i in self.fixed]
        for i, part in zip(self.order, box.slices, strict=True):
            parts[i] = part
        return tuple(parts)


def resolve_axes(path: Path, found: str, shape: Sequence[int], *, axes: str | None, channel: int | None) -> AxisOrder:
    """Settle the axes of a stored array of `shape` whose file names them `found`.

    `axes` overrules the file; `channel` picks one of several. Raises InputError for a 2D image, for several time
    points, for an axis without a name, for colour samples, and for several channels of which none is chosen.
    """
    has = _has(found, shape)
    letters = _given(path, axes, has, shape) if axes is not None else _known(path, found, has, shape)
    missing = [a for a in "ZYX" if a not in letters]
    if missing:
        raise InputError(f"{path} holds {has}, a 2D image; a 3D stack is wanted{_advice(found, shape)}")
    times = shape[letters.index("T")] if "T" in letters else 1
    if times > 1:
        raise InputError(
            f"{path} holds {has}: {times} time points; one is wanted. If they are slices, say "
            f"axes={_as_slices(letters)}; otherwise save one time point"
        )
    chosen, fixed = None, [0] * len(shape)
    for name in "CS":
        if name in letters:
            count = shape[letters.index(name)]
            chosen = _channel(path, has, count, channel, name)
            fixed[letters.index(name)] = chosen
    if chosen is None and channel not in (None, 0):
        raise InputError(f"{path} holds {has}, which has no channel {channel}; leave `channel` out")
    notes = (f"axes {found} taken as {letters}",) if letters != found else ()
    order = (letters.index("Z"), letters.index("Y"), letters.index("X"))
    return AxisOrder(letters, order, tuple(fixed), chosen, notes)


def default_axes(shape: Sequence[int]) -> str:
    """Axes of an array whose format does not name them: z y x when there are three and nothing speaks for colours."""
    if len(shape) == 2:
        return "YX"
    if len(shape) == 3 and not shape[2] <= _FEW < min(shape[:2]):
        return "ZYX"
    return "Q" * len(shape)


def _known(path: Path, found: str, has: str, shape: Sequence[int]) -> str:
    """The file's own names, with unnamed axes of length 1 let go; refuses what could be read in two ways."""
    letters = [("T" if a == "Q" and n == 1 else a) for a, n in zip(found, shape, strict=True)]
    letters = _only_once(letters, shape)
    if letters.count("Q") or any(a not in _NAMES for a in letters):
        choice = "CZYX, ZCYX or TZYX" if len(shape) == 4 else "ZYX, YXC or CYX" if len(shape) == 3 else "TCZYX"
        if letters.count("Q") == 1 and "Z" not in letters:
            choice = "".join(letters).replace("Q", "Z")
        raise InputError(f"{path} holds {has} and does not name its axes; say which they are, such as axes={choice}")
    text = "".join(letters)
    if "S" in letters and "Z" not in letters and 1 < shape[text.index("S")] <= _FEW:
        count = shape[text.index("S")]
        raise InputError(
            f"{path} holds {has}, saved as colours: a 2D colour image, or a stack of {count} slices that a writer took "
            f"for one; a 3D stack is wanted. If they are slices, say axes={text.replace('S', 'Z')}"
        )
    return text


def _only_once(letters: list[str], shape: Sequence[int]) -> list[str]:
    """Repeated or unknown letters on axes of length 1 become harmless."""
    return ["T" if shape[i] == 1 and (a not in "ZYXCTS" or a in letters[:i]) else a for i, a in enumerate(letters)]


def _given(path: Path, axes: str, has: str, shape: Sequence[int]) -> str:
    letters = axes.upper()
    wrong = sorted({a for a in letters if a not in "ZYXCTS"} | {a for a in letters if letters.count(a) > 1})
    if wrong or len(letters) != len(shape):
        raise InputError(
            f"axes={axes} does not fit {path}, which holds {has}; give {len(shape)} different letters of Z Y X C T, "
            "in the order the sizes are listed"
        )
    return letters


def _channel(path: Path, has: str, count: int, channel: int | None, name: str) -> int:
    if channel is None and count == 1:
        return 0
    if channel is None or not 0 <= channel < count:
        what = "channels" if name == "C" else "colour samples"
        asked = "" if channel is None else f"; {channel} is not one of them"
        raise InputError(f"{path} holds {has}: {count} {what}{asked}; choose one with channel=0 to {count - 1}")
    return channel


def _advice(found: str, shape: Sequence[int]) -> str:
    for name in "CTQS":  # a writer that put slices on the wrong axis is the usual reason
        if name in found and shape[found.index(name)] > 1:
            return f"; if the {_NAMES[name]} axis is slices, say axes={found.replace(name, 'Z')}"
    return "; a folder of slices opens by its own path, and axes=ZYX takes this as a stack of one slice"


def _as_slices(letters: str) -> str:
    return letters.translate(str.maketrans("TZ", "ZT"))


def _has(found: str, shape: Sequence[int]) -> str:
    names = ", ".join(f"{_NAMES.get(a, a)} {n}" for a, n in zip(found, shape, strict=True))
    return f"an array of shape {tuple(shape)} with axes {found} ({names})"
