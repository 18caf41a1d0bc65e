"""How easy the code is to read, measured from its syntax trees alone.

    python -m tools.bench.readability [FOLDER ...] [--worst 10]

Counts, for `hpc_neuro` and `launch` unless folders are given: lengths of functions, blank lines inside their bodies,
comment lines of their own, names that are participles, variables that name nothing (`found`, `said`), cyclic imports
and files. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hpc_neuro", "launch")
VAGUE = frozenset({"found", "said", "known", "mine", "theirs", "held", "told", "what", "way", "some", "looked"})
"""Variables that say nothing of what they hold."""
IRREGULAR = frozenset(
    [
        "begun",
        "bent",
        "broken",
        "brought",
        "built",
        "caught",
        "chosen",
        "cut",
        "dealt",
        "done",
        "drawn",
        "fed",
        "found",
        "given",
        "gone",
        "grown",
        "held",
        "hidden",
        "hung",
        "kept",
        "known",
        "led",
        "left",
        "lent",
        "lost",
        "made",
        "meant",
        "met",
        "mine",
        "overridden",
        "paid",
        "said",
        "seen",
        "sent",
        "shown",
        "spoken",
        "spread",
        "stuck",
        "sunk",
        "taken",
        "theirs",
        "thought",
        "told",
        "torn",
        "undone",
        "withheld",
        "won",
        "worn",
        "written",
    ]
)
"""Participles (and pronouns) that do not end in -ed."""
VERBS_IN_ED = frozenset({"embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "succeed"})
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FunctionFacts:
    """One function and what is counted of it."""

    path: Path
    name: str
    line: int
    lines: int
    blank: int
    vague: frozenset[str]

    @property
    def is_participle(self) -> bool:
        """Whether the name is one participle, where a verb with its object was wanted."""
        word = self.name.strip("_")
        return word in IRREGULAR or (word.endswith("ed") and "_" not in word and word not in VERBS_IN_ED)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, the worst functions, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / name for name in FOLDERS])
    parser.add_argument("--worst", type=int, default=10, help="how many of the longest functions to list")
    args = parser.parse_args(argv)

    paths = sorted(path for folder in args.folders for path in folder.rglob("*.py"))
    functions = [facts for path in paths for facts in read_functions(path)]
    figures = measure(paths, functions)

    for facts in sorted(functions, key=lambda f: -f.lines)[: args.worst]:
        print(f"{facts.lines:4d} lines  {facts.path}:{facts.line} {facts.name}")
    for facts in functions:
        if facts.vague:
            print(f"vague names  {facts.path}:{facts.line} {facts.name}: {', '.join(sorted(facts.vague))}")
        if facts.is_participle:
            print(f"participle   {facts.path}:{facts.line} {facts.name}")
    for cycle in find_import_cycles(paths):
        print(f"cycle        {' -> '.join(cycle)}")
    print(json.dumps(figures))
    return 0


def measure(paths: Sequence[Path], functions: Sequence[FunctionFacts]) -> dict[str, float]:
    """The figures of a set of files; shares are of all lines that the functions or the files have."""
    lengths = sorted(facts.lines for facts in functions) or [0]
    body_lines = sum(lengths)
    code_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)

    return {
        "files": len(paths),
        "lines": code_lines,
        "functions": len(functions),
        "function_lines_median": statistics.median(lengths),
        "function_lines_p90": lengths[int(0.9 * (len(lengths) - 1))],
        "function_lines_max": lengths[-1],
        "blank_share": round(sum(facts.blank for facts in functions) / max(body_lines, 1), 4),
        "own_line_comment_share": round(sum(map(count_own_line_comments, paths)) / max(code_lines, 1), 4),
        "functions_with_vague_names": sum(bool(facts.vague) for facts in functions),
        "participle_functions": sum(facts.is_participle for facts in functions),
        "import_cycles": len(find_import_cycles(paths)),
    }


def read_functions(path: Path) -> Iterator[FunctionFacts]:
    """Every function of a file, nested ones too."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            end = node.end_lineno or node.lineno
            body = lines[node.body[0].lineno - 1 : end]
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

            yield FunctionFacts(
                path=path.relative_to(ROOT) if path.is_relative_to(ROOT) else path,
                name=node.name,
                line=node.lineno,
                lines=end - node.lineno + 1,
                blank=sum(not line.strip() for line in body),
                vague=frozenset(names & VAGUE),
            )


def count_own_line_comments(path: Path) -> int:
    """Comment lines that share their line with no code."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens)


def find_import_cycles(paths: Sequence[Path]) -> list[list[str]]:
    """Modules that import one another at module level, as strongly connected components of more than one module."""
    modules = {_name_module(path): path for path in paths}
    graph = {name: set(_list_imports(name, path, modules)) for name, path in modules.items()}
    return [sorted(component) for component in _find_strong_components(graph) if len(component) > 1]


def _name_module(path: Path) -> str:
    parts = (
        path.resolve().relative_to(ROOT).with_suffix("").parts if path.resolve().is_relative_to(ROOT) else path.parts
    )
    return ".".join(parts).removesuffix(".__init__")


def _list_imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the set that are imported when this one is; imports inside functions and for types do not count."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in modules else node.module
                # A package's __init__ gathers its modules; a module that imports its package's sibling is no cycle.
                if target in modules and not name.startswith(f"{target}."):
                    yield target


def _find_strong_components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Tarjan's algorithm, without recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    for start in graph:
        if start in index:
            continue

        work = [(start, iter(graph[start]))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            node, edges = work[-1]
            for target in edges:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    work.append((target, iter(graph[target])))
                    break
                if target in stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])

                # The node is the first of its component that was visited; the others lie above it on the stack.
                if low[node] == index[node]:
                    cut = stack.index(node)
                    components.append(stack[cut:])
                    del stack[cut:]
    return components


if __name__ == "__main__":
    raise SystemExit(main())
