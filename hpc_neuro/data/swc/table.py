"""An SWC file as a table of rows with their line numbers, and what is wrong with single lines. Columns are x y z."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.header import COLUMNS, DIAMETER, SwcComment, find_other_columns, order_columns

_MAX_BYTES = 1 << 30
"""[bytes] Size of a file that is read: some ten million nodes."""
_MAX_ID = (1 << 63) - 1
"""Largest id that an array of 64 bits holds."""
_MAX_FLOAT_ID = 1 << 53
"""Largest id written as a decimal number: beyond it a float no longer tells two apart."""
_ROW_DTYPE = np.dtype([(n, "f8" if n in ("x", "y", "z", "radius") else "i8") for n in COLUMNS])
_LINE_ENDS = re.compile("[\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Characters that end a line in Unicode, and that Python takes for blanks between columns."""
UNREADABLE = ("commas or decimals", "columns differ", "lines joined", "no parents")
"""Kinds of findings on the whole table that no rule can repair."""
_Row = tuple[int, float, float, float, float, float, int]
"""Id, type, x, y, z, radius and parent."""
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|nan|inf(?:inity)?)", re.IGNORECASE)
"""A number as other programs read it; Python's float takes `1_0` and digits of other scripts too."""
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+(?:e[-+]?[0-9]+)?", re.IGNORECASE)
_ODDITIES = {
    "commas": "commas or semicolons between the columns",
    "semicolon decimals": "semicolons between the columns, and decimal commas",
    "extra columns": "more than seven columns (ESWC or the like); those after the seventh are not read",
    "float ids": "ids, types or parents written as decimal numbers",
    "blanks": "blanks between the columns that are none of ASCII",
}
"""Harmless deviations, each reported once per file."""


@dataclass(frozen=True, order=True)
class SwcFinding:
    """One thing about a file that the SWC convention does not allow, or that other readers refuse."""

    line: int
    """1-based; 0 for the file as a whole."""
    kind: str
    text: str
    fatal: bool = False
    """Whether `read` refuses the file for it: the meaning is ambiguous, and only `fix` may decide."""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


@dataclass(frozen=True)
class SwcTable:
    """The nodes of a file in its own order, and the findings of parsing."""

    line: NDArray[np.int64]
    """[N] 1-based line number."""
    id: NDArray[np.int64]
    type: NDArray[np.int64]
    xyz: NDArray[np.float64]
    """[N, 3] x y z as in the file."""
    radius: NDArray[np.float64]
    parent: NDArray[np.int64]
    """[N] an id; negative for a root."""
    comments: tuple[SwcComment, ...]
    """Header and other comments."""
    findings: list[SwcFinding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.id)

    def take(self, keep: NDArray[np.integer] | NDArray[np.bool_]) -> SwcTable:
        """The rows of an index or mask; findings stay."""
        line, number, kind, xyz = self.line[keep], self.id[keep], self.type[keep], self.xyz[keep]
        return SwcTable(line, number, kind, xyz, self.radius[keep], self.parent[keep], self.comments, self.findings)


def parse(path: Path, by_header: bool = False) -> SwcTable:
    """Read a file's lines. Raises InputError when it is missing, is no text, or is another format.

    by_header: take the columns in the order that the file's header names, and halve a column of diameters.
    """
    # Nearly every file is plain, and numpy parses it at once; any other is parsed line by line.
    text, findings = _read_text(path)
    table = _parse_plain(text, list(findings)) or _parse_lines(text, list(findings))

    others = [(c, find_other_columns(c.text)) for c in table.comments if c.is_whole_line]
    other = next(((comment, names) for comment, names in others if names), None)
    if other is None:
        return table

    # Which column is which decides every number of the tree.
    comment, names = other
    finding = SwcFinding(comment.line, "column names", _describe_columns(names), fatal=True)
    if not by_header:
        table.findings.append(finding)
        return table

    table = _parse_lines(text, findings, order_columns(names))
    table.findings.append(finding)
    return replace(table, radius=table.radius / 2) if DIAMETER in names else table


