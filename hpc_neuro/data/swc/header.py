"""What the comment lines of an SWC file state: the unit, the voxel size and the names of the columns.

The format has no field for a unit, so every program has words of its own. What is read here, in any case:

    unit: um | units nm | UNITS = "microns"             this package, Imaris and converters
    All positions and radii in µm                       SNT; also `in pixels`
    x, y, z = coordinates (um) | x_nm y_nm z_nm         tables with units in the names
    # Meta: {"units": "8 nanometer"}                    navis
    SCALE 1.0 1.0 1.0 | edited ... using StdSwc         NeuroMorpho and cvapp: um, unless another unit is stated
    Voxel separation (x,y,z): 0.33, 0.33, 1.0           SNT, in the unit of the positions
    voxel size (x, y, z) = (0.1, 0.1, 0.3) um/pixel     sizes that name the order of their axes
    id type x y z radius parent                         the columns
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.core.units import um_per

Unit = str
"""`um`, `voxel`, or another length such as `nm` or `8 nm`."""

WRITTEN_BY = "written by hpc_neuro"
"""Begin of the first line of a file that `write` made."""
COLUMNS = ("id", "type", "x", "y", "z", "radius", "parent")
"""The columns of an SWC file, in their order."""
DIAMETER = "diameter"
"""Name of the sixth column where it does not hold the radius."""

_SYMBOLS = {1.0: "um", 1e-3: "nm", 1e3: "mm", 1e4: "cm", 1e6: "m", 1e-4: "angstrom", 1e-6: "pm", 25400.0: "inch"}
"""Micrometres -> name of a unit."""

# Micro signs that were lost or read in another encoding. Nothing else than µm is one lost character before an m.
_LOST_MICRO = re.compile(r"(?:[âÂ]?[\u00b5\u03bc]|\\u00b5|\\u03bc|&micro;|&mu;|\u00a6\u00cc|[?\ufffd]+)(?=m)", re.I)

_WORD = (
    r"(?P<word>u\s?m|microns?|micro-?\s?met(?:er|re)s?|nm|nano-?met(?:er|re)s?|mm|milli-?met(?:er|re)s?|cm|"
    r"centi-?met(?:er|re)s?|met(?:er|re)s?|pm|pico-?met(?:er|re)s?|[åa]ngstr[oö]ms?|å|inch(?:es)?|voxels?|vox|vx|"
    r"pixels?|pix|px)"
    # Not `um/pixel`, `um per voxel`, `um^2`, `um3`, `um * 10` or the beginning of another word.
    r"(?![\w/^\u00b2\u00b3]|\s*/|\s*[*x\u00d7\u00b7]\s*\d|\s+per\b|"
    r"\s+(?:size|sep|spacing|dim|res|scal|width|height|pitch))"
)
_FACTOR = r"(?P<factor>\d+(?:\.\d+)?(?:e[-+]?\d+)?)?\s*"
_OPEN = r"[\s:=\"'(\[{<`,;|>-]*"
_SUBJECT = (
    r"(?:positions?|coordinates?|coords?|locations?|points?|nodes?|samples?|vertices|radii|radius|diameters?|values?|"
    r"numbers|lengths?|distances?|measures|measurements?|dimensions?|data|all|everything|swc|tree|x\W{0,3}y\W{0,3}z)"
)
_NOUN = (
    r"(?<![^\W_])(?:(?:length|spatial|space|distance|position|coordinate|world|physical)[\s_]?)?"
    r"(?:units?|einheit(?:en)?|unit[ée]s?|unidad(?:es)?|unit[àa]|单位|単位)(?![^\W_])"
)
"""`unit` in the languages of microscopy programs, also as a part of a key such as `lengthUnit`."""
_AXIS = r"(?:[\"']?[xyzr][\"']?\s*[:=]\s*[\"']?)?"
"""The axis that a unit is of, as in `x=um`."""
_UNIT_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # unit: um, units of length are nm, "units": "8 nanometer"
        rf"{_NOUN}(?:[\s_]+of[\s_]+(?:\w+\s+){{0,3}}?(?:\w+))?{_OPEN}(?:(?:is|are|in|as)\b{_OPEN})?"
        rf"{_AXIS}{_FACTOR}{_WORD}",
        # in micron units, in pixel coordinates
        rf"\b(?:in|uses?|using)\s+{_WORD}\s+(?:units?|coordinates?|space|index|indices)\b",
        # all positions and radii in um, coordinates (nm), radius at the point [um]
        rf"\b{_SUBJECT}\b[^;.]{{0,80}}?(?:\b(?:in|are|is|as|(?:converted|scaled) to)\s+|[:=(\[]\s*){_WORD}",
        # x_um, y [nm], radius(um), z/um
        rf"\b(?:x|y|z|r|rad|radius|diam|diameter)\s?[(\[_/]\s*{_WORD}",
        # r in um
        rf"\b[xyzr]\s+(?:(?:is|are)\s+)?in\s+{_WORD}",
        # a line of nothing else
        rf"^(?:in\s+)?[(\[]?{_WORD}[)\]]?\.?$",
    )
)
_FURTHER_UNIT = re.compile(rf"[\s,;\"')\]]+(?:and\s+)?{_AXIS}{_FACTOR}{_WORD}")
"""A unit behind another one, as in `um, um, nm`."""
_OTHER_QUANTITY = re.compile(
    r"(?:\b(?:time|temporal|intensity|angle|angular|voltage|current)|(?:size|spacing|resolution|separation)s?)[\s_-]*$"
)
"""What stands before `unit` where it is that of something else than the coordinates."""
_STATED_UNIT = re.compile(
    rf"^\W*(?P<before>(?:\w+\s+){{0,3}}?)(?:{_NOUN}[^:=\w]*(?:[:=]|\b(?:is|are|in)\b)|{_NOUN}(?=\s+\S+$))\s*(?P<unit>\S.*)$"
)
"""A line that states a unit, known or not."""
_STATED_IN = re.compile(
    rf"^\W*(?P<before>)(?:all\s+)?{_SUBJECT}(?:\s+and\s+{_SUBJECT})?\s+(?:are\s+)?in\s+"
    r"(?!(?:ras|lps|lpi|ccf\w*|xyz|zyx|order|this|file|image|space|brackets|parentheses)\b)(?P<unit>[^\W\d]+)\W*$"
)
"""A line such as `All positions and radii in UNIT`, with a unit that is known or not."""
_Z_IN_SLICES = re.compile(
    r"\bz\b[\s\"'\]]{0,3}(?:coordinates?\s+)?(?:(?:is|are)\s+)?(?:in|[:=(\[])\s*[\"']?(?:optical\s+)?"
    r"(?:slices?|sections?|planes?|frames?|layers?)\b"
)
"""Words that count z in slices, while the other axes have a unit."""
_NO_UNIT = re.compile(
    r"^\W*(?:none|null|nan|n/?a|n\.a\.?|a\.?u\.?|arbitrary|unitless|dimensionless|unspecified|undefined|missing)?\W*$|"
    r"[^\W\d]\s*(?:/\s*(?!\d)|per\b|\^|[\u00b2\u00b3]|[23]\b)"
)
"""What stands for no unit, and units of other quantities such as um/voxel."""
_EARLIER = re.compile(r"\b(?:original(?:ly)?|formerly|previous(?:ly)?|input|old)\b")
"""Words of lines on an earlier state of the coordinates."""
_SIZE_WORDS = re.compile(
    r"\b(?:voxel|pixel)s?[\s_-]*(?:size|sep|spacing|dim|res|scal|width|height|depth)|\bresolutions?\b|\bspacings?\b|"
    r"\bseparations?\b|\bcalibrations?\b|\bvoxel_?size|\bpixel_?size"
)
_OTHER_FILE = re.compile(r"(?:source|changed|repaired from|moved from|converted from|transform)\b")
"""Begins of lines of `write` about the file that a tree was made from, or about several units."""
_NO_STATEMENT = re.compile(rf"\bnot\b|\bunknown\b|\bthreshold|\btolerance|\bstep\b|^{_OTHER_FILE.pattern}")
"""Lines that state nothing about the coordinates."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_THREE_NUMBERS = re.compile(rf"(?<![\w.])({_NUMBER})[\s,;x*\u00d7]+({_NUMBER})[\s,;x*\u00d7]+({_NUMBER})(?![\w.])")
_SIZE_UNIT = re.compile(_WORD.split("(?!")[0] + r"(?![a-z])")
_SCALE = re.compile(rf"^scale\s*[:=]?\s*({_NUMBER})[\s,]+({_NUMBER})[\s,]+({_NUMBER})")
_OFFSET = re.compile(_SCALE.pattern.replace("scale", "offset", 1))
_ANY_SCALE = re.compile(rf"^scale\s*[:=]?\s*(?P<first>{_NUMBER}|nan|[-+]?inf\w*)(?![\w.])(?P<rest>.*)")
"""A line that states a scale of any number of values."""
_UNSCALED_SOURCES = re.compile(r"original_source.*(?:cloudvolume|kimimaro|igneous|osteoid)")
"""Programs whose SCALE is a matrix of theirs, and whose coordinates are in nanometres as a rule."""


