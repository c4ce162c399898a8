"""Losses that learn from negatives alone: gradient ascent, NPO, SimNPO, unlikelihood. (KTO has a module of its own.)"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce
from fastd2o.losses.tokens import TokenSide, cross_entropy_side, reduce_tokens


def gradient_ascent_loss(negative_logp: Tensor, *, reduction: str = "mean") -> Tensor:
    """Minimise the negative's log-probability itself: ``L = lp(y_l)``.

    Unbounded below, so the model breaks if it is let run: the baseline that the others are compared with (Jang et al.
    2022, arXiv 2210.01504).

    Args:
        negative_logp: [G], any shape, floating point, summed over the completion's tokens.
        reduction: ``"mean"`` over negatives, ``"sum"``, or ``"none"`` for one loss per negative.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: an unknown ``reduction``.
        TypeError: a log-probability that is not floating point.
    """
    (negative,) = checks.logprobs(negative_logp=negative_logp)
    return reduce(negative, reduction)


def npo_loss(negative_logp: Tensor, *, ref_negative_logp: Tensor, beta: float = 0.1, reduction: str = "mean") -> Tensor:
    """Negative Preference Optimization: gradient ascent that fades once the negative is rarer than under the reference.

    ``L = −(2/β) log σ(−β r(y_l))``, ``r = lp − lp_ref``; Zhang et al. 2024, arXiv 2404.05868, Eq. 3. At r = 0 its value
    is :func:`npo_offset`; log the value less that. It tends to gradient ascent as β → 0.

    Args:
        negative_logp: [G], or any shape that broadcasts, floating point, summed over the completion's tokens.
        ref_negative_logp: [G] under the reference, a constant: no gradient flows into it.
        beta: β > 0. Paper and default: 0.1.
        reduction: ``"mean"`` over negatives, ``"sum"``, or ``"none"`` for one loss per negative.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that do not broadcast or differ in their number of dimensions, ``beta`` not above 0, an
            unknown ``reduction``.
        TypeError: a log-probability that is not floating point.
    """
    checks.positive(beta=beta)
    negative, ref_negative = checks.logprobs(negative_logp=negative_logp, ref_negative_logp=ref_negative_logp)
    checks.same_rank(negative_logp=negative, ref_negative_logp=ref_negative)
    return reduce(-(2 / beta) * F.logsigmoid(-beta * (negative - ref_negative.detach())), reduction)


def npo_offset(beta: float) -> float:
    """Return ``(2/β) ln 2``, the value of :func:`npo_loss` when the policy is the reference."""
    checks.positive(beta=beta)
    return 2 / beta * math.log(2)


def simnpo_loss(
    negative_logp: Tensor,
    *,
    negative_length: Tensor,
    beta: float = 2.5,
    delta: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """NPO without a reference, on the mean log-probability per token.

    ``L = −(2/β) log σ(−(β/|y_l|) lp(y_l) − β δ)``; Fan et al. 2024, arXiv 2410.07163, whose margin γ is ``β δ`` here.

    Args:
        negative_logp: [G], or any shape that broadcasts, floating point, summed over the completion's tokens.
        negative_length: [G] completion tokens, at least 1.
        beta: β > 0. Default 2.5, of the order that per-token means ask for (NPO's 0.1 is made for sums).
        delta: δ, finite. Default 0.
        reduction: ``"mean"`` over negatives, ``"sum"``, or ``"none"`` for one loss per negative.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that do not broadcast or differ in their number of dimensions, a length of 0 (read on the CPU
            only), a number out of its range, an unknown ``reduction``.
        TypeError: a log-probability that is not floating point.
    """
    checks.positive(beta=beta)
    checks.finite(delta=delta)
    (negative,) = checks.logprobs(negative_logp=negative_logp)
    mean_logp = negative / checks.lengths("negative_length", negative_length, like=negative)
    return reduce(-(2 / beta) * F.logsigmoid(-beta * (mean_logp + delta)), reduction)


def unlikelihood_loss(
    negative_logodds: Tensor,
    negative_mask: Tensor,
    positive_logp: Tensor | None = None,
    positive_mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    reduction: str = "sequence",
) -> Tensor:
    """Raise ``1 − p`` of every negative token, and learn the positive tokens by cross-entropy.

    ``L = (Σ CE − α Σ_t log(1 − p_t)) / N``; Welleck et al. 2020, arXiv 1908.04319. The negatives come as
    log-odds ``m = log p − log(1 − p)``, from ``fastd2o.linear_logodds``: then ``log(1 − p) = log σ(−m)`` is exact,
    where a log-probability that has been rounded to 0 has lost its ``1 − p``.

    Args:
        negative_logodds: [S, L] floating point, m of each token of the negatives.
        negative_mask: [S, L] bool, True on the tokens that count. Masked slots may hold anything.
        positive_logp: [S', L'] floating point, token log-probabilities of the positives; default: no positives.
        positive_mask: [S', L'] bool, given together with ``positive_logp``.
        alpha: α ≥ 0, the weight of the negatives. Default 1.
        reduction: ``"sequence"``: N is the sequences (rows) of both sides with a counted token. ``"token"``: N is the
            counted tokens. ``"sum"``: N is 1.

    Returns:
        A scalar in float32 (float64 for float64 inputs); a 0 connected to the graph where nothing counts.

    Raises:
        ValueError: shapes that disagree, a negative ``alpha``, an unknown ``reduction``, one of the positive pair
            missing.
        TypeError: log-odds that are not floating point, masks that are not boolean.
    """
    checks.non_negative(alpha=alpha)
    (logodds,) = checks.logprobs(negative_logodds=negative_logodds)
    mask = checks.mask("negative_mask", negative_mask, like=logodds)
    # Select before the logarithm, so that the gradient of a masked slot is 0 whatever the slot holds.
    negatives = TokenSide("negative_logodds", -F.logsigmoid(-torch.where(mask, logodds, 0.0)), mask, alpha)
    return reduce_tokens(negatives, *cross_entropy_side("positive", positive_logp, positive_mask), reduction=reduction)
