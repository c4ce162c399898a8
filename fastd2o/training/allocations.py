"""Which tensors a piece of work makes, and when they are let go of: memory over time, by what it is for.

Works on any tensors. On fake ones (:class:`torch._subclasses.fake_tensor.FakeTensorMode`) no memory is taken.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKING = "working memory"
"""What storages are for that nobody has claimed."""


@dataclass
class _Storage:
    nbytes: int
    part: str | None


class Allocations(TorchDispatchMode):
    """A context that records every storage made by torch's operators within it, until it is freed.

    Storages are told apart, so a view costs nothing. What a kernel takes and gives back by itself is not seen.

    Args:
        granularity: bytes that every storage is rounded up to a multiple of.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()
        self._granularity = granularity
        self._storages: list[_Storage] = []
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by id, which the next storage may have again
        self._events: list[int] = []  # n: storage n was made; ~n: it was freed
        self._moments: list[tuple[int, str | None]] = [(0, None)]
        self._making: str | None = None

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and look at its results."""
        result = func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self._number(value)
        return result

    def _number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which it gets when it is first seen."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._alive.get(key)
        if known is not None:
            return known[0]
        number = len(self._storages)
        self._storages.append(_Storage(-(-storage.nbytes() // self._granularity) * self._granularity, self._making))
        self._events.append(number)

        def freed(_: Any) -> None:
            del self._alive[key]
            self._events.append(~number)

        self._alive[key] = (number, weakref.ref(storage, freed))
        return number

    def claim(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say what the storages of these tensors are for, from when they were made on."""
        for tensor in tensors:
            self._storages[self._number(tensor)].part = part

    def claim_rest(self, part: str) -> None:
        """Say what all that is alive, and that nobody has claimed, is for."""
        for number, _ in self._alive.values():
            if self._storages[number].part is None:
                self._storages[number].part = part

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is made within is for this."""
        before, self._making = self._making, part
        try:
            yield
        finally:
            self._making = before

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """Give a stretch of time a name; several may have the same."""
        self._moments.append((len(self._events), moment))
        try:
            yield
        finally:
            self._moments.append((len(self._events), None))

    def peaks(self) -> dict[str, dict[str, int]]:
        """For each named moment, in the order in which they came: bytes by part when the most were alive."""
        alive: Counter[str] = Counter()
        peaks: dict[str, dict[str, int]] = {}
        total = 0
        stops = [position for position, _ in self._moments[1:]] + [len(self._events)]
        for (start, moment), stop in zip(self._moments, stops, strict=True):
            most = -1 if moment is None else sum(peaks.get(moment, {"": -1}).values())
            for event in (None, *self._events[start:stop]):  # what is alive at the start counts
                if event is not None:
                    storage = self._storages[event if event >= 0 else ~event]
                    change = storage.nbytes if event >= 0 else -storage.nbytes
                    alive[storage.part or WORKING] += change
                    total += change
                if moment is not None and total > most:
                    most, peaks[moment] = total, dict(alive)
        return peaks
