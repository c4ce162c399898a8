"""``fastd2o bench``: this library, its peers and the bare matrix products, side by side, on this machine."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastd2o.cli.arguments import UsageError
from fastd2o.errors import FastD2OError

if TYPE_CHECKING:
    from rich.console import Console

HELP = "measure time, memory and error of this library and its peers, side by side; compare two such runs"

_EPILOG = """\
examples:
  fastd2o bench --quick
  fastd2o bench --tokens 4096 --hidden 2048 --vocab 151936 --dtype bfloat16 --cases frozen trained
  fastd2o bench --full --peers "trl chunked" liger --only "trained and not float32"
  fastd2o bench compare before/results.json after/results.json
Contestants take turns, and times are ratios to the bare matrix products of the same round. A peer that is not installed
is listed as absent: pip install 'fastd2o[peers]'.
"""
_CASES = ("forward", "frozen", "trained", "cringe", "dpo", "d2o", "step-d2o", "step-d2o-lora", "step-dpo")
_OF_A_RUN = ("gpu", "cases", "tokens", "hidden", "vocab", "dtype", "peers", "only", "append")
_OUT = Path("runs/bench")
_RESULTS, _PREVIOUS = "results.json", "results.previous.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o bench``."""
    parser.epilog = _EPILOG
    suite = parser.add_argument_group("suite; default: a large vocabulary in bfloat16, 15 minutes on two cores")
    suite = suite.add_mutually_exclusive_group()
    for name, about in (
        ("quick", "small shapes: two minutes on two cores"),
        ("full", "256 to 16384 tokens, four vocabularies, two dtypes, and how cost grows: hours"),
        ("targets", "the shapes that this project has targets for: an hour and more"),
    ):
        suite.add_argument(f"--{name}", dest="suite", action="store_const", const=name, help=about)
    parser.set_defaults(suite="default")
    parser.add_argument("--gpu", action="store_true", help="on CUDA, with its own suites (default: the CPU)")
    shape = parser.add_argument_group(
        "cases and shapes instead of the suite's; all combinations, and what is not given as in the default suite"
    )
    shape.add_argument("--cases", nargs="+", choices=_CASES, metavar="CASE", help=f"of: {', '.join(_CASES)}")
    shape.add_argument("--tokens", type=int, nargs="+", metavar="T", help="of a step: of each completion")
    shape.add_argument("--hidden", type=int, nargs="+", metavar="D", help="the hidden states' size")
    shape.add_argument("--vocab", type=int, nargs="+", metavar="V", help="the vocabulary's")
    shape.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), help="of the inputs, but of steps"
    )
    who = parser.add_argument_group("contestants")
    who.add_argument("--peers", nargs="+", metavar="NAME", help="only these, or none (default: all that are installed)")
    who.add_argument(
        "--only", metavar="EXPRESSION", help="what has these words in its name, as pytest -k: 'trained and eager'"
    )
    parser.add_argument("--out", type=Path, default=_OUT, metavar="FOLDER", help="for results and plots")
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    actions = parser.add_subparsers(dest="action", metavar="compare")
    compare = actions.add_parser("compare", help="what got faster or slower between two results.json, beyond noise")
    compare.add_argument("before", type=Path, metavar="BEFORE.json")
    compare.add_argument("after", type=Path, metavar="AFTER.json")
    compare.add_argument("--threshold", type=float, default=0.1, help="relative; smaller changes do not count")


def run(args: argparse.Namespace) -> int:
    """Measure, or compare."""
    from rich.console import Console

    # A terminal has its own width; a file gets that of the widest table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if args.action != "compare":
        return _measure(args, console)
    given = [name for name in _OF_A_RUN if getattr(args, name)] + ["out"] * (args.out != _OUT)
    if given or args.suite != "default":
        raise UsageError(f"compare measures nothing, and --{given[0] if given else args.suite} is for what measures")
    return _compare(args, console)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"fastd2o.benchmarks.{name}")
    except ModuleNotFoundError as error:
        raise FastD2OError(
            f"fastd2o bench needs the package {error.name!r}, which is not installed. Fix: pip install 'fastd2o[bench]'"
        ) from error


def _measure(args: argparse.Namespace, console: Console) -> int:
    results, tables, plots = _module("results"), _module("tables"), _module("plots")
    device = "cuda" if args.gpu else "cpu"
    _check(args, _module("cases"), _module("steps"), _module("contestants").peer_names(), device)
    path = args.out / _RESULTS
    code = _pytest(args, device, path)
    report = results.Report.read(path)
    tables.show(console, report)
    markdown = args.out / "results.md"
    pictures = plots.draw(report, args.out)
    links = "".join(f"\n![{picture.stem}]({picture.name}.png)\n" for picture in pictures)
    results.write_aside(markdown, f"# Results\n\n{tables.markdown(report)}{links}")
    for written in (path, markdown, *(picture.with_suffix(".png") for picture in pictures)):
        console.print(f"written: {written}", highlight=False, markup=False)
    if (args.out / _PREVIOUS).exists() and not args.append:
        console.print(
            f"compare with the run before: fastd2o bench compare {args.out / _PREVIOUS} {path}",
            highlight=False,
            markup=False,
        )
    return 1 if code else 0