def _parse_plain(text: str, findings: list[SwcFinding]) -> SwcTable | None:
    """A file of a comment header and rows of seven plain numbers, parsed at once; None for any other."""
    # The header: comments and empty lines.
    begin = number = 0
    comments: list[SwcComment] = []
    while text.startswith(("#", "\n"), begin):
        end = text.find("\n", begin)
        if end < 0:
            return None
        number += 1
        if end > begin:
            comments.append(SwcComment(number, text[begin:end].lstrip("#").strip()))
        begin = end + 1

    # The rows: seven columns of the right type, or it is no plain file.
    plain = text[begin:].rstrip()
    # NumPy's parser can crash on text that is not ASCII or holds NUL, and takes 1_0 for 10.
    if not plain or not plain.isascii() or "\0" in plain or "_" in plain:
        return None
    body = plain.split("\n")
    try:
        rows = np.loadtxt(body, dtype=_ROW_DTYPE, comments=None, ndmin=1)
    except ValueError:
        return None

    # loadtxt skips empty lines, and line numbers would be wrong after one.
    if len(rows) != len(body):
        return None

    xyz = np.stack([rows[a] for a in "xyz"], axis=1)
    line = np.arange(number + 1, number + 1 + len(rows))
    radius = rows["radius"].copy()
    return SwcTable(line, rows["id"], rows["type"], xyz, radius, rows["parent"], tuple(comments), findings)


def _parse_lines(text: str, findings: list[SwcFinding], order: Sequence[int] = ()) -> SwcTable:
    """Any file: each line is read as far as it has a meaning, and its deviations become findings.

    order: place of each column in a line; () for that of SWC.
    """
    comments: list[SwcComment] = []
    rows: list[_Row] = []
    lines: list[int] = []
    first_line: dict[str, int] = {}
    comma_lines: list[tuple[int, int]] = []
    counts: list[tuple[int, int]] = []

    for number, raw in enumerate(text.split("\n"), start=1):
        body, hash_, comment = raw.partition("#")
        body = body.strip()
        if hash_:
            comments.append(SwcComment(number, comment.lstrip("#").strip(), not body))
        if not body:
            continue

        # What stands between the numbers, and in which order they are wanted.
        parts, separator = _split_columns(body)
        if separator == "decimal comma":
            findings.append(SwcFinding(number, separator, f"decimal commas in {body[:60]!r}", fatal=True))
        elif separator == "commas":
            comma_lines.append((number, len(parts)))
        if order and len(parts) > max(order):
            parts = [parts[place] for place in order]

        # What the line is: a header, no node, or a node.
        if not rows and not any(_NUMBER.fullmatch(p) for p in parts):
            findings.append(SwcFinding(number, "header", f"a header line without #: {body[:60]!r}"))
            comments.append(SwcComment(number, body))
        elif fault := _find_fault(parts):
            findings.append(SwcFinding(number, *fault, fatal=True))
        else:
            rows.append(_parse_row(parts))
            lines.append(number)
            counts.append((number, _count_numbers(parts)))
            findings += _check_joined_lines(number, parts)
            for kind in _list_oddities(body, parts, separator):
                first_line.setdefault(kind, number)

    findings += _check_comma_lines(comma_lines, has_points="." in text)
    findings += _check_columns(counts, [row[6] for row in rows])
    findings += [SwcFinding(line, kind, _ODDITIES[kind]) for kind, line in first_line.items()]
    return _build_table(rows, lines, comments, findings)


def _split_columns(body: str) -> tuple[list[str], str]:
    """The columns of a line as plain numbers, and the finding on their separator ("" for blanks)."""
    if ";" in body:
        # Whoever separates by semicolons keeps the comma for decimals.
        parts = [p.strip() for p in body.removesuffix(";").split(";")]
        is_decimal = [bool(_DECIMAL_COMMA.fullmatch(p)) for p in parts]
        parts = [p.replace(",", ".") if decimal else p for p, decimal in zip(parts, is_decimal, strict=True)]
        return parts, "semicolon decimals" if any(is_decimal) else "commas"
    if "," not in body:
        return body.split(), ""

    # "0,5" inside one of seven columns is a decimal comma, "0, 5" or "0,5,1,..." separates columns.
    parts = body.split()
    if len(parts) >= len(COLUMNS) and any("," in p.strip(",") for p in parts[: len(COLUMNS)]):
        is_decimal = [bool(_DECIMAL_COMMA.fullmatch(p)) for p in parts]
        return [p.replace(",", ".") if decimal else p for p, decimal in zip(parts, is_decimal, strict=True)], (
            "decimal comma"
        )
    # An empty column between two commas stays one: without it the others would move.
    return re.split(r"\s*,\s*|\s+", body.removesuffix(",").rstrip()), "commas"


