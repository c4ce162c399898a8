"""Cringe's backward: two columns of the head per token carry a gradient, that of the negative and that of the positive.

Contract
  of sum_t coef_t (z_t[target_t] - z_t[positive_t]) with respect to hidden, weight and bias
  coef              [T] float32; a token whose coef is exactly 0 touches nothing, nor does a column outside [0, V)
  hidden            [T, D] float32, bfloat16 or float16, the dtype of the products
  weight, bias      [V, D], [V], any of the three dtypes; a row of the weight is rounded to hidden's dtype first
  target, positive  [T] int64
  dhidden           [T, D] float32
  dweight, dbias    [V, D], [V] in the dtypes of weight and bias, summed in float32 and rounded once
FLOPs  4 T·D for dhidden, 4 more with a softcap (two logits are formed again), 4 T·D for dweight
Bytes  two rows of the weight read and one of dhidden written per token; a row of hidden read per edge, dweight's zeros
       written, and over them the rows that were touched: with V above T the zeros, V·D, are most of all
Share of the limit, the speed of memory: not measured yet

dweight without atomics, so that two runs give the same bits: 2 T *edges* from tokens to columns are sorted by column,
stably. A program that stands on the first edge of its column sums all of that column, in a fixed order; all other
programs have nothing to do. No host needs to know how many columns there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastd2o.kernels.scalar import bend, transform_arguments
from fastd2o.ops.tile_ops import LogitTransform


@dataclass(frozen=True)
class CringeConfig:
    """Hidden dimensions that a program works on at once, and edges that it sums in one step, powers of two."""

    block_hidden: int
    edges: int
    num_warps: int


def hidden_config(hidden_size: int) -> CringeConfig:
    """A program for a token, which goes through its dimensions, four a thread: 16 bytes of dhidden."""
    block = _block(hidden_size)
    return CringeConfig(block_hidden=block, edges=1, num_warps=block // 128)


def weight_config(hidden_size: int) -> CringeConfig:
    """Most columns have one edge, a frequent token's hundreds: four at a time hide most of the way to memory. Eight
    dimensions a thread, 16 bytes of 16-bit numbers: then no two threads share one."""
    block = _block(hidden_size)
    return CringeConfig(block_hidden=block, edges=4, num_warps=block // 256)


def _block(hidden_size: int) -> int:
    return 1024 if hidden_size > 512 else 512


@dataclass(frozen=True)
class Edges:
    """E edges from tokens to the columns that they move: edge e is of token ``e % T``.

    Attributes:
        column_E: int32, V where the edge carries nothing.
        coef_E: float32, of ``dL/du`` there.
    """

    column_E: Tensor
    coef_E: Tensor


def cringe_backward(
    coef_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    positive_T: Tensor,
    transform: LogitTransform,
    *,
    detach_positive: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum_t coef_t (z_t[target_t] - z_t[positive_t])``.

    What ``fastd2o.ops.engine.cringe_backward`` gives, without waiting for the device.

    Args:
        detach_positive: take none through the positive's logit.
        need_hidden, need_weight, need_bias: the others are None.
    """
    need_bias = need_bias and bias_V is not None
    dhidden_TD, edges = hidden_gradient(
        coef_T,
        hidden_TD,
        weight_VD,
        bias_V,
        target_T,
        None if detach_positive else positive_T,
        transform,
        need_hidden=need_hidden,
        need_edges=need_weight or need_bias,
    )
    dweight_VD = dbias_V = None
    if edges is not None:
        dweight_VD, dbias_V = weight_gradient(
            edges, hidden_TD, weight_VD, bias_V, need_weight=need_weight, need_bias=need_bias
        )
    return dhidden_TD, dweight_VD, dbias_V


def hidden_gradient(
    coef_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    positive_T: Tensor | None,
    transform: LogitTransform,
    *,
    need_hidden: bool = True,
    need_edges: bool = True,
    config: CringeConfig | None = None,
) -> tuple[Tensor | None, Edges | None]:
    """``dhidden [T, D]`` float32, and the edges that :func:`weight_gradient` sums: those of the targets, then those of
    the positives where these are given."""
    tokens, hidden_size = hidden_TD.shape
    device = hidden_TD.device
    dhidden_TD = torch.empty((tokens, hidden_size), dtype=torch.float32, device=device) if need_hidden else None
    number = tokens * (1 if positive_T is None else 2)
    edges = None
    if need_edges:
        column_E = torch.empty(number, dtype=torch.int32, device=device)
        edges = Edges(column_E, torch.empty(number, dtype=torch.float32, device=device))
    if tokens == 0 or not (need_hidden or need_edges):
        return dhidden_TD, edges
    config = config or hidden_config(hidden_size)
    inner, _, capped = transform_arguments(transform)
    # Pointers that the kernel does not touch, where there is no such tensor.
    positive = target_T if positive_T is None else positive_T
    bias = coef_T if bias_V is None else bias_V
    dhidden = coef_T if dhidden_TD is None else dhidden_TD
    with torch.cuda.device_of(hidden_TD):
        hidden_kernel[(tokens,)](
            coef_T,
            coef_T.stride(0),
            hidden_TD,
            hidden_TD.stride(0),
            hidden_TD.stride(1),
            weight_VD,
            weight_VD.stride(0),
            weight_VD.stride(1),
            bias,
            bias.stride(0),
            target_T,
            target_T.stride(0),
            positive,
            positive.stride(0),
            dhidden,
            coef_T if edges is None else edges.column_E,
            coef_T if edges is None else edges.coef_E,
            tokens,
            weight_VD.shape[0],
            hidden_size,
            transform.slope,
            inner,
            CAPPED=capped,
            BIAS=bias_V is not None,
            POSITIVE=positive_T is not None,
            HIDDEN=need_hidden,
            EDGES=need_edges,
            BLOCK_D=config.block_hidden,
            num_warps=config.num_warps,
        )
    return dhidden_TD, edges


def weight_gradient(
    edges: Edges,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    need_weight: bool = True,
    need_bias: bool = True,
    config: CringeConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``dweight [V, D]`` and ``dbias [V]``: the edges of every column times their tokens' hidden states, summed."""
    tokens, hidden_size = hidden_TD.shape
    number = len(edges.column_E)
    dweight_VD = torch.zeros_like(weight_VD, memory_format=torch.contiguous_format) if need_weight else None
    dbias_V = torch.zeros_like(bias_V) if need_bias and bias_V is not None else None
    if number == 0 or (dweight_VD is None and dbias_V is None):
        return dweight_VD, dbias_V
    column_E, order_E = edges.column_E.sort(stable=True)
    config = config or weight_config(hidden_size)
    blocks = 1 if dweight_VD is None else triton.cdiv(hidden_size, config.block_hidden)
    with torch.cuda.device_of(hidden_TD):
        weight_kernel[(number, blocks)](
            column_E,
            order_E,
            edges.coef_E,
            hidden_TD,
            hidden_TD.stride(0),
            hidden_TD.stride(1),
            edges.coef_E if dweight_VD is None else dweight_VD,
            edges.coef_E if dbias_V is None else dbias_V,
            number,
            tokens,
            weight_VD.shape[0],
            hidden_size,
            WEIGHT=dweight_VD is not None,
            BIAS=dbias_V is not None,
            EDGES=config.edges,
            BLOCK_D=config.block_hidden,
            num_warps=config.num_warps,
        )
    return dweight_VD, dbias_V


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def rounded(row, LIKE: tl.constexpr):
    """Part of a row of the weight in float32, rounded to the dtype of the products."""
    return row.to(LIKE).to(tl.float32)


@triton.jit(
    do_not_specialize=["coef_stride", "bias_stride", "target_stride", "positive_stride", "tokens", "vocab_size"]
)
def hidden_kernel(
    coef,
    coef_stride,
    hidden,
    hidden_stride,
    hidden_step,
    weight,
    weight_stride,
    weight_step,
    bias,
    bias_stride,
    target,
    target_stride,
    positive,
    positive_stride,
    dhidden,
    edge_column,
    edge_coef,
    tokens,
    vocab_size,
    hidden_size,
    slope,
    inner,
    CAPPED: tl.constexpr,
    BIAS: tl.constexpr,
    POSITIVE: tl.constexpr,
    HIDDEN: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token. A row of the weight that carries nothing is not read."""
    token = tl.program_id(0).to(tl.int64)
    product: tl.constexpr = hidden.dtype.element_ty
    hidden += token * hidden_stride
    given = tl.load(coef + token * coef_stride).to(tl.float32)
    target_column = tl.load(target + token * target_stride)
    target_used = (target_column >= 0) & (target_column < vocab_size) & (given != 0)
    target_row = weight + target_column * weight_stride
    # Without a positive, all that is computed for one comes to nothing, and the compiler leaves it out.
    positive_column = target_column
    positive_used = target_used
    if POSITIVE:
        positive_column = tl.load(positive + token * positive_stride)
        positive_used = (positive_column >= 0) & (positive_column < vocab_size) & (given != 0)
    positive_row = weight + positive_column * weight_stride
    target_coef = slope * given
    positive_coef = -slope * given
    lane = tl.arange(0, BLOCK_D).to(tl.int64)

    if CAPPED:
        target_dot = tl.zeros([BLOCK_D], tl.float32)
        positive_dot = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, hidden_size, BLOCK_D):
            dim = start + lane
            there = dim < hidden_size
            h = tl.load(hidden + dim * hidden_step, mask=there, other=0.0).to(tl.float32)
            w = tl.load(target_row + dim * weight_step, mask=there & target_used, other=0.0)
            target_dot += h * rounded(w, product)
            if POSITIVE:
                w = tl.load(positive_row + dim * weight_step, mask=there & positive_used, other=0.0)
                positive_dot += h * rounded(w, product)
        target_raw = tl.sum(target_dot, axis=0)
        positive_raw = tl.sum(positive_dot, axis=0)
        if BIAS:
            target_raw += tl.load(bias + target_column * bias_stride, mask=target_used, other=0.0).to(tl.float32)
            positive_raw += tl.load(bias + positive_column * bias_stride, mask=positive_used, other=0.0).to(tl.float32)
        target_coef *= bend(target_raw, inner)
        positive_coef *= bend(positive_raw, inner)
    target_coef = tl.where(target_used, target_coef, 0.0)
    positive_coef = tl.where(positive_used, positive_coef, 0.0)

    if HIDDEN:
        dhidden += token * hidden_size
        for start in range(0, hidden_size, BLOCK_D):
            dim = start + lane
            there = dim < hidden_size
            w = tl.load(target_row + dim * weight_step, mask=there & target_used, other=0.0)
            gradient = target_coef * rounded(w, product)
            if POSITIVE:
                w = tl.load(positive_row + dim * weight_step, mask=there & positive_used, other=0.0)
                gradient += positive_coef * rounded(w, product)
            tl.store(dhidden + dim, gradient, mask=there)
    if EDGES:
        carries = target_used & (target_coef != 0)
        tl.store(edge_column + token, tl.where(carries, target_column, vocab_size).to(tl.int32))
        tl.store(edge_coef + token, target_coef)
        if POSITIVE:
            carries = positive_used & (positive_coef != 0)
            tl.store(edge_column + tokens + token, tl.where(carries, positive_column, vocab_size).to(tl.int32))
            tl.store(edge_coef + tokens + token, positive_coef)


@triton.jit(do_not_specialize=["number", "tokens", "vocab_size"])
def weight_kernel(
    edge_column,
    edge_order,
    edge_coef,
    hidden,
    hidden_stride,
    hidden_step,
    dweight,
    dbias,
    number,
    tokens,
    vocab_size,
    hidden_size,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D dimensions of the column whose first edge this is, of edges sorted by column; ``edge_order`` tells where
    they were, which is where their coefficients still are."""
    position = tl.program_id(0)
    column = tl.load(edge_column + position)
    before = tl.load(edge_column + position - 1, mask=position > 0, other=-1)
    if (column != before) & (column < vocab_size):
        dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
        there = dim < hidden_size
        step = tl.arange(0, EDGES)
        sums = tl.zeros([BLOCK_D], tl.float32)
        bias_sum = 0.0
        more = 1
        while more > 0:
            edge = position + step
            same = tl.load(edge_column + edge, mask=edge < number, other=-1) == column
            origin = tl.load(edge_order + edge, mask=same, other=0)
            factor = tl.load(edge_coef + origin, mask=same, other=0.0)
            if BIAS:
                bias_sum += tl.sum(factor, axis=0)
            if WEIGHT:
                token = tl.where(origin >= tokens, origin - tokens, origin)
                rows = tl.load(
                    hidden + token[:, None] * hidden_stride + dim[None, :] * hidden_step,
                    mask=same[:, None] & there[None, :],
                    other=0.0,
                ).to(tl.float32)
                sums += tl.sum(factor[:, None] * rows, axis=0)
            position += EDGES
            more = tl.min(same.to(tl.int32), axis=0)  # edges of a column stand together
        if WEIGHT:
            out = dweight + column.to(tl.int64) * hidden_size + dim
            tl.store(out, sums.to(dweight.dtype.element_ty), mask=there)
        if BIAS:
            tl.store(dbias + column, bias_sum.to(dbias.dtype.element_ty), mask=tl.program_id(1) == 0)
