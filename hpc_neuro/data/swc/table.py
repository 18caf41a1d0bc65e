"""An SWC file as a table of rows with their line numbers, and what is wrong with single lines. Columns are x y z."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.schema import InputError

COLUMNS = "id type x y z radius parent"

_MAX_ID = 1 << 53
"""Largest id: beyond it a float no longer tells two ids apart."""
_ROW_DTYPE = np.dtype([(n, "f8" if n in ("x", "y", "z", "radius") else "i8") for n in COLUMNS.split()])
_ODDITIES = {
    "commas": "commas or semicolons between the columns",
    "extra columns": "more than seven columns (ESWC or the like); those after the seventh are not read",
    "float ids": "ids, types or parents written as decimal numbers",
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
    """Whether `read` refuses the file for it: its meaning is open, and only `fix` may decide."""

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
    comments: tuple[str, ...]
    """Header and other comment lines, without their #."""
    findings: list[SwcFinding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.id)

    def take(self, keep: NDArray[np.integer] | NDArray[np.bool_]) -> SwcTable:
        """The rows of an index or mask; findings stay."""
        line, number, kind, xyz = self.line[keep], self.id[keep], self.type[keep], self.xyz[keep]
        return SwcTable(line, number, kind, xyz, self.radius[keep], self.parent[keep], self.comments, self.findings)


def parse(path: Path) -> SwcTable:
    """Read a file's lines. Raises InputError when it is missing, is no text, or is another format."""
    # Nearly every file is plain, and numpy parses it at once; any other is parsed line by line.
    text, findings = _read_text(path)
    return _parse_plain(text, findings) or _parse_lines(text, findings)


def _parse_plain(text: str, findings: list[SwcFinding]) -> SwcTable | None:
    """A file of a comment header and rows of seven plain numbers, parsed at once; None for any other."""
    # The header: comments and empty lines.
    begin = number = 0
    comments: list[str] = []
    while text.startswith(("#", "\n"), begin):
        end = text.find("\n", begin)
        if end < 0:
            return None
        if end > begin:
            comments.append(text[begin:end].lstrip("#").strip())
        begin, number = end + 1, number + 1

    # The rows: seven columns of the right type, or it is no plain file.
    plain = text[begin:].rstrip()
    # NumPy's parser can crash on text that is not ASCII or holds NUL.
    if not plain or not plain.isascii() or "\0" in plain:
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


def _parse_lines(text: str, findings: list[SwcFinding]) -> SwcTable:
    """Any file: each line is read as far as it has a meaning, and its deviations become findings."""
    comments: list[str] = []
    rows: list[list[float]] = []
    lines: list[int] = []
    first_line: dict[str, int] = {}

    for number, raw in enumerate(text.split("\n"), start=1):
        body, hash_, comment = raw.partition("#")
        if hash_:
            comments.append(comment.lstrip("#").strip())
        if not body.split():
            continue

        # What stands between the numbers.
        parts, separator = _split_columns(body)
        shown = repr(body.strip()[:60])
        if separator == "decimal comma":
            findings.append(SwcFinding(number, "decimal comma", f"decimal commas in {shown}", fatal=True))
        elif separator:
            first_line.setdefault(separator, number)

        # What the line is: a header, no node, or a node.
        if not rows and not any(_is_number(p) for p in parts):
            findings.append(SwcFinding(number, "header", f"a header line without #: {shown}"))
        elif fault := _find_fault(parts):
            findings.append(SwcFinding(number, *fault, fatal=True))
        else:
            rows.append([float(p) for p in parts[:7]])
            lines.append(number)
            for kind in _list_oddities(parts):
                first_line.setdefault(kind, number)

    findings += [SwcFinding(line, kind, _ODDITIES[kind]) for kind, line in first_line.items()]
    return _build_table(rows, lines, comments, findings)


def _split_columns(body: str) -> tuple[list[str], str]:
    """The columns of a line as plain numbers, and the finding that their separator is ("" for blanks)."""
    # "0,5" inside a number is a decimal comma, "0, 5" or "0,5,1,..." separates columns.
    parts = body.split()
    if "," not in body and ";" not in body:
        return parts, ""
    if _has_decimal_commas(parts):
        return [p.replace(",", ".") for p in parts], "decimal comma"
    return [p for p in re.split(r"[,;\s]+", body) if p], "commas"


def _has_decimal_commas(parts: list[str]) -> bool:
    """Whether commas lie inside the numbers: there are seven columns without a cut at the commas."""
    return len(parts) >= 7 and any(re.fullmatch(r"[-+]?\d*,\d+(e[-+]?\d+)?", p, re.IGNORECASE) for p in parts[:7])


def _find_fault(parts: list[str]) -> tuple[str, str] | None:
    """Kind and text of what keeps a line from being a node; None for a node."""
    try:
        row = [float(p) for p in parts[:7]]
    except ValueError:
        return "text", f"not seven numbers: {' '.join(parts)[:60]!r}"

    # More columns are harmless; fewer leave open which one is missing.
    if len(row) < 7:
        return "columns", f"{len(row)} columns where {COLUMNS} are wanted: {' '.join(parts)[:60]!r}"
    if not all(v.is_integer() and abs(v) <= _MAX_ID for v in (row[0], row[6])):
        return "id", f"id {parts[0]} or parent {parts[6]} is no whole number"
    return None


def _list_oddities(parts: list[str]) -> Iterable[str]:
    """Kinds of harmless deviations of a line that is a node."""
    if len(parts) > 7:
        yield "extra columns"
    if any("." in parts[i] for i in (0, 1, 6)):
        yield "float ids"


def _build_table(
    rows: list[list[float]], lines: list[int], comments: list[str], findings: list[SwcFinding]
) -> SwcTable:
    """The table of parsed rows; a type that is no whole number becomes 0, with a finding."""
    # reshape keeps seven columns where there is no row.
    values = np.array(rows, dtype=np.float64).reshape(len(rows), 7)
    line = np.array(lines, dtype=np.int64)

    kind = values[:, 1]
    is_odd = ~np.isfinite(kind) | (kind != np.round(kind)) | (np.abs(kind) > _MAX_ID)
    for i in np.flatnonzero(is_odd).tolist():
        findings.append(SwcFinding(int(line[i]), "type", f"type {kind[i]:g} is no whole number, taken as 0"))
    types = np.where(is_odd, 0, kind).astype(np.int64)

    ids = values[:, [0, 6]].astype(np.int64)
    xyz, radius = values[:, 2:5], values[:, 5]
    return SwcTable(line, ids[:, 0], types, xyz, radius, ids[:, 1], tuple(comments), findings)


def _read_text(path: Path) -> tuple[str, list[SwcFinding]]:
    """The file's text with plain line ends, and findings on its encoding."""
    if path.is_dir() or not path.exists():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {fault}; give the path of an SWC file")
    # Files of other programs that are often taken for SWC.
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        raise InputError(f"{path} is gzip-compressed (SNT .traces are), not SWC text; export it as SWC, or gunzip it")

    text, findings = _decode(path, data)
    if text.lstrip().startswith("<"):
        raise InputError(f"{path} is XML (an SNT .traces or NeuroML file), not SWC; export it as SWC")

    if "\r" in text:
        findings.append(SwcFinding(1, "line ends", "lines end with a carriage return (Windows or old Mac)"))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, findings


def _decode(path: Path, data: bytes) -> tuple[str, list[SwcFinding]]:
    """The text of a file in UTF-16, UTF-8 or latin-1, without a byte-order mark. Raises InputError for binary data."""
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
        return data.decode("latin-1"), findings


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