class SwcComment(NamedTuple):
    """A comment of a file, without its #."""

    line: int
    """1-based."""
    text: str
    is_whole_line: bool = True
    """False behind the numbers of a node."""


@dataclass(frozen=True)
class SwcHeader:
    """What the header of a file states about its coordinates; None where it does not."""

    unit: Unit | None
    voxel_size: VoxelSize | None
    unit_line: int = 0
    """1-based line that states the unit; 0 for none."""
    conflict: str = ""
    """A sentence on statements that exclude each other; the unit or the voxel size is then None."""


class _Statement(NamedTuple):
    line: int
    value: Unit | VoxelSize
    text: str


# --- Units ---


def unit_in_um(unit: Unit) -> float | None:
    """Micrometres in one `unit`; None for voxels."""
    if unit == "voxel":
        return None
    match = re.fullmatch(rf"{_FACTOR}(\S+)", unit)
    per = um_per(match[2]) if match else None
    if match is None or per is None:
        raise ValueError(f"{unit!r} is no unit of length")
    return float(match["factor"] or 1) * per


def _name_unit(match: re.Match[str]) -> Unit | None:
    """One name for all spellings of a unit."""
    word = re.sub(r"[\s-]", "", match["word"])
    factor = float(match.groupdict().get("factor") or 1)
    if word.startswith(("vox", "vx", "pix", "px")):
        return "voxel" if factor == 1 else None

    per = um_per(word)
    if per is None or factor <= 0:
        return None
    # 1000 nm are um, and 8 nm have a name of two words.
    for value, symbol in _SYMBOLS.items():
        if abs(factor * per / value - 1) < 1e-9:
            return symbol
    return f"{factor:g} {_SYMBOLS[per]}"


