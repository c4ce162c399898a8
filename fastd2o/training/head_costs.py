"""What the head of a training step costs, by each of the engine's algorithms and as others do it.

Letters: T tokens that are projected, D hidden size, V vocabulary, S sequences of L tokens. An operation is a
floating-point operation of a matrix product; memory is what is held beyond inputs, results and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastd2o.ops.plan import Plan
from fastd2o.training.footprint import Footprint

_FLOAT32 = torch.float32.itemsize
# trl/kernels/chunked_logprob.py and trl/trainer/utils.py of TRL 1.16.
_TRL_TILE = (4096, 32768)


@dataclass(frozen=True)
class HeadCost:
    """One way to the log-probabilities of a micro-batch and to their gradients.

    Attributes:
        name: of the algorithm, or who does it so.
        what: is done.
        tokens: T.
        factor: operations in multiples of T·D·V.
        flops: operations.
        extra_bytes: an upper estimate of the memory.
        chosen: the step does this.
    """

    name: str
    what: str
    tokens: int
    factor: float
    flops: int
    extra_bytes: int
    chosen: bool = False


def head_costs(footprint: Footprint) -> list[HeadCost]:
    """The engine's algorithms, then others, all for the same micro-batch."""
    return [*_engine(footprint), *_others(footprint)]


def _engine(footprint: Footprint) -> list[HeadCost]:
    step, main = footprint.step, footprint.head[-1]
    shape = (main.vocab_size, main.hidden_size)
    unit, grouped, stash = (step.plan(name, main.tokens, shape) for name in ("unit", "grouped", "recompute"))
    parts = "" if grouped.part_tokens is None else f", in parts of {grouped.part_tokens:,} tokens"
    share = f"{stash.kept_columns / stash.vocab_size:.0%}"
    half = replace(
        _planned("grouped, half skipped", "the same, the groups of half of the tokens having no gradient", grouped),
        factor=2 + (grouped.flops_factor - 2) / 2,
        flops=(grouped.flops + 2 * grouped.tokens * grouped.hidden_size * grouped.vocab_size) // 2,
    )
    rows = [
        _planned("unit", "frozen head (LoRA): the gradient is formed in the forward, up to one factor", unit),
        _planned("grouped", f"trained head, loss a sum over groups: gradients in the forward{parts}", grouped),
        half,
        _planned(
            "recompute",
            "trained head, any loss: logits are formed again in the backward",
            replace(stash, kept_bytes=0),
        ),
        _planned("stash", f"the same, with the softmax weights of {share} of the columns kept", stash),
    ]
    algorithm = "stash" if main.algorithm == "recompute" and main.kept_columns else main.algorithm
    rows = [replace(row, chosen=row.name == algorithm) for row in rows]
    for plan in footprint.head:
        if plan.algorithm == "cringe":
            row = _planned("cringe", "tokens of negatives: two logits of each carry a gradient", plan)
            rows.append(replace(row, chosen=True))
    if step.reference:
        row = _planned("forward only", "the reference", step.plan("forward", step.counted, shape))
        rows.append(replace(row, chosen=True))
    return rows


def _planned(name: str, what: str, plan: Plan) -> HeadCost:
    return HeadCost(name, what, plan.tokens, plan.flops_factor, plan.flops, plan.extra_bytes)


def _others(footprint: Footprint) -> list[HeadCost]:
    step, main, frozen = footprint.step, footprint.head[-1], footprint.head_frozen
    logit, weights = main.dtype.itemsize, main.vocab_size * main.hidden_size

    def other(name: str, what: str, tokens: int, factor: int, extra_bytes: int) -> HeadCost:
        factor -= 2 if frozen else 0
        return HeadCost(name, what, tokens, factor, factor * tokens * weights, extra_bytes)

    # Logits of every position, in float32 from log_softmax on. Its backward holds what it saved, the gradient that
    # arrives and the one that leaves.
    positions = step.rows * step.length
    eager = 3 * _FLOAT32 * positions * main.vocab_size
    # ChunkedLogProbFunction: tiles of the tokens that count, formed again in the backward; float32 gradients of hidden
    # and weight, cast at the end, where that is a copy.
    tile_tokens, tile_columns = min(main.tokens, _TRL_TILE[0]), min(main.vocab_size, _TRL_TILE[1])
    trl = tile_tokens * tile_columns * logit + main.tokens * main.hidden_size * _FLOAT32
    trl += tile_columns * main.hidden_size * logit if main.cast_weight else 0
    trl += 0 if frozen or step.dtype == torch.float32 else weights * _FLOAT32
    # LigerFusedLinearPreferenceBase of liger-kernel 0.8.5, chunk_size 1: gradients in the forward, pair by pair, of
    # all positions, as eager code has them; a pair's gradient of the weight is added to that of those before it.
    pairs = step.groups * max(1, step.positives)
    liger = 2 * step.length * main.vocab_size * (logit + 3 * _FLOAT32)
    liger += 0 if frozen else weights * step.dtype.itemsize
    return [
        other("eager", "logits of every position, log_softmax in float32", positions, 6, eager),
        other("TRL", "chunks, formed again in the backward", main.tokens, 8, trl),
        other("Liger", "DPO pair by pair, all logits of a pair at once", 2 * pairs * step.length, 6, liger),
    ]
