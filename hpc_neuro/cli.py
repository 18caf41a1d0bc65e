"""The command line: `hpc-neuro VERB [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_neuro.core import schema
from hpc_neuro.core.distributed import is_main

log = logging.getLogger("hpc_neuro")


@dataclass(frozen=True)
class Verb:
    """Where a verb lives and what it does; `config` None: the module takes the plain arguments itself."""

    module: str
    config: str | None
    text: str


VERBS = {
    "prepare": Verb("hpc_neuro.prepare", "PrepareConfig", "images + SWC trees -> training store"),
    "precompute": Verb("hpc_neuro.precompute", "PrecomputeConfig", "training store -> teacher feature cache"),
    "train": Verb("hpc_neuro.train", "TrainConfig", "store + cache -> 3D student"),
    "infer": Verb(
        "hpc_neuro.infer", "InferConfig", "student + volumes -> probabilities and SWC trees; verify OUT, serve OUT"
    ),
    "evaluate": Verb("hpc_neuro.evaluate", "EvaluateConfig", "predictions + truth -> metrics and report"),
    "search": Verb("hpc_neuro.search", "SearchConfig", "a study's trials -> table, figures, best config"),
    "demo": Verb("hpc_neuro.demo", "DemoConfig", "all of the above on a small data set"),
    "fetch-teacher": Verb("hpc_neuro.fetch_teacher", None, "a teacher's weights into a folder, for offline nodes"),
    "cache": Verb("hpc_neuro.precompute.cache_tool", None, "verify and repair a feature cache, or say what it holds"),
    "doctor": Verb("hpc_neuro.doctor", None, "what this machine has, what is missing and how to get it"),
    "info": Verb("hpc_neuro.info", None, "what a volume file holds"),
    "swc": Verb("hpc_neuro.swc_tool", None, "check, fix, convert or transform SWC files"),
    "history": Verb("hpc_neuro.history", None, "the chain behind a result, and whether it is whole"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit code: 0 done, 2 bad input or config, 3 done with listed failures, 75 stopped, resumable."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name == "--version":
        from hpc_neuro.core.run_folder import code_version

        sys.stdout.write(code_version() + "\n")
        return 0
    if name not in VERBS:
        sys.stderr.write(f"hpc-neuro: {name!r} is not one of the verbs {', '.join(VERBS)}\n")
        return 2
    _log_to_console()
    try:
        return _call(VERBS[name], name, rest)
    except (schema.ConfigError, schema.InputError) as error:
        sys.stderr.write(f"hpc-neuro {name}: {error}\n")
        return 2
    except BrokenPipeError:  # `hpc-neuro info FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(
            f"hpc-neuro {name}: no space left on the disk ({error.filename or error}); nothing half-written was kept: "
            "make room and give the same command again\n"
        )
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"hpc-neuro {name}: stopped; the same command goes on from here\n")
        return 75


def usage() -> str:
    """The overview `hpc-neuro --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.text}" for name, verb in VERBS.items()]
    return (
        "hpc-neuro VERB [CONFIG.yaml] [key=value ...] [--dry-run]\n\n"
        + "\n".join(lines)
        + "\n\n`hpc-neuro VERB --help` lists every key. "
        + "--dry-run checks everything a run needs and prints the forecast.\n"
    )


def _call(verb: Verb, name: str, rest: Sequence[str]) -> int:
    module = importlib.import_module(verb.module)
    if verb.config is None:
        return int(module.main(rest))
    if rest and rest[0] in (commands := getattr(module, "COMMANDS", {})):
        return int(commands[rest[0]](rest[1:]))
    cls = getattr(module, verb.config)
    flags = [a for a in rest if a.startswith("-")]
    if "--help" in flags or "-h" in flags:
        sys.stdout.write(_help(name, verb, cls))
        return 0
    if unknown := [f for f in flags if f != "--dry-run"]:
        raise schema.ConfigError(
            f"{unknown[0]} is not a flag; keys are given as key=value, flags are --dry-run and --help"
        )
    words = [a for a in rest if not a.startswith("-")]
    path = Path(words.pop(0)) if words and "=" not in words[0] else None
    cfg: Any = schema.load(cls, path, words)
    if "--dry-run" in flags:
        lines = module.forecast(cfg)
        if lines and is_main():
            sys.stdout.write("\n".join(lines) + "\n")
        return 0
    return int(module.run(cfg))


def _help(name: str, verb: Verb, cls: type) -> str:
    fields = list(schema.describe(cls))
    width = min(40, max(len(f.key) for f in fields))
    lines = [f"hpc-neuro {name} [CONFIG.yaml] [key=value ...] [--dry-run]: {verb.text}\n"]
    for field in fields:
        default = f" = {field.default}" if field.default else ""
        lines.append(f"  {field.key:<{width}} {field.type + default}")
        if field.text:
            lines.append(f"  {'':<{width}}   {field.text}")
    return "\n".join(lines) + "\n"


def _log_to_console() -> None:
    """Messages go to standard error as plain lines; ranks other than the first only warn."""
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