def _normalize(text: str) -> str:
    """Lower case, with every way to write the micro sign as u."""
    return " ".join(_LOST_MICRO.sub("u", text).lower().split())


# --- Statements of a header ---


def parse_header(comments: Sequence[SwcComment]) -> SwcHeader:
    """Unit and voxel size that the comment lines of a file state."""
    # A comment behind a node is about that node.
    lines = [SwcComment(c.line, _normalize(c.text)) for c in comments if c.is_whole_line]
    lines = [line for line in lines if not _NO_STATEMENT.search(line.text)]

    if conflict := _describe_open_unit(lines):
        return SwcHeader(None, None, 0, conflict)
    units = [statement for line in lines if not _EARLIER.search(line.text) for statement in _find_units(line)]
    scales = [] if any(_UNSCALED_SOURCES.search(line.text) for line in lines) else list(_find_scales(lines))
    if not units:
        # NeuroMorpho's headers state no unit in words: its files are in um, scaled as SCALE says.
        scaled = next((scale for scale in scales if scale.value != (1.0, 1.0, 1.0)), None)
        if scaled:
            return SwcHeader(None, None, 0, _describe_scale(scaled))
        if odd := next(_find_odd_scales(lines), None):
            return SwcHeader(None, None, 0, _describe_scale(odd))
        units = [_Statement(scale.line, "um", scale.text) for scale in scales]
        units += [_Statement(line.line, "um", line.text) for line in lines if "using stdswc" in line.text]

    if conflict := _find_conflict(units, "unit"):
        return SwcHeader(None, None, 0, conflict)
    unit = units[0] if units else None
    unit_name = str(unit.value) if unit else None

    sizes = [statement for line in lines for statement in _find_voxel_sizes(line, unit_name)]
    # SCALE of coordinates in voxels is the way to um.
    if unit_name == "voxel":
        sizes += [scale for scale in scales if scale.value != (1.0, 1.0, 1.0)]
    if conflict := _find_conflict(sizes, "voxel size"):
        return SwcHeader(unit_name, None, unit.line if unit else 0, conflict)

    size = sizes[0].value if sizes else None
    return SwcHeader(unit_name, size if isinstance(size, tuple) else None, unit.line if unit else 0)


def find_offset(text: str) -> tuple[float, float, float] | None:
    """The offset z y x that a line such as `OFFSET 10 20 30` of cvapp's header states; None for none, and for 0."""
    match = _OFFSET.match(_normalize(text))
    if not match:
        return None
    x, y, z = (float(number) for number in match.groups())
    return (z, y, x) if any((z, y, x)) else None


