"""What a run leaves: a report of contests, each with a row of figures for each contestant; are targets met?"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .cases import CASES, TARGET_SHAPES, TIMES_FASTER, Shape
from .instruments import Lap

SCHEMA = 2  # of the file; 1 had a file for each shape
FOLDER = Path(__file__).parent / "results"
FLOOR = "products alone"
LEFT_OUT = "left out"
# Whose versions matter to somebody's figures.
_LIBRARIES = (
    "fastd2o",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
)


class TriedError(Exception):
    """What was raised in another process, in one line."""


class WrongError(Exception):
    """Something else than what was asked for has been computed."""


class LeftOutError(Exception):
    """A run would take longer than anybody is ready to wait."""


@dataclass
class Row:
    """One contestant in one contest.

    Attributes:
        contestant: its name; :data:`FLOOR` for the bare matrix products.
        backend: of FastD2O.
        error: why there are no figures, or none to be trusted.
        rounds: how many runs were timed.
        seconds, min, max: of these, the median, the fastest, the slowest.
        forward, backward: seconds, medians; their sum need not be ``seconds``.
        forward_spread, backward_spread: half of the range of all rounds, over the median.
        times: seconds of every round, in the order of rounds, which is the same for all rows of a contest; some sit out
            the last.
        over_products: time over the bare products' in the same round, the median of that.
        spread: half of the range of those ratios, over their median, so that two runs agree within the sum of theirs
            (tried: docs/benchmarks.md); in a training step, which has no such ratios, of those to FastD2O's, and
            FastD2O's own of its times.
        over_fastd2o: as ``over_products``, over FastD2O's on the device's own kernels.
        extra_megabytes: the most memory beyond inputs, results and gradients; None if it was not measured.
        longest: tokens of the longest completion with which a training step stays within the budget.
        errors: relative root mean square against float64.
    """

    contestant: str
    backend: str | None = None
    error: str | None = None
    rounds: int = 0
    seconds: float | None = None
    min: float | None = None
    max: float | None = None
    forward: float | None = None
    backward: float | None = None
    forward_spread: float | None = None
    backward_spread: float | None = None
    times: list[float] = field(default_factory=list)
    over_products: float | None = None
    spread: float | None = None
    over_fastd2o: float | None = None
    extra_megabytes: float | None = None
    longest: int | None = None
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """What a table says in place of a time: nothing, where there is one."""
        if self.error is None:
            return ""
        return LEFT_OUT if self.error.startswith(LEFT_OUT) else "failed"

    @contextmanager
    def catching(self) -> Iterator[None]:
        """A contestant may fail in any way: it says so on its row, and the others go on."""
        try:
            yield
        except Exception as error:
            self.error = in_one_line(error)

    def check(self, errors: dict[str, float], bound: float) -> None:
        """Keep the errors that are numbers.

        Raises:
            WrongError: one is beyond the bound, or no number.
        """
        self.errors = {name: error for name, error in errors.items() if math.isfinite(error)}
        wrong = [f"{name} is off by {error:.2g}" for name, error in errors.items() if not error <= bound]
        if wrong:
            raise WrongError(f"{', '.join(wrong)}, relative to float64; the bound is {bound:g}")

    def record(self, laps: Sequence[Lap], floor: Sequence[Lap], ours: Sequence[Lap]) -> None:
        """Fill in the times. Laps of the same round stand at the same place; a contestant that ran but once is compared
        with medians."""
        self.times = [one.both for one in laps]
        self.rounds = len(laps)
        self.seconds, self.min, self.max = statistics.median(self.times), min(self.times), max(self.times)
        forward, backward = [one.forward for one in laps], [one.backward for one in laps]
        self.forward, self.backward = statistics.median(forward), statistics.median(backward)
        self.forward_spread = half_range(forward)
        self.backward_spread = half_range(backward) if self.backward else None
        if floor:
            found = ratios(self.times, [one.both for one in floor])
            self.over_products, self.spread = statistics.median(found), half_range(found)
        if ours:
            of_ours = ratios(self.times, [one.both for one in ours])
            self.over_fastd2o = statistics.median(of_ours)
            # FastD2O's own is 1 in every round; then it is that of its times.
            self.spread = self.spread or half_range(of_ours) or half_range(self.times)


@dataclass
class Contest:
    """All rows of one case and shape.

    Attributes:
        case: of :data:`benchmarks.cases.CASES`, or a training step of :data:`benchmarks.steps.STEPS`.
        shape: its numbers by name.
        floor: what the bare products were; of a training step, which has none, nothing.
        flops: of the bare products; of a training step, all of an eager one's.
        rows: the figures.
        date: of the measurement, ISO.
        commit: of the code that was measured, where it is known.
    """

    case: str
    shape: dict[str, Any]
    floor: str
    flops: float
    rows: list[Row]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).date().isoformat())
    commit: str | None = None

    @property
    def key(self) -> str:
        """What no other contest of a report has."""
        return f"{self.case}-{shape_text(self.shape)}"

    def row(self, contestant: str) -> Row | None:
        """The row of a contestant, if it took part."""
        return next((row for row in self.rows if row.contestant == contestant), None)


@dataclass
class Report:
    """What was measured on one machine.

    Attributes:
        machine: kind ("cpu" or "cuda"), device, threads, versions.
        contests: the figures.
        absent: contestant -> why it did not take part.
    """

    machine: dict[str, Any]
    contests: list[Contest] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Of the device: "cpu" or "cuda"."""
        return str(self.machine["kind"])

    def add(self, contest: Contest) -> None:
        """In place of the one that has the same key, if there is one."""
        keys = [other.key for other in self.contests]
        if contest.key in keys:
            self.contests[keys.index(contest.key)] = contest
        else:
            self.contests.append(contest)

    def of(self, case: str, **shape: Any) -> Iterable[Contest]:
        """The contests of a case with these numbers in their shape."""
        return (c for c in self.contests if c.case == case and shape.items() <= c.shape.items())

    def write(self, path: Path) -> Path:
        """As JSON, whole or not at all; what is None or empty is left out of rows."""
        fields = {"schema": SCHEMA, **asdict(self)}
        for contest in fields["contests"]:
            contest["rows"] = [
                {name: _rounded(value) for name, value in row.items() if value not in (None, {}, [])}
                for row in contest["rows"]
            ]
        return write_aside(path, _as_json(fields))

    @classmethod
    def read(cls, path: Path) -> Report:
        """The inverse of :meth:`write`.

        Raises:
            ValueError: the file is no report, or one of another schema.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            schema = fields.pop("schema")
            if schema == SCHEMA:
                contests = [
                    Contest(**{**contest, "rows": [Row(**row) for row in contest["rows"]]})
                    for contest in fields.pop("contests")
                ]
                return cls(contests=contests, **fields)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{path} is no report of a benchmark, which fastd2o bench writes as results.json"
            ) from error
        raise ValueError(
            f"{path} has schema {schema}, and this version reads {SCHEMA}. Fix: compare reports of the same version"
        )


def write_aside(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def within(errors: dict[str, float], bound: float) -> bool:
    """Whether all errors are; what is no number is beyond every bound."""
    return all(error <= bound for error in errors.values())


def in_one_line(error: BaseException) -> str:
    """Its type and message. One that came from another process has its type in its message, and what is left out is no
    failure."""
    message = " ".join(str(error).split())
    of_ours = isinstance(error, TriedError | LeftOutError)
    return (message if of_ours else f"{type(error).__name__}: {message}")[:300]


def shape_text(shape: dict[str, Any]) -> str:
    """ "t2048-d1024-v128256-bfloat16", and so on for the numbers that only a training step has."""
    return "-".join(f"{name[0]}{value}" if isinstance(value, int) else str(value) for name, value in shape.items())


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of the rounds that both were in; where one ran but once, of the medians."""
    if 1 in (len(times), len(others)):
        return [statistics.median(times) / statistics.median(others)]
    return [time / other for time, other in zip(times, others, strict=False)]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of :func:`ratios`."""
    return statistics.median(ratios(times, others))


def half_range(values: Sequence[float]) -> float | None:
    """Half of what the values cover, over their median; None for fewer than three."""
    if len(values) < 3:
        return None
    return (max(values) - min(values)) / 2 / statistics.median(values)


def _rounded(value: Any) -> Any:
    """To six digits, which is more than any figure here deserves."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return {name: _rounded(one) for name, one in value.items()} if isinstance(value, dict) else value


