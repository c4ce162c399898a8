"""Metrics of a logging window: sums and weights, added up over micro-batches and processes, divided once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastd2o.training.scoring import Measure


class Meter:
    """Collects :class:`Measure` s by name, on the device, without waiting for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def add(self, measures: Mapping[str, Measure]) -> None:
        """Add the measures of one batch."""
        for name, measure in measures.items():
            pair = torch.stack([_exact(measure.total), _exact(measure.weight)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self, over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The means since the last call, over all processes, of everything that was measured at all; and start afresh.

        Every process must call it. Processes may have measured different names: those of an objective are the same
        everywhere, but a process may have had no batch.
        """
        names = _union(sorted(self._sums))
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=_dtype(device), device=device)
        totals = over_ranks(torch.stack([self._sums.get(name, nothing) for name in names])).tolist()
        self._sums = {}
        return {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight > 0}

    def state(self) -> dict[str, list[float]]:
        """The sums so far, as plain numbers."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Continue from what :meth:`state` gave."""
        self._sums = {name: torch.tensor(pair, dtype=_dtype(device), device=device) for name, pair in state.items()}


def _dtype(device: torch.device) -> torch.dtype:
    # Long windows of large log-probabilities: float64, but for the one device that lacks it.
    return torch.float32 if device.type == "mps" else torch.float64


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(_dtype(value.device))


def _union(names: list[str]) -> list[str]:
    """The names of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return names
    everyone: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, names)
    return sorted({name for theirs in everyone for name in theirs})
