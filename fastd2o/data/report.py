"""What became of the rows: kept, dropped, repaired, each with its reason and its line."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from fastd2o.data.rows import Origin

_SHOWN_LINES = 5


@dataclass
class DataReport:
    """Every row that did not go through unchanged.

    A line is listed once per reason, in order; one row may be repaired for several reasons.

    Attributes:
        origin: the name of the dataset and what its numbers count (lines of a file, or rows).
        rows: rows read.
        kept: groups in the dataset.
        dropped: reason -> lines of rows left out.
        repaired: reason -> lines of rows kept after a change.
        notes: remark -> lines of rows kept as they are that deserve a look.
    """

    origin: Origin
    rows: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    repaired: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, line: int) -> None:
        """Count a row as left out."""
        _record(self.dropped, reason, line)

    def repair(self, reason: str, line: int) -> None:
        """Count a row as changed."""
        _record(self.repaired, reason, line)

    def note(self, remark: str, line: int) -> None:
        """Remark on a row that stays as it is."""
        _record(self.notes, remark, line)

    @property
    def clean(self) -> bool:
        """Whether every row was kept as it is."""
        return not (self.dropped or self.repaired)

    def describe(self, reason: str, lines: list[int]) -> str:
        """``"empty completion: 7 (lines 3, 5, 8, 13, 21, …)"``."""
        shown = ", ".join(map(str, lines[:_SHOWN_LINES])) + (", …" if len(lines) > _SHOWN_LINES else "")
        unit = self.origin.unit if len(lines) == 1 else self.origin.unit + "s"
        return f"{reason}: {len(lines)} ({unit} {shown})"

    def __str__(self) -> str:
        repaired = len({line for lines in self.repaired.values() for line in lines})
        dropped = sum(map(len, self.dropped.values()))
        head = f"{self.origin.name}: {self.rows} rows, {self.kept} kept, {dropped} dropped, {repaired} repaired"
        counts = (("dropped", self.dropped), ("repaired", self.repaired), ("note", self.notes))
        body = [f"  {kind}: {self.describe(*item)}" for kind, reasons in counts for item in reasons.items()]
        return "\n".join([head, *body])


def _record(counts: dict[str, list[int]], reason: str, line: int) -> None:
    lines = counts.setdefault(reason, [])
    index = bisect_left(lines, line)
    if lines[index : index + 1] != [line]:
        lines.insert(index, line)
