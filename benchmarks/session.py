"""One run of a suite: holds each contest when the first of its rows is asked for, and writes the report as it grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from . import steps, trial
from .cases import CASES, Shape
from .contest import Setup, Trial, hold
from .contestants import Contestant, load
from .results import FLOOR, Contest, Report, Row, commit, shape_text
from .scale import Scale
from .steps import StepShape
from .suites import Suite


@dataclass(frozen=True)
class Entry:
    """A contest that is to be held: a case or training step, and its shape."""

    name: str
    shape: Shape | StepShape

    @property
    def key(self) -> str:
        """That of its :class:`~benchmarks.results.Contest`."""
        return f"{self.name}-{shape_text(self.shape.fields)}"

    @property
    def effort(self) -> float:
        """About how long a contestant takes, in seconds, for the time left."""
        if isinstance(self.shape, StepShape):
            return 20.0
        shape = self.shape
        return 2.0 + 40 * shape.tokens * shape.hidden * shape.vocab / 2e11


@dataclass
class Session:
    """
    Attributes:
        suite: what is measured.
        device: "cpu" or "cuda".
        peers: names of the peers that may take part; None for all.
        report: to which contests are added.
        path: of the report's file; None for no file.
        previous: where a file that is there goes, once there is something to put in its place.
        progress: told how many seconds' worth of work is done, and on what.
    """

    suite: Suite
    device: str
    report: Report
    peers: frozenset[str] | None = None
    path: Path | None = None
    previous: Path | None = None
    progress: Callable[[float, str], None] = lambda done, what: None
    chosen: Mapping[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scale = Scale(self.device)
        self._done = 0.0
        self._written = False
        self._held: dict[str, Contest] = {}
        self._loaded: dict[str, list[Contestant]] = {}

    @cached_property
    def entries(self) -> list[Entry]:
        """In the order in which they are held."""
        contests = [Entry(name, shape) for name, shape in self.suite.contests]
        return contests + [Entry(name, shape) for name, shape in self.suite.steps]

    def contestants(self, entry: Entry) -> list[str]:
        """Who may take part in a contest, the floor included where it has one."""
        if isinstance(entry.shape, StepShape):
            return [name for name in steps.CONTESTANTS if name == steps.OURS or self._is_there(name)]
        case = CASES[entry.name]
        most = self.suite.peer_tokens
        ours_alone = most is not None and entry.shape.tokens > most
        return [
            FLOOR,
            *(
                contestant.name
                for contestant in self._load(entry.shape.dtype)
                if contestant.knows(case) and not (ours_alone and contestant.backend != self.device)
            ),
        ]

    @property
    def effort(self) -> float:
        """Of all that was chosen."""
        return sum(entry.effort * len(self.chosen[entry.key]) for entry in self.entries if entry.key in self.chosen)

    def row(self, entry: Entry, contestant: str) -> Row:
        """The figures of one contestant; all of its contest are measured at once, the first time."""
        if entry.key not in self._held:
            self._held[entry.key] = contest = self._hold(entry)
            self.report.add(replace(contest, commit=commit()))
            if self.path is not None:
                if not self._written and self.previous is not None and self.path.exists():
                    os.replace(self.path, self.previous)
                self._written = True
                self.report.write(self.path)
        found = self._held[entry.key].row(contestant)
        assert found is not None
        return found

    def close(self) -> None:
        """End the process in which contestants are tried."""
        self.scale.close()

    def _hold(self, entry: Entry) -> Contest:
        names = self.chosen[entry.key]
        effort = entry.effort * len(names)

        def progress(share: float) -> None:
            self.progress(self._done + share * effort, entry.key)

        progress(0.0)
        try:
            return self._measure(entry, names, progress)
        except Exception as error:  # out of memory for the inputs, say; the next contest may be smaller
            rows = [Row(name, self.device if name.startswith("fastd2o") else None) for name in names]
            for row in rows:
                with row.catching():
                    raise error
            return Contest(entry.name, entry.shape.fields, "", 0, rows)
        finally:
            self._done += effort
            if self.device == "cuda":
                with suppress(RuntimeError):  # a device that a contestant has broken
                    torch.cuda.empty_cache()

    def _measure(self, entry: Entry, names: list[str], progress: Callable[[float], None]) -> Contest:
        if isinstance(entry.shape, StepShape):
            return steps.measure(entry.name, entry.shape, self.device, names, self.suite.patience, self.scale, progress)
        shape = entry.shape
        contestants = [one for one in self._load(shape.dtype) if one.name in names]

        def attempt(contestant: str) -> Trial:
            most_seconds = self.suite.patience.most_seconds
            return self.scale(trial.of_contestant, entry.name, shape, self.device, contestant, most_seconds)

        return hold(Setup(CASES[entry.name], shape, self.device, contestants, self.suite.patience, attempt, progress))

    def _load(self, dtype: str) -> list[Contestant]:
        if dtype not in self._loaded:
            self._loaded[dtype], absent = load(self.device, getattr(torch, dtype), self.peers)
            present = {one.name for one in self._loaded[dtype]}
            self.report.absent = {
                name: why for name, why in (self.report.absent | absent).items() if name not in present
            }
        return self._loaded[dtype]

    def _is_there(self, peer: str) -> bool:
        return any(one.name == peer for one in self._load("bfloat16"))
