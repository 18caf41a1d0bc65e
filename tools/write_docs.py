"""Write the tables of docs/ that come from the code; a test checks that the pages hold what this program writes.

    python -m tools.write_docs            # writes the pages that differ
    python -m tools.write_docs --check    # lists them, exit code 1 if there are any

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end of table -->`, each on a line of its own.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hpc_neuro
from hpc_neuro.core import schema
from hpc_neuro.core.constants import EXIT_CODES
from hpc_neuro.metrics import list_metrics
from hpc_neuro.pipeline import VERBS
from launch.site import ClusterFacts, Resources

DOCS = Path(__file__).resolve().parent.parent / "docs"
"""Folder of the pages."""
_CODE_WIDTH = 100
"""Characters of a signature that stands on one line."""
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Write the pages that differ, or list them."""
    outdated = [path for path in sorted(DOCS.glob("*.md")) if path.read_text(encoding="utf-8") != render_page(path)]
    for path in outdated:
        sys.stdout.write(f"{path}\n")
        if "--check" not in argv:
            path.write_text(render_page(path), encoding="utf-8")
    return 1 if outdated and "--check" in argv else 0


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


def format_settings() -> str:
    """Every key of every verb that has a config, one table for each verb."""
    sections = []
    for verb in VERBS.values():
        if verb.config:
            table = _format_config(verb.load_config_class())
            sections.append(f"## {verb.name}\n\n`hpc-neuro {verb.name}`: {verb.summary}\n\n{table}")
    return "\n".join(sections)


def format_functions() -> str:
    """The functions of the Python API that are no verbs."""
    names = [name for name in hpc_neuro.__all__ if name.islower() and not name.startswith("run_")]
    return "\n".join(_describe_function(name) for name in names)


def format_classes() -> str:
    """The classes of the Python API that are no configs of verbs."""
    configs = {verb.config for verb in VERBS.values()}
    names = [name for name in hpc_neuro.__all__ if not name.islower() and name not in configs]
    return "\n".join(_describe_class(name) for name in names)


def format_verb_functions() -> str:
    """The verbs as functions, with their config classes."""
    rows = [
        (
            f"`{verb.function}(cfg)`",
            f"`{verb.config}`",
            verb.summary,
            f"[keys](settings.md#{verb.name.replace(' ', '-')})",
        )
        for verb in VERBS.values()
        if verb.config
    ]
    return _format_table(("function", "config", "what it does", "settings"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "metrics": format_metrics,
    "exit_codes": format_exit_codes,
    "site_keys": format_site_keys,
    "resources": format_resources,
    "settings": format_settings,
    "functions": format_functions,
    "classes": format_classes,
    "verb_functions": format_verb_functions,
}
"""Text of each table, by the name that pages use."""


def _describe_function(name: str) -> str:
    """A heading, the signature and the docstring."""
    function = getattr(hpc_neuro, name)
    return f"### {name}\n\n```python\n{_format_signature(name, function)}\n```\n\n{inspect.getdoc(function)}\n"


def _format_signature(name: str, function: Callable[..., Any]) -> str:
    """The signature on one line, or with a line for each parameter."""
    signature = inspect.signature(function)

    parts = list[str]()
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{parameter.name}: {parameter.annotation}{default}")

    result = signature.return_annotation
    line = f"{name}({', '.join(parts)}) -> {result}"
    if len(line) <= _CODE_WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f") -> {result}"


def _describe_class(name: str) -> str:
    """A heading, the docstring, and a table of the public fields, properties and methods with a docstring."""
    cls = getattr(hpc_neuro, name)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)

    rows = [(f"`{member}`", text) for member, text in _list_members(definition) if not member.startswith("_")]
    table = f"\n{_format_table(('member', 'meaning'), rows)}" if rows else ""
    return f"### {name}\n\n{inspect.getdoc(cls)}\n{table}"


def _list_members(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """(name, first paragraph of the docstring) of each field and method of a class that has a docstring."""
    for statement, following in itertools.pairwise([*definition.body, ast.Pass()]):
        text = None
        if isinstance(statement, ast.FunctionDef):
            name, text = statement.name, ast.get_docstring(statement)
        elif isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            # The docstring of a field is the expression below it.
            name, text = ast.unparse(statement.target), str(ast.literal_eval(following.value))

        if text:
            yield name, " ".join(text.split("\n\n")[0].split())


def _format_config(cls: type) -> str:
    rows = [
        (f"`{field.key}`", field.type, _format_default(field.default), field.text) for field in schema.describe(cls)
    ]
    return _format_table(("key", "type", "default", "meaning"), rows)


def _format_default(default: str) -> str:
    """A default as code; a section has none, and `(required)` is no value."""
    return default.strip("()") if default in ("", "(required)") else f"`{default}`"


def _format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    # A bar inside a cell would end it.
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
