"""Calls every kernel of a backend, at shapes with ragged edges: rows that one warp works on, that several do, and that
registers do not hold. What compute-sanitizer watches in ``make gpu``. What becomes of tiles is compared with the
reference; whether the operators' results are right is for the tests to say.

    compute-sanitizer --tool racecheck --kernel-name kns=fastd2o python -m benchmarks.every_kernel --backend cuda
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastd2o
from fastd2o.losses import GROUPED_OBJECTIVES, grouped_loss
from fastd2o.ops.backends import resolve, supported, tile_ops
from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState
from fastd2o.ops.torch_tile_ops import TorchTileOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS: list[dict[str, Any]] = [{}, {"logit_scale": 0.5, "softcap": 20.0, "temperature": 1.3}]

# Rows of 41 elements and of an odd number of columns: none but the first begins where a vector load could.
TOKENS, HIDDEN = 37, 41
BLOCK_TOKENS = 32
CANDIDATES = (5, 64)
# The vocabulary, and the columns of a tile: for a row a warp, and three.
WIDTHS = ((1001, 333), (2205, 1101))


class Layout(NamedTuple):
    """Of a tile of logits: its shape, and elements of memory before its first row and between rows."""

    tokens: int
    columns: int
    before: int = 0
    between: int = 0


LAYOUTS = (
    Layout(5, 333, before=1, between=2),
    Layout(5, 1101, before=1, between=2),
    Layout(5, 1104),  # nothing but whole vectors
    Layout(3, 16411, before=1, between=2),  # more than the registers of a block hold
    Layout(3, 16640),
)
VOCAB_START = 100


def main(argv: list[str] | None = None) -> None:
    """Call them all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every_kernel", description="Call every kernel.")
    parser.add_argument("--backend", default="all", choices=["cuda", "triton", "cpu", "all"], help="all: of a GPU")
    chosen = parser.parse_args(argv).backend
    for backend in ("cuda", "triton") if chosen == "all" else (chosen,):
        device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
        dtypes = [dtype for dtype in DTYPES if supported(backend, device, dtype) is None]
        if not dtypes:
            raise SystemExit(f"benchmarks.every_kernel: {supported(backend, device, DTYPES[0])}")
        for dtype in dtypes:
            for transform in TRANSFORMS:
                of_tokens(backend, device, dtype, transform)
                for layout in LAYOUTS if has_tiles(backend, dtype) else ():
                    of_tile(backend, device, dtype, transform, layout)
        for objective in GROUPED_OBJECTIVES:
            of_groups(backend, device, objective)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"every kernel of the backend {backend!r} has run")


