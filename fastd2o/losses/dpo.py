"""DPO and its neighbours: one chosen and one rejected completion per pair, both measured against a reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.reduction import reduce


@dataclass(frozen=True)
class _Pair:
    """Log-ratios ``r(y) = lp(y) − lp_ref(y)`` of a batch of pairs, and everything that one of the types reads."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    label_smoothing: float
    chosen_length: Tensor | None
    rejected_length: Tensor | None
    dpop_lambda: float
    bdpo_lambda: float
    discopop_tau: float
    bco_baseline: Tensor | float

    @property
    def margin(self) -> Tensor:
        """βΔ = β (r(y_w) − r(y_l))."""
        return self.beta * (self.chosen - self.rejected)


def _sigmoid(pair: _Pair) -> Tensor:
    smoothing = pair.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(pair.margin) - smoothing * F.logsigmoid(-pair.margin)


def _hinge(pair: _Pair) -> Tensor:
    return F.relu(1 - pair.margin)


def _ipo(pair: _Pair) -> Tensor:
    chosen_mean = pair.chosen / checks.lengths("chosen_length", pair.chosen_length, like=pair.chosen)
    rejected_mean = pair.rejected / checks.lengths("rejected_length", pair.rejected_length, like=pair.rejected)
    return (chosen_mean - rejected_mean - 1 / (2 * pair.beta)).square()


def _robust(pair: _Pair) -> Tensor:
    smoothing = pair.label_smoothing
    unbiased = -(1 - smoothing) * F.logsigmoid(pair.margin) + smoothing * F.logsigmoid(-pair.margin)
    return unbiased / (1 - 2 * smoothing)


def _dpop(pair: _Pair) -> Tensor:
    return -F.logsigmoid(pair.margin - pair.beta * pair.dpop_lambda * F.relu(-pair.chosen))


def _bdpo(pair: _Pair) -> Tensor:
    keep = pair.rejected.new_tensor(1 - pair.bdpo_lambda).log()
    mixed = torch.logaddexp(pair.rejected + math.log(pair.bdpo_lambda), keep)
    return -F.logsigmoid(pair.beta * (pair.chosen - mixed))


def _apo_zero(pair: _Pair) -> Tensor:
    return torch.sigmoid(-pair.beta * pair.chosen) + torch.sigmoid(pair.beta * pair.rejected)


def _apo_down(pair: _Pair) -> Tensor:
    return torch.sigmoid(pair.beta * pair.chosen) + torch.sigmoid(-pair.margin)


def _nca_pair(pair: _Pair) -> Tensor:
    chosen, rejected = pair.beta * pair.chosen, pair.beta * pair.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _sppo_hard(pair: _Pair) -> Tensor:
    target = 1 / (2 * pair.beta)
    return (pair.chosen - target).square() + (pair.rejected + target).square()


def _exo_pair(pair: _Pair) -> Tensor:
    if pair.label_smoothing == 0:
        raise ValueError(
            "label_smoothing is 0, expected a rate above 0: 'exo_pair' is a divergence from the labels, infinite from "
            "one-hot ones. Fix: label_smoothing=1e-3, the paper's value."
        )
    log_chosen, log_rejected = F.logsigmoid(pair.margin), F.logsigmoid(-pair.margin)
    prior_chosen, prior_rejected = math.log1p(-pair.label_smoothing), math.log(pair.label_smoothing)
    return torch.sigmoid(pair.margin) * (log_chosen - prior_chosen) + torch.sigmoid(-pair.margin) * (
        log_rejected - prior_rejected
    )


def _bco_pair(pair: _Pair) -> Tensor:
    baseline = pair.bco_baseline
    return -F.logsigmoid(pair.beta * pair.chosen - baseline) - F.logsigmoid(baseline - pair.beta * pair.rejected)


def _discopop(pair: _Pair) -> Tensor:
    gate = pair.margin / pair.discopop_tau
    # exp(−x) σ(x/τ) as one exponential: the two factors overflow and vanish on their own, and inf · 0 is NaN.
    exponential = torch.exp(F.logsigmoid(gate) - pair.margin)
    return -F.logsigmoid(pair.margin) * torch.sigmoid(-gate) + exponential


