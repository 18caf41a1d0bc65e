"""The chain of pages of a TIFF: whether it is whole, and whether the pages of a stack are stored alike."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats.volume import require_bytes

PageForm = tuple[int, ...]
"""The values of `_FIELDS` of one page, in their order."""

_FIELDS = {
    256: ("width", 0),
    257: ("length", 0),
    258: ("bits per sample", 1),
    259: ("compression", 1),
    262: ("photometric interpretation", 0),
    266: ("fill order", 1),
    277: ("samples per pixel", 1),
    278: ("rows per strip", (1 << 32) - 1),
    284: ("planar configuration", 1),
    317: ("predictor", 1),
    322: ("tile width", 0),
    323: ("tile length", 0),
    339: ("sample format", 1),
}
"""Tag -> name and value where a page does not state it. Pages that differ in one are decoded differently."""
_ROWS_PER_STRIP, _LENGTH = list(_FIELDS).index(278), list(_FIELDS).index(257)
_FORMS = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Type of a tag -> `struct` format of its whole numbers."""


def read_page_forms(path: Path) -> list[PageForm]:
    """The form of each page in the chain; InputError where it leaves the file or turns back (truncated or damaged)."""
    # BigTIFF (version 43) has the same layout with wider numbers.
    size = path.stat().st_size
    with path.open("rb") as handle:
        order = "<" if handle.read(2) == b"II" else ">"
        is_big = _read_number(path, handle, order + "H") == 43
        count_form, entry_form, offset_form = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")

        handle.seek(8 if is_big else 4)
        offset = _read_number(path, handle, order + offset_form)
        seen: set[int] = set()
        forms: list[PageForm] = []
        while offset:
            if offset in seen or offset + struct.calcsize(count_form) > size:
                fault = "turns back on itself" if offset in seen else f"leaves the file ({size} bytes)"
                raise InputError(
                    f"{path} is damaged or incomplete: after {len(seen)} pages its chain of pages {fault}; "
                    "copy or export it again"
                )
            seen.add(offset)

            # A page is a count, that many entries, and the offset of the next page.
            handle.seek(offset)
            count = _read_number(path, handle, order + count_form)
            entries = struct.Struct(order + entry_form)
            end = handle.tell() + count * entries.size
            require_bytes(path, end, struct.calcsize(offset_form), f"page {len(forms)}")
            table = handle.read(count * entries.size)
            handle.seek(end)
            offset = _read_number(path, handle, order + offset_form)
            forms.append(_parse_form(order, entries, table))
    return forms


def require_one_form(path: Path, forms: Sequence[PageForm], pages: Sequence[int]) -> None:
    """Raise InputError unless all of `pages` are stored as the first of them."""
    if pages:
        require_form(path, forms, pages[1:], forms[pages[0]], f"page {pages[0]}")


def require_form(
    path: Path, forms: Sequence[PageForm], pages: Sequence[int], wanted: PageForm, wanted_page: str
) -> None:
    """Raise InputError unless all of `pages` have the form `wanted`, which is that of `wanted_page`."""
    for number in pages:
        if forms[number] != wanted:
            place = next(i for i, (a, b) in enumerate(zip(forms[number], wanted, strict=True)) if a != b)
            name = list(_FIELDS.values())[place][0]
            raise InputError(
                f"{path}: page {number} has another {name} ({forms[number][place]}) than {wanted_page} "
                f"({wanted[place]}); save all pages alike"
            )


def _parse_form(order: str, entries: struct.Struct, table: bytes) -> PageForm:
    values = {tag: default for tag, (_, default) in _FIELDS.items()}
    for tag, kind, count, data in entries.iter_unpack(table):
        form = _FORMS.get(kind, "")
        # The value of several samples lies elsewhere in the file; their number is compared.
        if tag in values and form and count * struct.calcsize(form) <= len(data):
            values[tag] = struct.unpack_from(order + form, data)[0]

    # A strip may be longer than the page.
    form_values = list(values.values())
    form_values[_ROWS_PER_STRIP] = min(form_values[_ROWS_PER_STRIP], form_values[_LENGTH])
    return tuple(form_values)


def _read_number(path: Path, handle: Any, form: str) -> int:
    """The next number of a TIFF header, by its `struct` format."""
    count = struct.calcsize(form)
    data: bytes = handle.read(count)
    if len(data) != count:
        raise InputError(f"{path} is incomplete: it ends inside its TIFF header; copy or export it again")
    return int(struct.unpack(form, data)[0])
