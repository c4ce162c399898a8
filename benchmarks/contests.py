"""The contests as pytest-benchmark has them: a test for each contestant of each contest.

    pytest benchmarks/contests.py --suite quick -k "trained and cpu"

pytest-benchmark runs one test after the other, which a drifting clock makes unfair. So the first test of a contest
holds all of it (:mod:`benchmarks.contest`), with contestants taking turns, and each test replays the times of its own:
tables, JSON and comparisons are pytest-benchmark's as ever. A peer that fails is an expected failure, FastD2O a
failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from .session import Entry, Session


class RecordedClock:
    """Shows a time that moves with each recorded run, and only then."""

    def __init__(self) -> None:
        self._now = 0.0
        self._runs: Iterator[float] = iter(())

    def replay(self, seconds: Sequence[float]) -> None:
        """Take the runs that are to come from a recording."""
        self._now, self._runs = 0.0, iter(seconds)

    def run(self) -> None:
        """Let the next run pass."""
        self._now += next(self._runs)

    def __call__(self) -> float:
        """Seconds."""
        return self._now


CLOCK = RecordedClock()


@pytest.mark.benchmark(timer=CLOCK, min_rounds=1, warmup=False)
def test_contest(entry: Entry, contestant: str, session: Session, benchmark: BenchmarkFixture) -> None:
    row = session.row(entry, contestant)
    if row.error is not None:
        (pytest.xfail if row.backend is None else pytest.fail)(row.error)
    benchmark.group = entry.key
    figures = ("over_products", "over_fastd2o", "extra_megabytes", "forward", "backward", "longest", "errors")
    benchmark.extra_info.update({name: value for name in figures if (value := getattr(row, name)) is not None})
    CLOCK.replay(row.times)
    benchmark.pedantic(CLOCK.run, rounds=row.rounds)
