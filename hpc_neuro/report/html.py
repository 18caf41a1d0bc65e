"""One self-contained HTML page: style, script and pictures are inside it.

The functions are named after the element they return, as HTML text with all values escaped.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import compress

_NO_NUMBER = "\N{EN DASH}"
"""What stands in place of a number that a row lacks."""


@dataclass(frozen=True)
class Cell:
    """A table cell."""

    text: str
    value: float | None = None
    """The number by which the cell is sorted; None: by its text."""
    best: bool = False
    note: str = ""
    """Shown small below the text, such as an interval."""
    hint: str = ""
    """Shown when the pointer rests on the cell."""


@dataclass(frozen=True)
class Column:
    """A table column."""

    title: str
    hint: str = ""
    """What the column means; shown when the pointer rests on the heading."""
    numeric: bool = True
    wrap: bool = False
    """Whether long text breaks anywhere, as paths must."""


def render_page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page from (heading, HTML) sections, with links to them at the top."""
    # Everything is inside the page, so that one file can be mailed or archived.
    links = "".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h, _ in sections)
    body = "".join(f'<section id="{_anchor(h)}"><h2>{escape(h)}</h2>{html}</section>' for h, html in sections)

    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_read_asset('report.css')}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>"
        f'<p class="subtitle">{escape(subtitle)}</p><nav>{links}</nav></header>\n<main>{body}</main>'
        f"\n<script>{_read_asset('report.js')}</script></body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text with `code` in backticks; kind `notice` frames it, `small` makes it quiet."""
    return f'<p class="{kind}">{_mark_code(text)}</p>' if kind else f"<p>{_mark_code(text)}</p>"


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], sortable: bool = True) -> str:
    """A table; a click on a heading sorts by it, numbers by value. The best cells of a row stand out."""
    # The container scrolls where a table is wider than the screen; the page itself never does.
    head = "".join(_heading_cell(column, sortable) for column in columns)
    lines = ["".join(_cell(cell, column) for cell, column in zip(row, columns, strict=True)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def drop_empty_columns(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]]
) -> tuple[list[Column], list[list[Cell]]]:
    """The columns in which a row has text or a number, and the rows with these cells alone."""
    filled = [any(row[i].text not in ("", _NO_NUMBER) for row in rows) for i in range(len(columns))]
    return list(compress(columns, filled)), [list(compress(row, filled)) for row in rows]


def definitions(terms: Sequence[tuple[str, str]]) -> str:
    """A list of terms and what they mean."""
    return "<dl>" + "".join(f"<dt>{escape(t)}</dt><dd>{_mark_code(d)}</dd>" for t, d in terms) + "</dl>"


def picture(image: bytes, caption: str, kind: str = "jpeg") -> str:
    """An image file's bytes inside the page, with its caption."""
    # The caption is also the text for those who do not see the picture.
    data = base64.b64encode(image).decode("ascii")
    alt = escape(caption)
    return f'<figure><img src="data:image/{kind};base64,{data}" alt="{alt}"/><figcaption>{alt}</figcaption></figure>'


def row(charts: Sequence[str]) -> str:
    """Charts side by side, as many as fit."""
    return '<div class="row">' + "".join(f"<div>{c}</div>" for c in charts) + "</div>"


def details(summary: str, html: str, is_open: bool = False) -> str:
    """A part that opens on a click."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{html}</details>"


def code(text: str) -> str:
    """Text in a fixed-width block."""
    return f"<pre>{escape(text)}</pre>"


def format_number(value: float | None, digits: int, signed: bool = False) -> str:
    """A number for people: fixed digits, a dash for none, an infinity sign; thin spaces group thousands.

    signed: a number above zero begins with a plus.
    """
    if value is None:
        return _NO_NUMBER
    if math.isinf(value):
        return "\N{INFINITY}"

    # `or 0.0`: a negative number that rounds to zero loses its sign.
    value = round(value, digits) or 0.0

    plus = "+" if signed and value > 0 else ""
    return plus + f"{value:,.{digits}f}".replace(",", "\N{THIN SPACE}").replace("-", "\N{MINUS SIGN}")


def _heading_cell(column: Column, sortable: bool) -> str:
    # A button can be reached by keyboard, a bare heading cannot.
    title = re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", escape(column.title))
    content = f'<button type="button">{title}</button>' if sortable else title
    kind = _name_kind(column)
    return f'<th class="{kind}" title="{escape(column.hint)}" scope="col">{content}</th>'


def _cell(cell: Cell, column: Column) -> str:
    # The script sorts by `data-value`; what has none stays last.
    value = "" if cell.value is None or not math.isfinite(cell.value) else f' data-value="{cell.value!r}"'
    kind = _name_kind(column) + (" best" if cell.best else "")
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    hint = f' title="{escape(cell.hint)}"' if cell.hint else ""

    return f'<td class="{kind}"{value}{hint}>{escape(cell.text)}{note}</td>'


def _name_kind(column: Column) -> str:
    """Classes of a column's cells: how they are sorted and aligned, and whether they wrap."""
    return ("number" if column.numeric else "text") + (" wrap" if column.wrap else "")


def _mark_code(text: str) -> str:
    """Escaped text, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())


def _read_asset(name: str) -> str:
    return resources.files("hpc_neuro").joinpath(f"assets/{name}").read_text("utf-8")
