"""KTO: Kahneman–Tversky Optimization (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce


def kto_reference_point(mismatched_logp: Tensor, *, ref_mismatched_logp: Tensor) -> Tensor:
    """Estimate z₀, how far the policy has left the reference, from completions under prompts that are not theirs.

    ``z₀ = max(0, mean r(y'))``, detached; arXiv 2402.01306, Section 4. In a distributed run hand in the
    log-probabilities of all ranks: the mean comes before the maximum.

    Args:
        mismatched_logp: [S] floating point, the policy's log-probability of each mismatched completion, summed over its
            tokens.
        ref_mismatched_logp: [S] under the reference.

    Returns:
        A scalar ≥ 0 without gradient; 0 where S = 0.

    Raises:
        ValueError: shapes that disagree.
        TypeError: a log-probability that is not floating point.
    """
    policy, reference = checks.logprobs(mismatched_logp=mismatched_logp, ref_mismatched_logp=ref_mismatched_logp)
    checks.same_shape(mismatched_logp=policy, ref_mismatched_logp=reference)
    return reduce((policy - reference).detach(), "mean").clamp(min=0)


def kto_loss(
    logp: Tensor,
    *,
    ref_logp: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Make desirable completions worth more, and undesirable ones less, than the reference point z₀; no pairs needed.

    ::

        desirable:     λ_D (1 − σ(β (r(y) − z₀)))
        undesirable:   λ_U (1 − σ(β (z₀ − r(y))))          r = lp − lp_ref

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 7. Negatives alone are the second line.

    Args:
        logp: [S], any shape, floating point, the policy's log-probability of each completion, summed over its tokens.
        ref_logp: [S] under the reference, a constant: no gradient flows into it.
        desirable: [S] bool, True for a positive, False for a negative.
        reference_point: z₀, a number or a scalar tensor, from :func:`kto_reference_point`; no gradient flows into it.
        beta: β > 0. Default 0.1.
        desirable_weight: λ_D ≥ 0. Default 1.
        undesirable_weight: λ_U ≥ 0. Default 1.
        reduction: ``"mean"`` over the completions of both kinds, ``"sum"``, or ``"none"`` for one loss per completion.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that disagree, a number out of its range, an unknown ``reduction``.
        TypeError: a log-probability that is not floating point, ``desirable`` that is not boolean.
    """
    checks.positive(beta=beta)
    checks.non_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    policy, reference = checks.logprobs(logp=logp, ref_logp=ref_logp)
    checks.same_shape(logp=policy, ref_logp=reference)
    checks.mask("desirable", desirable, like=policy)
    distance = policy - reference.detach() - checks.constant("reference_point", reference_point, like=policy)
    # 1 − σ(x) is σ(−x), which keeps its digits where σ(x) rounds to 1.
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-beta * distance),
        undesirable_weight * torch.sigmoid(beta * distance),
    )
    return reduce(losses, reduction)