def is_finite_offset(offset: tuple[float, float, float]) -> bool:
    """Whether all numbers of an offset are finite: `1e400` is read as infinity."""
    return all(map(math.isfinite, offset))


def states_other(text: str, unit: Unit, voxel_size: VoxelSize | None) -> bool:
    """Whether a comment line states another unit or voxel size than these."""
    header = parse_header([SwcComment(1, text)])
    if header.unit is None and header.voxel_size is None and not header.conflict:
        # A voxel size whose unit is that of the positions says nothing without them.
        header = parse_header([SwcComment(1, f"unit: {unit}"), SwcComment(2, text)])
    is_other_size = header.voxel_size is not None and header.voxel_size != voxel_size
    # An offset is that of the file which was read.
    return bool(header.conflict or find_offset(text)) or header.unit not in (None, unit) or is_other_size


def _find_units(line: SwcComment) -> Iterator[_Statement]:
    """Units that a line states for the coordinates or radii."""
    for number, pattern in enumerate(_UNIT_PATTERNS):
        # A line on the size of a voxel names the unit of that size.
        if number and _SIZE_WORDS.search(line.text):
            return
        for match in pattern.finditer(line.text):
            if number == 0 and _OTHER_QUANTITY.search(line.text[: match.start()]):
                continue
            # Each axis may have a unit of its own.
            further: re.Match[str] | None = match
            while further:
                if name := _name_unit(further):
                    yield _Statement(line.line, name, line.text)
                further = _FURTHER_UNIT.match(line.text, further.end())


def _describe_open_unit(lines: Sequence[SwcComment]) -> str:
    """A sentence on a line whose unit is not known, or may be that of an earlier state; "" where there is none."""
    has_unit = False
    for line in lines:
        names = list(_find_units(line))
        if _Z_IN_SLICES.search(line.text):
            return f"line {line.line} ({line.text[:60]!r}) counts z in slices, so that the axes have different units"
        stated = _STATED_UNIT.match(line.text) or _STATED_IN.match(line.text)
        has_unit = has_unit or bool(names and not _EARLIER.search(line.text))
        if names or stated is None or _OTHER_QUANTITY.search(stated["before"]) or _NO_UNIT.search(stated["unit"]):
            continue
        return f"line {line.line} ({line.text[:60]!r}) states a unit that is none of um, nm, mm, voxel and the like"

    earlier = [line for line in lines if _EARLIER.search(line.text) and any(_find_units(line))]
    if has_unit or not earlier:
        return ""
    return (
        f"line {earlier[0].line} ({earlier[0].text[:60]!r}) speaks of an earlier state, and leaves open which unit the "
        "coordinates have now"
    )


def _find_scales(lines: Sequence[SwcComment]) -> Iterator[_Statement]:
    """The SCALE lines of cvapp's header, z y x."""
    for line in lines:
        if match := _SCALE.match(line.text):
            x, y, z = (float(number) for number in match.groups())
            yield _Statement(line.line, (z, y, x), line.text)


def _find_odd_scales(lines: Sequence[SwcComment]) -> Iterator[_Statement]:
    """Lines with a scale other than 1 that is not one of three numbers."""
    for line in lines:
        match = _ANY_SCALE.match(line.text)
        if match and not _SCALE.match(line.text) and not _is_one(match["first"]):
            yield _Statement(line.line, match["first"], line.text)


def _is_one(number: str) -> bool:
    return float(number) == 1


def _find_voxel_sizes(line: SwcComment, unit: Unit | None) -> Iterator[_Statement]:
    """The voxel size of a line that states the order of its axes and a unit, or has the unit of the coordinates."""
    size_words, numbers = _SIZE_WORDS.search(line.text), _THREE_NUMBERS.search(line.text)
    if not size_words or not numbers:
        return

    values = [float(number) for number in numbers.groups()]
    before = line.text[: numbers.start()]
    if re.search(r"\bz\W{0,3}y\W{0,3}x\b", before):
        z, y, x = values
    elif re.search(r"\bx\W{0,3}y\W{0,3}z\b", before) or len(set(values)) == 1:
        x, y, z = values
    else:
        return

    # `um/pixel` names a unit too; a size in voxels is none.
    word = _SIZE_UNIT.search(size_words.re.sub(" ", line.text))
    stated = _name_unit(word) if word else unit
    per = unit_in_um(stated) if stated else None
    if per is not None and min(values) > 0:
        # Rounded, so that sizes stated in nm and in um compare equal.
        yield _Statement(line.line, (round(z * per, 9), round(y * per, 9), round(x * per, 9)), line.text)