def _check_comma_lines(lines: Sequence[tuple[int, int]], has_points: bool) -> Iterable[SwcFinding]:
    """A fatal finding where commas may separate columns as well as decimals: `1,3,0,5,1,5,0,1,-1`.

    lines: number and columns of each line whose columns commas separate. has_points: whether the file has any point.
    """
    counts = Counter(count for _, count in lines)
    most = max(counts, default=0)
    if most > len(COLUMNS) and (len(counts) > 1 or not has_points):
        line = next(number for number, count in lines if count == most)
        text = f"{most} columns between commas, in other lines {min(counts)}" if len(counts) > 1 else f"{most} columns"
        yield SwcFinding(
            line, "commas or decimals", f"{text}: commas may be decimal points; export the tree with points", fatal=True
        )


def _count_numbers(parts: list[str]) -> int:
    """How many columns of a node hold numbers, before the first that does not."""
    return next((place for place, part in enumerate(parts) if not _NUMBER.fullmatch(part)), len(parts))


def _check_joined_lines(line: int, parts: list[str]) -> Iterable[SwcFinding]:
    """A fatal finding where a line holds the numbers of several nodes, one behind the other."""
    width = len(COLUMNS)
    if len(parts) < 2 * width or len(parts) % width or _count_numbers(parts) < len(parts):
        return
    ids = [_parse_whole(part) for part in parts[::width]]
    if all(a is not None and b == a + 1 for a, b in itertools.pairwise(ids)):
        text = f"{len(parts)} numbers, as of several nodes: an end of line was lost; export the tree again"
        yield SwcFinding(line, "lines joined", text, fatal=True)


def _check_columns(counts: Sequence[tuple[int, int]], parents: Sequence[int]) -> Iterable[SwcFinding]:
    """Fatal findings where further columns leave open which column is which.

    counts: line and numbers of each node. parents: of each node.
    """
    width = len(COLUMNS)
    longer = [(line, count) for line, count in counts if count > width]
    if longer and len(longer) < len(counts):
        line, count = longer[0]
        text = (
            f"{count} numbers, in other lines {width}: a number may hold a blank; correct it, or export the tree again"
        )
        yield SwcFinding(line, "columns differ", text, fatal=True)
    elif len(longer) > 1 and all(parent <= 0 for parent in parents) and len(set(parents)) == 1:
        text = f"{longer[0][1]} columns, and by the seventh no node has a parent; put the parents into the seventh"
        yield SwcFinding(longer[0][0], "no parents", text, fatal=True)


def _find_fault(parts: list[str]) -> tuple[str, str] | None:
    """Kind and text of what keeps a line from being a node; None for a node."""
    shown = repr(" ".join(parts)[:60])
    if not all(_NUMBER.fullmatch(p) for p in parts[: len(COLUMNS)]):
        return "text", f"not seven numbers: {shown}"

    # More columns are harmless; fewer leave open which one is missing.
    if len(parts) < len(COLUMNS):
        return "columns", f"{len(parts)} columns where {' '.join(COLUMNS)} are wanted: {shown}"
    if _parse_whole(parts[0]) is None or _parse_whole(parts[6]) is None:
        return "id", f"id {parts[0][:30]} or parent {parts[6][:30]} is no whole number of at most 63 bits"
    return None


def _parse_whole(text: str) -> int | None:
    """The whole number that an id is, also one written as 1.0; None for any other."""
    # Python refuses to convert thousands of digits, and no id has as many.
    if len(text) > 40:
        return None
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text) if abs(int(text)) <= _MAX_ID else None
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= _MAX_FLOAT_ID else None


def _parse_row(parts: list[str]) -> _Row:
    """The seven numbers of a line without a fault."""
    kind, x, y, z, radius = (float(p) for p in parts[1:6])
    return _parse_whole(parts[0]) or 0, kind, x, y, z, radius, _parse_whole(parts[6]) or 0


