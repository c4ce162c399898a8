"""What got faster or slower between two reports, beyond noise.

A contestant's time is taken as its ratio to the bare matrix products in the same round (in a training step's contest,
to eager code's), so that another clock rate is no change. The change is the ratio of the medians; its noise the range
in which 95 of 100 changes lie when rounds are drawn anew (the bootstrap). A change counts if all of that range is
beyond the threshold: two processes differ by a few per cent for reasons that no number of rounds in one of them shows.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .results import FLOOR, Contest, Report, Row, ratios

Judgement = Literal[
    "slower",
    "faster",
    "more memory",
    "less memory",
    "less accurate",
    "shorter completions",
    "now fails",
    "gone",
    "not judged",
    "same",
]
REGRESSIONS: tuple[Judgement, ...] = (
    "slower",
    "more memory",
    "less accurate",
    "shorter completions",
    "now fails",
    "gone",
)

_RESAMPLES = 2000
_COVERED = 0.95
# Of fewer the noise is their whole range, and a change counts if all of it is beyond twice the threshold.
_LEAST_ROUNDS = 4
# Memory is the same in every run, but for blocks that one allocator rounds and another does not.
_MEGABYTES = 1.0
# An error counts as grown beyond twice what it was, if it is more than the last digits of float32.
_TIMES_THE_ERROR, _LAST_DIGITS = 2.0, 1e-6
# The longest completion that fits is found to one part in so many.
_LONGEST_PARTS = 8


@dataclass(frozen=True)
class Change:
    """One contestant's, in one contest.

    Attributes:
        contest: its key.
        contestant: by name.
        ours: whether it is FastD2O with kernels of its own.
        judgement: what it comes to.
        time: after over before; None where one of them has no time.
        low, high: where its noise reaches.
        memory: MB after minus MB before; None where it was not measured.
    """

    contest: str
    contestant: str
    ours: bool
    judgement: Judgement
    time: float | None = None
    low: float | None = None
    high: float | None = None
    memory: float | None = None


def compare(before: Report, after: Report, threshold: float = 0.1) -> list[Change]:
    """All rows that both reports have.

    Args:
        before: the earlier report.
        after: the later one.
        threshold: relative; smaller changes of time or memory do not count.

    Raises:
        ValueError: they have no contest in common, or the threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; expected a number above 0, such as 0.1 for ten per cent")
    later = {contest.key: contest for contest in after.contests}
    common = [contest for contest in before.contests if contest.key in later]
    if not common:
        raise ValueError("the two reports have no contest in common. Fix: compare runs of the same suite")
    return [
        _change(contest, later[contest.key], row, threshold)
        for contest in common
        for row in contest.rows
        if row.contestant != FLOOR
    ]


def _change(earlier: Contest, later: Contest, before: Row, threshold: float) -> Change:
    # The torch backend's time is torch's.
    ours = before.contestant.startswith("fastd2o") and before.backend != "torch"
    name = (earlier.key, before.contestant, ours)
    after = later.row(before.contestant)
    if before.error is not None:
        return Change(*name, "not judged")
    if after is None:
        return Change(*name, "gone")
    if after.error is not None:
        return Change(*name, "now fails")
    memory = None
    if before.extra_megabytes is not None and after.extra_megabytes is not None:
        memory = after.extra_megabytes - before.extra_megabytes
    judgement: Judgement = "not judged"  # of what ran but once nobody knows the noise
    time = low = high = None
    yardstick = next((one for one in (FLOOR, "eager") if _is_in(one, earlier) and _is_in(one, later)), None)
    old, new = _relative(earlier, before, yardstick), _relative(later, after, yardstick)
    if min(len(old), len(new)) > 1:
        time = statistics.median(new) / statistics.median(old)
        few = min(len(old), len(new)) < _LEAST_ROUNDS
        low, high = (min(new) / max(old), max(new) / min(old)) if few else _noise(old, new)
        beyond = 1 + (2 * threshold if few else threshold)
        judgement = "slower" if low > beyond else "faster" if high < 1 / beyond else "same"
    other = _but_for_time(before, after, memory, threshold)
    if other == "less memory":
        judgement = other if judgement in ("same", "not judged") else judgement
    elif other is not None and judgement != "slower":
        judgement = other
    return Change(*name, judgement, time, low, high, memory)


def _but_for_time(before: Row, after: Row, memory: float | None, threshold: float) -> Judgement | None:
    """What else got worse, or else that memory was saved."""
    allowed = max(_MEGABYTES, threshold * abs(before.extra_megabytes or 0.0))
    if memory is not None and memory > allowed:
        return "more memory"
    for name in before.errors.keys() & {"value", "last_values", "gradient", "hidden_gradient", "weight_gradient"}:
        error = before.errors[name]
        if after.errors.get(name, 0.0) > max(_LAST_DIGITS, _TIMES_THE_ERROR * error):
            return "less accurate"
    shortest = (1 - max(threshold, 1 / _LONGEST_PARTS)) * (before.longest or 0)
    if after.longest is not None and after.longest < shortest:
        return "shorter completions"
    return "less memory" if memory is not None and memory < -allowed else None


def _is_in(contestant: str, contest: Contest) -> bool:
    row = contest.row(contestant)
    return row is not None and row.seconds is not None and row.error is None


def _relative(contest: Contest, row: Row, yardstick: str | None) -> list[float]:
    """Of each round, the time over the yardstick's, if there is one; nothing of a report that has no rounds."""
    other = contest.row(yardstick) if yardstick is not None else None
    if not row.times or (other is not None and not other.times):
        return []
    if other is None or other is row:
        return list(row.times)
    return ratios(row.times, other.times)


def _noise(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """In which the change of the median lies, were the rounds drawn again; the same for the same rounds."""
    draw = random.Random(0)
    changes = sorted(
        statistics.median(draw.choices(new, k=len(new))) / statistics.median(draw.choices(old, k=len(old)))
        for _ in range(_RESAMPLES)
    )
    outside = int(_RESAMPLES * (1 - _COVERED) / 2)
    return changes[outside], changes[-1 - outside]
