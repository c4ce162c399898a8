"""fold, grad, topk and draw: what happens to a tile of logits after a matrix product has written it.

Contract (exactly: fastd2o/ops/tile_ops.py and, for the draw, docs/engine.md)
  logits   [T, N] float32, bfloat16 or float16, rows contiguous, at any distance between rows
  columns  target, state, rescale, lse_others, coef: [T, 1], at any distance between rows
  fold     state from "all columns before" to "all columns up to here"; weights [T, N] = exp(z - new max) * bend, 0 at
           the target, in any of the three dtypes, in place where it is the logits'
  grad     out [T, N] = -coef * bend * softmax over the others, 0 at the target; a row whose coef is exactly 0 is not
           read: it becomes zeros
  topk     values, index [T, k], k <= 64, in no order. Of equal logits the smaller column stays, NaN is larger than all,
           -inf never enters: what stays does not depend on how the columns were cut into tiles
  draw     values, index [T, k] in any order, k <= 64; the same columns as every other backend draws
FLOPs  fold about 8 a logit, one of them an exponential; with a softcap tanh on top, with weights a second exponential.
       grad about 6, one an exponential. topk about 3, and some 300 instructions of a warp for each newcomer
Bytes  the tile read once, in L2, and what is asked for written once; weights of rows that registers do not hold take a
       second reading
Share of the limit, the speed of L2: not measured yet

A program works on a row. Blocks are [DEEP, LANES] logits, LANES being so many that in the layout which Triton chooses
for vectors of 16 bytes what is taken down axis 0 stays within a thread. So every lane keeps a maximum and sums relative
to it, at the price of one more exponential a block, and the row agrees on one maximum when all is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastd2o.kernels.configs import DTYPES, MAX_CANDIDATES
from fastd2o.kernels.scalar import (
    LOW_WORD,
    NEG_INF,
    bend,
    key_column,
    key_logit,
    moved_sum,
    rank_key,
    shift_of,
    transform_arguments,
    transformed,
)
from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState

# No column of a row: where a lane has not met its maximum.
_NO_COLUMN = tl.constexpr(2**31 - 1)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Keys (rank_key) above all others, and below those of every logit but at -inf.
_ABOVE_ALL = tl.constexpr(2**63 - 1)
_BELOW_ALL = tl.constexpr(-0x7F800001 << 32)


@dataclass(frozen=True)
class RowConfig:
    """How a program works through a row: blocks of ``deep`` times ``lanes`` logits, both powers of two."""

    deep: int
    lanes: int
    num_warps: int


@dataclass(frozen=True)
class DrawConfig:
    """How many tokens a program draws for."""

    tokens: int
    num_warps: int


def fold_config(tokens: int, columns: int, itemsize: int, weights_itemsize: int | None = None) -> RowConfig:
    """Four warps for a row, more where rows are too few to fill a GPU.

    A thread has 16 logits of a block, enough to keep memory busy, or 32 where it can hold all of its part of a row in
    registers until the weights are written.

    Args:
        itemsize, weights_itemsize: bytes of a logit, and of a weight where these are asked for.
    """
    num_warps = 4 if tokens >= 512 else 8
    # Triton gives loads and stores one layout, in vectors of the narrower.
    narrower = min(itemsize, weights_itemsize or itemsize)
    resident = weights_itemsize is not None and columns <= num_warps * 32 * 32
    return _row_config(num_warps, narrower, thread_logits=32 if resident else 16)


def grad_config(itemsize: int) -> RowConfig:
    """A program for 2048 logits of a row: programs of a row need not agree on anything."""
    return _row_config(num_warps=4, itemsize=itemsize, thread_logits=16)


def topk_config(tokens: int, itemsize: int) -> RowConfig:
    """A warp for a row, so that the search for a newcomer's place has no barrier; four where rows are few."""
    return _row_config(num_warps=1 if tokens >= 1024 else 4, itemsize=itemsize, thread_logits=16)


