"""Times contestants that take turns: a warm-up of all, which compiles and tunes, then rounds (A B C A B C ...).

A machine whose clock drifts slows all of a round, so what counts are ratios within it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .instruments import Lap, Run, lap
from .results import FLOOR, Row


@dataclass(frozen=True)
class Patience:
    """How long to measure.

    Attributes:
        rounds: at least so many.
        most_rounds: and not more.
        seconds: short rounds are repeated until their first has taken so long.
        each: seconds; who has taken so long altogether sits out the rounds beyond ``rounds``.
        turn: seconds; a peer that takes longer runs once after its warm-up, and in no round.
        most_seconds: who would take longer for one run is left out.
    """

    rounds: int = 5
    most_rounds: int = 25
    seconds: float = 3.0
    each: float = 20.0
    turn: float = 60.0
    most_seconds: float = 600.0

    def rounds_of(self, seconds: float) -> int:
        """``rounds``, or more where a run is short and its noise large."""
        return max(self.rounds, min(self.most_rounds, int(self.seconds / seconds)))


def race(
    rows: Sequence[Row],
    runs: Mapping[str, Run],
    ours: str,
    patience: Patience,
    device: str,
    progress: Callable[[float], None],
) -> None:
    """Time everyone who has no error yet, and record it; who fails on the way says so on its row.

    Args:
        rows: the bare products' first, where there are any.
        runs: by contestant.
        ours: whom the others are compared with, beside the bare products.
        patience: how long.
        device: "cpu" or "cuda".
        progress: told how much is done, in [0, 1].
    """
    laps: dict[str, list[Lap]] = {}
    racing = [row for row in rows if row.error is None]
    for number, row in enumerate(racing):
        progress(number / len(racing) / 2)
        with row.catching():
            turn = math.inf if row.contestant == FLOOR or row.backend == device else patience.turn
            laps[row.contestant] = _warm_up(runs[row.contestant], turn, device)

    racing = [row for row in racing if laps.get(row.contestant) == []]
    rounds = _rounds(racing, runs, patience, device)
    for number in range(rounds):
        progress((1 + number / rounds) / 2)
        for row in racing:
            mine = laps[row.contestant]
            if row.error is None and (number < patience.rounds or sum(one.both for one in mine) < patience.each):
                with row.catching():
                    mine.append(lap(runs[row.contestant], device))

    valid = {row.contestant: laps[row.contestant] for row in rows if row.error is None}
    for row in rows:
        if row.contestant in valid:
            row.record(valid[row.contestant], valid.get(FLOOR, []), valid.get(ours, []))
    progress(1.0)


def _rounds(racing: Sequence[Row], runs: Mapping[str, Run], patience: Patience, device: str) -> int:
    """By the time of the first that does not fail."""
    for row in racing:
        with row.catching():
            return patience.rounds_of(lap(runs[row.contestant], device).both)
    return 0


def _warm_up(run: Run, turn: float, device: str) -> list[Lap]:
    """The laps that count already: none, but of what takes longer than a turn the second, which compiles nothing."""
    for _ in range(2):
        once = lap(run, device)
        if once.both <= turn:
            return []
    return [once]
