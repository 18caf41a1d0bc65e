"""One HTML page that needs nothing else: style, script and pictures are inside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources


@dataclass(frozen=True)
class Cell:
    """A table cell: the text shown, and the number it sorts by (None: by its text)."""

    text: str
    value: float | None = None
    best: bool = False
    note: str = ""
    """Shown small below the text, as an interval is."""


@dataclass(frozen=True)
class Column:
    """A table's column: heading, and what it means (shown when the pointer rests on it)."""

    title: str
    hint: str = ""
    numeric: bool = True


def render_page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page from (heading, HTML) sections, with a list of them at the top."""
    style, script = (
        resources.files("hpc_neuro").joinpath(f"assets/report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    links = "".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h, _ in sections)
    body = "".join(f'<section id="{_anchor(h)}"><h2>{escape(h)}</h2>{html}</section>' for h, html in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<p class="subtitle">{escape(subtitle)}</p><nav>{links}</nav></header>\n<main>{body}</main>'
        f"\n<script>{script}</script></body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; kind `notice` frames it, `small` makes it quiet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], sortable: bool = True) -> str:
    """A table; a click on a heading sorts by it, numbers by value. The best cells of a row stand out."""
    head = "".join(
        f'<th class="{"number" if c.numeric else "text"}" title="{escape(c.hint)}" scope="col">'
        + (f'<button type="button">{escape(c.title)}</button>' if sortable else escape(c.title))
        + "</th>"
        for c in columns
    )
    body = "".join(
        "<tr>" + "".join(_cell(cell, column) for cell, column in zip(row, columns, strict=True)) + "</tr>"
        for row in rows
    )
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(terms: Sequence[tuple[str, str]]) -> str:
    """A list of terms and what they mean."""
    return "<dl>" + "".join(f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in terms) + "</dl>"


def picture(image: bytes, caption: str, kind: str = "jpeg") -> str:
    """An image file's bytes inside the page, with its caption."""
    data = base64.b64encode(image).decode("ascii")
    alt = escape(caption)
    return f'<figure><img src="data:image/{kind};base64,{data}" alt="{alt}"/><figcaption>{alt}</figcaption></figure>'


def row(charts: Sequence[str]) -> str:
    """Charts side by side, as many as fit."""
    return '<div class="row">' + "".join(f"<div>{c}</div>" for c in charts) + "</div>"


def details(summary: str, html: str, open_: bool = False) -> str:
    """A part that opens on a click."""
    return f"<details{' open' if open_ else ''}><summary>{escape(summary)}</summary>{html}</details>"


def code(text: str) -> str:
    """Text in a fixed-width block."""
    return f"<pre>{escape(text)}</pre>"


def format_number(value: float | None, digits: int) -> str:
    """A number for people: fixed digits, a dash for none, an infinity sign; thin spaces group thousands."""
    if value is None:
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}"
    value = round(value, digits) or 0.0  # what rounds to zero has no sign
    return f"{value:,.{digits}f}".replace(",", "\N{THIN SPACE}").replace("-", "\N{MINUS SIGN}")


def _cell(cell: Cell, column: Column) -> str:
    value = "" if cell.value is None or not math.isfinite(cell.value) else f' data-value="{cell.value!r}"'
    kinds = ["number" if column.numeric else "text", *(["best"] if cell.best else [])]
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f'<td class="{" ".join(kinds)}"{value}>{escape(cell.text)}{note}</td>'


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())
