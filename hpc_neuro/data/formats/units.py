"""Names of length units as microscopes and file formats write them."""

from __future__ import annotations

from collections.abc import Iterable

_UM_PER_UNIT = {
    "um": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "a": 1e-4,
    "pm": 1e-6,
    "inch": 25400.0,
    "in": 25400.0,
    "micron": 1.0,
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "angstrom": 1e-4,
    "picometer": 1e-6,
}


def um_per(unit: str | None) -> float | None:
    """Micrometres in one `unit` (um, µm, micron, micrometre, nm, mm, inch ...); None for a text that is no length."""
    text = (unit or "").strip().strip('"')

    # ImageJ writes the micro sign as an escape; Unicode has two characters that look like it.
    for micro in ("\\u00B5", "\u00b5", "\u03bc"):
        text = text.replace(micro, "u")

    text = text.lower().replace("metre", "meter")
    return _UM_PER_UNIT.get(text) or _UM_PER_UNIT.get(text.removesuffix("s"))


def note_missing_unit(steps: Iterable[float], order: str) -> str:
    """A note for people on steps whose unit the file does not state; `order` names the axes of the steps."""
    numbers = " x ".join(f"{step:.6g}" for step in steps)
    return f"steps {numbers} ({order}) without a unit; give the voxel size in um"
