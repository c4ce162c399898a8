"""How much memory a piece of work takes, from the allocator's own records rather than from the process' size."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of tensors on the CPU.

    Attributes:
        peak: the most alive at once, beyond what was alive before.
        largest: the largest single allocation.
        remaining: what was still alive when the work returned.
    """

    peak: int
    largest: int
    remaining: int


def measure_memory(run: Callable[[], object], *, warm_up: bool = True) -> MemoryUse:
    """Run once under torch's profiler and read its allocation records. What ``run`` returns counts as remaining.

    Args:
        run: the work.
        warm_up: run once before, so that what a library allocates only once does not count.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces its start and stop on the terminal
    if warm_up:
        run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = peak = largest = 0
    for _, change in sorted(changes, key=lambda record: record[0]):
        alive += change
        peak, largest = max(peak, alive), max(largest, change)
    return MemoryUse(peak, largest, alive)
