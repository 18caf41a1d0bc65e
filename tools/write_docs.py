"""Write the tables of docs/ that come from the code; a test checks that the pages hold what this program writes.

    python -m tools.write_docs            # writes the pages that differ
    python -m tools.write_docs --check    # lists them, exit code 1 if there are any

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end of table -->`, each on a line of its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hpc_neuro.core import schema
from hpc_neuro.core.constants import EXIT_CODES
from hpc_neuro.metrics import list_metrics
from launch.site import ClusterFacts, Resources

DOCS = Path(__file__).resolve().parent.parent / "docs"
"""Folder of the pages."""
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Write the pages that differ, or list them."""
    outdated = [path for path in sorted(DOCS.glob("*.md")) if path.read_text(encoding="utf-8") != render_page(path)]
    for path in outdated:
        sys.stdout.write(f"{path}\n")
        if "--check" not in arguments:
            path.write_text(render_page(path), encoding="utf-8")
    return 1 if outdated and "--check" in arguments else 0


def render_page(path: Path) -> str:
    """The text of a page with its tables as the code has them. Raises KeyError for a table that is not in TABLES."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], path.read_text(encoding="utf-8"))


def format_metrics() -> str:
    """Every metric of a report, by its key."""
    arrows = {"higher": "↑", "lower": "↓", "": ""}
    rows = [
        (f"`{metric.key}`", f"{metric.heading} {arrows[metric.direction]}".strip(), metric.definition)
        for metric in list_metrics()
    ]
    return _format_table(("key", "heading", "definition"), rows)


def format_exit_codes() -> str:
    """The exit codes of every verb."""
    rows = [
        (str(code), exit_code.meaning, exit_code.advice, exit_code.effect) for code, exit_code in EXIT_CODES.items()
    ]
    return _format_table(("code", "meaning", "what to do", "effect on a job"), rows)


def format_site_keys() -> str:
    """The keys of a site, without the sections of the verbs."""
    return _format_config(ClusterFacts)


def format_resources() -> str:
    """The keys of the section of one verb."""
    return _format_config(Resources)


TABLES: dict[str, Callable[[], str]] = {
    "metrics": format_metrics,
    "exit_codes": format_exit_codes,
    "site_keys": format_site_keys,
    "resources": format_resources,
}
"""Text of each table, by the name that pages use."""


def _format_config(cls: type) -> str:
    rows = [(f"`{field.key}`", field.type, f"`{field.default}`", field.text) for field in schema.describe(cls)]
    return _format_table(("key", "type", "default", "meaning"), rows)


def _format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    # A bar inside a cell would end it.
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
