"""README.md and docs/: every link leads somewhere, and every command line is one that the program accepts."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile

import hpc_neuro
import launch.__main__ as launch_cli
from hpc_neuro import cli
from hpc_neuro.core import schema
from hpc_neuro.core.morphology import build_tree
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.infer.viewer import ServeConfig
from hpc_neuro.pipeline import VERBS, Verb, find_verb
from launch import chain, submit
from launch.site import Site

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
QUESTIONS = (
    "trace-one-stack",
    "my-voxel-size-is-missing-or-wrong",
    "several-neurons-and-somas",
    "sparse-labels",
    "label-volumes-without-a-tree",
    "train-on-five-neurons",
    "own-dino-weights",
    "adapt-a-teacher-to-my-microscope",
    "four-gpus",
    "stop-and-resume",
    "a-whole-brain-in-a-night",
    "choose-a-threshold",
    "proofread",
    "read-the-report",
    "sweeps-without-internet",
    "fiji-and-snt",
    "napari",
    "neuroglancer",
    "neurom",
)
"""Anchors of docs/howto.md that docs/index.md must link to."""
COMMON_QUESTIONS = ("how-many-labels-do-i-need", "how-much-gpu-memory-do-i-need", "how-long-does-it-take")
"""Anchors of docs/faq.md that docs/index.md must link to."""
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
PROGRAM = re.compile(r"^.*?(?P<program>hpc-neuro|-m hpc_neuro|-m launch|slurm/\w+\.sbatch) (?P<rest>.*)$")
SPAN = re.compile(r"(?<!`)`((?:hpc-neuro|python -m|make) [^`]+)`(?!`)")
PATTERN = re.compile(r"VERB|\[key=value|\||NAME.*\.\.\.$")
"""What stands for several commands."""
NOT_GIVEN = ("Field required", "Missing")
"""Faults of examples that leave out what does not matter to them."""


def find_anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def find_broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    broken = []
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if match["target"].startswith(("http:", "https:", "mailto:")):
            continue

        target = page.parent / match["target"] if match["target"] else page
        anchors = find_anchors(target.read_text(encoding="utf-8")) if target.suffix == ".md" and target.exists() else ()
        if not target.exists() or (match["anchor"] and match["anchor"] not in anchors):
            broken.append(match[0])
    return broken


def list_code_lines(text: str) -> list[str]:
    """Lines of the code blocks of a page, fenced or indented, with continued lines joined."""
    blocks = [match["body"] for match in FENCE.finditer(text) if match["language"] != "python"]
    # A block in a list is indented further than its item.
    indented = re.findall(r"^ {4,}(?=\S).*(?:\n {4,}.*)*", FENCE.sub("", text), re.MULTILINE)
    code = "\n".join([*blocks, *indented])
    return [line.strip().removeprefix("$ ") for line in re.sub(r"\\\n\s*", "", code).splitlines()]


def list_commands(page: Path) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every command line of a page; programs are `hpc-neuro` and `launch`."""
    commands = []
    for line in list_code_lines(page.read_text(encoding="utf-8")):
        match = PROGRAM.match(line)
        # The lines of diagrams and of printed output do not begin with a program.
        if match is None or re.match(r"(?!hpc-neuro|python|torchrun|mpiexec|srun|sbatch|job=|OMP_)", line):
            continue

        words = shlex.split(match["rest"].rstrip(")") if line.startswith("job=") else match["rest"], comments=True)
        program = "launch" if match["program"].endswith("launch") else "hpc-neuro"
        # These scripts run the verb that they are named after.
        script = re.fullmatch(r"slurm/(train|precompute)\.sbatch", match["program"])
        verb = [script[1]] if script else []
        # What "..." stands for is not known.
        commands.append((program, verb + [word for word in words if word != "..."]))
    return commands


def list_spans(page: Path) -> list[str]:
    """Commands in the running text and the tables of a page; patterns such as `VERB --help` are none."""
    spans = [" ".join(match[1].split()) for match in SPAN.finditer(FENCE.sub("", page.read_text(encoding="utf-8")))]
    return [span for span in spans if not PATTERN.search(span)]


def list_modules(page: Path) -> list[str]:
    """Commands `python -m tools.NAME` and `python -m tests.NAME` of a page, in code blocks and in the text."""
    lines = [*list_code_lines(page.read_text(encoding="utf-8")), *list_spans(page)]
    return [match[0] for line in lines if (match := re.search(r"python -m (tools|tests)\..*", line))]


def check_module(command: str) -> list[str]:
    """The module of a command where it does not exist, and options that its source does not name."""
    _, _, name, *words = shlex.split(command, comments=True)
    path = REPO / name.replace(".", "/")
    files = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.glob("*.py"))
    if not files:
        return [name]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    return [word for word in words if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]


