# The product with the head and what is made of its logits, in one kernel: logits exist only in registers.
#
# logprob_forward: fold_products_kernel, merge_folds_kernel
# Contract (exactly: TileOps.fold in fastd2o/ops/tile_ops.py, with the product inside)
#   hidden  [T, D], weight [N, D] float32, bfloat16 or float16, the same; bias [N] or none, any float dtype
#   state   max, sum, target_logit and, with statistics, weighted, argmax, total: [T, 1], from "all columns before" to
#           "all columns up to here"
# FLOPs  2 T·D·N, and about 10 a logit, one of them an exponential; with a softcap tanh on top
# Bytes  hidden once for each split of a group, the weight once for each group of token blocks (see below); 8 bytes of
#        partial sums for each token and split, 20 with statistics
# Share of the limit, the rate of the bare product: not measured yet
#
# logprob_grad_slab: grad_products_kernel
# Contract (exactly: TileOps.grad, with the product inside)
#   lse_others, coef  [T, 1]; out [T, N] in any float dtype, 0 in the target's column
#   A block of tokens whose coefficients are all exactly 0 is not multiplied: it becomes zeros.
# FLOPs  2 T·D·N, and about 8 a logit; with a softcap tanh and a second exponential on top
# Bytes  as above; out once
# Share of the limit, the rate of the bare product: not measured yet
"""The product with the head, fused with its fold (:func:`logprob_forward`) or its gradient
(:func:`logprob_grad_slab`).

Shapes: T tokens, D hidden size, N columns of one slab of the vocabulary, or of all of it, S splits of these columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastd2o.kernels import configs
from fastd2o.kernels.configs import ProductConfig
from fastd2o.kernels.scalar import NEG_INF, bend, moved_sum, shift_of, transform_arguments, transformed
from fastd2o.ops.plan import PARTIAL_BYTES
from fastd2o.ops.tile_ops import FoldState, LogitTransform, StatisticsState

# Integers that say how much there is, or where: kernels are not compiled anew for those that happen to be multiples of
# 16. (They are for hidden sizes: where that is ragged as well, copies to shared memory shrink to single entries.)
COUNTS = ("tokens", "columns", "target_stride", "vocab_start", "splits", "blocks_per_split", "group")
LAST_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def block_factors(
    hidden,
    weight,
    row_start,
    column_start,
    d,
    tokens,
    columns,
    hidden_size,
    hidden_stride,
    hidden_inner,
    weight_stride,
    weight_inner,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """What a block of logits needs of hidden and weight from hidden entry ``d`` on: [BLOCK_T, BLOCK_D], [BLOCK_N,
    BLOCK_D]."""
    if TMA:
        left = hidden.load([row_start, d])
        right = weight.load([column_start, d])
    else:
        # Rows and columns beyond the end are the last one again, which needs no mask and makes no NaN.
        rows = tl.minimum(row_start + tl.arange(0, BLOCK_T), tokens - 1).to(tl.int64)
        cols = tl.minimum(column_start + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
        dims = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        left_at = hidden + rows[:, None] * hidden_stride + dims[None, :] * hidden_inner
        right_at = weight + cols[:, None] * weight_stride + dims[None, :] * weight_inner
        if EVEN_D:
            left = tl.load(left_at)
            right = tl.load(right_at)
        else:
            inside = dims[None, :] < hidden_size
            left = tl.load(left_at, mask=inside, other=0.0)
            right = tl.load(right_at, mask=inside, other=0.0)
    return left, right


@triton.jit
def block_of(item, token_blocks, column_blocks, group):
    """Which token block and which of the column blocks (or splits) an item is.

    Items that run at the same time have neighbouring numbers, and shall share what they read in L2. In a group of token
    blocks the token block changes first: ``group`` items read the same weight, one after the other all columns pass by,
    and the group's hidden states stay in L2 meanwhile.
    """
    items = group * column_blocks
    first = item // items * group
    rows = tl.minimum(group, token_blocks - first)
    return first + item % items % rows, item % items // rows


@triton.jit
def raw_logits(acc, bias, cols, columns, HAS_BIAS: tl.constexpr):
    """u = W h + b of a block."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def own_columns(target, target_stride, rows, tokens, columns, vocab_start):
    """Where in the slab each token's target lies, -1 for nowhere."""
    local = tl.load(target + rows.to(tl.int64) * target_stride, mask=rows < tokens, other=-1) - vocab_start
    return tl.where((rows < tokens) & (local >= 0) & (local < columns), local, -1).to(tl.int32)


