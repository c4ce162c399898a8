"""What a run leaves: rows of figures, a file of them, and whether the targets are met."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, TIMES_FASTER

FOLDER = Path(__file__).parent / "results"
FLOOR = "products alone"


@dataclass
class Row:
    """One contestant at one case.

    Attributes:
        case: of :data:`benchmarks.cases.CASES`.
        contestant: its name; :data:`FLOOR` for the bare matrix products.
        backend: of FastD2O.
        error: why there are no figures, or none to be trusted.
        rounds: how many runs were timed.
        seconds, min, max: of these, the median, the fastest, the slowest.
        over_products: time over the bare products' in the same round, the median of that.
        over_fastd2o: the same over FastD2O's on the device's own kernels.
        extra_megabytes: the most memory beyond inputs, results and gradients; None if it was not measured.
        errors: relative root mean square against float64.
    """

    case: str
    contestant: str
    backend: str | None = None
    error: str | None = None
    rounds: int = 0
    seconds: float | None = None
    min: float | None = None
    max: float | None = None
    over_products: float | None = None
    over_fastd2o: float | None = None
    extra_megabytes: float | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def record(self, times: list[float], floor: list[float], ours: list[float]) -> None:
        """Fill in the figures. Times of the same round stand at the same place; a contestant that ran but once is
        compared with medians."""
        self.rounds = len(times)
        self.seconds, self.min, self.max = statistics.median(times), min(times), max(times)
        self.over_products = median_ratio(times, floor)
        self.over_fastd2o = median_ratio(times, ours) if ours else None


@dataclass
class Result:
    """All rows of one shape, and where they are from.

    Attributes:
        machine: device, threads, versions, date.
        shape: tokens, hidden, vocab, dtype.
        floors: case -> what the bare products were.
        absent: contestant -> why it did not take part.
        rows: the figures.
    """

    machine: dict[str, Any]
    shape: dict[str, Any]
    floors: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Of the device: "cpu" or "cuda"."""
        return str(self.machine["kind"])

    @property
    def name(self) -> str:
        """Of its file. One with a part of the cases must not take the place of one with all."""
        shape = self.shape
        name = f"{self.kind}-t{shape['tokens']}-d{shape['hidden']}-v{shape['vocab']}-{shape['dtype']}"
        cases = dict.fromkeys(row.case for row in self.rows)
        return name if len(cases) == len(CASES) else "-".join([name, *cases])

    def row(self, case: str, contestant: str) -> Row | None:
        """The row of a contestant, if it took part."""
        return next((row for row in self.rows if (row.case, row.contestant) == (case, contestant)), None)

    def write(self, folder: Path) -> Path:
        """As JSON; what is None or empty is left out."""
        rows = [{name: value for name, value in asdict(row).items() if value not in (None, {})} for row in self.rows]
        path = folder / f"{self.name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({**asdict(self), "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return path

    @classmethod
    def read(cls, path: Path) -> Result:
        """The inverse of :meth:`write`."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios within a round."""
    if len(times) != len(others):
        return statistics.median(times) / statistics.median(others)
    return statistics.median(map(float.__truediv__, times, others))


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


def verdicts(row: Row, kind: str) -> list[Verdict]:
    """The targets that a row has to meet: those of FastD2O's own kernels for the device, and by how much a peer has to
    be slower. The torch backend, the reference, is held to none."""
    target = CASES[row.case].targets.get(kind)
    if row.backend == kind and target is not None:
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
