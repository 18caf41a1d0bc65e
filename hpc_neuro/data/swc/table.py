"""An SWC file as the table it is: rows by line number, and what is odd about each line. x y z order lives here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.schema import InputError

COLUMNS = "id type x y z radius parent"
_MOST_ID = 1 << 53  # beyond it a float no longer tells two ids apart


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
    """The nodes of a file in its own order, and what was found while parsing."""

    line: NDArray[np.int64]  # [N] 1-based line number
    id: NDArray[np.int64]  # [N]
    type: NDArray[np.int64]  # [N]
    xyz: NDArray[np.float64]  # [N, 3] x y z as in the file
    radius: NDArray[np.float64]  # [N]
    parent: NDArray[np.int64]  # [N] an id, negative for a root
    comments: tuple[str, ...]  # header and other comment lines, without their #
    findings: list[SwcFinding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.id)

    def take(self, keep: NDArray[np.integer] | NDArray[np.bool_]) -> SwcTable:
        """The rows of an index or mask; findings stay."""
        line, number, kind, xyz = self.line[keep], self.id[keep], self.type[keep], self.xyz[keep]
        return SwcTable(line, number, kind, xyz, self.radius[keep], self.parent[keep], self.comments, self.findings)


def parse(path: Path) -> SwcTable:
    """Read a file's lines. Raises InputError when it is missing, is no text, or is another format."""
    text, findings = _text(path)
    return _plain(text, findings) or _line_by_line(text, findings)


_DTYPE = np.dtype([(n, "f8" if n in ("x", "y", "z", "radius") else "i8") for n in COLUMNS.split()])


def _plain(text: str, findings: list[SwcFinding]) -> SwcTable | None:
    """A file of a comment header and rows of seven plain numbers, parsed at once; None for any other."""
    begin = number = 0
    comments: list[str] = []
    while text.startswith(("#", "\n"), begin):
        end = text.find("\n", begin)
        if end < 0:
            return None
        if end > begin:
            comments.append(text[begin:end].lstrip("#").strip())
        begin, number = end + 1, number + 1
    body = text[begin:].rstrip().split("\n")
    if body == [""]:
        return None
    try:
        rows = np.loadtxt(body, dtype=_DTYPE, comments=None, ndmin=1)
    except ValueError:
        return None
    if len(rows) != len(body):  # blank lines in between: line numbers would slip
        return None
    xyz = np.stack([rows[a] for a in "xyz"], axis=1)
    line = np.arange(number + 1, number + 1 + len(rows))
    return SwcTable(
        line, rows["id"], rows["type"], xyz, rows["radius"].copy(), rows["parent"], tuple(comments), findings
    )


def _line_by_line(text: str, findings: list[SwcFinding]) -> SwcTable:
    """Any file: each line is taken as far as it has a meaning, and what is odd about it is recorded."""
    comments: list[str] = []
    rows: list[list[float]] = []
    lines: list[int] = []
    first: dict[str, int] = {}  # line of the first of each harmless oddity
    for number, raw in enumerate(text.split("\n"), start=1):
        body, hash_, remark = raw.partition("#")
        if hash_:
            comments.append(remark.lstrip("#").strip())
        parts = body.split()
        if not parts:
            continue
        shown = repr(body.strip()[:60])
        if "," in body or ";" in body:
            if _decimal_commas(parts):
                findings.append(SwcFinding(number, "decimal comma", f"decimal commas in {shown}", fatal=True))
                parts = [p.replace(",", ".") for p in parts]
            else:
                parts = [p for p in re.split(r"[,;\s]+", body) if p]
                first.setdefault("commas", number)
        if not rows and not any(_is_number(p) for p in parts):
            findings.append(SwcFinding(number, "header", f"a header line without #: {shown}"))
            continue
        fault = _fault(parts)
        if fault:
            findings.append(SwcFinding(number, *fault, fatal=True))
            continue
        row = [float(p) for p in parts[:7]]
        if len(parts) > 7:
            first.setdefault("extra columns", number)
        if any("." in parts[i] for i in (0, 1, 6)):
            first.setdefault("float ids", number)
        rows.append(row)
        lines.append(number)
    findings += [SwcFinding(line, kind, _ODD[kind]) for kind, line in first.items()]
    return _table(rows, lines, comments, findings)


_ODD = {
    "commas": "commas or semicolons between the columns",
    "extra columns": "more than seven columns (ESWC or the like); those after the seventh are not read",
    "float ids": "ids, types or parents written as decimal numbers",
}


def _fault(parts: list[str]) -> tuple[str, str] | None:
    """Kind and text of what keeps a line from being a node."""
    try:
        row = [float(p) for p in parts[:7]]
    except ValueError:
        return "text", f"not seven numbers: {' '.join(parts)[:60]!r}"
    if len(row) < 7:
        return "columns", f"{len(row)} columns where {COLUMNS} are wanted: {' '.join(parts)[:60]!r}"
    if not all(v.is_integer() and abs(v) <= _MOST_ID for v in (row[0], row[6])):
        return "id", f"id {parts[0]} or parent {parts[6]} is no whole number"
    return None


def _table(rows: list[list[float]], lines: list[int], comments: list[str], findings: list[SwcFinding]) -> SwcTable:
    values = np.array(rows, dtype=np.float64).reshape(len(rows), 7)
    number = np.array(lines, dtype=np.int64)
    kind = values[:, 1]
    odd = ~np.isfinite(kind) | (kind != np.round(kind)) | (np.abs(kind) > _MOST_ID)
    findings += [
        SwcFinding(int(number[i]), "type", f"type {kind[i]:g} is no whole number, taken as 0") for i in _some(odd)
    ]
    whole = values[:, [0, 6]].astype(np.int64)
    types = np.where(odd, 0, kind).astype(np.int64)
    xyz, radius = values[:, 2:5], values[:, 5]
    return SwcTable(number, whole[:, 0], types, xyz, radius, whole[:, 1], tuple(comments), findings)


def _some(mask: NDArray[np.bool_]) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask)]


def _text(path: Path) -> tuple[str, list[SwcFinding]]:
    """The file's text with plain line ends, and findings on its encoding."""
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; give the path of an SWC file")
    data = path.read_bytes()
    findings: list[SwcFinding] = []
    if data[:2] == b"\x1f\x8b":
        raise InputError(f"{path} is gzip-compressed (SNT .traces are), not SWC text; export it as SWC, or gunzip it")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        findings.append(SwcFinding(1, "encoding", "the file is UTF-16; SWC is plain ASCII"))
        text = data.decode("utf-16", errors="replace")
    else:
        if data.startswith(b"\xef\xbb\xbf"):
            findings.append(SwcFinding(1, "BOM", "the file begins with a byte-order mark"))
            data = data[3:]
        if b"\0" in data[:4096]:
            raise InputError(f"{path} is a binary file, not SWC text; give an SWC file")
        text = data.decode("utf-8") if _is_utf8(data) else data.decode("latin-1")
    if text.lstrip().startswith("<"):
        raise InputError(f"{path} is XML (an SNT .traces or NeuroML file), not SWC; export it as SWC")
    if "\r" in text:
        findings.append(SwcFinding(1, "line ends", "lines end with a carriage return (Windows or old Mac)"))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, findings


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decimal_commas(parts: list[str]) -> bool:
    """Whether commas stand inside the numbers: seven columns are there without cutting at them."""
    return len(parts) >= 7 and any(re.fullmatch(r"[-+]?\d*,\d+(e[-+]?\d+)?", p, re.IGNORECASE) for p in parts[:7])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