def _row_config(num_warps: int, itemsize: int, thread_logits: int) -> RowConfig:
    """Blocks of which every thread holds ``thread_logits``, in vectors of 16 bytes."""
    vector = 16 // itemsize
    return RowConfig(deep=thread_logits // vector, lanes=num_warps * 32 * vector, num_warps=num_warps)


def draw_config(slots: int) -> DrawConfig:
    """Launch and latency outweigh everything else, as long as the candidates stay in registers."""
    return DrawConfig(tokens=256 // slots, num_warps=4)


def candidate_slots(k: int) -> int:
    """In how much room ``k`` candidates are kept by :func:`topk`: a lane of a warp for each, or two. Less would cost as
    much."""
    return 32 if k <= 32 else MAX_CANDIDATES


def drawn_slots(k: int) -> int:
    """In how much room ``k`` candidates are put in order by :func:`draw`."""
    return 8 if k <= 8 else MAX_CANDIDATES


def fold(
    logits_TN: Tensor,
    target_T1: Tensor,
    vocab_start: int,
    state: FoldState,
    transform: LogitTransform,
    weights_TN: Tensor | None = None,
    *,
    config: RowConfig | None = None,
) -> Tensor:
    """See :meth:`fastd2o.ops.tile_ops.TileOps.fold`; state and result are float32."""
    tokens, columns = logits_TN.shape
    rescale_T1 = torch.empty((tokens, 1), dtype=torch.float32, device=logits_TN.device)
    if tokens == 0 or columns == 0:
        return rescale_T1.fill_(1.0)
    _check_rows("logits_TN", logits_TN)
    if weights_TN is not None:
        _check_rows("weights_TN", weights_TN)
    config = config or fold_config(
        tokens, columns, logits_TN.element_size(), None if weights_TN is None else weights_TN.element_size()
    )
    inner, outer, capped = transform_arguments(transform)
    extra = state.statistics
    # Pointers that a kernel does not touch, where there is no such tensor.
    weighted, argmax, total = (state.max,) * 3 if extra is None else (extra.weighted, extra.argmax, extra.total)
    weights = logits_TN if weights_TN is None else weights_TN
    with torch.cuda.device_of(logits_TN):
        fold_kernel[(tokens,)](
            logits_TN,
            logits_TN.stride(0),
            columns,
            target_T1,
            target_T1.stride(0),
            vocab_start,
            inner,
            outer,
            state.max,
            state.max.stride(0),
            state.sum,
            state.sum.stride(0),
            state.target_logit,
            state.target_logit.stride(0),
            rescale_T1,
            weights,
            weights.stride(0),
            weighted,
            weighted.stride(0),
            argmax,
            argmax.stride(0),
            total,
            total.stride(0),
            CAPPED=capped,
            STATISTICS=extra is not None,
            WEIGHTS=weights_TN is not None,
            RESIDENT=weights_TN is not None and columns <= config.deep * config.lanes,
            DEEP=config.deep,
            LANES=config.lanes,
            num_warps=config.num_warps,
        )
    return rescale_T1


def grad(
    logits_TN: Tensor,
    target_T1: Tensor,
    vocab_start: int,
    lse_others_T1: Tensor,
    coef_T1: Tensor,
    out_TN: Tensor,
    transform: LogitTransform,
    *,
    config: RowConfig | None = None,
) -> None:
    """See :meth:`fastd2o.ops.tile_ops.TileOps.grad`; the columns are float32."""
    tokens, columns = logits_TN.shape
    if tokens == 0 or columns == 0:
        return
    _check_rows("logits_TN", logits_TN)
    _check_rows("out_TN", out_TN)
    config = config or grad_config(logits_TN.element_size())
    inner, outer, capped = transform_arguments(transform)
    with torch.cuda.device_of(logits_TN):
        grad_kernel[(tokens, triton.cdiv(columns, config.deep * config.lanes))](
            logits_TN,
            logits_TN.stride(0),
            columns,
            target_T1,
            target_T1.stride(0),
            vocab_start,
            inner,
            outer,
            lse_others_T1,
            lse_others_T1.stride(0),
            coef_T1,
            coef_T1.stride(0),
            out_TN,
            out_TN.stride(0),
            CAPPED=capped,
            BLOCK=config.deep * config.lanes,
            num_warps=config.num_warps,
        )


def topk(
    logits_TN: Tensor,
    target_T1: Tensor,
    vocab_start: int,
    top: TopKState,
    transform: LogitTransform,
    *,
    config: RowConfig | None = None,
) -> None:
    """See :meth:`fastd2o.ops.tile_ops.TileOps.topk`; for k up to :data:`MAX_CANDIDATES`, values are float32."""
    tokens, columns = logits_TN.shape
    k = _checked_k(top)
    if tokens == 0 or columns == 0:
        return
    _check_rows("logits_TN", logits_TN)
    config = config or topk_config(tokens, logits_TN.element_size())
    inner, outer, capped = transform_arguments(transform)
    with torch.cuda.device_of(logits_TN):
        topk_kernel[(tokens,)](
            logits_TN,
            logits_TN.stride(0),
            columns,
            target_T1,
            target_T1.stride(0),
            vocab_start,
            inner,
            outer,
            top.values,
            top.values.stride(0),
            top.index,
            top.index.stride(0),
            k,
            CAPPED=capped,
            SLOTS=candidate_slots(k),
            BLOCK=config.deep * config.lanes,
            num_warps=config.num_warps,
        )


def draw(top: TopKState, seed: int, counter_T: Tensor, *, config: DrawConfig | None = None) -> tuple[Tensor, Tensor]:
    """See :meth:`fastd2o.ops.tile_ops.TileOps.draw`; for k up to :data:`MAX_CANDIDATES`, values are float32."""
    tokens, k = len(top.values), _checked_k(top)
    positive_T = torch.empty(tokens, dtype=torch.int64, device=top.values.device)
    positive_logit_T = torch.empty(tokens, dtype=torch.float32, device=top.values.device)
    if tokens == 0:
        return positive_T, positive_logit_T
    slots = drawn_slots(k)
    config = config or draw_config(slots)
    with torch.cuda.device_of(top.values):
        draw_kernel[(triton.cdiv(tokens, config.tokens),)](
            top.values,
            top.values.stride(0),
            top.index,
            top.index.stride(0),
            counter_T,
            counter_T.stride(0),
            (seed + 2**63) % 2**64 - 2**63,  # as a signed word
            positive_T,
            positive_logit_T,
            tokens,
            k,
            SLOTS=slots,
            TOKENS=config.tokens,
            num_warps=config.num_warps,
        )
    return positive_T, positive_logit_T


def _check_rows(name: str, tile_TN: Tensor) -> None:
    if tile_TN.shape[1] > 1 and tile_TN.stride(1) != 1:
        raise ValueError(f"the rows of {name} are not contiguous (stride {tile_TN.stride(1)}). Fix: .contiguous()")
    if tile_TN.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {str(tile_TN.dtype).removeprefix('torch.')}, the kernels take float32, bfloat16 and float16. "
            'Fix: backend="torch"'
        )


def _checked_k(top: TopKState) -> int:
    k = top.values.shape[1]
    if not 1 <= k <= MAX_CANDIDATES:
        raise ValueError(f'k={k}, the kernels take 1 to {MAX_CANDIDATES}. Fix: a smaller k, or backend="torch"')
    for name, tensor in (("values", top.values), ("index", top.index)):
        if k > 1 and tensor.stride(1) != 1:
            raise ValueError(f"the rows of {name} are not contiguous (stride {tensor.stride(1)}). Fix: .contiguous()")
    return k


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def column_of_target(target, vocab_start, columns):
    """The target's column within the tile, -1 where it lies in another."""
    column = tl.load(target) - vocab_start
    return tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)