def _check(args: argparse.Namespace, cases: Any, steps: Any, peers: list[str], device: str) -> None:
    """Refuse what could only fail later."""
    for name in ("tokens", "hidden", "vocab"):
        small = [value for value in getattr(args, name) or () if value < 1]
        if small:
            raise UsageError(f"--{name} {small[0]} is below 1. Fix: positive numbers")
    shaped = any((args.tokens, args.hidden, args.vocab, args.dtype))
    chosen = args.cases or (list(cases.CASES) if shaped else [])
    losses = [name for name in chosen if name in cases.POSITIVES]
    uneven = [tokens for tokens in args.tokens or () if tokens % cases.SEQUENCES]
    if losses and uneven:
        raise UsageError(
            f"--tokens {uneven[0]} is not a multiple of {cases.SEQUENCES}, the sequences that {' and '.join(losses)} "
            f"share them out to. Fix: --tokens {uneven[0] + cases.SEQUENCES - uneven[0] % cases.SEQUENCES}, or --cases "
            "without them"
        )
    tiny = [vocab for vocab in args.vocab or () if vocab <= cases.CRINGE_K]
    if "cringe" in chosen and tiny:
        raise UsageError(
            f"--vocab {tiny[0]} is too small for cringe, which draws among k = {cases.CRINGE_K} tokens beside the "
            f"negative. Fix: --vocab {cases.CRINGE_K + 1} or more, or --cases without it"
        )
    of_steps = [name for name in chosen if name in steps.STEPS]
    odd = [hidden for hidden in args.hidden or () if hidden % 64]
    if of_steps and odd:
        raise UsageError(
            f"--hidden {odd[0]} is not a multiple of 64, the size of a head of attention in {of_steps[0]}. Fix: "
            f"--hidden {odd[0] + 64 - odd[0] % 64}, or --cases without steps"
        )
    if of_steps and args.dtype:
        raise UsageError(f"--dtype does not apply to {of_steps[0]}, which is bfloat16. Fix: leave one of them out")
    unknown = [name for name in args.peers or () if name not in (*peers, "none")]
    if unknown:
        raise UsageError(f"there is no peer {unknown[0]!r}. The peers are: {', '.join(peers)}; or none")
    if "none" in (args.peers or ()) and len(args.peers) > 1:
        raise UsageError("--peers has none and a peer. Fix: one or the other")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise FastD2OError("--gpu, and torch finds no CUDA device. Fix: leave it out to measure the CPU")


def _pytest(args: argparse.Namespace, device: str, path: Path) -> int:
    """Hold the contests."""
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ModuleNotFoundError as error:
        raise FastD2OError(
            f"fastd2o bench needs the package {error.name!r}, which is not installed. Fix: pip install 'fastd2o[bench]'"
        ) from error
    folder = Path(_module("contests").__file__).parent
    arguments = [str(folder / "contests.py"), "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    arguments += ["-p", "no:terminal", "--benchmark-quiet"]
    arguments += [f"--benchmark-json={path.with_name('pytest-benchmark.json')}"]
    arguments += ["--suite", args.suite, "--device", device, "--report", str(path)]
    for name in ("cases", "tokens", "hidden", "vocab", "dtype"):
        values = getattr(args, name)
        arguments += [f"--{name}", *map(str, values)] if values else []
    if args.append:
        arguments.append("--append")
    if args.peers:
        arguments += ["--peers", ",".join(name for name in args.peers if name != "none")]
    if args.only:
        arguments += ["-k", args.only]
    failures, before = _Failures(), path.stat().st_mtime_ns if path.exists() else None
    code = int(pytest.main(arguments, plugins=[failures]))
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise UsageError(f"no contest has {args.only!r} in its name. Fix: words of the names of cases and contestants")
    if code == pytest.ExitCode.INTERRUPTED and not failures.messages:
        written = path.exists() and path.stat().st_mtime_ns != before
        told = (
            f"what was measured until then is in {path}" if written else "no contest had ended, so nothing is written"
        )
        raise KeyboardInterrupt(f"interrupted; {told}")
    if failures.messages or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise FastD2OError(
            " ".join(failures.messages) or f"pytest ended with exit code {code}; the reason stands above"
        )
    return code


class _Failures:
    """Listens to pytest, which has no terminal here. A contestant that fails says so in the report."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def pytest_collectreport(self, report: Any) -> None:
        """Called by pytest after a module is read."""
        if report.failed:
            self.messages.append(str(report.longrepr))

    def pytest_internalerror(self, excrepr: Any) -> None:
        """Called by pytest when a hook fails."""
        self.messages.append(str(excrepr))


def _compare(args: argparse.Namespace, console: Console) -> int:
    from rich.table import Table

    results, comparing = _module("results"), _module("compare")
    before, after = results.Report.read(args.before), results.Report.read(args.after)
    if before.machine != after.machine:
        different = sorted(
            name for name in {*before.machine, *after.machine} if before.machine.get(name) != after.machine.get(name)
        )
        console.print(f"the machines differ in: {', '.join(different)}", highlight=False, markup=False)
    changes = comparing.compare(before, after, args.threshold)
    table = Table()
    for column in ("contest", "contestant"):
        table.add_column(column)
    for column in ("time", "noise", "MB"):
        table.add_column(column, justify="right")
    table.add_column("")
    same = sum(change.judgement == "same" for change in changes)
    unknown = sum(change.judgement == "not judged" for change in changes)
    told = [change for change in changes if change.judgement not in ("same", "not judged")]
    for change in told:
        table.add_row(
            change.contest,
            change.contestant,
            "" if change.time is None else f"{change.time:.3f}",
            "" if change.low is None else f"{change.low:.3f} to {change.high:.3f}",
            "" if change.memory is None else f"{change.memory:+,.1f}",
            change.judgement,
        )
    if told:
        console.print(table)
    regressions = [change for change in changes if change.ours and change.judgement in comparing.REGRESSIONS]
    console.print(
        f"{len(changes)} figures compared: {same} the same within noise and {args.threshold:.0%}; "
        f"{unknown} not judged, for want of rounds; {len(regressions)} of FastD2O's worse",
        highlight=False,
    )
    return 1 if regressions else 0
