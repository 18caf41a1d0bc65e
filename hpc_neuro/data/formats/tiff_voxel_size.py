"""Voxel size from a TIFF's tags and from the metadata of ImageJ, OME and Zeiss LSM."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import um_per

Scale = dict[str, float]
"""Micrometers per step by axis letter."""

_UM_PER_RESOLUTION_UNIT = {2: 25400.0, 3: 10000.0}
"""Micrometers in the unit of the tag ResolutionUnit: 2 inch, 3 centimeter."""
_MAX_PIXEL_UM = 100
"""Largest pixel from resolution tags alone: writers fill in 72, 96 or 300 dots per inch, for paper."""


_SINGLE_KEYS = ("unit", "yunit", "zunit", "spacing", "images", "slices", "channels", "frames", "cf", "c0", "c1")
"""Keys of ImageJ's description on which a reading depends."""


def read_spacing(tif: tifffile.TiffFile, series: Any, axes: str) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    """Micrometers along each of `axes` (nan where unknown), and notes. None where the file states no size."""
    scale, notes = _read_scale(tif, series)
    if not scale:
        return None, notes

    # Resolution tags state y and x only.
    if missing := [a for a in "ZYX" if a not in scale]:
        stated = ", ".join(f"{a} {scale[a]:.6g} um" for a in "ZYX" if a in scale)
        notes += (f"the file gives {stated}, but no size along {' '.join(missing)}",)

    # An axis that `axes=` turns into Z takes the distance of slices with it.
    slices = next((i for i, a in enumerate(axes) if a in "ZTQ"), None) if "Z" not in axes else None
    return tuple(scale.get("Z" if i == slices else a, math.nan) for i, a in enumerate(axes)), notes


def _read_scale(tif: tifffile.TiffFile, series: Any) -> tuple[Scale, tuple[str, ...]]:
    """The voxel size from the most specific metadata that the file has."""
    if series.kind == "ome" and tif.ome_metadata:
        images = [s for s in tif.series if s.kind == "ome"]
        return _parse_ome(tif.ome_metadata, next(i for i, s in enumerate(images) if s is series), len(images))
    if tif.is_lsm and tif.lsm_metadata:
        # LSM states meters.
        meta = tif.lsm_metadata
        return {a: float(meta[f"VoxelSize{a}"]) * 1e6 for a in "ZYX" if meta.get(f"VoxelSize{a}")}, ()

    plane = _read_resolution(series.keyframe)
    if tif.is_imagej:
        return _parse_imagej(tif.imagej_metadata or {}, plane)
    notes = _note_unused_ome(str(tif.ome_metadata)) if tif.is_ome else ()

    # Plain TIFF: the tags alone, if they can be those of a microscope.
    unit = series.keyframe.tags.get("ResolutionUnit")
    per = _UM_PER_RESOLUTION_UNIT.get(int(unit.value) if unit else 0)
    if per is None or not plane or min(plane.values()) * per > _MAX_PIXEL_UM:
        return {}, notes
    return {a: v * per for a, v in plane.items()}, notes


def _parse_imagej(meta: dict[str, Any], plane: Scale) -> tuple[Scale, tuple[str, ...]]:
    """ImageJ keeps the pixel size in the resolution tags, its unit and the distance of slices in a description."""
    steps = dict(plane)
    distance = parse_number(meta.get("spacing", 0) or 0)
    if distance is None:
        return {}, (f"the distance of slices is {meta['spacing']!r}, which is no number; give the voxel size in um",)
    if distance > 0:
        steps["Z"] = distance

    # ImageJ writes 1 x 1 for an image that is not calibrated.
    if not steps or steps == {"Y": 1.0, "X": 1.0}:
        return {}, ()

    # Axes whose unit is no length, such as pixel, have no size; the others keep theirs.
    units = {letter: imagej_unit(meta, letter) for letter in steps}
    per = {letter: um_per(unit) for letter, unit in units.items()}
    scale = {letter: step * (per[letter] or 0.0) for letter, step in steps.items() if per[letter]}
    if len(scale) == len(steps):
        return scale, ()
    texts = ", ".join(repr(unit) for unit in dict.fromkeys(units[a] for a in steps if a not in scale))
    sizes = ", ".join(f"{a} {steps[a]:.6g}" for a in "ZYX" if a in steps and a not in scale)
    return scale, (f"steps {sizes} in the unit {texts}, which is no length; give the voxel size in um",)


