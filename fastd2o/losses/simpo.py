"""SimPO: preference by mean log-probability, without a reference (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce


def simpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    *,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """Prefer y_w to y_l by a margin γ in mean log-probability per token.

    ``L = −log σ( (β/|y_w|) lp(y_w) − (β/|y_l|) lp(y_l) − γ )``; Meng et al. 2024, arXiv 2405.14734, Eq. 6.

    Args:
        chosen_logp: [G], or any shape that broadcasts, floating point, log-probability of y_w summed over its tokens.
        rejected_logp: [G] the same of y_l.
        chosen_length: [G] completion tokens of y_w, at least 1.
        rejected_length: [G] completion tokens of y_l, at least 1.
        beta: β > 0. Default 2, as the authors recommend; DPO's 0.1 is made for sums, not means.
        gamma: γ, finite. Default 0.5.
        reduction: ``"mean"`` over pairs, ``"sum"``, or ``"none"`` for one loss per pair.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that do not broadcast or differ in their number of dimensions, a length of 0 (read on the CPU
            only), a number out of its range, an unknown ``reduction``.
        TypeError: a log-probability that is not floating point.
    """
    checks.positive(beta=beta)
    checks.finite(gamma=gamma)
    chosen, rejected = checks.logprobs(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    checks.same_rank(chosen_logp=chosen, rejected_logp=rejected)
    chosen_mean = chosen / checks.lengths("chosen_length", chosen_length, like=chosen)
    rejected_mean = rejected / checks.lengths("rejected_length", rejected_length, like=rejected)
    return reduce(-F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma), reduction)
