"""What got faster or slower between two reports, beyond noise.

A contestant's time is taken as its ratio to the bare matrix products in the same round (in a training step's contest,
to eager code's), so that another clock rate is no change. The change is the ratio of the medians; its noise the range
in which 99 of 100 changes lie when rounds are drawn anew (the bootstrap). A change counts beyond both the threshold and
its noise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .results import FLOOR, Contest, Report, Row, ratios

Judgement = Literal["slower", "faster", "more memory", "less memory", "now fails", "same", "too few rounds"]
REGRESSIONS: tuple[Judgement, ...] = ("slower", "more memory", "now fails")

_RESAMPLES = 2000
_COVERED = 0.99
# Fewer cannot tell a change from noise.
_LEAST_ROUNDS = 4
# Memory is the same in every run, but for blocks that one allocator rounds and another does not.
_MEGABYTES = 1.0


@dataclass(frozen=True)
class Change:
    """One contestant's, in one contest.

    Attributes:
        contest: its key.
        contestant: by name.
        ours: whether it is FastD2O.
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
    earlier = {contest.key: contest for contest in before.contests}
    common = [contest for contest in after.contests if contest.key in earlier]
    if not common:
        raise ValueError("the two reports have no contest in common. Fix: compare runs of the same suite")
    return [
        _change(earlier[contest.key], contest, of_before, row, threshold)
        for contest in common
        for row in contest.rows
        if row.contestant != FLOOR and (of_before := earlier[contest.key].row(row.contestant)) is not None
    ]


def _change(earlier: Contest, later: Contest, before: Row, after: Row, threshold: float) -> Change:
    ours = after.contestant.startswith("fastd2o")
    name = (later.key, after.contestant, ours)
    if before.error is not None or after.error is not None:
        return Change(*name, "now fails" if before.error is None else "same")
    memory = None
    if before.extra_megabytes is not None and after.extra_megabytes is not None:
        memory = after.extra_megabytes - before.extra_megabytes
    old, new = _relative(earlier, before), _relative(later, after)
    time = statistics.median(new) / statistics.median(old) if old and new else None
    judgement: Judgement = "same"
    low = high = None
    if time is not None and min(len(old), len(new)) < _LEAST_ROUNDS:
        judgement = "too few rounds"
    elif time is not None:
        low, high = _noise(old, new)
        if time > 1 + threshold and low > 1:
            judgement = "slower"
        elif time < 1 / (1 + threshold) and high < 1:
            judgement = "faster"
    if judgement in ("same", "too few rounds") and memory is not None and before.extra_megabytes is not None:
        beyond = max(_MEGABYTES, threshold * abs(before.extra_megabytes))
        if abs(memory) > beyond:
            judgement = "more memory" if memory > 0 else "less memory"
    return Change(*name, judgement, time, low, high, memory)


def _relative(contest: Contest, row: Row) -> list[float]:
    """Of each round, the time over that of what all are compared with."""
    yardstick = contest.row(FLOOR) or contest.row("eager")
    if not row.times or yardstick is None or not yardstick.times or yardstick is row:
        return list(row.times)
    return ratios(row.times, yardstick.times)


def _noise(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """In which the change of the median lies, were the rounds drawn again; the same for the same rounds."""
    draw = random.Random(0)
    changes = sorted(
        statistics.median(draw.choices(new, k=len(new))) / statistics.median(draw.choices(old, k=len(old)))
        for _ in range(_RESAMPLES)
    )
    outside = int(_RESAMPLES * (1 - _COVERED) / 2)
    return changes[outside], changes[-1 - outside]
