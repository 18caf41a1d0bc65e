"""SWC trees: `read`, `write`, `check`, `fix`, `convert`. Files hold x y z; everything else here is z y x."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hpc_neuro.core.files import quote_path
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.convert import Transform, convert, transform
from hpc_neuro.data.swc.header import SwcHeader, find_offset, is_finite_offset, parse_header, unit_in_um
from hpc_neuro.data.swc.repair import RepairResult, fix, split_by_length
from hpc_neuro.data.swc.structure import build_tree, link
from hpc_neuro.data.swc.table import UNREADABLE, SwcFinding, SwcTable, parse
from hpc_neuro.data.swc.writer import drop_added_nodes, node_ids, write

__all__ = [
    "RepairResult",
    "SwcFinding",
    "SwcHeader",
    "Transform",
    "check",
    "convert",
    "fix",
    "is_repairable",
    "node_ids",
    "read",
    "read_comments",
    "read_header",
    "require_header",
    "split_by_length",
    "transform",
    "unit_in_um",
    "write",
]

_MAX_SHOWN = 8
"""Findings in the error of a file that cannot be used."""


def read(path: Path | str) -> Tree:
    """The tree of an SWC file, z y x in the file's own unit, parents first; several roots stay several.

    Takes what has one meaning: Windows lines, byte-order marks, commas or semicolons between columns, ids like `1.0`,
    more columns, any order of nodes, repeated lines. A radius that is not finite and positive becomes its parent's (a
    root's: the median; 1 where no radius is good), so that every radius is above 0. Nodes that `write` added for other
    readers are removed again. Raises InputError listing by line what has no single meaning.
    """
    path = Path(path)
    linked = link(parse(path))

    # A file can have thousands of findings; the first few tell what is wrong.
    if linked.fatal:
        lines = [f"  {finding}" for finding in linked.fatal[:_MAX_SHOWN]]
        if len(linked.fatal) > _MAX_SHOWN:
            lines.append(f"  and {len(linked.fatal) - _MAX_SHOWN} more")
        advice = f"Repair it with:  hpc-neuro swc fix {quote_path(path)}"
        if not is_repairable(linked.fatal):
            advice = "Export it again."
        raise InputError("\n".join([f"{path} is not a usable SWC file:", *lines, advice]))

    # What `write` added is no part of the tree.
    return drop_added_nodes(build_tree(linked), linked.table.comments)


def is_repairable(findings: Iterable[SwcFinding]) -> bool:
    """Whether `fix` can settle fatal findings: not without a node, and not where no rule tells the columns apart."""
    return not {finding.kind for finding in findings} & {"empty", *UNREADABLE}


def check(path: Path | str) -> list[SwcFinding]:
    """Everything in an SWC file that breaks the convention or that other readers refuse, by line; [] when clean.

    Raises InputError for a file that is missing or no SWC text at all.
    """
    table = parse(Path(path))
    conflict = parse_header(table.comments).conflict
    unit = [SwcFinding(0, "unit", conflict)] if conflict else []
    return sorted([*unit, *_find_offsets(table), *link(table).findings])


def _find_offsets(table: SwcTable) -> Iterator[SwcFinding]:
    """Findings on lines that state an offset other than 0, which may be applied already or not."""
    for comment in table.comments:
        if comment.is_whole_line and (offset := find_offset(comment.text)):
            z, y, x = offset
            if not is_finite_offset(offset):
                text = f"the header states an offset that is no number: {comment.text.strip()[:60]!r}; correct the line"
                yield SwcFinding(comment.line, "offset", text)
                continue
            text = (
                f"the header states an offset of {x:g} {y:g} {z:g} (x y z), which is not applied; where it has to be, "
                f"use `hpc-neuro swc transform FILE shift={z:g},{y:g},{x:g}`"
            )
            yield SwcFinding(comment.line, "offset", text)


def read_header(path: Path | str) -> SwcHeader:
    """Unit and voxel size that a file states in the words of any common program; None for what it does not state.

    A header whose lines exclude each other says so in `conflict`. Raises InputError for a file that is no SWC text.
    """
    return parse_header(parse(Path(path)).comments)


def require_header(path: Path | str) -> SwcHeader:
    """As `read_header`; raises InputError for statements that exclude each other, which no caller may choose from."""
    header = read_header(path)
    if header.conflict:
        raise InputError(
            f"{path}: {header.conflict}; state which holds with:  hpc-neuro swc fix {quote_path(path)} unit=um  "
            "(or unit=voxel)"
        )
    return header


def read_comments(path: Path | str) -> list[str]:
    """The comment lines of a file, without their #."""
    return [comment.text for comment in parse(Path(path)).comments if comment.is_whole_line]
