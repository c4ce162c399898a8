"""What pytest needs to hold the contests of a suite (:mod:`benchmarks.contests`): options, and a test for each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cases import CASES
from .contestants import peer_names
from .instruments import within_free_memory
from .results import Report, machine
from .session import Entry, Session
from .steps import STEPS
from .suites import SUITE_NAMES, choose

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastd2o", "what is measured")
    group.addoption("--suite", default="quick", choices=SUITE_NAMES, help="which contests")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--cases", nargs="+", choices=[*CASES, *STEPS], help="instead of the suite's")
    for name in ("tokens", "hidden", "vocab"):
        group.addoption(f"--{name}", type=int, nargs="+", help="instead of the suite's")
    group.addoption("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], help="instead of the suite's")
    group.addoption("--peers", default=None, help="names of the peers that may take part, with commas between")
    group.addoption("--report", default=None, type=Path, help="JSON file that figures are written to as they come")
    group.addoption("--append", action="store_true", help="add to what is in that file")


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    path, peers = options.report, options.peers
    suite = choose(
        options.device, options.suite, options.cases, options.tokens, options.hidden, options.vocab, options.dtype
    )
    if not suite.contests and not suite.steps:
        raise pytest.UsageError(
            f"the suite {options.suite} has no {' or '.join(options.cases)}. Fix: leave the suite out, or give shapes"
        )
    report = Report(machine(options.device))
    if options.append and path is not None and path.exists():
        report = _continued(report, path)
    previous = None if options.append or path is None else path.with_suffix(".previous.json")
    names = None if peers is None else frozenset(filter(None, peers.split(",")))
    if unknown := sorted((names or frozenset()) - set(peer_names())):
        raise pytest.UsageError(f"there is no peer {unknown[0]!r}. The peers are: {', '.join(peer_names())}")
    config.stash[_SESSION] = Session(suite, options.device, report, names, path, previous)


def _continued(report: Report, path: Path) -> Report:
    """The report of the file, if it is of the same machine."""
    earlier = Report.read(path)
    different = [name for name, value in report.machine.items() if earlier.machine.get(name, value) != value]
    if different:
        name = different[0]
        raise pytest.UsageError(
            f"{path} has {name} {earlier.machine[name]}, and here it is {report.machine[name]}. Fix: another folder"
        )
    earlier.machine = report.machine
    return earlier


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SESSION in config.stash:
        config.stash[_SESSION].close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[_SESSION]
    pairs = [(entry, name) for entry in session.entries for name in session.contestants(entry)]
    ids = [f"{entry.key}-{name}".replace(" ", "_") for entry, name in pairs]
    metafunc.parametrize(("entry", "contestant"), pairs, ids=ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is left after ``-k`` takes part."""
    chosen: dict[str, list[str]] = {}
    for item in session.items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params
        entry, contestant = cast(Entry, parameters["entry"]), cast(str, parameters["contestant"])
        chosen.setdefault(entry.key, []).append(contestant)
    session.config.stash[_SESSION].chosen = chosen


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """The one run, with a bar that says how long it takes."""
    session = pytestconfig.stash[_SESSION]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("so far,"))
    left = (TimeRemainingColumn(), TextColumn("left"))
    bar = Progress(*columns, *left, console=Console(stderr=True), speed_estimate_period=120)
    task = bar.add_task("", total=session.effort)

    def progress(done: float, what: str) -> None:
        bar.update(task, completed=done, description=what)

    session.progress = progress
    with bar, within_free_memory() if session.device == "cpu" else nullcontext():
        yield session
