"""Weighs what a contestant allocates, on the CPU in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from .cases import CASES, Shape
from .contest import Inputs
from .contestants import Contestant, load
from .instruments import Weighed, weigh, within_free_memory

Found = TypeVar("Found")


class Scale:
    """Weighs contestants one after the other.

    On CUDA in this process, whose allocator keeps count. On the CPU in another one, which lives as long as the scale or
    until the system kills it; then the next weighing starts a new one.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.process: ProcessPoolExecutor | None = None

    def __call__(self, weigh: Callable[..., Found], *arguments: Any) -> Found:
        """What ``weigh``, a function at the top of a module, finds for these arguments.

        Raises:
            MemoryError: the process was killed, which systems do when memory runs out.
        """
        if self.device == "cuda":
            return weigh(*arguments)
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.process = ProcessPoolExecutor(1, context, _begin, (torch.get_num_threads(),))
        try:
            return self.process.submit(weigh, *arguments).result()
        except BrokenProcessPool:
            self.close()
            raise MemoryError("the process that measured its memory was killed") from None

    def close(self) -> None:
        """End the other process, if there is one."""
        if self.process is not None:
            self.process.shutdown()
            self.process = None


_until_the_end = contextlib.ExitStack()


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    _until_the_end.enter_context(within_free_memory())


def of_contestant(case: str, shape: Shape, device: str, contestant: str) -> Weighed:
    """One run of a contestant of :func:`benchmarks.contestants.load`."""
    inputs, few = _inputs(case, shape, device)
    chosen = next(one for one in _contestants(device, shape.dtype) if one.name == contestant)
    few.run(chosen)  # what is allocated once, for good, is no part of a run
    torch.compiler.reset()
    return weigh(functools.partial(inputs.run, chosen), device)


# One contest after the other, and one contestant after the other within each.
@functools.lru_cache(maxsize=1)
def _inputs(case: str, shape: Shape, device: str) -> tuple[Inputs, Inputs]:
    inputs = Inputs.random(CASES[case], shape, device)
    return inputs, inputs.few()


@functools.lru_cache
def _contestants(device: str, dtype: str) -> list[Contestant]:
    return load(device, getattr(torch, dtype))[0]
