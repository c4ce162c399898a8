"""CRINGE (Adolphs et al., ACL 2023, arXiv 2211.05826) and Pairwise Cringe (Xu et al. 2023, arXiv 2312.16682)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce
from fastd2o.losses.tokens import TokenSide, cross_entropy_side, reduce_tokens


def cringe_token_loss(negative_logit: Tensor, positive_logit: Tensor, *, detach_positive: bool = False) -> Tensor:
    """Contrast a negative token's logit s⁻ with the logit s⁺ of the token that the model itself would put there.

    ``ℓ = −log[ e^{s⁺} / (e^{s⁺} + e^{s⁻}) ] = softplus(s⁻ − s⁺)``, arXiv 2211.05826, Eq. 3–5;
    ``∂ℓ/∂s⁻ = σ(s⁻ − s⁺) = −∂ℓ/∂s⁺``.

    Args:
        negative_logit: [...] floating point, s⁻. −inf gives a loss of 0.
        positive_logit: [...] floating point, s⁺, of the same number of dimensions. −inf says that there was no
            alternative to sample: loss and gradient are 0.
        detach_positive: no gradient into s⁺.

    Returns:
        [...] the loss of each token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not broadcast.
        TypeError: a logit that is not floating point.
    """
    negative, positive = checks.logprobs(negative_logit=negative_logit, positive_logit=positive_logit)
    checks.same_rank(negative_logit=negative, positive_logit=positive)
    if detach_positive:
        positive = positive.detach()
    has_alternative = positive != -torch.inf  # NaN is no missing alternative: it must be seen
    # Select before subtracting: −inf − (−inf) is NaN, and its gradient would survive a later mask.
    gap = torch.where(has_alternative, positive, 0.0) - torch.where(has_alternative, negative, -torch.inf)
    return -F.logsigmoid(gap)


def cringe_loss(
    negative_loss: Tensor,
    negative_mask: Tensor,
    positive_logp: Tensor | None = None,
    positive_mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    reduction: str = "token",
) -> Tensor:
    """Learn the positive tokens by cross-entropy and un-learn the negative ones by contrast.

    ``L = (Σ CE + α_c Σ ℓ) / N``, arXiv 2211.05826, Eq. 1–5.

    Args:
        negative_loss: [S, L] floating point, ℓ of each token of the negatives: the ``loss`` of
            ``fastd2o.linear_cringe``, or :func:`cringe_token_loss`.
        negative_mask: [S, L] bool, True on the tokens that count. Masked slots may hold anything.
        positive_logp: [S', L'] floating point, token log-probabilities of the positives; default: no positives.
        positive_mask: [S', L'] bool, given together with ``positive_logp``.
        alpha: α_c ≥ 0, the weight of the negatives. Default 1 (reference code; the paper tries 0.5 to 5).
        reduction: ``"token"``: N is the counted tokens of both sides together, as in the reference code.
            ``"sequence"``: N is the sequences (rows) with a counted token. ``"sum"``: N is 1.

    Returns:
        A scalar in float32 (float64 for float64 inputs); a 0 connected to the graph where nothing counts.

    Raises:
        ValueError: shapes that disagree, a negative ``alpha``, an unknown ``reduction``, one of the positive pair
            missing.
        TypeError: losses that are not floating point, masks that are not boolean.
    """
    checks.non_negative(alpha=alpha)
    (losses,) = checks.logprobs(negative_loss=negative_loss)
    negatives = TokenSide("negative_loss", losses, checks.mask("negative_mask", negative_mask, like=losses), alpha)
    return reduce_tokens(negatives, *cross_entropy_side("positive", positive_logp, positive_mask), reduction=reduction)


def pairwise_cringe_gate(
    chosen_logp: Tensor, rejected_logp: Tensor, *, margin: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Return g, how much of a pair is still to be learnt: near 1 until the pair is apart by ``margin``, then towards 0.

    ``g = σ((b − M) / τ)``, ``M = lp(y_w) − lp(y_l)``, arXiv 2312.16682. Log its mean. Arguments and errors:
    see :func:`pairwise_cringe_loss`; [G] in, [G] out.
    """
    checks.finite(margin=margin)
    checks.positive(temperature=temperature)
    chosen, rejected = checks.logprobs(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    checks.same_rank(chosen_logp=chosen, rejected_logp=rejected)
    return torch.sigmoid((margin - (chosen - rejected)) / temperature)


def pairwise_cringe_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_nll: Tensor,
    rejected_cringe: Tensor,
    *,
    margin: float = 0.0,
    temperature: float = 1.0,
    detach_gate: bool = True,
    alpha: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Apply the binary CRINGE loss to a pair for as long as the pair is not yet told apart; no reference model.

    ::

        L_bin(y_w, y_l) = CE(y_w) + α_c Σ_t ℓ_t(y_l)
        L_pair = g · L_bin          g = σ((b − M) / τ),  M = lp(y_w) − lp(y_l)

    Source: Xu et al. 2023, arXiv 2312.16682.

    Args:
        chosen_logp: [G] floating point, log-probability of y_w; a sum over its tokens, or a per-token mean if the
            margin is to be one.
        rejected_logp: [G] the same of y_l.
        chosen_nll: [G] CE(y_w), reduced over the tokens of y_w as the caller wishes (``−chosen_logp`` for sums).
        rejected_cringe: [G] Σ_t ℓ_t(y_l), from ``fastd2o.linear_cringe`` or :func:`cringe_token_loss`, reduced
            likewise.
        margin: b, finite. Default 0.
        temperature: τ > 0. Default 1.
        detach_gate: the gate is a weight without gradient. With False its own gradient, ``−(1/τ) g (1−g) L_bin ∇M``, is
            added.
        alpha: α_c ≥ 0, the weight of the negative. Default 1.
        reduction: ``"mean"`` over pairs, ``"sum"``, or ``"none"`` for one loss per pair.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that do not broadcast or differ in their number of dimensions, a number out of its range, an
            unknown ``reduction``.
        TypeError: an input that is not floating point.
    """
    checks.non_negative(alpha=alpha)
    gate = pairwise_cringe_gate(chosen_logp, rejected_logp, margin=margin, temperature=temperature)
    nll, cringe = checks.logprobs(chosen_nll=chosen_nll, rejected_cringe=rejected_cringe)
    checks.same_device(chosen_logp=chosen_logp, chosen_nll=nll)
    checks.same_rank(chosen_logp=chosen_logp, rejected_logp=rejected_logp, chosen_nll=nll, rejected_cringe=cringe)
    if detach_gate:
        gate = gate.detach()
    return reduce(gate * (nll + alpha * cringe), reduction)