@triton.jit
def without_target(z, cols, own, rows, target_logit, target_logit_stride, column_start, BLOCK_N: tl.constexpr):
    """Writes the logits of the targets that are in a block to ``target_logit``, and takes them out of it."""
    is_target = cols[None, :] == own[:, None]
    here = (own >= column_start) & (own < column_start + BLOCK_N)
    logit = tl.sum(tl.where(is_target, z, 0.0), 1)
    tl.store(target_logit + rows.to(tl.int64) * target_logit_stride, logit, mask=here)
    return tl.where(is_target, NEG_INF, z)


@triton.jit
def has_target(own, column_start, BLOCK_N: tl.constexpr):
    """Whether any token's target is in a block: most blocks have none, and need not compare every logit's column."""
    return tl.max(((own >= column_start) & (own < column_start + BLOCK_N)).to(tl.int32), 0) != 0


@triton.jit
def in_parts(acc, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """A block's columns in 1, 2 or 4 parts, from left to right: what is done to one is over before the next comes into
    registers."""
    if PARTS == 1:
        parts = (acc,)
    else:
        low, high = tl.split(tl.permute(tl.reshape(acc, [BLOCK_T, 2, BLOCK_N // 2]), [0, 2, 1]))
        if PARTS == 2:
            parts = (low, high)
        else:
            first, second = tl.split(tl.permute(tl.reshape(low, [BLOCK_T, 2, BLOCK_N // 4]), [0, 2, 1]))
            third, fourth = tl.split(tl.permute(tl.reshape(high, [BLOCK_T, 2, BLOCK_N // 4]), [0, 2, 1]))
            parts = (first, second, third, fourth)
    return parts


@triton.jit
def part_logits(
    acc,
    bias,
    column_start,
    columns,
    inner,
    outer,
    PART_N: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """z of PART_N columns of the product, from ``column_start`` on; -inf beyond the last column."""
    cols = column_start + tl.arange(0, PART_N)
    z = transformed(raw_logits(acc, bias, cols, columns, HAS_BIAS), inner, outer, CAPPED)
    if column_start + PART_N > columns:
        z = tl.where((cols < columns)[None, :], z, NEG_INF)
    return z


@triton.jit
def fold_logits(z, maximum, sums):
    """The new maximum and sum of exponentials with these logits, and what comes up on the way: exp(z - new maximum),
    z - new maximum, the factor by which older sums were multiplied, and its logarithm."""
    new_max = tl.maximum(maximum, tl.max(z, 1))
    shift = shift_of(new_max)
    by = maximum - shift
    factor = tl.exp(by)
    below = z - shift[:, None]
    e = tl.exp(below)
    return new_max, sums * factor + tl.sum(e, 1), e, below, factor, by


@triton.jit
def fold_statistics(z, cols, maximum, sums, weighted, argmax, e, below, factor, by):
    """The new ``weighted`` and ``argmax``, where maximum and sums are still the old ones."""
    # Columns ascend, so an equal maximum further on does not count.
    part_max = tl.max(z, 1)
    first = tl.min(tl.where(z == part_max[:, None], cols[None, :], LAST_COLUMN), 1)
    argmax = tl.where(part_max > maximum, first, argmax)
    moved = moved_sum(weighted, sums, by, factor)
    return moved + tl.sum(tl.where(e == 0, 0.0, e * below), 1), argmax


@triton.jit(do_not_specialize=[*COUNTS, "target_logit_stride"])
def fold_products_kernel(
    hidden,
    weight,
    bias,
    target,
    target_logit,
    partial,  # [2, S, T] maximum and sum; [4, S, T] with weighted and total
    partial_argmax,  # [S, T]
    tokens,
    columns,
    hidden_size,
    hidden_stride,
    hidden_inner,
    weight_stride,
    weight_inner,
    target_stride,
    target_logit_stride,
    vocab_start,
    inner,
    outer,
    splits,
    blocks_per_split,
    group,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Persistent: program p takes items p, p + programs, ...; an item is a block of tokens and a split of the columns,
    ``blocks_per_split`` blocks of logits one after the other.

    Items, their blocks and the steps along D of a block are one flat loop, so that the loads of the next block are
    under way while the logits of this one are folded. ``tl.range(flatten=True)`` is to do just that from three loops,
    but Triton 3.7 fails at what is carried here from block to block.
    """
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    programs = tl.num_programs(0)
    items = tl.cdiv(token_blocks * splits - tl.program_id(0), programs)
    dim_steps = tl.cdiv(hidden_size, BLOCK_D)
    PART_N: tl.constexpr = BLOCK_N // PARTS

    # Of the running item.
    maximum = tl.full([BLOCK_T], NEG_INF, tl.float32)
    sums = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    argmax = tl.zeros([BLOCK_T], tl.int32)
    own = tl.full([BLOCK_T], -1, tl.int32)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)

    # One before the first of each, so that the first step begins everything.
    item = tl.program_id(0) - programs
    block = blocks_per_split - 1
    dim_step = dim_steps - 1
    row_start = 0
    column_start = 0
    split = 0
    for _ in range(items * blocks_per_split * dim_steps):
        dim_step = tl.where(dim_step == dim_steps - 1, 0, dim_step + 1)
        if dim_step == 0:
            block = tl.where(block == blocks_per_split - 1, 0, block + 1)
            if block == 0:
                item += programs
                token_block, split = block_of(item, token_blocks, splits, group)
                row_start = token_block * BLOCK_T
            column_start = (split * blocks_per_split + block) * BLOCK_N
        left, right = block_factors(
            hidden,
            weight,
            row_start,
            column_start,
            dim_step * BLOCK_D,
            tokens,
            columns,
            hidden_size,
            hidden_stride,
            hidden_inner,
            weight_stride,
            weight_inner,
            BLOCK_T,
            BLOCK_N,
            BLOCK_D,
            EVEN_D,
            TMA,
        )
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
        if dim_step == dim_steps - 1:
            rows = row_start + tl.arange(0, BLOCK_T)
            if block == 0:
                own = own_columns(target, target_stride, rows, tokens, columns, vocab_start)
                maximum = tl.full([BLOCK_T], NEG_INF, tl.float32)
                sums = tl.zeros([BLOCK_T], tl.float32)
                weighted = tl.zeros([BLOCK_T], tl.float32)
                total = tl.zeros([BLOCK_T], tl.float32)
                argmax = tl.zeros([BLOCK_T], tl.int32)
            targeted = has_target(own, column_start, BLOCK_N)
            parts = in_parts(acc, BLOCK_T, BLOCK_N, PARTS)
            for part in tl.static_range(PARTS):
                part_start = column_start + part * PART_N
                cols = part_start + tl.arange(0, PART_N)
                z = part_logits(parts[part], bias, part_start, columns, inner, outer, PART_N, CAPPED, HAS_BIAS)
                if STATISTICS:
                    total += tl.sum(tl.where(z == NEG_INF, 0.0, z), 1)
                if targeted:
                    z = without_target(z, cols, own, rows, target_logit, target_logit_stride, part_start, PART_N)
                new_max, new_sums, e, below, factor, by = fold_logits(z, maximum, sums)
                if STATISTICS:
                    weighted, argmax = fold_statistics(z, cols, maximum, sums, weighted, argmax, e, below, factor, by)
                maximum = new_max
                sums = new_sums
            acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            if block == blocks_per_split - 1:
                here = rows < tokens
                size = splits.to(tl.int64) * tokens
                at = split.to(tl.int64) * tokens + rows
                tl.store(partial + at, maximum, mask=here)
                tl.store(partial + size + at, sums, mask=here)
                if STATISTICS:
                    tl.store(partial + 2 * size + at, weighted, mask=here)
                    tl.store(partial + 3 * size + at, total, mask=here)
                    tl.store(partial_argmax + at, argmax, mask=here)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "splits",
        "vocab_start",
        "max_stride",
        "sum_stride",
        "weighted_stride",
        "argmax_stride",
        "total_stride",
    ]
)
def merge_folds_kernel(
    partial,  # [2, S, T] or [4, S, T], see above
    partial_argmax,  # [S, T]
    state_max,
    state_sum,
    state_weighted,
    state_argmax,
    state_total,
    tokens,
    splits,
    vocab_start,
    max_stride,
    sum_stride,
    weighted_stride,
    argmax_stride,
    total_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Merges what the splits found into the state, always in the same order. A few MB at most."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < tokens
    size = splits.to(tl.int64) * tokens
    old_max = tl.load(state_max + rows * max_stride, mask=inside, other=NEG_INF)
    old_sum = tl.load(state_sum + rows * sum_stride, mask=inside, other=0.0)

    new_max = old_max
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = split[:, None].to(tl.int64) * tokens + rows[None, :]
        mask = (split < splits)[:, None] & inside[None, :]
        new_max = tl.maximum(new_max, tl.max(tl.load(partial + at, mask=mask, other=NEG_INF), 0))

    shift = shift_of(new_max)
    factor = tl.exp(old_max - shift)
    new_sum = old_sum * factor
    if STATISTICS:
        old_weighted = tl.load(state_weighted + rows * weighted_stride, mask=inside, other=0.0)
        new_weighted = moved_sum(old_weighted, old_sum, old_max - shift, factor)
        new_total = tl.load(state_total + rows * total_stride, mask=inside, other=0.0)
        first = tl.full([BLOCK_T], LAST_COLUMN, tl.int32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = split[:, None].to(tl.int64) * tokens + rows[None, :]
        mask = (split < splits)[:, None] & inside[None, :]
        part_max = tl.load(partial + at, mask=mask, other=NEG_INF)
        part_sum = tl.load(partial + size + at, mask=mask, other=0.0)
        by = part_max - shift[None, :]
        part_factor = tl.exp(by)
        new_sum += tl.sum(part_sum * part_factor, 0)
        if STATISTICS:
            part_weighted = tl.load(partial + 2 * size + at, mask=mask, other=0.0)
            new_weighted += tl.sum(moved_sum(part_weighted, part_sum, by, part_factor), 0)
            new_total += tl.sum(tl.load(partial + 3 * size + at, mask=mask, other=0.0), 0)
            part_argmax = tl.load(partial_argmax + at, mask=mask, other=LAST_COLUMN)
            first = tl.minimum(first, tl.min(tl.where(part_max == new_max[None, :], part_argmax, LAST_COLUMN), 0))
    tl.store(state_max + rows * max_stride, new_max, mask=inside)
    tl.store(state_sum + rows * sum_stride, new_sum, mask=inside)
    if STATISTICS:
        tl.store(state_weighted + rows * weighted_stride, new_weighted, mask=inside)
        tl.store(state_total + rows * total_stride, new_total, mask=inside)
        argmax = first.to(tl.int64) + vocab_start
        tl.store(state_argmax + rows * argmax_stride, argmax, mask=inside & (new_max > old_max))


@triton.jit
def store_part(out, out_stride, rows, column_start, tokens, columns, part, PART_N: tl.constexpr):
    """Writes PART_N columns of a block, from ``column_start`` on."""
    cols = column_start + tl.arange(0, PART_N)
    at = out + rows[:, None].to(tl.int64) * out_stride + cols[None, :]
    tl.store(at, part.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (cols < columns)[None, :])


@triton.jit(do_not_specialize=[*COUNTS, "lse_stride", "coef_stride"])
def grad_products_kernel(
    hidden,
    weight,
    bias,
    target,
    lse_others,
    coef,
    out,
    tokens,
    columns,
    hidden_size,
    hidden_stride,
    hidden_inner,
    weight_stride,
    weight_inner,
    target_stride,
    lse_stride,
    coef_stride,
    out_stride,
    vocab_start,
    inner,
    outer,
    group,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One block of logits a program: blocks that are skipped would leave holes in a persistent kernel's pipeline."""
    token_block, column_block = block_of(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.cdiv(columns, BLOCK_N), group)
    row_start = token_block * BLOCK_T
    column_start = column_block * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_T)
    row_coef = tl.load(coef + rows.to(tl.int64) * coef_stride, mask=rows < tokens, other=0.0)
    PART_N: tl.constexpr = BLOCK_N // PARTS

    if tl.max((row_coef != 0).to(tl.int32), 0) == 0:
        zeros = tl.zeros([BLOCK_T, PART_N], out.dtype.element_ty)
        for part in tl.static_range(PARTS):
            store_part(out, out_stride, rows, column_start + part * PART_N, tokens, columns, zeros, PART_N)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for d in range(0, hidden_size, BLOCK_D):
            left, right = block_factors(
                hidden,
                weight,
                row_start,
                column_start,
                d,
                tokens,
                columns,
                hidden_size,
                hidden_stride,
                hidden_inner,
                weight_stride,
                weight_inner,
                BLOCK_T,
                BLOCK_N,
                BLOCK_D,
                EVEN_D,
                TMA,
            )
            acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
        lse = tl.load(lse_others + rows.to(tl.int64) * lse_stride, mask=rows < tokens, other=0.0)
        own = own_columns(target, target_stride, rows, tokens, columns, vocab_start)
        parts = in_parts(acc, BLOCK_T, BLOCK_N, PARTS)
        for part in tl.static_range(PARTS):
            cols = column_start + part * PART_N + tl.arange(0, PART_N)
            raw = raw_logits(parts[part], bias, cols, columns, HAS_BIAS)
            gradient = tl.exp(transformed(raw, inner, outer, CAPPED) - shift_of(lse)[:, None]) * -row_coef[:, None]
            if CAPPED:
                gradient *= bend(raw, inner)
            # A token that does not count has no gradient, whatever its logits are.
            nothing = (cols[None, :] == own[:, None]) | (row_coef == 0)[:, None]
            gradient = tl.where(nothing, 0.0, gradient)
            store_part(out, out_stride, rows, column_start + part * PART_N, tokens, columns, gradient, PART_N)


def logprob_forward(
    hidden_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    target_T1: Tensor,
    vocab_start: int,
    state: FoldState,
    transform: LogitTransform,
    config: ProductConfig | None = None,
) -> None:
    """Fold the logits ``hidden @ weight.T + bias`` of columns ``vocab_start`` to ``vocab_start + N`` into ``state``, as
    :meth:`fastd2o.ops.tile_ops.TileOps.fold` does with a tile, without one.

    Args:
        hidden_TD, weight_ND: float32, bfloat16 or float16, the same; fastest with contiguous rows that begin at
            multiples of 16 bytes.
        bias_N: of any floating dtype; -inf marks padding.
        target_T1: int64, columns of the whole vocabulary; those outside this slab are left alone.
        state: float32; its statistics are gathered if it has any.
        config: instead of the table's.

    Raises:
        ValueError: for dtypes or shapes that do not go together.
    """
    check_factors(hidden_TD, weight_ND, bias_N)
    (tokens, hidden_size), columns = hidden_TD.shape, len(weight_ND)
    if tokens == 0 or columns == 0:
        return
    extra = state.statistics
    if config is None:
        config = configs.choose(
            "fold",
            hidden_TD,
            weight_ND,
            (bias_N is None, extra is None, transform.softcap is None),
            lambda one: logprob_forward(
                hidden_TD, weight_ND, bias_N, target_T1, vocab_start, copied(state), transform, one
            ),
        )
    programs = configs.multiprocessors(hidden_TD.device)
    row_bytes, split_bytes = hidden_size * hidden_TD.element_size(), 8 if extra is None else 20
    plan = partition(tokens, columns, row_bytes, programs, config, split_bytes)
    partial = hidden_TD.new_empty((2 if extra is None else 4, plan.splits, tokens), dtype=torch.float32)
    partial_argmax = None if extra is None else hidden_TD.new_empty((plan.splits, tokens), dtype=torch.int32)
    inner, outer, capped = transform_arguments(transform)
    with torch.cuda.device_of(hidden_TD):
        fold_products_kernel[(min(programs, plan.splits * triton.cdiv(tokens, config.block_tokens)),)](
            **factor_arguments(hidden_TD, weight_ND, bias_N, config),
            target=target_T1,
            target_logit=state.target_logit,
            partial=partial,
            partial_argmax=partial_argmax,
            target_stride=target_T1.stride(0),
            target_logit_stride=state.target_logit.stride(0),
            vocab_start=vocab_start,
            inner=inner,
            outer=outer,
            splits=plan.splits,
            blocks_per_split=plan.blocks_per_split,
            group=plan.group,
            CAPPED=capped,
            STATISTICS=extra is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        merge_folds(partial, partial_argmax, state, vocab_start)


def logprob_grad_slab(
    hidden_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    target_T1: Tensor,
    vocab_start: int,
    lse_others_T1: Tensor,
    coef_T1: Tensor,
    out_TN: Tensor,
    transform: LogitTransform,
    config: ProductConfig | None = None,
) -> None:
    """Write ``-coef * bend * softmax over the others`` of a slab's logits, formed again, to ``out_TN``, and 0 to the
    target's column, as :meth:`fastd2o.ops.tile_ops.TileOps.grad` does with a tile, without one.

    Args:
        lse_others_T1, coef_T1: float32.
        out_TN: of any floating dtype, with contiguous rows.

    The rest is as in :func:`logprob_forward`.
    """
    check_factors(hidden_TD, weight_ND, bias_N)
    (tokens, hidden_size), columns = hidden_TD.shape, len(weight_ND)
    if out_TN.shape != (tokens, columns) or (columns > 1 and out_TN.stride(1) != 1):
        raise ValueError(
            f"out has shape {list(out_TN.shape)} and strides {out_TN.stride()}, expected [{tokens}, {columns}] with "
            "contiguous rows"
        )
    if tokens == 0 or columns == 0:
        return
    if config is None:
        config = configs.choose(
            "grad",
            hidden_TD,
            weight_ND,
            (bias_N is None, transform.softcap is None, out_TN.dtype),
            lambda one: logprob_grad_slab(
                hidden_TD,
                weight_ND,
                bias_N,
                target_T1,
                vocab_start,
                lse_others_T1,
                coef_T1,
                torch.empty_like(out_TN),
                transform,
                one,
            ),
        )
    token_blocks, column_blocks = triton.cdiv(tokens, config.block_tokens), triton.cdiv(columns, config.block_columns)
    programs = configs.multiprocessors(hidden_TD.device)
    inner, outer, capped = transform_arguments(transform)
    with torch.cuda.device_of(hidden_TD):
        grad_products_kernel[(token_blocks * column_blocks,)](
            **factor_arguments(hidden_TD, weight_ND, bias_N, config),
            target=target_T1,
            lse_others=lse_others_T1,
            coef=coef_T1,
            out=out_TN,
            target_stride=target_T1.stride(0),
            lse_stride=lse_others_T1.stride(0),
            coef_stride=coef_T1.stride(0),
            out_stride=out_TN.stride(0),
            vocab_start=vocab_start,
            inner=inner,
            outer=outer,
            group=group_of(token_blocks, hidden_size * hidden_TD.element_size(), programs, config),
            CAPPED=capped,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


# ---- what the launchers share ---------------------------------------------------------------------------------------

# Of the L2 cache, for the hidden states of a group: a third of the 50 MB of an H100, two thirds of the half of it that
# is near to a multiprocessor.
_GROUP_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Partition:
    """How T x N logits are dealt out: ``splits`` of the columns with ``blocks_per_split`` blocks each, token blocks in
    groups."""

    splits: int
    blocks_per_split: int
    group: int


def group_of(token_blocks: int, row_bytes: int, programs: int, config: ProductConfig) -> int:
    """How many token blocks share the weight at a time.

    What ``programs`` blocks of logits read anew is least where their hidden states are as much as their weights: a
    square. The hidden states, which are read again for every block of columns, have to stay in L2 besides.
    """
    square = math.sqrt(programs * config.block_columns / config.block_tokens)
    fitting = _GROUP_BYTES // (config.block_tokens * row_bytes)
    return max(1, min(token_blocks, fitting, 2 ** int(math.log2(square))))


@lru_cache(maxsize=1024)
def partition(
    tokens: int, columns: int, row_bytes: int, programs: int, config: ProductConfig, split_bytes: int = 8
) -> Partition:
    """The splits that finish first when ``programs`` take item after item; of equals, the fewest. No more than leave
    ``PARTIAL_BYTES`` to be merged, ``split_bytes`` for each token.

    A function of shapes and of the device alone: the same bits on every run.
    """
    token_blocks, column_blocks = -(-tokens // config.block_tokens), -(-columns // config.block_columns)
    group = group_of(token_blocks, row_bytes, programs, config)
    most = min(column_blocks, max(1, PARTIAL_BYTES // (tokens * split_bytes)))
    least = min(most, -(-programs // group) if token_blocks <= group else max(1, programs // group))

    def blocks_in_line(splits: int) -> int:
        return -(-token_blocks * splits // programs) * -(-column_blocks // splits)

    splits = min(range(least, min(most, 4 * least) + 1), key=lambda count: (blocks_in_line(count), count))
    blocks_per_split = -(-column_blocks // splits)
    return Partition(-(-column_blocks // blocks_per_split), blocks_per_split, group)


def check_factors(hidden_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> None:
    """Refuse what the kernels would misread.

    Raises:
        ValueError: the message says what.
    """
    if hidden_TD.dtype != weight_ND.dtype or hidden_TD.dtype not in configs.DTYPES:
        raise ValueError(
            f"hidden is {hidden_TD.dtype} and weight {weight_ND.dtype}, expected both in float32, bfloat16 or float16"
        )
    if hidden_TD.shape[1:] != weight_ND.shape[1:] or (bias_N is not None and bias_N.shape != weight_ND.shape[:1]):
        bias = "" if bias_N is None else f" and bias {list(bias_N.shape)}"
        raise ValueError(
            f"hidden has shape {list(hidden_TD.shape)}, weight {list(weight_ND.shape)}{bias}, expected [T, D], [N, D] "
            "and [N]"
        )


def factor_arguments(
    hidden_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, config: ProductConfig
) -> dict[str, Any]:
    """What every kernel that multiplies is told of its factors."""
    precision = configs.precision(hidden_TD.dtype)
    tma = (
        configs.has_tma(hidden_TD.device, hidden_TD.dtype, precision)
        and configs.fits_tma(hidden_TD)
        and configs.fits_tma(weight_ND)
    )
    hidden_size = hidden_TD.shape[1]
    hidden: Any = hidden_TD
    weight: Any = weight_ND
    if tma:
        hidden = TensorDescriptor.from_tensor(hidden_TD, [config.block_tokens, config.block_hidden])
        weight = TensorDescriptor.from_tensor(weight_ND, [config.block_columns, config.block_hidden])
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": None if bias_N is None else bias_N.contiguous(),
        "tokens": len(hidden_TD),
        "columns": len(weight_ND),
        "hidden_size": hidden_size,
        "hidden_stride": hidden_TD.stride(0),
        "hidden_inner": hidden_TD.stride(1),
        "weight_stride": weight_ND.stride(0),
        "weight_inner": weight_ND.stride(1),
        "BLOCK_T": config.block_tokens,
        "BLOCK_N": config.block_columns,
        "BLOCK_D": config.block_hidden,
        "PARTS": config.parts,
        # A descriptor reads zeros beyond the end.
        "EVEN_D": tma or hidden_size % config.block_hidden == 0,
        "TMA": tma,
        "PRECISION": precision,
        "HAS_BIAS": bias_N is not None,
    }


def merge_folds(partial: Tensor, partial_argmax: Tensor | None, state: FoldState, vocab_start: int) -> None:
    """Launch the merge of what the splits found into ``state``."""
    splits, tokens = partial.shape[1:]
    block_tokens = 64
    extra = state.statistics
    merge_folds_kernel[(triton.cdiv(tokens, block_tokens),)](
        partial,
        partial_argmax,
        state.max,
        state.sum,
        None if extra is None else extra.weighted,
        None if extra is None else extra.argmax,
        None if extra is None else extra.total,
        tokens,
        splits,
        vocab_start,
        state.max.stride(0),
        state.sum.stride(0),
        0 if extra is None else extra.weighted.stride(0),
        0 if extra is None else extra.argmax.stride(0),
        0 if extra is None else extra.total.stride(0),
        BLOCK_S=16,
        BLOCK_T=block_tokens,
        STATISTICS=extra is not None,
        num_warps=4,
    )


def copied(state: FoldState) -> FoldState:
    """The same in memory of its own."""
    extra = state.statistics
    if extra is not None:
        extra = StatisticsState(extra.weighted.clone(), extra.argmax.clone(), extra.total.clone())
    return FoldState(state.max.clone(), state.sum.clone(), state.target_logit.clone(), extra)