def _list_oddities(body: str, parts: list[str], separator: str) -> Iterable[str]:
    """Kinds of harmless deviations of a line that is a node."""
    if separator in _ODDITIES:
        yield separator
    if len(parts) > len(COLUMNS):
        yield "extra columns"
    if any(not re.fullmatch(r"[-+]?[0-9]+", parts[i]) for i in (0, 1, 6)):
        yield "float ids"
    if not body.isascii() and any(character.isspace() and not character.isascii() for character in body):
        yield "blanks"


def _describe_columns(names: Sequence[str]) -> str:
    shown = " ".join(name or "?" for name in names)
    return f"the header names the columns {shown}; those of SWC are {' '.join(COLUMNS)}"


def _build_table(
    rows: Sequence[_Row],
    lines: list[int],
    comments: Sequence[SwcComment],
    findings: list[SwcFinding],
) -> SwcTable:
    """The table of parsed rows; a type that is no whole number becomes 0, with a finding."""
    # Ids stay whole numbers: a float does not hold more than 53 bits. reshape keeps the columns where there is no row.
    ids = np.array([(row[0], row[6]) for row in rows], dtype=np.int64).reshape(len(rows), 2)
    values = np.array([row[1:6] for row in rows], dtype=np.float64).reshape(len(rows), 5)
    line = np.array(lines, dtype=np.int64)

    kind = values[:, 0]
    is_odd = ~np.isfinite(kind) | (kind != np.round(kind)) | (np.abs(kind) > _MAX_FLOAT_ID)
    for i in np.flatnonzero(is_odd).tolist():
        findings.append(SwcFinding(int(line[i]), "type", f"type {kind[i]:g} is no whole number, taken as 0"))
    types = np.where(is_odd, 0, kind).astype(np.int64)

    xyz, radius = values[:, 1:4], values[:, 4]
    return SwcTable(line, ids[:, 0], types, xyz, radius, ids[:, 1], tuple(comments), findings)


def _read_text(path: Path) -> tuple[str, list[SwcFinding]]:
    """The file's text with plain line ends, and findings on its encoding."""
    if path.is_dir() or not path.exists():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {fault}; give the path of an SWC file")
    # Files of other programs that are often taken for SWC.
    data = files.read_limited(path, _MAX_BYTES, "an SWC file")
    if data[:2] == b"\x1f\x8b":
        raise InputError(f"{path} is gzip-compressed (SNT .traces are), not SWC text; export it as SWC, or gunzip it")

    text, findings = _decode(path, data)
    if text.lstrip().startswith("<"):
        raise InputError(f"{path} is XML (an SNT .traces or NeuroML file), not SWC; export it as SWC")

    if "\r" in text:
        findings.append(SwcFinding(1, "line ends", "lines end with a carriage return (Windows or old Mac)"))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _LINE_ENDS.search(text):
        findings.append(SwcFinding(1, "line ends", "lines end with characters that are no line ends in other programs"))
        text = _LINE_ENDS.sub("\n", text)
    return text, findings


def _decode(path: Path, data: bytes) -> tuple[str, list[SwcFinding]]:
    """The text of a file in UTF-32, UTF-16, UTF-8 or latin-1, without a byte-order mark.

    Raises InputError for binary data.
    """
    if data[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        finding = SwcFinding(1, "encoding", "the file is UTF-32; SWC is plain ASCII")
        return data.decode("utf-32", errors="replace"), [finding]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        finding = SwcFinding(1, "encoding", "the file is UTF-16; SWC is plain ASCII")
        return data.decode("utf-16", errors="replace"), [finding]

    findings = []
    if data.startswith(b"\xef\xbb\xbf"):
        findings.append(SwcFinding(1, "BOM", "the file begins with a byte-order mark"))
        data = data[3:]
    if b"\0" in data[:4096]:
        raise InputError(f"{path} is a binary file, not SWC text; give an SWC file")

    # Any bytes are latin-1, so it comes last; only comments hold such characters.
    try:
        return data.decode("utf-8"), findings
    except UnicodeDecodeError:
        # Byte 0x85 of Windows is an ellipsis, and no end of a line.
        return data.decode("latin-1").replace("\x85", "..."), findings
