"""Reading the command line: one-line usage errors that say what was probably meant, and defaults from a YAML file."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

JSON = "JSON"  # the metavar of an option that a configuration file may give as a mapping
_MOST_CHOICES = 6  # a longer list of them is not written out in the help


class UsageError(Exception):
    """The command line itself is wrong (exit code 2)."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each option once and briefly, with a default that says something; the examples keep their line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == ""
        silent = nothing or action.required or "efault" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser gives every option a second spelling with dashes, which need not be shown.
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if "-" not in name[2:])
        value = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{names} {value}".rstrip()

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if action.metavar is None and action.choices is not None and len(list(action.choices)) > _MOST_CHOICES:
            return lambda size: (default_metavar,) * size
        return super()._metavar_formatter(action, default_metavar)


class CommandParser(argparse.ArgumentParser):
    """Takes only full option names, and raises :class:`UsageError` instead of printing a page of usage."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UsageError` with ``message`` and where to read more."""
        raise UsageError(f"{message}. See: {self.prog} --help")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" (did you mean x?)"`` when something in ``known`` is close to ``word``, else ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of ``parser``, in the underscore spelling, without the dashes."""
    options = (option for action in parser._actions for option in action.option_strings)
    return [option[2:] for option in options if option.startswith("--") and "-" not in option[2:]]


def reject_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    """Raise :class:`UsageError` naming the first argument that ``parser`` did not recognise, if there is one."""
    if not unknown:
        return
    flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    hint = did_you_mean(flag, [f"--{name}" for name in option_names(parser)])
    parser.error(f"unrecognized argument {flag!r}{hint}")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Around the making of options: a value that they refuse is a mistake in the command line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def in_options(message: str, parser: argparse.ArgumentParser) -> str:
    """``message`` as one says it on the command line: ``--truncate_prompt`` for ``truncate_prompt=True``.

    Messages name settings as Python has them, because the same code serves both.
    """

    def spell(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"].strip("'\"")
        return f"--{name}" if value == "True" else f"--{name} {value.lower() if value == 'False' else value}"

    names = "|".join(map(re.escape, option_names(parser)))
    value = r"""'[^']*'|"[^"]*"|[+-]?\w+(?:\.\w+)*"""
    # Not in a call, and not in a path or another text that the user wrote.
    return re.sub(rf"(?<![\w.(/,'\"-])(?P<name>{names})=(?P<value>{value})", spell, message)


def with_config(arguments: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Put what ``--config FILE`` says in front of ``arguments``, so that the command line, which comes later, wins.

    The file is a YAML mapping from option names to values. It becomes ordinary arguments, so that one parser converts
    and checks both: a list gives several values, a mapping is passed as JSON to the options that take it, ``null``
    leaves the option alone.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[], nargs="?")
    files = finder.parse_known_args(arguments)[0].config
    if "config" not in option_names(parser) or not files or files[-1] is None:
        return arguments
    actions = {option: action for action in parser._actions for option in action.option_strings}
    valid = [name for name in option_names(parser) if name not in ("config", "help")]
    expanded: list[str] = []
    for name, value in _read_mapping(Path(files[-1])).items():
        if name not in valid:
            raise UsageError(
                f"{files[-1]}: unknown key {name!r}{did_you_mean(str(name), valid)}. See: {parser.prog} --help"
            )
        if value is None:
            continue
        try:
            expanded += _as_arguments(name, value, actions[f"--{name}"], parser)
        except argparse.ArgumentError as error:
            raise UsageError(f"{files[-1]}: {name}: {error.message}. See: {parser.prog} --help") from error
    return expanded + arguments


def _as_arguments(name: str, value: Any, action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    """``value`` as arguments for ``action``, which takes it.

    Raises:
        argparse.ArgumentError: it does not.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentError(action, f"found {value!r}, expected true or false")
        return [f"--{name}"] * value
    if isinstance(value, dict) and action.metavar != JSON:
        raise argparse.ArgumentError(action, f"found the mapping {value!r}, expected a value")
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            raise argparse.ArgumentError(action, f"found the list {value!r}, expected one value")
        if not value:
            raise argparse.ArgumentError(action, "found an empty list, expected at least one value")
    words = [_as_word(item, action) for item in (value if isinstance(value, list) else [value])]
    parser._get_values(action, list(words))
    return [f"--{name}", *words] if isinstance(value, list) else [f"--{name}={words[0]}"]


def _as_word(value: Any, action: argparse.Action) -> str:
    if value is False and "no" in (action.choices or ()):
        return "no"  # which YAML takes for a boolean
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_mapping(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_numbers_as_in_yaml_1_2(yaml.SafeLoader))
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {str(path)!r} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"--config: {str(path)!r} holds a {type(content).__name__}; write one 'option: value' per line"
        )
    return content


def _numbers_as_in_yaml_1_2(loader: type[Any]) -> type[Any]:
    """``loader``, but ``1e-6`` is a number: in YAML 1.1 it is text unless it has a point and a sign, ``1.0e-6``."""

    class Loader(loader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader
