"""The arithmetic of a single logit, in float32, for all kernels: ``csrc/online_softmax.h`` in Triton.

A column whose raw logit is -inf is padding: it becomes z = -inf whatever the transform, and z = -inf adds nothing
anywhere. NaN passes through the exponentials, so that sums carry it even where a maximum does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def tanh(x):
    """Without the vendor's library, which neither the interpreter nor every target has. Below 1/4 the quotient would
    cancel; the series' next term is 1e-8 of its sum there."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


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