@triton.jit
def block_of(deep, lanes, DEEP: tl.constexpr, LANES: tl.constexpr):
    """Offsets [DEEP, LANES] of a block's logits."""
    return deep[:, None] * LANES + lanes[None, :]


@triton.jit
def fold_block(raw, column, wanted, lane, inner, outer, CAPPED: tl.constexpr, STATISTICS: tl.constexpr):
    """A block of raw logits [DEEP, LANES] into the lanes' maxima and sums; returns these and exp(z - lane maximum).

    What is taken down axis 0 stays within a thread. ``lane`` and its successor: maximum, sum and, with statistics,
    weighted sum, first column at the maximum, sum of the logits, [LANES] each.
    """
    maximum, total_exp, weighted, argmax, total = lane
    z = transformed(raw, inner, outer, CAPPED)
    if STATISTICS:
        total += tl.sum(tl.where(z == NEG_INF, 0.0, z), axis=0)
    z = tl.where(column == wanted, NEG_INF, z)
    new_max = tl.maximum(maximum, tl.max(z, axis=0))
    shift = shift_of(new_max)
    moved_by = maximum - shift
    factor = tl.exp(moved_by)
    below = z - shift[None, :]
    e = tl.exp(below)
    if STATISTICS:
        first = tl.min(tl.where(z == new_max[None, :], column, _NO_COLUMN), axis=0)
        argmax = tl.where(new_max > maximum, first, argmax)
        weighted = moved_sum(weighted, total_exp, moved_by, factor) + tl.sum(tl.where(e > 0, e * below, 0.0), axis=0)
    total_exp = total_exp * factor + tl.sum(e, axis=0)
    return (new_max, total_exp, weighted, argmax, total), e


