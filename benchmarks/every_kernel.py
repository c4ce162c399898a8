"""Calls every native kernel of a device, at small shapes with ragged edges, and looks at no result: what
compute-sanitizer watches in ``make gpu``. Whether results are right is for the tests to say.

    compute-sanitizer --tool racecheck --kernel-name kns=fastd2o python -m benchmarks.every_kernel
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

import fastd2o
from fastd2o.losses import GROUPED_OBJECTIVES, grouped_loss

# Rows of 41 and 1001 elements: none but the first begins where a vector load could.
TOKENS, HIDDEN, VOCAB = 37, 41, 1001
TRANSFORMS: list[dict[str, Any]] = [{}, {"logit_scale": 0.5, "softcap": 20.0, "temperature": 1.3}]


def main(argv: list[str] | None = None) -> None:
    """Call them all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every_kernel", description="Call every native kernel.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = parser.parse_args(argv).device
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for transform in TRANSFORMS:
            of_tokens(device, dtype, transform)
    for objective in GROUPED_OBJECTIVES:
        of_groups(device, objective)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"every kernel of the backend {device!r} has run")


def of_tokens(device: str, dtype: torch.dtype, transform: dict[str, Any]) -> None:
    """Log-probabilities and Cringe, in several tiles."""
    weight = torch.randn(VOCAB, HIDDEN, device=device, dtype=dtype)
    target = torch.randint(VOCAB, (TOKENS,), device=device)
    for trained in (False, True):
        hidden = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype, requires_grad=True)
        leaves = [hidden, weight.requires_grad_(trained)][: 1 + trained]
        tiled = _in_tiles(fastd2o.Plan.of(hidden, weight, backend=device))
        output = fastd2o.linear_logprob(hidden, weight, target, stats=True, plan=tiled, **transform)
        torch.autograd.grad(output.logprob.sum(), leaves)
        with torch.no_grad():
            tiled = _in_tiles(fastd2o.Plan.of(hidden, weight, backend=device))
            fastd2o.linear_logprob(hidden, weight, target, plan=tiled, **transform)
        tiled = _in_tiles(fastd2o.Plan.of(hidden, weight, cringe=True, backend=device))
        for k in (5, 64):
            loss = fastd2o.linear_cringe(hidden, weight, target, k=k, plan=tiled, **transform).loss
            torch.autograd.grad(loss.sum(), leaves)


def _in_tiles(plan: fastd2o.Plan) -> fastd2o.Plan:
    return dataclasses.replace(plan, block_tokens=16, block_vocab=333)


def of_groups(device: str, objective: str) -> None:
    """Two groups: a negative and two positives, a negative and one."""
    logp = -torch.rand(10, device=device)
    logp.requires_grad_()
    cringe = objective in ("cringe", "pairwise_cringe")
    result = grouped_loss(
        logp,
        torch.tensor([0, 3, 4, 6, 9, 10], device=device),
        torch.tensor([0, 3, 5], device=device),
        torch.tensor([False, True, True, True, False], device=device),
        objective=objective,
        backend=device,
        ref_logp=None if cringe else -torch.rand(5, device=device),
        token_cringe=torch.rand(10, device=device) if cringe else None,
    )
    result.loss.sum().backward()


if __name__ == "__main__":
    main()