COMMANDS = [(page.name, program, words) for page in PAGES for program, words in list_commands(page)]
SPANS = [(page.name, span) for page in PAGES for span in list_spans(page)]
MODULES = [(page.name, command) for page in PAGES for command in list_modules(page)]


def accept(*_: Any) -> int:
    """Stands for the work of a verb."""
    return 0


def drop_missing_configs(words: list[str]) -> list[str]:
    """The words without config files that exist only in the reader's folder."""
    return [word for word in words if not (word.endswith(".yaml") and "=" not in word and not (REPO / word).exists())]


def list_faults(text: str) -> list[str]:
    """Faults of an error message, one a line, without those of keys that an example leaves out."""
    lines = text.splitlines()
    # Several faults stand below a heading.
    return [line for line in lines[1:] or lines if not any(reason in line for reason in NOT_GIVEN)]


def check_tool(verb: Verb, words: list[str]) -> list[str]:
    """Keys and subcommands of a tool, which has no config, that its help does not name."""
    module = importlib.import_module(dict(verb.commands).get(words[0] if words else "", verb.module))
    text = getattr(module, "HELP", None) or module.__doc__
    keys = [word.partition("=")[0] for word in words if "=" in word]
    subcommands = words[:1] if verb.name in ("swc", "cache") else []
    names = [*(f"{key}=" for key in keys), *subcommands]
    return [name for name in names if not re.search(rf"\b{re.escape(name)}", text)]