@triton.jit(
    do_not_specialize=[
        "target_stride",
        "vocab_start",
        "max_stride",
        "sum_stride",
        "target_logit_stride",
        "weighted_stride",
        "argmax_stride",
        "total_stride",
    ]
)
def fold_kernel(
    logits,
    logits_stride,
    columns,
    target,
    target_stride,
    vocab_start,
    inner,
    outer,
    state_max,
    max_stride,
    state_sum,
    sum_stride,
    target_logit,
    target_logit_stride,
    rescale,
    weights,
    weights_stride,
    state_weighted,
    weighted_stride,
    state_argmax,
    argmax_stride,
    state_total,
    total_stride,
    CAPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row. RESIDENT: it is a single block, whose weights are written from registers."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    weights += row * weights_stride
    state_max += row * max_stride
    state_sum += row * sum_stride
    wanted = column_of_target(target + row * target_stride, vocab_start, columns)
    # Read before the row agrees on a maximum, for which its warps wait for each other: no weight is in its place yet.
    target_raw = tl.load(logits + wanted, mask=wanted >= 0, other=NEG_INF).to(tl.float32)
    target_z = transformed(target_raw, inner, outer, CAPPED)
    tl.store(target_logit + row * target_logit_stride, target_z, mask=wanted >= 0)

    offset = block_of(tl.arange(0, DEEP), tl.arange(0, LANES), DEEP, LANES)
    zeros = tl.zeros([LANES], tl.float32)
    lane = (zeros + NEG_INF, zeros, zeros, tl.full([LANES], _NO_COLUMN, tl.int32), zeros)
    if RESIDENT:
        raw = tl.load(logits + offset, mask=offset < columns, other=NEG_INF).to(tl.float32)
        lane, e = fold_block(raw, offset, wanted, lane, inner, outer, CAPPED, STATISTICS)
    else:
        for start in range(0, columns, DEEP * LANES):
            column = start + offset
            loaded = tl.load(logits + column, mask=column < columns, other=NEG_INF).to(tl.float32)
            lane, _ = fold_block(loaded, column, wanted, lane, inner, outer, CAPPED, STATISTICS)

    lane_max, lane_sum, lane_weighted, lane_argmax, lane_total = lane
    old_max = tl.load(state_max)
    old_sum = tl.load(state_sum)
    row_max = tl.max(lane_max, axis=0)
    new_max = tl.maximum(old_max, row_max)
    shift = shift_of(new_max)
    old_factor = tl.exp(old_max - shift)
    lane_factor = tl.exp(lane_max - shift)
    new_sum = old_sum * old_factor + tl.sum(lane_sum * lane_factor, axis=0)
    if STATISTICS:
        state_weighted += row * weighted_stride
        state_total += row * total_stride
        lane_moved = moved_sum(lane_weighted, lane_sum, lane_max - shift, lane_factor)
        new_weighted = moved_sum(tl.load(state_weighted), old_sum, old_max - shift, old_factor)
        new_weighted += tl.sum(lane_moved, axis=0)
        new_total = tl.load(state_total) + tl.sum(lane_total, axis=0)
        first = tl.min(tl.where(lane_max == row_max, lane_argmax, _NO_COLUMN), axis=0)
        tl.store(state_weighted, new_weighted)
        tl.store(state_total, new_total)
        known = (row_max > old_max) & (first != _NO_COLUMN)
        tl.store(state_argmax + row * argmax_stride, vocab_start + first.to(tl.int64), mask=known)
    tl.store(state_max, new_max)
    tl.store(state_sum, new_sum)
    tl.store(rescale + row, old_factor)

    if WEIGHTS:
        if RESIDENT:
            weight = e * lane_factor[None, :]
            if CAPPED:
                weight *= bend(raw, inner)
            tl.store(weights + offset, weight.to(weights.dtype.element_ty), mask=offset < columns)
        else:
            for start in range(0, columns, DEEP * LANES):
                column = start + offset
                again = tl.load(logits + column, mask=column < columns, other=NEG_INF).to(tl.float32)
                weight_again = tl.exp(transformed(again, inner, outer, CAPPED) - shift)
                if CAPPED:
                    weight_again *= bend(again, inner)
                weight_again = tl.where(column == wanted, 0.0, weight_again)
                tl.store(weights + column, weight_again.to(weights.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["target_stride", "vocab_start", "lse_others_stride", "coef_stride"])
def grad_kernel(
    logits,
    logits_stride,
    columns,
    target,
    target_stride,
    vocab_start,
    inner,
    outer,
    lse_others,
    lse_others_stride,
    coef,
    coef_stride,
    out,
    out_stride,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * logits_stride
    out += row * out_stride
    factor = tl.load(coef + row * coef_stride)
    gradient = tl.zeros([BLOCK], tl.float32)
    if factor != 0:
        wanted = column_of_target(target + row * target_stride, vocab_start, columns)
        shift = shift_of(tl.load(lse_others + row * lse_others_stride))
        raw = tl.load(logits + column, mask=column < columns, other=NEG_INF).to(tl.float32)
        gradient = tl.exp(transformed(raw, inner, outer, CAPPED) - shift) * -factor
        if CAPPED:
            gradient *= bend(raw, inner)
        gradient = tl.where(column == wanted, 0.0, gradient)
    tl.store(out + column, gradient.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def bar_of(smallest):
    """No logit below this one can take the place of the smallest key. While there is room all finite ones can, and NaN;
    -inf never."""
    logit = key_logit(smallest)
    return tl.where(logit == NEG_INF, -_LARGEST_FLOAT, logit)


@triton.jit(do_not_specialize=["target_stride", "vocab_start", "values_stride", "index_stride", "k"])
def topk_kernel(
    logits,
    logits_stride,
    columns,
    target,
    target_stride,
    vocab_start,
    inner,
    outer,
    values,
    values_stride,
    index,
    index_stride,
    k,
    CAPPED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row.

    Threshold first: a logit below the smallest of the k is dropped after one comparison, and a block without a newcomer
    costs no more. In a row of n logits in random order only about k (1 + ln(n / k)) pass, most of them in the first
    tile. So the k keys need no order and no clever structure: the largest of a block takes the place of the smallest of
    them, until it is no larger.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    wanted = column_of_target(target + row * target_stride, vocab_start, columns)
    slot = tl.arange(0, SLOTS)
    values += row * values_stride + slot
    index += row * index_stride + slot
    held = rank_key(tl.load(values, mask=slot < k, other=0.0), tl.load(index, mask=slot < k, other=0))
    held = tl.where(slot < k, held, _ABOVE_ALL)
    smallest = tl.min(held, axis=0)
    bar = bar_of(smallest)
    lane = tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        column = start + lane
        raw = tl.load(logits + column, mask=column < columns, other=NEG_INF).to(tl.float32)
        z = tl.where(column == wanted, NEG_INF, transformed(raw, inner, outer, CAPPED))
        if tl.max(tl.where(z < bar, 0, 1), axis=0) > 0:  # NaN is not below
            fresh = rank_key(z, vocab_start + column.to(tl.int64))
            newcomer = tl.max(fresh, axis=0)
            while newcomer > smallest:
                place = tl.min(tl.where(held == smallest, slot, SLOTS), axis=0)
                held = tl.where(slot == place, newcomer, held)
                fresh = tl.where(fresh == newcomer, _BELOW_ALL, fresh)
                smallest = tl.min(held, axis=0)
                newcomer = tl.max(fresh, axis=0)
            bar = bar_of(smallest)
    tl.store(values, key_logit(held), mask=slot < k)
    tl.store(index, key_column(held), mask=slot < k)


@triton.jit(do_not_specialize=["values_stride", "index_stride", "counter_stride", "seed", "tokens", "k"])
def draw_kernel(
    values,
    values_stride,
    index,
    index_stride,
    counter,
    counter_stride,
    seed: tl.int64,
    positive,
    positive_logit,
    tokens,
    k,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """TOKENS tokens. Their candidates are gone through one by one, the next always being the largest below the last, so
    that the sums round as on every other device."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    slot = tl.arange(0, SLOTS)
    there = live[:, None] & (slot < k)[None, :]
    logit = tl.load(values + token[:, None] * values_stride + slot[None, :], mask=there, other=NEG_INF)
    column = tl.load(index + token[:, None] * index_stride + slot[None, :], mask=there, other=0)
    keys = rank_key(logit, column)
    first = tl.max(keys, axis=1)
    top = key_logit(first)
    shift = shift_of(top)

    total = tl.zeros([TOKENS], tl.float32)
    current = first
    for _ in range(k):
        total += tl.exp(key_logit(current) - shift)  # exp(-inf) is the 0 it shall be
        current = tl.max(tl.where(keys < current[:, None], keys, _BELOW_ALL), axis=1)

    number = tl.load(counter + token * counter_stride, mask=live, other=0)
    low = (number & LOW_WORD).to(tl.uint32)
    high = ((number >> 32) & LOW_WORD).to(tl.uint32)
    zero = low ^ low
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    u = (word >> 8).to(tl.float32) * (1.0 / 16777216.0)

    below = tl.zeros([TOKENS], tl.float32)
    chosen = first
    waiting = tl.full([TOKENS], 1, tl.int32)
    current = first
    for _ in range(k):
        finite = key_logit(current) != NEG_INF
        chosen = tl.where((waiting > 0) & finite, current, chosen)
        step = tl.div_rn(tl.exp(key_logit(current) - shift), total)
        below += tl.where(finite, step, 0.0)
        # NaN stops at once: it comes first, and must be seen.
        waiting = tl.where(below <= u, waiting, 0)
        current = tl.max(tl.where(keys < current[:, None], keys, _BELOW_ALL), axis=1)
    tl.store(positive + token, tl.where(top == NEG_INF, -1, key_column(chosen)), mask=live)
    tl.store(positive_logit + token, key_logit(chosen), mask=live)
