"""Names of length units as microscopes and file formats write them."""

from __future__ import annotations

_UM = {
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
    """Micrometres in one `unit` (um, µm, micron, micrometre, nm, mm, inch ...); None for what is no length."""
    text = (unit or "").strip().strip('"').replace("\\u00B5", "u").replace("\u00b5", "u").replace("\u03bc", "u")
    text = text.lower().replace("metre", "meter")
    return _UM.get(text) or _UM.get(text.removesuffix("s"))