def has_tiles(backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend takes tiles of such logits."""
    return backend != "cpu" or dtype == torch.float32


def of_tokens(backend: str, device: str, dtype: torch.dtype, transform: dict[str, Any]) -> None:
    """Log-probabilities and Cringe, in several tiles."""
    for trained, k, (vocab, columns) in zip((False, True), CANDIDATES, WIDTHS, strict=True):
        hidden = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(vocab, HIDDEN, device=device, dtype=dtype, requires_grad=trained)
        target = torch.randint(vocab, (TOKENS,), device=device)
        leaves = [hidden, weight][: 1 + trained]
        tiled = _in_tiles(columns, fastd2o.Plan.of(hidden, weight, backend=backend))
        output = fastd2o.linear_logprob(hidden, weight, target, stats=True, plan=tiled, **transform)
        torch.autograd.grad(output.logprob.sum(), leaves)
        with torch.no_grad():
            tiled = _in_tiles(columns, fastd2o.Plan.of(hidden, weight, backend=backend))
            fastd2o.linear_logprob(hidden, weight, target, plan=tiled, **transform)
        tiled = _in_tiles(columns, fastd2o.Plan.of(hidden, weight, cringe=True, k=k, backend=backend))
        loss = fastd2o.linear_cringe(hidden, weight, target, k=k, plan=tiled, **transform).loss
        torch.autograd.grad(loss.sum(), leaves)


def _in_tiles(columns: int, plan: fastd2o.Plan) -> fastd2o.Plan:
    return dataclasses.replace(plan, block_tokens=BLOCK_TOKENS, block_vocab=columns)


def of_tile(backend: str, device: str, dtype: torch.dtype, transform: dict[str, Any], layout: Layout) -> None:
    """fold, grad, topk and draw on logits of a dtype, whatever the engine gives them.

    Raises:
        AssertionError: something else came out than of the reference, in float64 on the CPU.
    """
    resolve(backend, device, dtype)
    ops = tile_ops(backend, LogitTransform(**transform), torch.float32)
    reference = TorchTileOps(LogitTransform(**transform), torch.float64)
    tokens, columns = layout[:2]
    generator = torch.Generator().manual_seed(0)
    raw = 4 * torch.randn(tokens, columns, generator=generator)
    raw[torch.rand(raw.shape, generator=generator) < 0.05] = -torch.inf
    raw = raw.to(dtype)
    exact = raw.double()
    places = [0, columns - 1, columns // 2, -1, columns]  # within the tile, before it and behind it
    target = torch.tensor(places[:tokens]).unsqueeze(1) + VOCAB_START
    raw_there, target_there = raw.to(device), target.to(device)

    def tile(dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        stride = columns + layout.between
        memory = torch.zeros(layout.before + tokens * stride, dtype=dtype, device=device)
        found = memory[layout.before :].view(tokens, stride)[:, :columns]
        return found if values is None else found.copy_(values)

    def state(on: Tensor, dtype: torch.dtype, statistics: bool) -> FoldState:
        return FoldState.empty(tokens, on, dtype, statistics)

    for statistics in (False, True):
        for weights_dtype in (None, *DTYPES):
            found, expected = state(raw_there, torch.float32, statistics), state(raw, torch.float64, statistics)
            for start in (VOCAB_START, VOCAB_START + columns):
                logits, weights = tile(dtype, raw_there), None
                if weights_dtype is not None:
                    weights = logits if weights_dtype == dtype else tile(weights_dtype)
                exact_weights = torch.empty_like(exact)
                rescale = ops.fold(logits, target_there, start, found, weights)
                _agree(rescale, reference.fold(exact.clone(), target, start, expected, exact_weights))
                if weights is not None:
                    _agree(weights, exact_weights)
            _states_agree(found, expected)

    lse_others = expected.lse_others
    coef = torch.linspace(-1.0, 1.0, tokens).unsqueeze(1)  # of the middle token exactly 0
    exact_gradient = torch.empty_like(exact)
    reference.grad(exact.clone(), target, VOCAB_START, lse_others, coef.double(), exact_gradient)
    for out_dtype in DTYPES:
        logits = tile(dtype, raw_there)
        out = logits if out_dtype == dtype else tile(out_dtype)
        ops.grad(logits, target_there, VOCAB_START, lse_others.float().to(device), coef.to(device), out)
        _agree(out, exact_gradient, least=1e-7)

    for k in CANDIDATES:
        top, best = TopKState.empty(tokens, k, raw_there, torch.float32), TopKState.empty(tokens, k, raw, torch.float64)
        ops.topk(tile(dtype, raw_there), target_there, VOCAB_START, top)
        reference.topk(exact, target, VOCAB_START, best)
        _agree(top.values.sort(1).values, best.values.sort(1).values)
        # The raw logits, as which of equal ones it was is no matter here.
        chosen, largest = (exact.gather(1, one.index.cpu() - VOCAB_START).sort(1).values for one in (top, best))
        assert torch.equal(chosen, largest)
        positive, logit = ops.draw(top, 7, torch.arange(tokens, device=device))
        is_drawn = (top.index == positive.unsqueeze(1)) & (top.values == logit.unsqueeze(1))
        assert bool((is_drawn.sum(1) == 1).all())


def _states_agree(found: FoldState, expected: FoldState) -> None:
    _agree(found.max, expected.max)
    _agree(found.sum, expected.sum)
    _agree(found.target_logit, expected.target_logit)
    if found.statistics is not None and expected.statistics is not None:
        _agree(found.statistics.weighted, expected.statistics.weighted)
        # Of terms of either sign, a few for each of 16411 columns.
        _agree(found.statistics.total, expected.statistics.total, least=0.05)
        assert torch.equal(found.statistics.argmax.cpu(), expected.statistics.argmax)


def _agree(found: Tensor, expected: Tensor, least: float = 1e-6) -> None:
    """Up to the rounding of float32 sums and exponentials, and of what is kept in 16 bits."""
    rounding = max(1e-4, torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=rounding, atol=least)


def of_groups(backend: str, device: str, objective: str) -> None:
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
        backend=backend,
        ref_logp=None if cringe else -torch.rand(5, device=device),
        token_cringe=torch.rand(10, device=device) if cringe else None,
    )
    result.loss.sum().backward()


if __name__ == "__main__":
    main()
