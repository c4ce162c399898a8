"""The arithmetic of a single logit, in float32, for all kernels: ``csrc/online_softmax.h`` in Triton.

A column whose raw logit is -inf is padding: it becomes z = -inf whatever the transform, and z = -inf adds nothing
anywhere. NaN passes through the exponentials, so that sums carry it even where a maximum does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastd2o.ops.tile_ops import LogitTransform

NEG_INF = tl.constexpr(float("-inf"))
LOW_WORD = tl.constexpr(2**32 - 1)
_RANK_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def tanh(x):
    """Without the vendor's library, which neither the interpreter nor every target has. Below 1/4 the quotient would
    cancel; the series' next term is 1e-8 of its sum there."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


def transform_arguments(transform: LogitTransform) -> tuple[float, float, bool]:
    """``inner``, ``outer`` and ``CAPPED`` of :func:`transformed`."""
    if transform.softcap is None:
        return transform.slope, 1.0, False
    return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature, True


@triton.jit
def transformed(raw, inner, outer, CAPPED: tl.constexpr):
    """z = softcap(logit_scale * u) / temperature of raw logits u: outer * tanh(inner * u), or inner * u without a
    softcap."""
    z = raw * inner
    if CAPPED:
        z = outer * tanh(z)
    return tl.where(raw == NEG_INF, raw, z)


@triton.jit
def bend(raw, inner):
    """The factor 1 - tanh² = 1 / cosh² of dz/du under a softcap; formed from exp(-2|x|), it neither cancels where the
    cap saturates nor overflows."""
    e = tl.exp(-2 * tl.abs(raw * inner))
    half_cosh = 1 + e
    return 4 * e / (half_cosh * half_cosh)


@triton.jit
def shift_of(maximum):
    """What to subtract before exponentials are taken: while everything so far is -inf, subtracting that would make NaN
    of it."""
    return tl.where(maximum == NEG_INF, 0.0, maximum)


@triton.jit
def moved_sum(weighted, sum_exp, moved_by, factor):
    """``sum exp(z - max) (z - max)`` relative to another maximum, whose exponential is ``factor`` times the old one's.

    0 * -inf is the 0 it tends to, also where what counts for nothing any more has overflowed.
    """
    moved = weighted + tl.where(sum_exp > 0, sum_exp * moved_by, 0.0)
    return tl.where(factor == 0, 0.0, moved * factor)


@triton.jit
def rank_of(z):
    """A logit's bits as an int32 that is larger for a larger logit; above them all is NaN, so that it is seen. There is
    one NaN, and one zero."""
    z = tl.where(z == 0, 0.0, z)
    bits = tl.where(z != z, _RANK_NAN, z.to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def logit_of(rank):
    """The logit of a :func:`rank_of`."""
    return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(tl.float32, bitcast=True)


@triton.jit
def key_of(rank, column):
    """A :func:`rank_of` and a column as one int64: larger for a larger logit and, of equal ones, for the smaller
    column. Columns are below 2^32."""
    return (rank.to(tl.int64) << 32) | (column.to(tl.int64) ^ LOW_WORD)


@triton.jit
def rank_key(z, column):
    """The same of a logit."""
    return key_of(rank_of(z), column)


@triton.jit
def key_logit(key):
    """The logit of a :func:`key_of`."""
    return logit_of((key >> 32).to(tl.int32))


@triton.jit
def key_column(key):
    """The column of a :func:`key_of`."""
    return (key & LOW_WORD) ^ LOW_WORD
