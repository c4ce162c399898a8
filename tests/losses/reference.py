"""The formulas once more: plain Python floats, one pair or token at a time, as naive as float64 can afford."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return math.log(sigmoid(x))


def d2o_argument(
    negative: float,
    anchors: Sequence[float],
    ref_negative: float,
    ref_anchors: Sequence[float],
    *,
    alpha: float,
    beta: float,
) -> float:
    log_ratios = [anchor - ref for anchor, ref in zip(anchors, ref_anchors, strict=True)]
    anchor_term = beta * sum(log_ratios) / len(log_ratios) if log_ratios else 0.0
    return anchor_term - alpha * (negative - ref_negative)


class Pair(NamedTuple):
    """Log-ratios of chosen and rejected, β, and the lengths of the two completions."""

    chosen: float
    rejected: float
    beta: float
    chosen_length: float = 1.0
    rejected_length: float = 1.0

    @property
    def margin(self) -> float:
        return self.beta * (self.chosen - self.rejected)


SMOOTHING = {"sigmoid": 0.1, "robust": 0.1, "exo_pair": 1e-3}
"""Label smoothing of the types that have it, in :data:`DPO` and wherever it is compared with."""

BASELINE = 0.3
"""δ of ``bco_pair`` in :data:`DPO`."""


def _exo(pair: Pair) -> float:
    eps, chosen = SMOOTHING["exo_pair"], sigmoid(pair.margin)
    return chosen * math.log(chosen / (1 - eps)) + (1 - chosen) * math.log((1 - chosen) / eps)


def _discopop(pair: Pair) -> float:
    gate = sigmoid(pair.margin / 0.05)
    return -log_sigmoid(pair.margin) * (1 - gate) + math.exp(-pair.margin) * gate


DPO: dict[str, Callable[[Pair], float]] = {
    "sigmoid": lambda p: -0.9 * log_sigmoid(p.margin) - 0.1 * log_sigmoid(-p.margin),
    "hinge": lambda p: max(0.0, 1 - p.margin),
    "ipo": lambda p: (p.chosen / p.chosen_length - p.rejected / p.rejected_length - 1 / (2 * p.beta)) ** 2,
    "robust": lambda p: (-0.9 * log_sigmoid(p.margin) + 0.1 * log_sigmoid(-p.margin)) / (1 - 2 * 0.1),
    "dpop": lambda p: -log_sigmoid(p.beta * (p.chosen - p.rejected - 50 * max(0.0, -p.chosen))),
    "bdpo": lambda p: -log_sigmoid(p.beta * p.chosen - p.beta * math.log(0.5 * math.exp(p.rejected) + 0.5)),
    "apo_zero": lambda p: 1 - sigmoid(p.beta * p.chosen) + sigmoid(p.beta * p.rejected),
    "apo_down": lambda p: sigmoid(p.beta * p.chosen) + 1 - sigmoid(p.margin),
    "nca_pair": lambda p: (
        -log_sigmoid(p.beta * p.chosen)
        - 0.5 * log_sigmoid(-p.beta * p.chosen)
        - 0.5 * log_sigmoid(-p.beta * p.rejected)
    ),
    "sppo_hard": lambda p: (p.chosen - 1 / (2 * p.beta)) ** 2 + (p.rejected + 1 / (2 * p.beta)) ** 2,
    "exo_pair": _exo,
    "bco_pair": lambda p: -log_sigmoid(p.beta * p.chosen - BASELINE) - log_sigmoid(-(p.beta * p.rejected - BASELINE)),
    "discopop": _discopop,
}


def simpo(
    chosen: float, rejected: float, chosen_length: float, rejected_length: float, beta: float, gamma: float
) -> float:
    return -log_sigmoid(beta / chosen_length * chosen - beta / rejected_length * rejected - gamma)


def orpo(chosen: float, rejected: float, chosen_length: float, rejected_length: float, weight: float) -> float:
    p_chosen, p_rejected = math.exp(chosen / chosen_length), math.exp(rejected / rejected_length)
    logits = [math.log(p / (1 - p)) for p in (p_chosen, p_rejected)]
    return -math.log(p_chosen) - weight * log_sigmoid(logits[0] - logits[1])


def npo(log_ratio: float, beta: float) -> float:
    return -2 / beta * log_sigmoid(-beta * log_ratio)


def simnpo(logp: float, length: float, beta: float, delta: float) -> float:
    return -2 / beta * log_sigmoid(-beta / length * logp - beta * delta)


def kto(log_ratio: float, desirable: bool, z0: float, beta: float, weight: float) -> float:
    return weight * (1 - sigmoid(beta * (log_ratio - z0) if desirable else beta * (z0 - log_ratio)))


def unlikelihood_token(logodds: float) -> float:
    return -math.log(1 - sigmoid(logodds))


def cringe_token(negative_logit: float, positive_logit: float) -> float:
    return -math.log(math.exp(positive_logit) / (math.exp(positive_logit) + math.exp(negative_logit)))


def pairwise_cringe(
    chosen: float, rejected: float, nll: float, cringe: float, *, margin: float, temperature: float, alpha: float
) -> float:
    return sigmoid((margin - (chosen - rejected)) / temperature) * (nll + alpha * cringe)
