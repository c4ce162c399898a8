# cringe_forward: the product with the head, its fold, and the k largest logits of every token, in one pass.
#
# Contract (exactly: TileOps.fold and TileOps.topk in fastd2o/ops/tile_ops.py, with the product inside)
#   hidden         [T, D], weight [N, D] float32, bfloat16 or float16, the same; bias [N] or none, any float dtype
#   state          max, sum, target_logit [T, 1], from "all columns before" to "all columns up to here"
#   values, index  [T, k] float32 and int64, k <= 64, likewise. Of equal logits the smaller column stays, NaN is larger
#                  than all, -inf never enters, the target's column neither: what stays does not depend on how the
#                  columns were cut.
# FLOPs  2 T·D·N, and about 12 a logit. A newcomer among the k costs its block about 10 a logit.
# Bytes  as in logprob.py; the candidates of each split, 8 K T S bytes with K the next power of two of k, written and
#        read once
# Share of the limit, the rate of the bare product: not measured yet
#
# Threshold first, as in csrc/cuda/topk.cuh: whether a block has a newcomer for any token is told by its row maxima,
# which the fold needs anyhow. Only then its logits are looked at again, one pass for the largest newcomer of every
# token, until no token has one. In logits in random order, of which a split has n, a token meets k (1 + ln(n / k)) of
# them, most in the first block; since a pass serves all tokens of a block, a few passes a block remain.
#
# The candidates are 64-bit keys in registers, in no order: a newcomer takes the place of the smallest.
"""Cringe's pass over the vocabulary (:func:`cringe_forward`).

Shapes: T tokens, D hidden size, N columns of one slab of the vocabulary, or of all of it, S splits of these columns, K
the candidates' number as the next power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastd2o.kernels import configs
from fastd2o.kernels.configs import ProductConfig
from fastd2o.kernels.logprob import (
    COUNTS,
    LAST_COLUMN,
    block_factors,
    block_of,
    check_factors,
    copied,
    factor_arguments,
    fold_logits,
    has_target,
    in_parts,
    merge_folds,
    own_columns,
    part_logits,
    partition,
    without_target,
)
from fastd2o.kernels.scalar import NEG_INF, key_column, key_of, logit_of, rank_key, rank_of, transform_arguments
from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState

# Of rank_of: that of -inf, and below them all nothing.
_RANK_NEG_INF = tl.constexpr(-2139095041)
_RANK_NOTHING = tl.constexpr(-(2**31))
# Candidates that a program merges, of all its tokens.
MERGED_KEYS = 256

# Keys of empty places, each its own, and of places beyond the k-th, which are never the smallest.
_KEY_EMPTY = tl.constexpr(-(2**63))
_KEY_FULL = tl.constexpr(2**63 - 1)


@triton.jit
def logit_or_nothing(rank):
    """The logit of a rank; -inf of nothing."""
    return tl.where(rank == _RANK_NOTHING, NEG_INF, logit_of(rank))


@triton.jit
def take_in(z, column_start, vocab_start, keys, PART_N: tl.constexpr):
    """The keys with those of PART_N columns of logits that are larger than the smallest of them, and that one's
    logit."""
    cols = column_start + tl.arange(0, PART_N)
    rank = rank_of(z)
    best = tl.max(rank, 1)
    smallest = tl.min(keys, 1)
    enters = best > tl.maximum((smallest >> 32).to(tl.int32), _RANK_NEG_INF)
    while tl.max(enters.to(tl.int32), 0) != 0:
        column = tl.min(tl.where(rank == best[:, None], cols[None, :], LAST_COLUMN), 1)
        newcomer = key_of(best, column.to(tl.int64) + vocab_start)
        keys = tl.where(enters[:, None] & (keys == smallest[:, None]), newcomer[:, None], keys)
        rank = tl.where(cols[None, :] == column[:, None], _RANK_NOTHING, rank)
        best = tl.max(rank, 1)
        smallest = tl.min(keys, 1)
        enters = best > tl.maximum((smallest >> 32).to(tl.int32), _RANK_NEG_INF)
    return keys, logit_or_nothing((smallest >> 32).to(tl.int32))


@triton.jit(do_not_specialize=[*COUNTS, "target_logit_stride", "k"])
def cringe_products_kernel(
    hidden,
    weight,
    bias,
    target,
    target_logit,
    partial,  # [2, S, T] maximum and sum
    partial_keys,  # [S, T, K]
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
    k,
    K: tl.constexpr,
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
    """Persistent, over the items of ``fold_products_kernel``. Only the loop along D is pipelined: Triton pipelines no
    loop around a ``while``, which taking in newcomers needs."""
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    slots = tl.arange(0, K)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for item in range(tl.program_id(0), token_blocks * splits, tl.num_programs(0)):
        token_block, split = block_of(item, token_blocks, splits, group)
        row_start = token_block * BLOCK_T
        rows = row_start + tl.arange(0, BLOCK_T)
        own = own_columns(target, target_stride, rows, tokens, columns, vocab_start)
        maximum = tl.full([BLOCK_T], NEG_INF, tl.float32)
        sums = tl.zeros([BLOCK_T], tl.float32)
        # The smallest of the k, which a newcomer has to be above.
        bar = tl.full([BLOCK_T], NEG_INF, tl.float32)
        keys = tl.where((slots < k)[None, :], slots[None, :].to(tl.int64) + _KEY_EMPTY, _KEY_FULL)
        keys = tl.broadcast_to(keys, [BLOCK_T, K])
        for block in range(blocks_per_split):
            column_start = (split * blocks_per_split + block) * BLOCK_N
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
            targeted = has_target(own, column_start, BLOCK_N)
            parts = in_parts(acc, BLOCK_T, BLOCK_N, PARTS)
            for part in tl.static_range(PARTS):
                part_start = column_start + part * PART_N
                cols = part_start + tl.arange(0, PART_N)
                z = part_logits(parts[part], bias, part_start, columns, inner, outer, PART_N, CAPPED, HAS_BIAS)
                if targeted:
                    z = without_target(z, cols, own, rows, target_logit, target_logit_stride, part_start, PART_N)
                part_max = tl.max(z, 1)
                maximum, sums, _, _, _, _ = fold_logits(z, maximum, sums)
                # A maximum may pass over NaN; a sum does not.
                newcomers = (rows < tokens) & ((part_max > bar) | (sums != sums))
                if tl.max(newcomers.to(tl.int32), 0) != 0:
                    keys, bar = take_in(z, part_start, vocab_start, keys, PART_N)
        inside = rows < tokens
        at = split.to(tl.int64) * tokens + rows
        tl.store(partial + at, maximum, mask=inside)
        tl.store(partial + splits.to(tl.int64) * tokens + at, sums, mask=inside)
        keys = tl.where((slots < k)[None, :], keys, _KEY_EMPTY)
        tl.store(partial_keys + at[:, None] * K + slots[None, :], keys, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "splits", "k", "values_stride", "index_stride"])
def merge_candidates_kernel(
    partial_keys,  # [S, T, K]
    values,
    index,
    tokens,
    splits,
    k,
    values_stride,
    index_stride,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The k largest of the state's candidates and those of every split, sorted.

    Of K keys that descend and K that ascend, the larger one in each place is one of the K largest of all.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, K)
    inside = (rows < tokens)[:, None] & (slots < k)[None, :]
    values_at = values + rows[:, None] * values_stride + slots[None, :]
    index_at = index + rows[:, None] * index_stride + slots[None, :]
    value = tl.load(values_at, mask=inside, other=NEG_INF)
    keys = rank_key(value, tl.load(index_at, mask=inside, other=0))
    keys = tl.sort(tl.where(value == NEG_INF, _KEY_EMPTY, keys), descending=True)
    for split in range(splits):
        at = (tl.cast(split, tl.int64) * tokens + rows)[:, None] * K + slots[None, :]
        found = tl.load(partial_keys + at, mask=(rows < tokens)[:, None], other=_KEY_EMPTY)
        keys = tl.sort(tl.maximum(keys, tl.sort(found, descending=False)), descending=True)
    rank = (keys >> 32).to(tl.int32)
    tl.store(values_at, logit_or_nothing(rank), mask=inside)
    tl.store(index_at, tl.where(rank == _RANK_NOTHING, 0, key_column(keys)), mask=inside)


def cringe_forward(
    hidden_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    target_T1: Tensor,
    vocab_start: int,
    state: FoldState,
    top: TopKState,
    transform: LogitTransform,
    config: ProductConfig | None = None,
) -> None:
    """Fold the logits ``hidden @ weight.T + bias`` of columns ``vocab_start`` to ``vocab_start + N`` into ``state``,
    and merge the largest of them into ``top``, largest first: :func:`fastd2o.kernels.logprob.logprob_forward` and
    :meth:`fastd2o.ops.tile_ops.TileOps.topk` in one pass.

    Args:
        top: float32 values and int64 columns, each token's contiguous; k up to 64.
        state: without statistics.

    The rest is as in :func:`fastd2o.kernels.logprob.logprob_forward`.

    Raises:
        ValueError: for dtypes or shapes that do not go together.
    """
    check_factors(hidden_TD, weight_ND, bias_N)
    (tokens, hidden_size), columns, k = hidden_TD.shape, len(weight_ND), top.values.shape[1]
    if not 1 <= k <= configs.MAX_CANDIDATES:
        raise ValueError(f"k={k}, expected 1 to {configs.MAX_CANDIDATES}")
    if k > 1 and (top.values.stride(1), top.index.stride(1)) != (1, 1):
        raise ValueError(f"the candidates of a token are not contiguous: strides {top.values.stride()}")
    if state.statistics is not None:
        raise ValueError("cringe_forward gathers no statistics")
    if tokens == 0 or columns == 0:
        return
    if config is None:
        config = configs.choose(
            "cringe" if k <= 16 else "cringe_wide",
            hidden_TD,
            weight_ND,
            (bias_N is None, transform.softcap is None, k),
            lambda one: cringe_forward(
                hidden_TD,
                weight_ND,
                bias_N,
                target_T1,
                vocab_start,
                copied(state),
                TopKState(top.values.clone(), top.index.clone()),
                transform,
                one,
            ),
        )
    programs = configs.multiprocessors(hidden_TD.device)
    places = max(2, triton.next_power_of_2(k))
    row_bytes = hidden_size * hidden_TD.element_size()
    plan = partition(tokens, columns, row_bytes, programs, config, split_bytes=8 + 8 * places)
    partial = hidden_TD.new_empty((2, plan.splits, tokens), dtype=torch.float32)
    partial_keys = hidden_TD.new_empty((plan.splits, tokens, places), dtype=torch.int64)
    inner, outer, capped = transform_arguments(transform)
    merge_rows = MERGED_KEYS // places
    with torch.cuda.device_of(hidden_TD):
        cringe_products_kernel[(min(programs, plan.splits * triton.cdiv(tokens, config.block_tokens)),)](
            **factor_arguments(hidden_TD, weight_ND, bias_N, config),
            target=target_T1,
            target_logit=state.target_logit,
            partial=partial,
            partial_keys=partial_keys,
            target_stride=target_T1.stride(0),
            target_logit_stride=state.target_logit.stride(0),
            vocab_start=vocab_start,
            inner=inner,
            outer=outer,
            splits=plan.splits,
            blocks_per_split=plan.blocks_per_split,
            group=plan.group,
            k=k,
            K=places,
            CAPPED=capped,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        merge_folds(partial, None, state, vocab_start)
        merge_candidates_kernel[(triton.cdiv(tokens, merge_rows),)](
            partial_keys,
            top.values,
            top.index,
            tokens,
            plan.splits,
            k,
            top.values.stride(0),
            top.index.stride(0),
            K=places,
            BLOCK_T=merge_rows,
            num_warps=4,
        )