def _find_conflict(statements: Sequence[_Statement], noun: str) -> str:
    """A sentence on two statements that differ; "" where all agree."""
    for other in statements[1:]:
        first = statements[0]
        if other.value != first.value:
            places = f"line {first.line} ({first.text[:60]!r}) and line {other.line} ({other.text[:60]!r})"
            return f"the header states two {noun}s, {first.value} and {other.value}, in {places}"
    return ""


def _describe_scale(scale: _Statement) -> str:
    return (
        f"line {scale.line} ({scale.text[:60]!r}) leaves open whether the coordinates are in um already or still have "
        "to be scaled"
    )


# --- Columns ---

_COLUMN_NAMES = {
    "id": "n id index idx no number pointno node nodeid nodeno point pointid sample sampleid inode compartment "
    "sampleno sampleidentifier compartmentid nodenumber samplenumber nr",
    "type": "t type label structure structureid structuretype structureidentifier nodetype tag kind compartmenttype "
    "region",
    "x": "x xpos xcoord xcoordinate xposition posx positionx coordx xvalue",
    "y": "y ypos ycoord ycoordinate yposition posy positiony coordy yvalue",
    "z": "z zpos zcoord zcoordinate zposition posz positionz coordz zvalue",
    "radius": "r rad radius d/2 diam/2 diameter/2 sampleradius noderadius",
    DIAMETER: "d diam diameter 2r",
    "parent": "p pid par parent parentid parentno idpar pn parentnode parentidentifier parentsample parentpoint "
    "parentcompartment parentnumber parentnodeid parentsampleid link",
}
_COLUMN_UNIT = re.compile(rf"[\s_]?[(\[_/]\s*{_WORD}(?:\s*[)\]])?")
_COLUMN_OF = {name: column for column, names in _COLUMN_NAMES.items() for name in names.split()}
_LEAST_NAMES = 5
"""Names of columns in a line that is taken for the header of the table."""


def parse_columns(text: str) -> tuple[str, ...] | None:
    """The columns that a line names, in its order, unknown names as ""; None for a line that names no columns.

    Only a line of the names of x, y, z and two other columns, each once, counts.
    """
    if _OTHER_FILE.match(text):
        return None
    # `columns: id, type, ...`; units in brackets or behind an underscore are no part of a name.
    body = _normalize(text).rpartition(":")[2].strip()
    body = _COLUMN_UNIT.sub("", body)
    parts = re.split(r"[,;|\t]", body) if len(re.findall(r"[,;|\t]", body)) >= _LEAST_NAMES - 1 else body.split()
    names = [_COLUMN_OF.get(re.sub(r"[\s_.#\"'()\[\]-]", "", part), "") for part in parts]

    # The TREES toolbox writes `inode R X Y Z D/2 idpar`, where R is the region.
    if names[:1] == ["id"] and names[1:2] == ["radius"] and names.count("radius") == 2:
        names[1] = "type"

    # Names behind the columns of SWC belong to extended formats. Prose with such words has more others, or one twice.
    names = names[: len(COLUMNS) + 1]
    stated = [name for name in names if name]
    is_header = len(stated) >= _LEAST_NAMES and {"x", "y", "z"} <= set(stated) and len(set(stated)) == len(stated)
    return tuple(names) if is_header else None


def find_other_columns(text: str) -> tuple[str, ...] | None:
    """The columns that a line names where they are not those of SWC; None where they are, or none are named."""
    names = parse_columns(text)
    if names is None:
        return None

    # Unknown names take the place of a column or stand behind the seventh.
    stated = [name for name in names if name]
    order = [COLUMNS.index(name) for name in stated if name != DIAMETER]
    has_all = set(COLUMNS) <= set(stated)
    is_plain = order == sorted(order) and DIAMETER not in stated and (not has_all or names[: len(COLUMNS)] == COLUMNS)
    return None if is_plain else names


def order_columns(names: Sequence[str]) -> list[int]:
    """Place in the file of each column of SWC, by the names; an unknown name stands for a column that is not named."""
    places = {("radius" if name == DIAMETER else name): place for place, name in enumerate(names) if name}
    # A line with fewer names than columns leaves the last ones out.
    free = iter(place for place in range(len(names) + len(COLUMNS)) if place not in places.values())
    return [places[column] if column in places else next(free) for column in COLUMNS]
