"""The command line: ``fastd2o train | sample | rounds | plan | bench | demo | build | doctor``.

Each command is a module of this package with

- ``HELP: str``: one line for the list of commands,
- ``configure(parser)``: adds the command's arguments to its parser,
- ``run(args) -> int``: does the work and returns the exit code,
- and, where arguments come ready-made, ``parents() -> list[ArgumentParser]``.

Importing one of these modules must stay cheap; only the command that was asked for is configured, and heavy imports
happen inside its functions. Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted. A failure is one line on stderr
that ends with the fix; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TextIO

from fastd2o.cli.arguments import CommandParser, UsageError, did_you_mean, in_options, reject_unknown, with_config
from fastd2o.errors import DataError, FastD2OError, FastD2OWarning

COMMANDS = ("train", "sample", "rounds", "plan", "bench", "demo", "build", "doctor")

_DESCRIPTION = "Train language models from what they should not say."
_EPILOG = """\
examples:
  fastd2o sample --model MODEL --dataset negatives.jsonl --out anchors.jsonl --num_anchors 8
  fastd2o train --model MODEL --dataset anchors.jsonl --objective d2o --output_dir aligned
  fastd2o demo
"""

# Failures that the message alone explains. Anything else is a bug, of ours or of a library: its type is told as well.
_EXPECTED = (FastD2OError, DataError, ValueError, TypeError, OSError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments without the program's name; default ``sys.argv[1:]``.
    """
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    messages = _Messages()
    try:
        with _own_warnings_only(messages, debug):
            return _dispatch(arguments, messages)
    except UsageError as error:
        messages.complain(str(error))
        return 2
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as interrupt:
        messages.complain(str(interrupt) or "interrupted")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        messages.complain(_describe(error))
        return 1


class _Messages:
    """What is told on stderr, in the words of the command line."""

    def __init__(self) -> None:
        self.parser: CommandParser | None = None  # of the command, once it is known

    def complain(self, message: str) -> None:
        """One line: why there is no result."""
        print(f"fastd2o: error: {' '.join(self._spelled(message).split())}", file=sys.stderr)

    def warn(self, message: str) -> None:
        """Something to look at."""
        print(f"fastd2o: warning: {self._spelled(message)}", file=sys.stderr)

    def _spelled(self, message: str) -> str:
        return message if self.parser is None else in_options(message, self.parser)


def _dispatch(arguments: list[str], messages: _Messages) -> int:
    command = next((word for word in arguments if not word.startswith("-")), None)
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in COMMANDS}
    if command is not None and command not in modules:
        hint = did_you_mean(command, modules)
        raise UsageError(f"unknown command {command!r}{hint}. The commands are: {', '.join(modules)}")
    parser, chosen = _build_parser(modules, command)
    if command is None or chosen is None:
        parser.parse_args(arguments)  # --help and --version end here, an unknown option too
        parser.print_help(sys.stderr)
        return 2
    messages.parser = chosen
    position = arguments.index(command) + 1
    arguments = arguments[:position] + with_config(arguments[position:], chosen)
    args, unknown = parser.parse_known_args(arguments)
    reject_unknown(chosen, unknown)
    code: int = modules[command].run(args)
    return code


def _build_parser(modules: dict[str, ModuleType], command: str | None) -> tuple[CommandParser, CommandParser | None]:
    """The whole parser, with only ``command`` configured, and the parser of that command."""
    from fastd2o import __version__

    parser = CommandParser(prog="fastd2o", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"fastd2o {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure (also after the command)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = None
    for name, module in modules.items():
        if name == command:
            parents = module.parents() if hasattr(module, "parents") else []
            chosen = commands.add_parser(name, help=module.HELP, description=module.HELP, parents=parents)
            module.configure(chosen)
        else:
            commands.add_parser(name, help=module.HELP)
    return parser, chosen


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove ``--debug`` wherever it stands alone.

    ``train`` also has the Trainer's own ``--debug underflow_overflow``, which takes a value: that one stays.
    """
    kept: list[str] = []
    for position, word in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else "-"
        after_command = any(not earlier.startswith("-") for earlier in kept)
        if word != "--debug" or (after_command and not following.startswith("-")):
            kept.append(word)
    return kept, len(kept) < len(arguments)


@contextmanager
def _own_warnings_only(messages: _Messages, debug: bool) -> Iterator[None]:
    """Show FastD2O's own warnings, without their place in the code; those of libraries only with ``--debug``."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if os.environ.get("RANK", "0") == "0":
            messages.warn(str(message) if issubclass(category, FastD2OWarning) else f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", FastD2OWarning)
        warnings.showwarning = show
        yield


def _describe(error: Exception) -> str:
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return f"{error} Fix: smaller batches or shorter sequences; for train also --gradient_checkpointing, --use_peft"
    if isinstance(error, ModuleNotFoundError) and "Fix:" not in str(error) and error.name:
        # A missing module goes by its name; a missing distribution by a sentence with the requirement in quotes.
        requirement = re.search(r"'([\w-]+)", error.name)
        package = requirement[1] if requirement else error.name.partition(".")[0]
        wanted = "'fastd2o[train]'" if package in _of_train() else package
        return f"the package {package!r} is not installed. Fix: pip install {wanted}"
    if isinstance(error, _EXPECTED):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error} (unexpected: run again with --debug for the traceback)"


def _of_train() -> set[str]:
    """The packages that come with ``fastd2o[train]``, by the names that one imports."""
    from importlib.metadata import requires

    wanted = [line for line in requires("fastd2o") or () if "extra == 'train'" in line or 'extra == "train"' in line]
    names = {re.split(r"[^\w-]", line, maxsplit=1)[0].lower() for line in wanted}
    return names | {"yaml"}  # PyYAML
