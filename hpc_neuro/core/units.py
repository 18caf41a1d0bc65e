"""Names of length units as microscopes and file formats write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UM_PER_UNIT = {
    "um": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "a": 1e-4,
    "å": 1e-4,
    "pm": 1e-6,
    "inch": 25400.0,
    "inches": 25400.0,
    "in": 25400.0,
    "micron": 1.0,
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "angstrom": 1e-4,
    "ångström": 1e-4,
    "ångstrom": 1e-4,
    "angström": 1e-4,
    "picometer": 1e-6,
}


def um_per(unit: object) -> float | None:
    """Micrometres in one `unit` (um, µm, micron, micrometre, nm, mm, inch ...); None for a text that is no length."""
    if not isinstance(unit, str):
        return None
    # ImageJ writes characters beyond ASCII as escapes, such as \u00B5 for the micro sign.
    text = unit.strip().strip('"')
    text = re.sub(r"\\u([0-9A-Fa-f]{4})", lambda match: chr(int(match[1], 16)), text)

    # Mega and peta differ from milli and pico by nothing but their case.
    if text in ("Mm", "Pm"):
        return None

    # Lower case maps the angstrom sign to the letter å; Unicode has two characters that look like the micro sign.
    text = text.lower().replace("\u00b5", "u").replace("\u03bc", "u").replace("metre", "meter")
    # UTF-8 that was read as latin-1 has an Â before the micro sign.
    text = text.removeprefix("â") if text.startswith("âu") else text
    return _UM_PER_UNIT.get(text) or _UM_PER_UNIT.get(text.removesuffix("s"))


def note_missing_unit(steps: Iterable[float], order: str) -> str:
    """A note for people on steps whose unit the file does not state; `order` names the axes of the steps."""
    numbers = " x ".join(f"{step:.6g}" for step in steps)
    return f"steps {numbers} ({order}) without a unit; give the voxel size in um"