_LOSSES: dict[str, Callable[[_Pair], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "dpop": _dpop,
    "bdpo": _bdpo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "exo_pair": _exo_pair,
    "bco_pair": _bco_pair,
    "discopop": _discopop,
}

DPO_LOSS_TYPES: tuple[str, ...] = tuple(_LOSSES)
"""Every ``loss_type`` of :func:`dpo_loss`."""

DPO_SMOOTHED_TYPES: tuple[str, ...] = ("sigmoid", "robust", "exo_pair")
"""The types that read ``label_smoothing``; the others refuse any but 0."""


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    *,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    dpop_lambda: float = 50.0,
    bdpo_lambda: float = 0.5,
    discopop_tau: float = 0.05,
    bco_baseline: Tensor | float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Prefer the chosen completion y_w to the rejected y_l, in one of the ways below.

    Per pair, with ``r = lp − lp_ref``, ``r_w = r(y_w)``, ``r_l = r(y_l)``, ``Δ = r_w − r_l``, ε = ``label_smoothing``::

        sigmoid     −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                 Rafailov 2023, 2305.18290; with ε: Mitchell 2023
        hinge       max(0, 1 − βΔ)                                  SLiC-HF, Zhao 2023, 2305.10425
        ipo         (r_w/|y_w| − r_l/|y_l| − 1/(2β))²               Azar 2023, 2310.12036
        robust      [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)    Chowdhury 2024, 2403.00409
        dpop        −log σ(β [Δ − λ max(0, −r_w)])                  Pal 2024, 2402.13228
        bdpo        −log σ(β r_w − β log(λ e^{r_l} + 1 − λ))        Cho 2025, 2506.12725
        apo_zero    1 − σ(β r_w) + σ(β r_l)                         D'Oosterlinck 2024, 2408.06266, Eq. 7
        apo_down    σ(β r_w) + 1 − σ(βΔ)                            the same, Eq. 8
        nca_pair    −log σ(β r_w) − ½ log σ(−β r_w) − ½ log σ(−β r_l)   Chen 2024, 2402.05369
        sppo_hard   (r_w − 1/(2β))² + (r_l + 1/(2β))²               Wu 2024, 2405.00675, Eq. 4.7
        exo_pair    σ(βΔ) log[σ(βΔ)/(1−ε)] + σ(−βΔ) log[σ(−βΔ)/ε]   Ji 2024, 2402.00856, Eq. 16
        bco_pair    −log σ(β r_w − δ) − log σ(−(β r_l − δ))         Jung 2024, 2404.04656
        discopop    −log σ(βΔ) σ(−βΔ/τ) + e^{−βΔ} σ(βΔ/τ)           Lu 2024, 2406.08414, Eq. 5

    The numbers are arXiv's. Names and constants are those of TRL's ``DPOTrainer``, where it has the type.

    Args:
        chosen_logp: [G], or any shape that broadcasts, floating point: the policy's log-probability of y_w, summed over
            the completion's tokens.
        rejected_logp: [G] the same of y_l.
        ref_chosen_logp: [G] of y_w under the reference. References are constants: no gradient flows into them.
        ref_rejected_logp: [G] of y_l under the reference.
        beta: β > 0, how dearly a departure from the reference is paid. Default 0.1.
        loss_type: one of :data:`DPO_LOSS_TYPES`.
        label_smoothing: ε in [0, 0.5), the assumed rate of flipped labels, for ``sigmoid``, ``robust`` and ``exo_pair``
            (which needs ε > 0; its paper uses 1e-3). The other types refuse a value that they would ignore.
        chosen_length: [G] completion tokens of y_w, at least 1; needed and read by ``ipo`` alone.
        rejected_length: [G] completion tokens of y_l; as above.
        dpop_lambda: λ ≥ 0 of ``dpop``. Default 50.
        bdpo_lambda: λ in (0, 1] of ``bdpo``; 1 is ``sigmoid``. Default 0.5.
        discopop_tau: τ > 0 of ``discopop``. Default 0.05. Up to 1 the loss grows at most linearly in −βΔ; above,
            exponentially.
        bco_baseline: δ of ``bco_pair``, in units of β r: a constant number or tensor. The paper's δ is a running mean
            of ``(β r(y_w) + β r(y_l)) / 2``, which its caller keeps. Default 0, as in TRL.
        reduction: ``"mean"`` over pairs, ``"sum"``, or ``"none"`` for one loss per pair.

    Returns:
        The loss in float32 (float64 for float64 inputs). The mean of an empty batch is a 0 connected to the graph.

    Raises:
        ValueError: shapes that do not broadcast or differ in their number of dimensions, a number out of its range, an
            unknown ``loss_type`` or ``reduction``, missing lengths.
        TypeError: a log-probability that is not floating point.
    """
    checks.one_of("loss_type", loss_type, DPO_LOSS_TYPES)
    checks.positive(beta=beta, discopop_tau=discopop_tau, bdpo_lambda=bdpo_lambda)
    checks.non_negative(dpop_lambda=dpop_lambda)
    if bdpo_lambda > 1:
        raise ValueError(f"bdpo_lambda is {bdpo_lambda}, expected a share in (0, 1].")
    checks.label_smoothing(label_smoothing)
    if label_smoothing > 0 and loss_type not in DPO_SMOOTHED_TYPES:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but loss_type {loss_type!r} has no label smoothing; "
            f"these have: {', '.join(DPO_SMOOTHED_TYPES)}. Fix: label_smoothing=0."
        )
    chosen, rejected, ref_chosen, ref_rejected = checks.logprobs(
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        ref_chosen_logp=ref_chosen_logp,
        ref_rejected_logp=ref_rejected_logp,
    )
    checks.same_rank(
        chosen_logp=chosen, rejected_logp=rejected, ref_chosen_logp=ref_chosen, ref_rejected_logp=ref_rejected
    )
    pair = _Pair(
        chosen=chosen - ref_chosen.detach(),
        rejected=rejected - ref_rejected.detach(),
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        dpop_lambda=dpop_lambda,
        bdpo_lambda=bdpo_lambda,
        discopop_tau=discopop_tau,
        bco_baseline=checks.constant("bco_baseline", bco_baseline, like=chosen),
    )
    return reduce(_LOSSES[loss_type](pair), reduction)
