"""The command line: `hpc-neuro VERB [CONFIG.yaml] [key=value ...] [--dry-run] [--help [all]]`."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import files, schema, stop_signals
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from hpc_neuro.core.distributed import is_main
from hpc_neuro.core.hardware_faults import find_hardware_fault
from hpc_neuro.pipeline import VERBS, Verb, find_verb

log = logging.getLogger("hpc_neuro")
_HELP_FLAGS = ("-h", "--help")
_KEY_COLUMN = 40
"""Characters that keys take at most in the help of a verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit code: 0 done, 2 bad input or config, 3 done with listed failures, 75 stopped, resumable."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in _HELP_FLAGS:
        sys.stdout.write(format_usage())
        return EXIT_DONE if arguments else EXIT_BAD_INPUT

    if arguments[0] == "--version":
        # Asking git takes longer than any other answer here; the module is imported only for it.
        from hpc_neuro.core.run_folder import code_version

        sys.stdout.write(code_version() + "\n")
        return EXIT_DONE

    verb, rest = find_verb(arguments)
    if verb is None:
        return _refuse_verb(arguments)
    name = verb.name

    # Verbs report through logging; only results that programs read go to standard output.
    _log_to_console()
    try:
        return _run_verb(verb, rest)
    except (schema.ConfigError, schema.InputError) as error:
        sys.stderr.write(f"hpc-neuro {name}: {error}\n")
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        # The reader has closed the pipe, as in `hpc-neuro info FILE | head`. Python flushes standard output at exit,
        # which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        code = _report_fault(name, error)
        # Whatever is neither the place of a file nor failing hardware is a bug, and keeps its traceback.
        if code is None:
            raise
        return code
    except KeyboardInterrupt:
        sys.stderr.write(f"hpc-neuro {name}: stopped; the same command resumes\n")
        return EXIT_STOPPED


def _refuse_verb(arguments: Sequence[str]) -> int:
    """Name the verbs that may be meant; the exit code. The help of the first word of some verbs lists them."""
    family = {name: verb.summary for name, verb in VERBS.items() if name.startswith(f"{arguments[0]} ")}
    if family and arguments[1:2] and arguments[1] in _HELP_FLAGS:
        sys.stdout.write("".join(f"  hpc-neuro {name}: {summary}\n" for name, summary in family.items()))
        return EXIT_DONE

    text = " ".join(arguments[:2]) if family else arguments[0]
    sys.stderr.write(f"hpc-neuro: {text!r} is not one of the verbs {', '.join(family or VERBS)}\n")
    return EXIT_BAD_INPUT


def run_process() -> int:
    """`main` for a process that ends with it: a signal while the interpreter shuts down changes no exit code."""
    code = main()
    stop_signals.ignore_signals()
    return code


def format_usage() -> str:
    """The overview that `hpc-neuro --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "hpc-neuro VERB [CONFIG.yaml] [key=value ...] [--dry-run]\n\n"
        f"{verbs}\n\n"
        "`hpc-neuro VERB --help` lists the keys that people set most, `hpc-neuro VERB --help all` every key.\n"
        "--dry-run checks everything that a run needs and prints the forecast.\n"
    )


def format_help(verb: Verb, all_keys: bool) -> str:
    """The keys of a verb with type, default and meaning: all of them, or those that people set most."""
    fields = list(schema.describe(verb.load_config_class()))
    main_keys = verb.main_keys.split()
    shown = [field for field in fields if all_keys or field.key in main_keys]
    width = min(_KEY_COLUMN, max(len(field.key) for field in shown))
    plain = f" {verb.positional.removesuffix('s').upper()}..." if verb.positional else ""
    lines = [f"hpc-neuro {verb.name}{plain} [CONFIG.yaml] [key=value ...] [--dry-run]: {verb.summary}\n"]

    for field in shown:
        default = f" = {field.default}" if field.default else ""
        lines.append(f"  {field.key:<{width}} {field.type}{default}")
        if field.text:
            lines.append(f"  {'':<{width}}   {field.text}")

    # Otherwise a reader takes the short list for all keys.
    if len(shown) < len(fields):
        lines.append(f"\n{len(shown)} of {len(fields)} keys; `hpc-neuro {verb.name} --help all` lists every key.")
    return "\n".join(lines) + "\n"


def _run_verb(verb: Verb, arguments: Sequence[str]) -> int:
    """Run a verb with its arguments. Raises ConfigError or InputError."""
    # A subcommand, such as `infer verify`, reads its own arguments.
    commands = dict(verb.commands)
    if arguments and arguments[0] in commands:
        return int(importlib.import_module(commands[arguments[0]]).main(arguments[1:]))
    if verb.config is None:
        return int(verb.load_module().main(arguments))

    flags = [argument for argument in arguments if argument.startswith("-")]
    # Flags may stand anywhere among the keys.
    words = [argument for argument in arguments if not argument.startswith("-")]
    if any(flag in _HELP_FLAGS for flag in flags):
        sys.stdout.write(format_help(verb, all_keys="all" in words))
        return EXIT_DONE

    unknown = [flag for flag in flags if flag != "--dry-run"]
    if unknown:
        raise schema.ConfigError(
            f"{unknown[0]} is not a flag; keys are given as key=value, flags are --dry-run and --help"
        )

    path, words, values = verb.sort_words(words)
    # The verb itself is imported only after its config is known to be good: a config error answers at once.
    cfg: Any = schema.load(verb.load_config_class(), path, words, values)

    if "--dry-run" in flags:
        _require_place(verb.name, getattr(cfg, "out", None))
        lines = verb.load_module().forecast(cfg)
        if lines and is_main():
            sys.stdout.write("\n".join(lines) + "\n")
        return EXIT_DONE
    run = stop_signals.resumable(verb.name)(verb.load_module().run)
    return int(run(cfg))


def _require_place(name: str, out: Any) -> None:
    """Raise ConfigError where a run could not use `out`: a file has its place, or another verb's run lies in it."""
    if not isinstance(out, Path):
        return
    if out.exists() and not out.is_dir():
        raise schema.ConfigError(f"{out} is no folder; choose another `out`, or move that file away")
    from hpc_neuro.core import run_folder

    run_folder.require_verb(name, out)


def _report_fault(name: str, error: Exception) -> int | None:
    """Say what the user can do about a place, a name or failing hardware; the exit code, None for any other error."""
    sentence = files.explain_error(error)
    if sentence is not None:
        sys.stderr.write(f"hpc-neuro {name}: {sentence}; no half-written file was kept\n")
        return EXIT_BAD_INPUT

    fault = find_hardware_fault(error)
    if fault is None:
        return None
    # Administrators want the whole of it.
    sys.stderr.write("".join(traceback.format_exception(error)))
    sys.stderr.write(
        f"hpc-neuro {name}: hardware fault on {platform.node()}: {fault.text}. What was finished is kept: give the "
        "same command again, on another node if it fails again\n"
    )
    return fault.exit_code


def _log_to_console() -> None:
    """Send messages to standard error as plain lines; ranks other than the first only warn."""
    # Of several ranks, one reports progress; a warning matters from any of them.
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    # Libraries may have configured the root logger; a message must not appear twice.
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
