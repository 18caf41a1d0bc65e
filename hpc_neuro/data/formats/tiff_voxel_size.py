"""Voxel size from a TIFF's tags and from the metadata of ImageJ, OME and Zeiss LSM."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import tifffile

from hpc_neuro.data.formats.units import um_per

Scale = dict[str, float]
"""Micrometres per step by axis letter."""


def spacing(tif: tifffile.TiffFile, series: Any, axes: str) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    """Micrometres along each of `axes` (nan where unknown), and remarks. None where the file says nothing."""
    scale, notes = _found(tif, series)
    if not scale:
        return None, notes
    if missing := [a for a in "ZYX" if a not in scale]:
        known = ", ".join(f"{a} {scale[a]:.6g} um" for a in "ZYX" if a in scale)
        notes += (f"the file gives {known}, but no size along {' '.join(missing)}",)
    depth = next((i for i, a in enumerate(axes) if a in "ZTQ"), None) if "Z" not in axes else None
    # an axis that `axes=` turns into Z takes the slice distance with it
    return tuple(scale.get("Z" if i == depth else a, math.nan) for i, a in enumerate(axes)), notes


def _found(tif: tifffile.TiffFile, series: Any) -> tuple[Scale, tuple[str, ...]]:
    if series.kind == "ome" and tif.ome_metadata:
        number = next((i for i, s in enumerate(tif.series) if s is series), 0)
        return _ome(tif.ome_metadata, number)
    if tif.is_lsm and tif.lsm_metadata:
        meta = tif.lsm_metadata
        return {a: float(meta[f"VoxelSize{a}"]) * 1e6 for a in "ZYX" if meta.get(f"VoxelSize{a}")}, ()
    plane = _resolution(series.keyframe)
    if tif.is_imagej:
        return _imagej(tif.imagej_metadata or {}, plane)
    unit = series.keyframe.tags.get("ResolutionUnit")
    per = {2: 25400.0, 3: 10000.0}.get(int(unit.value) if unit else 0)
    if per is None or "Y" not in plane or plane["Y"] >= 100 / 25400 * 0.99:
        # writers fill in 72, 96 or 300 dots per inch for paper; a microscope's pixel is far smaller
        pass
    if per is None or not plane or min(plane.values()) * per > 100:
        return {}, ()
    return {a: v * per for a, v in plane.items()}, ()


def _imagej(meta: dict[str, Any], plane: Scale) -> tuple[Scale, tuple[str, ...]]:
    unit = str(meta.get("unit", "")).strip()
    per = um_per(unit)
    steps = dict(plane)
    if float(meta.get("spacing", 0) or 0) > 0:
        steps["Z"] = float(meta["spacing"])
    if not steps or steps == {"Y": 1.0, "X": 1.0}:
        return {}, ()
    if per is None:
        sizes = ", ".join(f"{a} {steps[a]:.6g}" for a in "ZYX" if a in steps)
        return {}, (f"steps {sizes} in the unit {unit!r}, which is no length; give the voxel size in um",)
    return {a: v * per for a, v in steps.items()}, ()


def _resolution(page: Any) -> Scale:
    """Steps along Y and X in the file's unit, from the resolution tags."""
    steps: Scale = {}
    for name, a in (("YResolution", "Y"), ("XResolution", "X")):
        tag = page.tags.get(name)
        if tag is not None and isinstance(tag.value, tuple) and len(tag.value) == 2 and all(tag.value):
            steps[a] = tag.value[1] / tag.value[0]
    return steps


def _ome(text: str, number: int) -> tuple[Scale, tuple[str, ...]]:
    root = ElementTree.fromstring(text)
    pixels = [e for e in root.iter() if e.tag.endswith("}Pixels")]
    if not pixels:
        return {}, ()
    found = pixels[min(number, len(pixels) - 1)].attrib
    scale: Scale = {}
    notes: tuple[str, ...] = ()
    for a in "ZYX":
        size = float(found.get(f"PhysicalSize{a}", "nan"))
        unit = found.get(f"PhysicalSize{a}Unit", "um")  # the schema's default
        per = um_per(unit)
        if per is None and math.isfinite(size):
            notes += (f"PhysicalSize{a} is in {unit!r}, which is no length; give the voxel size in um",)
        elif per is not None and math.isfinite(size) and size > 0:
            scale[a] = size * per
    return scale, notes