def _as_json(fields: dict[str, Any]) -> str:
    """Readable, with a line for each row."""
    contests = fields.pop("contests")
    text = json.dumps({**fields, "contests": "@"}, indent=1, ensure_ascii=False, allow_nan=False)
    parts = []
    for contest in contests:
        rows = contest.pop("rows")
        of_rows = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        head = json.dumps(contest, ensure_ascii=False)[:-1]
        parts.append(f'{head}, "rows": [\n    {of_rows}]}}')
    return text.replace('"@"', "[\n  " + ",\n  ".join(parts) + "\n ]" if parts else "[]") + "\n"


# --- where figures are from -------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """The device and the versions of what is measured."""
    libraries = {}
    for library in _LIBRARIES:
        try:
            libraries[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "kind": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **libraries,
    }


def cpu_name() -> str:
    """The processor's model and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


@functools.cache
def commit() -> str | None:
    """Of the checkout that this file lies in, with a plus sign where it has changes; None where it is installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A target, and whether a figure meets it.

    Attributes:
        quantity: "time", "memory" or "peer".
        text: the target, as a table shows it.
    """

    quantity: str
    text: str
    met: bool


def verdicts(contest: Contest, row: Row, kind: str) -> list[Verdict]:
    """The targets that a row has to meet: those of FastD2O's own kernels for the device, and by how much a peer has to
    be slower. The torch backend, the reference, is held to none; nor is what keeps more for the sake of time, nor
    anybody at a shape that has no targets."""
    target = CASES[contest.case].targets.get(kind) if contest.case in CASES else None
    if target is None or Shape(**contest.shape) not in TARGET_SHAPES[kind]:
        return []
    if row.contestant == f"fastd2o {kind}":
        if row.over_products is None:
            return [Verdict("time", f"≤ {target.over_products:.2f}", False)]
        found = [Verdict("time", f"≤ {target.over_products:.2f}", row.over_products <= target.over_products)]
        if row.extra_megabytes is not None:
            text = f"≤ {target.megabytes:.0f} MB"
            found.append(Verdict("memory", text, row.extra_megabytes <= target.megabytes))
        return found
    times = TIMES_FASTER[kind].get(row.contestant)
    if times is not None and row.over_fastd2o is not None:
        return [Verdict("peer", f"≥ {times:g}x", row.over_fastd2o >= times)]
    return []