def require_single_values(path: Path, description: str) -> None:
    """Raise InputError for an ImageJ description that states one key twice, with different values."""
    values: dict[str, str] = {}
    for line in description.splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if equals and key in _SINGLE_KEYS and values.setdefault(key, value) != value:
            raise InputError(
                f"{path}: its ImageJ description states {key} twice, as {values[key]} and {value}; open the image in "
                "ImageJ, set Image > Properties, and save it again"
            )


def parse_number(value: object) -> float | None:
    """A number of ImageJ's metadata; None for a text that is none, such as `2,5`."""
    try:
        return float(str(value))
    except ValueError:
        return None


def imagej_unit(meta: dict[str, Any], letter: str) -> str:
    """The unit of one axis in ImageJ's metadata: `unit` is that of x; y and z have their own where they differ."""
    own = meta.get(f"{letter.lower()}unit") if letter in "YZ" else None
    return str(own if own is not None else meta.get("unit", "")).strip()


def _read_resolution(page: Any) -> Scale:
    """Steps along Y and X in the file's unit, from the resolution tags."""
    steps: Scale = {}
    for name, letter in (("YResolution", "Y"), ("XResolution", "X")):
        # A resolution is a fraction: pixels / units.
        tag = page.tags.get(name)
        if tag is not None and isinstance(tag.value, tuple) and len(tag.value) == 2 and all(tag.value):
            steps[letter] = tag.value[1] / tag.value[0]

    return steps


def _note_unused_ome(text: str) -> tuple[str, ...]:
    """A note on an OME description that says nothing of the pages: it is damaged, or stands in another file."""
    with contextlib.suppress(ElementTree.ParseError):
        for element in ElementTree.fromstring(text).iter():
            if element.tag.rpartition("}")[2] == "BinaryOnly":
                return (f"its OME description is in {element.get('MetadataFile')}, which is not read",)
    return ("its OME description does not fit its pages and is not used",)


def _parse_ome(text: str, number: int, count: int) -> tuple[Scale, tuple[str, ...]]:
    """The physical sizes of image `number` of the `count` that the file holds, from its OME description."""
    root = ElementTree.fromstring(text)
    # Namespaces differ between versions of the schema, and some writers leave them out.
    pixels = [e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"]
    if not pixels:
        return {}, ()

    # Images whose pages lie in files that are missing leave open which of them the others are.
    sizes = [_parse_ome_pixels(element.attrib) for element in pixels]
    if len(pixels) != count and any(size != sizes[0] for size in sizes):
        note = f"its OME description is of {len(pixels)} images of several voxel sizes, and {count} of them are here"
        return {}, (f"{note}; give the voxel size in um",)
    return sizes[min(number, len(sizes) - 1)]


def _parse_ome_pixels(attributes: Mapping[str, str]) -> tuple[Scale, tuple[str, ...]]:
    """The physical sizes that one `Pixels` element states."""
    scale: Scale = {}
    notes: tuple[str, ...] = ()
    for letter in "ZYX":
        text = attributes.get(f"PhysicalSize{letter}", "nan")
        size = parse_number(text)
        if size is None:
            notes += (f"PhysicalSize{letter} is {text!r}, which is no number; give the voxel size in um",)
            continue

        # um is the schema's default.
        unit = attributes.get(f"PhysicalSize{letter}Unit", "um")
        per = um_per(unit)
        if per is None and math.isfinite(size):
            notes += (f"PhysicalSize{letter} is in {unit!r}, which is no length; give the voxel size in um",)
        elif per is not None and math.isfinite(size) and size > 0:
            scale[letter] = size * per
    return scale, notes
