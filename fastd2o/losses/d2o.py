"""D2O: Distributional Dispreference Optimization (Duan et al., Findings of EMNLP 2024, arXiv 2403.03419v2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce


class D2OTerms(NamedTuple):
    """What is inside D2O's sigmoid, group by group; ``argument = anchor_term − negative_term``.

    Both terms grow with the length of the completions, and a negative that is being unlearnt can drive its term towards
    −∞: log them, and the share of groups whose ``sigmoid(−argument)``, the weight of their gradient, has vanished.
    """

    argument: Tensor
    """[...] z, the argument of the sigmoid."""
    anchor_term: Tensor
    """[...] (β/K) Σ_i r(y_i); 0 in a group without anchors."""
    negative_term: Tensor
    """[...] α r(y_l)."""
    valid_anchors: Tensor
    """[...] int64, the K of each group."""


def d2o_logits(
    negative_logp: Tensor,
    anchor_logp: Tensor,
    *,
    ref_negative_logp: Tensor,
    ref_anchor_logp: Tensor,
    anchor_mask: Tensor | None = None,
    alpha: float = 0.1,
    beta: float = 0.1,
) -> D2OTerms:
    """Return the argument of D2O's sigmoid and the terms it is made of. Arguments and errors: see :func:`d2o_loss`."""
    checks.non_negative(alpha=alpha)
    checks.positive(beta=beta)
    negative, anchors, ref_negative, ref_anchors = checks.logprobs(
        negative_logp=negative_logp,
        anchor_logp=anchor_logp,
        ref_negative_logp=ref_negative_logp,
        ref_anchor_logp=ref_anchor_logp,
    )
    checks.same_shape(negative_logp=negative, ref_negative_logp=ref_negative)
    checks.same_shape(anchor_logp=anchors, ref_anchor_logp=ref_anchors)
    if anchors.dim() != negative.dim() + 1 or anchors.shape[:-1] != negative.shape:
        raise ValueError(
            f"anchor_logp has shape {list(anchors.shape)}, negative_logp {list(negative.shape)}, "
            "expected [G, K] and [G]: K anchors for each negative."
        )
    if anchor_mask is None:
        valid_anchors = torch.full_like(negative, anchors.shape[-1], dtype=torch.int64)
    else:
        mask = checks.mask("anchor_mask", anchor_mask, like=anchors)
        valid_anchors = mask.sum(dim=-1)
        # Select first, subtract later: whatever a masked slot holds (NaN, inf − inf) stays out of values and gradients.
        anchors, ref_anchors = torch.where(mask, anchors, 0.0), torch.where(mask, ref_anchors, 0.0)
    anchor_term = beta * (anchors - ref_anchors.detach()).sum(dim=-1) / valid_anchors.clamp(min=1)
    negative_term = alpha * (negative - ref_negative.detach())
    return D2OTerms(anchor_term - negative_term, anchor_term, negative_term, valid_anchors)


def d2o_loss(
    negative_logp: Tensor,
    anchor_logp: Tensor,
    *,
    ref_negative_logp: Tensor,
    ref_anchor_logp: Tensor,
    anchor_mask: Tensor | None = None,
    alpha: float = 0.1,
    beta: float = 0.1,
    allow_no_anchor: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Push the policy away from one negative and hold it near K of its own samples, the anchors, prompt by prompt.

    ::

        L = −E log σ( (β/K) Σ_i log[ πθ(y_i|x) / π_r⁻(y_i|x) ]  −  α log[ πθ(y_l|x) / π_r⁺(y_l|x) ] )

    Source: Duan et al. 2024, arXiv 2403.03419v2, Eq. 3. The references cross: anchors are measured against the more
    *harmful* reference π_r⁻, the negative against the more *helpful* π_r⁺ (one model for both is the paper's setting).
    With K = 1, α = β and one reference this is DPO. The gradient of a group, z being the argument of σ, is
    ``−(β/K) σ(−z)`` on each anchor and ``+α σ(−z)`` on the negative.

    Args:
        negative_logp: [G] (or any leading shape) floating point, the policy's log-probability of the negative, summed
            over the completion's tokens.
        anchor_logp: [G, K] the same of the anchors.
        ref_negative_logp: [G] under the helpful reference π_r⁺. References are constants: no gradient flows into them.
        ref_anchor_logp: [G, K] under the harmful reference π_r⁻.
        anchor_mask: [G, K] bool, True where there is an anchor; default: all. Each group is averaged over its own
            anchors, and masked slots may hold anything, NaN included.
        alpha: weight α ≥ 0 of the negative. Paper and default: 0.1.
        beta: weight β > 0 of the anchors. Paper and default: 0.1.
        allow_no_anchor: what becomes of a group without any anchor. False: its loss is 0, whatever its negative holds,
            and it does not count in the mean. True: it is kept as the negative term alone, ``−log σ(−α r(y_l))``.
        reduction: ``"mean"`` over the groups that count, ``"sum"``, or ``"none"`` for the shape of ``negative_logp``.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean over no group at all is a 0 connected to the graph.

    Raises:
        ValueError: shapes that disagree, an ``alpha``, ``beta`` or ``reduction`` out of range, or no anchor in any
            group without ``allow_no_anchor`` (seen for K = 0, and in the mask where reading it costs nothing: on the
            CPU, outside ``torch.compile``).
        TypeError: a log-probability that is not floating point, a mask that is not boolean.
    """
    terms = d2o_logits(
        negative_logp,
        anchor_logp,
        ref_negative_logp=ref_negative_logp,
        ref_anchor_logp=ref_anchor_logp,
        anchor_mask=anchor_mask,
        alpha=alpha,
        beta=beta,
    )
    if allow_no_anchor:
        return reduce(-F.logsigmoid(terms.argument), reduction)
    has_anchor = terms.valid_anchors > 0
    nothing_left = anchor_logp.shape[-1] == 0 or (checks.values_readable(has_anchor) and not has_anchor.any())
    if nothing_left and has_anchor.numel() > 0:
        raise ValueError(
            f"no group has an anchor: anchor_logp has shape {list(anchor_logp.shape)}, expected a valid anchor. "
            "Fix: sample anchors, or pass allow_no_anchor=True to train on the negatives alone."
        )
    # As with masked anchors: what a group that does not count holds must not reach the logarithm.
    argument = torch.where(has_anchor, terms.argument, 0.0)
    return reduce(-F.logsigmoid(argument), reduction, keep=has_anchor)
