"""The clock, the scale, and what keeps an experiment from taking the machine down."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastd2o.memory import measure_memory

Mark = Callable[[], None]
# What calls the mark between its forward and its backward, if it has one.
Run = Callable[[Mark], object]

_SHARE_OF_FREE_MEMORY = 0.9


@dataclass(frozen=True)
class Lap:
    """Seconds of one run, up to the mark and beyond it."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """The whole run."""
        return self.forward + self.backward


def lap(run: Run, device: str) -> Lap:
    """One run, everything it put onto the device included. Without a mark all of it is forward."""
    marks: list[float] = []

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    run(lambda: marks.append(now()))
    end = now()
    middle = marks[0] if marks else end
    return Lap(middle - start, end - middle)


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one run that has no mark."""
    return lap(lambda mark: run(), device).both


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes of tensors alive beyond those alive before: the allocator's records on the CPU, on CUDA its own
    peak counter."""
    if device == "cpu":
        return measure_memory(run, warm_up=False).peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cache_bytes(device: str) -> int:
    """Of the largest cache; 0 where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")  # "1024K"
    return max((1024 * int(size.read_text(encoding="utf-8").strip().removesuffix("K")) for size in sizes), default=0)


@contextmanager
def within_free_memory() -> Iterator[None]:
    """While it lasts, memory beyond what the machine has free raises an error instead of having the system kill a
    process. On Linux alone; elsewhere nothing."""
    if sys.platform != "linux":
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    # The limit counts what this process holds already.
    ours = _kilobytes("/proc/self/status", "VmData")
    most = 1024 * int(ours + _SHARE_OF_FREE_MEMORY * _kilobytes("/proc/meminfo", "MemAvailable"))
    hard = limits[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _kilobytes(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
