"""The command line: `hpc-neuro VERB [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import schema
from hpc_neuro.core.distributed import is_main
from hpc_neuro.pipeline import VERBS, Verb

log = logging.getLogger("hpc_neuro")


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
        return _call(VERBS[name], rest)
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
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return (
        "hpc-neuro VERB [CONFIG.yaml] [key=value ...] [--dry-run]\n\n"
        + "\n".join(lines)
        + "\n\n`hpc-neuro VERB --help` lists every key. "
        + "--dry-run checks everything a run needs and prints the forecast.\n"
    )


def _call(verb: Verb, rest: Sequence[str]) -> int:
    commands = dict(verb.commands)
    if rest and rest[0] in commands:
        return int(importlib.import_module(commands[rest[0]]).main(rest[1:]))
    module = verb.load_module()
    if verb.config is None:
        return int(module.main(rest))
    cls = verb.load_config_class()
    flags = [a for a in rest if a.startswith("-")]
    if "--help" in flags or "-h" in flags:
        sys.stdout.write(_help(verb, cls))
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


def _help(verb: Verb, cls: type) -> str:
    fields = list(schema.describe(cls))
    width = min(40, max(len(f.key) for f in fields))
    lines = [f"hpc-neuro {verb.name} [CONFIG.yaml] [key=value ...] [--dry-run]: {verb.summary}\n"]
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
