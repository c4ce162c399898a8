"""Measure on the GPU that is here which is faster with Triton: kernels that fuse the product, or the vendor's product
and a fold after it. The engine goes by the table that this writes, kernels/triton/measured.json: commit it.

    python -m benchmarks.tune            8192 x 4096 x 128256 in every dtype; about a minute
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

import fastd2o
from fastd2o.ops import measured
from fastd2o.ops.backends import check_backend, fuses

from .cases import CASES, CRINGE_K, OF_TOKENS, Case, Shape
from .contest import Inputs
from .contestants import Contestant
from .instruments import timed

SHAPE = {"tokens": 8192, "hidden": 4096, "vocab": 128256}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show, write; dtype by dtype, so that what is measured stays when the rest takes too long."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Measure what is faster with Triton here, fused or not."
    ).parse_args(argv)
    capability = measured.current_capability()
    if capability is None:
        raise SystemExit("benchmarks.tune: there is no NVIDIA GPU here, and nothing else has two ways to choose from")
    check_backend("triton")
    import triton

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "shape": SHAPE,
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in DTYPES:
        found |= milliseconds(SHAPE, (dtype,), "cuda", ROUNDS)
        measured.record(capability, {**machine, "milliseconds": found})
    print(f"written to {measured.TABLE}")


def milliseconds(
    shape: dict[str, int], dtypes: Sequence[torch.dtype], device: str, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By dtype, algorithm and way."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        found[name] = {}
        for case in (CASES[of_tokens] for of_tokens in OF_TOKENS):
            if fuses("triton", case.algorithm):
                found[name][case.algorithm] = times = both_ways(case, shape, dtype, device, rounds)
                print(f"{name}, {case.algorithm}: " + ", ".join(f"{way} {ms} ms" for way, ms in times.items()))
    return found


def both_ways(case: Case, shape: dict[str, int], dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    """The median of each; they take turns."""
    inputs = Inputs.random(case, Shape(**shape, dtype=str(dtype).removeprefix("torch.")), device)
    runs = {way: functools.partial(inputs.run, contestant(way)) for way in measured.WAYS}
    for run in runs.values():  # the first call compiles
        run()
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            seconds[way].append(timed(run, device))
    return {way: round(1e3 * statistics.median(times), 3) for way, times in seconds.items()}


def contestant(way: str) -> Contestant:
    """The backend, made to go one way."""

    def plan(hidden: Tensor, weight: Tensor, **kind: Any) -> fastd2o.Plan:
        chosen = fastd2o.Plan.of(hidden, weight, backend="triton", **kind)
        return dataclasses.replace(chosen, fused=way == "fused")

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fastd2o.linear_logprob(hidden, weight, target, plan=plan(hidden, weight))

    def cringe(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = fastd2o.linear_cringe(hidden, weight, target, k=CRINGE_K, plan=plan(hidden, weight, cringe=True))
        return output.loss, output.positive

    return Contestant(f"fastd2o triton, {way}", logprob, cringe, backend="triton")


if __name__ == "__main__":
    main()
