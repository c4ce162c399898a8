"""The clock and the scale."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastd2o.memory import measure_memory


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one run, everything it put onto the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
