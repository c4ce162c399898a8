"""ORPO: supervised fine-tuning with an odds-ratio penalty, without a reference (Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce


def orpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    *,
    chosen_length: Tensor,
    rejected_length: Tensor,
    orpo_lambda: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Learn y_w by cross-entropy while the odds of y_l are pushed below those of y_w.

    ``L = NLL(y_w) − λ log σ( logit P(y_w) − logit P(y_l) )`` with ``P(y) = exp(lp(y)/|y|)`` and
    ``NLL(y_w) = −lp(y_w)/|y_w|``; Hong et al. 2024, arXiv 2403.07691, Eq. 3–7.

    Args:
        chosen_logp: [G], or any shape that broadcasts, floating point, log-probability of y_w summed over its tokens.
        rejected_logp: [G] the same of y_l.
        chosen_length: [G] completion tokens of y_w, at least 1.
        rejected_length: [G] completion tokens of y_l, at least 1.
        orpo_lambda: λ ≥ 0, the weight of the odds ratio. Default 0.1.
        reduction: ``"mean"`` over pairs, ``"sum"``, or ``"none"`` for one loss per pair.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that do not broadcast or differ in their number of dimensions, a length of 0 (read on the CPU
            only), a negative ``orpo_lambda``, an unknown ``reduction``.
        TypeError: a log-probability that is not floating point.
    """
    checks.non_negative(orpo_lambda=orpo_lambda)
    chosen, rejected = checks.logprobs(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    checks.same_rank(chosen_logp=chosen, rejected_logp=rejected)
    chosen_mean = chosen / checks.lengths("chosen_length", chosen_length, like=chosen)
    rejected_mean = rejected / checks.lengths("rejected_length", rejected_length, like=rejected)
    log_odds_ratio = _logit(chosen_mean) - _logit(rejected_mean)
    return reduce(-chosen_mean - orpo_lambda * F.logsigmoid(log_odds_ratio), reduction)


def _logit(logp: Tensor) -> Tensor:
    """Return ``log P − log(1 − P)`` from ``log P``.

    ``−expm1`` gives 1 − P with all its digits when P is near 1; when P is tiny, its rounding is lost against ``log P``.
    A log P within rounding of 0 stands at −eps, where the odds are still a number, and keeps the gradient of its first
    term.
    """
    below_one = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(below_one))