def check_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Faults of the arguments of `hpc-neuro`."""
    name, *rest = words
    if name.startswith("-"):
        return [] if name in ("--help", "--version") else [name]
    verb, rest = find_verb(words)
    if verb is None:
        return [f"{name} is no verb"]

    if verb.config is None or (rest and rest[0] == "verify"):
        return check_tool(verb, rest)
    if rest and rest[0] == "serve":
        schema.load(ServeConfig, None, [f"out={rest[1]}", *rest[2:]])
        return []

    capsys.readouterr()
    code = cli.main([verb.name, *drop_missing_configs(rest)])
    faults = list_faults(capsys.readouterr().err)
    assert code in (0, 2)
    return faults


def check_launch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Faults of the arguments of `python -m launch VERB` or `--chain`."""
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(launch_cli, "_check_and_submit", lambda args: parsed.append(args) or 0)
    assert launch_cli.main(words) == 0
    (args,) = parsed

    site_keys = [word.removeprefix("cluster.") for word in args.words if word.startswith("cluster.")]
    keys = [word for word in drop_missing_configs(args.words) if not word.startswith("cluster.")]
    faults = []
    try:
        schema.load(Site, None, site_keys)
        if args.chain:
            chain.plan_chain(args.chain.split(","), None, keys)
        else:
            verb, *keys = keys
            config, keys, values = submit.require_launchable(verb).sort_words(keys)
            submit.load_config(verb, REPO / config if config else None, keys, values)
    except ConfigError as error:
        faults = list_faults(str(error))
    return faults


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are named relative to the repository, and no verb does any work."""
    monkeypatch.chdir(REPO)
    classes = {name: verb.load_config_class() for name, verb in VERBS.items() if verb.config}
    monkeypatch.setattr(Verb, "load_config_class", lambda verb: classes[verb.name])
    work = SimpleNamespace(run=accept, forecast=lambda _: [])
    monkeypatch.setattr(Verb, "load_module", lambda _: work)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert find_broken_links(page) == []


@pytest.mark.parametrize(
    ("name", "program", "words"), COMMANDS, ids=[f"{name}-{shlex.join(words)}"[:90] for name, _, words in COMMANDS]
)
def test_every_command_is_accepted(
    name: str,
    program: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if program == "hpc-neuro":
        assert check_command(words, capsys) == []
    elif words[0] == "sweep":
        assert words[1] == "CONFIG" or Path(words[1]).exists()
    elif words[0] not in ("status", "cancel", "logs"):
        assert check_launch(words, monkeypatch) == []


@pytest.mark.parametrize(("name", "span"), SPANS, ids=[f"{name}-{span}"[:90] for name, span in SPANS])
def test_every_command_in_the_text_is_accepted(
    name: str, span: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = [word for word in shlex.split(span) if word != "..."]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[0] in targets
    elif program == "hpc-neuro" and len(words) == 1:
        # The name of a verb, or of a group of verbs.
        assert words[0].startswith("-") or [verb for verb in VERBS if verb.split()[0] == words[0]]
    elif program == "hpc-neuro":
        assert check_command(words, capsys) == []
    elif words[1] == "launch" and len(words) > 2 and words[2] not in ("status", "cancel", "logs", "sweep"):
        assert check_launch(words[2:], monkeypatch) == []


@pytest.mark.parametrize(("name", "command"), MODULES, ids=[f"{name}-{text}"[:90] for name, text in MODULES])
def test_every_tool_and_option_exists(name: str, command: str) -> None:
    assert check_module(command) == []


def test_the_check_of_tools_finds_wrong_ones() -> None:
    assert check_module("python -m tools.bench.student --device cuda") == []
    assert check_module("python -m tools.bench.student --devices cuda") == ["--devices"]
    assert check_module("python -m tools.bench.pupil") == ["tools.bench.pupil"]


def test_the_check_of_commands_finds_wrong_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (
        "trace a.tif voxelsize=1,1,1",
        "infer out=o 'inputs=[{picture: a.tif}]'",
        "train optim.step=3",
        "train --dryrun",
    ):
        assert check_command(shlex.split(wrong), capsys), wrong
    for wrong in ("swc convert a.swc size=1", "swc repair a.swc", "score a.swc b.swc limit=4", "tracing a.tif"):
        assert check_command(shlex.split(wrong), capsys), wrong

    assert check_launch(["train", "optim.step=3"], monkeypatch)
    assert check_launch(["--chain", "prepare,train", "out=runs/a", "train.optim.step=3"], monkeypatch)
    assert check_launch(["train", "cluster.train.gpu=3"], monkeypatch)


def test_the_check_of_links_finds_broken_ones(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Sizes (um)\n[a](#sizes-um) [b](#size) [c](other.md) [d](https://example.org/x#y)\n")
    assert find_broken_links(page) == ["[b](#size)", "[c](other.md)"]


def test_commands_of_all_forms_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nhpc-neuro trace a.tif \\\n    out=o   # a comment\n```\n\n    mpiexec -n 2 hpc-neuro infer x=1\n\n"
        "```\njob=$(sbatch --array=0-9 slurm/shares.sbatch infer c.yaml)\ninfer: hpc-neuro is done\n```\n"
    )
    assert list_commands(page) == [
        ("hpc-neuro", ["trace", "a.tif", "out=o"]),
        ("hpc-neuro", ["infer", "c.yaml"]),
        ("hpc-neuro", ["infer", "x=1"]),
    ]


def test_the_python_examples_of_the_how_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPO / "docs" / "howto.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("neuron.tif", np.zeros((64, 400, 500), np.uint8), metadata={"axes": "ZYX"})
    tree = build_tree(np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 4.0], [1.0, 5.0, 4.0]]), np.array([-1, 0, 1]))
    Path("trace/swc").mkdir(parents=True)
    for name in ("neuron.swc", "neuron.voxel.swc"):
        hpc_neuro.write_swc(Path("trace/swc") / name, tree, unit="voxel")

    shapes: list[Any] = []
    layer = SimpleNamespace(scale=(1.0, 0.33, 0.33))
    viewer = SimpleNamespace(layers=[layer], add_shapes=lambda lines, **_: shapes.append(lines))
    examples = [match["body"] for match in FENCE.finditer(text) if match["language"] == "python"]
    for example in examples:
        exec(example, {"viewer": viewer})

    assert len(examples) == 3
    assert tifffile.imread("cut.tif").shape == (60, 300, 300)
    # Lines of two points each, z y x.
    assert shapes[0].shape == (2, 2, 3)


def test_the_index_answers_every_question_in_two_clicks() -> None:
    assert "(docs/index.md)" in (REPO / "README.md").read_text(encoding="utf-8")
    index = (REPO / "docs" / "index.md").read_text(encoding="utf-8")
    assert [anchor for anchor in QUESTIONS if f"(howto.md#{anchor})" not in index] == []
    answers = find_anchors((REPO / "docs" / "howto.md").read_text(encoding="utf-8")) - {"how-to"}
    assert answers == set(QUESTIONS)

    assert [anchor for anchor in COMMON_QUESTIONS if f"(faq.md#{anchor})" not in index] == []
    assert set(COMMON_QUESTIONS) <= find_anchors((REPO / "docs" / "faq.md").read_text(encoding="utf-8"))


def list_pages(nav: list[Any]) -> list[str]:
    """Pages of a navigation of mkdocs, in order."""
    pages = []
    for item in nav:
        for value in item.values():
            pages += list_pages(value) if isinstance(value, list) else [value]
    return pages


def test_the_site_shows_every_page_and_begins_with_the_index() -> None:
    pages = list_pages(schema.read_yaml(REPO / "mkdocs.yml")["nav"])
    assert pages[:2] == ["index.md", "quickstart.md"]
    assert sorted(pages) == [page.name for page in PAGES[1:]]


def test_anchors_are_those_of_the_site() -> None:
    """mkdocs makes one hyphen of several spaces, and GitHub several; links must work on both."""
    for page in PAGES:
        for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
            assert "--" not in (match["anchor"] or ""), f"{page.name}: {match[0]}; change the heading"


def test_the_index_lists_every_page() -> None:
    index = (REPO / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


def test_the_readme_is_short_and_begins_with_trace() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert COMMANDS[0][2][0] == "trace"
