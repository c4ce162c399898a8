"""The objectives by name: what each needs of data and model, its options, and its loss from the scores of a batch.

An objective's loss is returned as a *sum* over its units (groups, sequences or tokens); the trainer divides by how many
of them the whole accumulation window holds, over all processes, so that the split into micro-batches and ranks cannot
change a gradient. Objectives of pairs, given a group with K positives, average their pair losses over the K.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastd2o import losses
from fastd2o.data import Needs, PromptSuffix
from fastd2o.training.scoring import UNITS, Measure, Outcome, Scores, Wants

if TYPE_CHECKING:
    from fastd2o.training.config import PreferenceConfig


ENTROPY = "entropy"
"""The metric that tells whether the statistics of tokens were measured."""

SATURATED = ("d2o/saturated", "pairwise_cringe/saturated", "rewards/saturated")
"""The metrics that say how large a share of the groups hardly teaches any more; the first that is logged counts."""

_HARDLY = 0.01  # of its full gradient, where no option says otherwise


Options = SimpleNamespace
Loss = Callable[[Scores, Options], Outcome]


@dataclass(frozen=True)
class Option:
    """An option of objectives: which values it takes."""

    expected: str
    valid: Callable[[Any], bool]


@dataclass(frozen=True)
class Objective:
    """One way to learn from preferences.

    Attributes:
        name: as in ``PreferenceConfig.objective``.
        loss: the sum over the units of a batch, from its scores and the resolved options.
        unit: what the loss is a mean over.
        needs: what every group must have.
        options: the options it reads, each with its default.
        reference: whether it compares the policy with a reference.
        harmful_reference: whether positives are compared with the harmful one (D2O).
        positives: whether positives enter the loss. If not, training leaves them out of the batch.
        mismatches: whether each group comes with a completion under another prompt (KTO).
        cringe: whether the Cringe loss of the tokens of negatives is used.
        negative_gradient: whether the log-probabilities of negatives are differentiated, given the options.
        separable: whether the loss is a sum over groups: not with a statistic of the batch in it (KTO).
        reward: [S] the implicit reward of each completion, or None.
    """

    name: str
    loss: Loss
    unit: Literal["group", "sequence", "token"]
    needs: Needs
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = False
    harmful_reference: bool = False
    positives: bool = True
    mismatches: bool = False
    cringe: bool = False
    negative_gradient: Callable[[Options], bool] = lambda options: True
    separable: bool = True
    reward: Callable[[Scores, Options], Tensor] | None = None

    @property
    def saturates(self) -> bool:
        """Whether a group can be so far apart that it hardly teaches any more, which one of :data:`SATURATED` tells."""
        return self.needs is Needs.PAIR and (self.reward is not None or self.cringe)


class Mixture:
    """The objectives of a run with their weights and resolved options: what the trainer optimises."""

    def __init__(self, config: PreferenceConfig) -> None:
        assert config.objective_weights is not None
        self.parts = [
            (objective, Options(**{name: config.option(objective, name) for name in objective.options}), weight)
            for objective, weight in zip(config.objectives, config.objective_weights, strict=True)
        ]
        objectives = config.objectives
        self.reference = any(objective.reference for objective in objectives)
        self.harmful_reference = any(objective.harmful_reference for objective in objectives)
        self.positives = any(objective.positives for objective in objectives)
        self.mismatches = any(objective.mismatches for objective in objectives)
        self.separable = all(objective.separable for objective in objectives)
        self.needs = self._needs()
        self.wants = self._wants()
        self.prompt_suffix = self._prompt_suffix()

    def __call__(self, scores: Scores, counts: Tensor) -> Outcome:
        """The weighted loss of a batch, each part divided by ``counts`` [3] of its unit, and everything to log."""
        total = scores.logp.new_zeros(())
        own = scores.batch.counts()
        metrics = _describe(scores)
        for objective, options, weight in self.parts:
            unit = UNITS.index(objective.unit)
            outcome = objective.loss(scores, options)
            total = total + weight * outcome.loss / counts[unit].clamp(min=1)
            metrics.update(outcome.metrics)
            metrics[f"loss/{objective.name}"] = Measure(outcome.loss.detach(), own[unit])
        for objective, options, _ in self.parts:
            if objective.reward is not None:
                metrics.update(_rewards(scores, objective.reward(scores, options).detach()))
                break  # Names without an objective in them, as in TRL: the first one that has rewards gives them.
        return Outcome(total, metrics)

    def unit_scale(self, counts: Tensor) -> Tensor:
        """0-d: what :meth:`__call__` multiplies a group's own loss with, given the same ``counts``."""
        shares = [weight / counts[UNITS.index(objective.unit)].clamp(min=1) for objective, _, weight in self.parts]
        return torch.stack(shares).sum()

    def combine(self, part_losses: Mapping[str, float]) -> float:
        """The weighted loss from the mean of each part, under the names that :meth:`__call__` logs."""
        return sum(weight * part_losses[f"loss/{objective.name}"] for objective, _, weight in self.parts)

    def _needs(self) -> Needs:
        # Ordered from the weakest to the strongest.
        order = (Needs.ANY, Needs.NEGATIVE, Needs.PAIR)
        needs = [
            Needs.NEGATIVE if getattr(options, "allow_no_anchor", False) else objective.needs
            for objective, options, _ in self.parts
        ]
        return max(needs, key=order.index)

    def _wants(self) -> Wants:
        for objective, options, _ in self.parts:
            if objective.cringe:
                negative_gradient = any(other.negative_gradient(choices) for other, choices, _ in self.parts)
                return Wants(options.cringe_k, options.cringe_detach_positive, negative_gradient)
        return Wants()

    def _prompt_suffix(self) -> PromptSuffix | None:
        for objective, options, _ in self.parts:
            if objective.name == "nat":
                return PromptSuffix(positive=options.nat_positive_suffix, negative=options.nat_negative_suffix)
        return None


def find_objective(name: str) -> Objective:
    """The objective called ``name``; ``sigmoid`` is another name of ``dpo``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    known = _ALIASES.get(name, name)
    if known not in OBJECTIVES:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"objective {name!r} is unknown, expected one of: {', '.join(OBJECTIVES)}.{hint}")
    return OBJECTIVES[known]


# --- what there is to log -------------------------------------------------------------------------------------


def _mean(values: Tensor, mask: Tensor | None = None) -> Measure:
    """The mean of ``values`` where ``mask`` holds, as a sum and a count."""
    values = values.detach()
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    return Measure(torch.where(mask, values, 0.0).sum(), mask.sum())


def _group_mean(values: Tensor, mask: Tensor) -> Measure:
    """[G, K]: the mean over groups of the mean over each group's own."""
    return _mean(_over_positives(values, mask), mask.any(1))


def _describe(scores: Scores) -> dict[str, Measure]:
    """What can be said of any batch, whatever is optimised."""
    measures = {
        "logps/chosen": _group_mean(scores.positives(scores.logp), scores.positive_mask),
        "logps/rejected": _mean(scores.negatives(scores.logp), scores.batch.negative_row >= 0),
    }
    statistics = scores.tokens.statistics
    if statistics is not None:
        negative, positive = (mask & statistics.known for mask in _token_masks(scores))
        measures |= {
            "logits/chosen": _mean(statistics.mean_logit, positive),
            "logits/rejected": _mean(statistics.mean_logit, negative),
            ENTROPY: _mean(statistics.entropy, positive | negative),
            "mean_token_accuracy": _mean((statistics.top1 == scores.batch.target).float(), positive),
        }
    return measures


def _rewards(scores: Scores, reward: Tensor) -> dict[str, Measure]:
    has_negative = scores.batch.negative_row >= 0
    chosen, rejected = scores.positives(reward), scores.negatives(reward)
    pairs = scores.positive_mask & has_negative[:, None]
    margins = chosen - rejected[:, None]
    return {
        "rewards/chosen": _group_mean(chosen, scores.positive_mask),
        "rewards/rejected": _mean(rejected, has_negative),
        "rewards/accuracies": _group_mean((margins > 0).float(), pairs),
        "rewards/margins": _group_mean(margins, pairs),
        "rewards/saturated": _group_mean((torch.sigmoid(-margins) < _HARDLY).float(), pairs),
    }


# --- the losses -----------------------------------------------------------------------------------------------


def _over_positives(values: Tensor, mask: Tensor) -> Tensor:
    """[G, K] -> [G]: the mean over the positives that are there, 0 where there is none."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _log_ratio(scores: Scores) -> Tensor:
    """[S]: log πθ(y) − log π_ref(y)."""
    return scores.logp - scores.reference


def _scaled_log_ratio(scores: Scores, options: Options) -> Tensor:
    return options.beta * _log_ratio(scores)


def _d2o_log_ratio(scores: Scores, options: Options) -> Tensor:
    """As the loss has it: positives against the harmful reference."""
    reference = torch.where(scores.batch.positive, scores.harmful_reference, scores.reference)
    ratio = scores.logp - reference
    return options.beta * (ratio / scores.length if options.length_normalize else ratio)


def _d2o(scores: Scores, options: Options) -> Outcome:
    length = scores.length if options.length_normalize else torch.ones_like(scores.length)
    arguments: dict[str, Any] = {
        "negative_logp": scores.negatives(scores.logp / length),
        "anchor_logp": scores.positives(scores.logp / length),
        "ref_negative_logp": scores.negatives(scores.reference / length),
        "ref_anchor_logp": scores.positives(scores.harmful_reference / length),
        "anchor_mask": scores.positive_mask,
        "alpha": options.alpha,
        "beta": options.beta,
    }
    with torch.no_grad():
        terms = losses.d2o_logits(**arguments)
    metrics = {
        "d2o/anchor_term": _mean(terms.anchor_term, terms.valid_anchors > 0),
        "d2o/negative_term": _mean(terms.negative_term),
        "d2o/saturated": _mean((torch.sigmoid(-terms.argument) < options.saturation_threshold).float()),
        "d2o/valid_k": _mean(terms.valid_anchors.float()),
    }
    return Outcome(losses.d2o_loss(**arguments, allow_no_anchor=options.allow_no_anchor, reduction="sum"), metrics)


def _dpo(loss_type: str) -> Loss:
    def loss(scores: Scores, options: Options) -> Outcome:
        pairs = losses.dpo_loss(
            scores.positives(scores.logp),
            scores.negatives(scores.logp)[:, None],
            ref_chosen_logp=scores.positives(scores.reference),
            ref_rejected_logp=scores.negatives(scores.reference)[:, None],
            chosen_length=scores.positives(scores.length, fill=1),
            rejected_length=scores.negatives(scores.length)[:, None],
            loss_type=loss_type,
            reduction="none",
            **vars(options),
        )
        return Outcome(_over_positives(pairs, scores.positive_mask).sum(), {})

    return loss


def _simpo(scores: Scores, options: Options) -> Outcome:
    pairs = losses.simpo_loss(**_pair_means(scores), beta=options.beta, gamma=options.simpo_gamma, reduction="none")
    return Outcome(_over_positives(pairs, scores.positive_mask).sum(), {})


def _orpo(scores: Scores, options: Options) -> Outcome:
    pairs = losses.orpo_loss(**_pair_means(scores), orpo_lambda=options.orpo_lambda, reduction="none")
    nll = -scores.positives(scores.logp / scores.length)
    metrics = {"nll_loss": _group_mean(nll, scores.positive_mask)}
    return Outcome(_over_positives(pairs, scores.positive_mask).sum(), metrics)


def _pair_means(scores: Scores) -> dict[str, Tensor]:
    return {
        "chosen_logp": scores.positives(scores.logp),
        "rejected_logp": scores.negatives(scores.logp)[:, None],
        "chosen_length": scores.positives(scores.length, fill=1),
        "rejected_length": scores.negatives(scores.length)[:, None],
    }


def _npo(scores: Scores, options: Options) -> Outcome:
    each = losses.npo_loss(
        scores.negatives(scores.logp),
        ref_negative_logp=scores.negatives(scores.reference),
        beta=options.beta,
        reduction="none",
    )
    return Outcome(each.sum(), {"npo/above_offset": _mean(each - losses.npo_offset(options.beta))})


def _simnpo(scores: Scores, options: Options) -> Outcome:
    loss = losses.simnpo_loss(
        scores.negatives(scores.logp),
        negative_length=scores.negatives(scores.length),
        beta=options.beta,
        delta=options.simnpo_delta,
        reduction="sum",
    )
    return Outcome(loss, {})


def _gradient_ascent(scores: Scores, options: Options) -> Outcome:
    return Outcome(losses.gradient_ascent_loss(scores.negatives(scores.logp), reduction="sum"), {})


def _kto(scores: Scores, options: Options) -> Outcome:
    rows = scores.batch.negative | scores.batch.positive
    # z₀ is a mean over the mismatches of the batch, of all ranks together: the one number that is not a sum over units.
    mismatched = _log_ratio(scores).detach()[~rows]
    total, count = scores.over_ranks(torch.stack([mismatched.sum(), mismatched.new_tensor(len(mismatched))]))
    mean = (total / count.clamp(min=1)).unsqueeze(0)
    reference_point = losses.kto_reference_point(mean, ref_mismatched_logp=torch.zeros_like(mean))
    loss = losses.kto_loss(
        scores.logp[rows],
        ref_logp=scores.reference[rows],
        desirable=scores.batch.positive[rows],
        reference_point=reference_point,
        beta=options.beta,
        desirable_weight=options.kto_desirable_weight,
        undesirable_weight=options.kto_undesirable_weight,
        reduction="sum",
    )
    return Outcome(loss, {"kl": _mean(reference_point.unsqueeze(0))})


def _unlikelihood(scores: Scores, options: Options) -> Outcome:
    negative, positive = _token_masks(scores)
    loss = losses.unlikelihood_loss(
        scores.tokens.logodds,
        negative,
        scores.tokens.logp,
        positive,
        alpha=options.unlikelihood_alpha,
        reduction="sum",
    )
    return Outcome(loss, {"nll_loss": _mean(-scores.tokens.logp, positive)})


def _cringe(scores: Scores, options: Options) -> Outcome:
    negative, positive = _token_masks(scores)
    assert scores.tokens.cringe is not None
    loss = losses.cringe_loss(
        scores.tokens.cringe, negative, scores.tokens.logp, positive, alpha=options.cringe_alpha, reduction="sum"
    )
    metrics = {
        "nll_loss": _mean(-scores.tokens.logp, positive),
        "cringe/negative_loss": _mean(scores.tokens.cringe, negative),
    }
    return Outcome(loss, metrics)


def _pairwise_cringe(scores: Scores, options: Options) -> Outcome:
    assert scores.tokens.cringe is not None
    length = scores.length if options.length_normalize else torch.ones_like(scores.length)
    gated: dict[str, Any] = {
        "chosen_logp": scores.positives(scores.logp / length),
        "rejected_logp": scores.negatives(scores.logp / length)[:, None],
        "margin": options.cringe_margin,
        "temperature": options.cringe_temperature,
    }
    pairs = losses.pairwise_cringe_loss(
        **gated,
        chosen_nll=-scores.positives(scores.logp),
        rejected_cringe=scores.negatives(scores.tokens.cringe.sum(1))[:, None],
        detach_gate=options.cringe_detach_gate,
        alpha=options.cringe_alpha,
        reduction="none",
    )
    with torch.no_grad():
        gate = losses.pairwise_cringe_gate(**gated)
    metrics = {
        "pairwise_cringe/gate": _group_mean(gate, scores.positive_mask),
        "pairwise_cringe/saturated": _group_mean((gate < _HARDLY).float(), scores.positive_mask),
        "cringe/negative_loss": _mean(scores.tokens.cringe, _token_masks(scores)[0]),
    }
    return Outcome(_over_positives(pairs, scores.positive_mask).sum(), metrics)


def _nat(scores: Scores, options: Options) -> Outcome:
    negative, positive = _token_masks(scores)
    loss = losses.nat_loss(scores.tokens.logp, negative, scores.tokens.logp, positive, reduction="sum")
    return Outcome(loss, {"nll_loss": _mean(-scores.tokens.logp, positive)})


def _token_masks(scores: Scores) -> tuple[Tensor, Tensor]:
    """[S, L] bool each: the counted tokens of negatives, and of positives."""
    return scores.mask & scores.batch.negative[:, None], scores.mask & scores.batch.positive[:, None]


# --- the registry ---------------------------------------------------------------------------------------------

_CRINGE_OPTIONS = {"cringe_alpha": 1.0, "cringe_k": 5, "cringe_detach_positive": False}


def _dpo_type(name: str, loss_type: str | None = None, **options: Any) -> Objective:
    return Objective(
        name,
        _dpo(loss_type or name),
        unit="group",
        needs=Needs.PAIR,
        options={"beta": 0.1, **options},
        reference=True,
        reward=_scaled_log_ratio,
    )


_REGISTERED = (
    Objective(
        "d2o",
        _d2o,
        unit="group",
        needs=Needs.PAIR,
        options={
            "alpha": 0.1,
            "beta": 0.1,
            "length_normalize": False,
            "allow_no_anchor": False,
            "saturation_threshold": 0.01,
        },
        reference=True,
        harmful_reference=True,
        reward=_d2o_log_ratio,
    ),
    _dpo_type("dpo", "sigmoid", label_smoothing=0.0),
    _dpo_type("hinge"),
    _dpo_type("ipo"),
    _dpo_type("robust", label_smoothing=0.0),
    _dpo_type("dpop", dpop_lambda=50.0),
    _dpo_type("bdpo", bdpo_lambda=0.5),
    _dpo_type("apo_zero"),
    _dpo_type("apo_down"),
    _dpo_type("nca_pair"),
    _dpo_type("sppo_hard"),
    _dpo_type("exo_pair", label_smoothing=1e-3),
    _dpo_type("bco_pair"),
    _dpo_type("discopop", discopop_tau=0.05),
    Objective(
        "cringe",
        _cringe,
        unit="token",
        needs=Needs.ANY,
        options=_CRINGE_OPTIONS,
        cringe=True,
        negative_gradient=lambda options: False,
    ),
    Objective(
        "pairwise_cringe",
        _pairwise_cringe,
        unit="group",
        needs=Needs.PAIR,
        options={
            **_CRINGE_OPTIONS,
            "cringe_margin": 0.0,
            "cringe_temperature": 1.0,
            "cringe_detach_gate": True,
            "length_normalize": False,
        },
        cringe=True,
        negative_gradient=lambda options: not options.cringe_detach_gate,
    ),
    Objective(
        "npo",
        _npo,
        unit="group",
        needs=Needs.NEGATIVE,
        options={"beta": 0.1},
        reference=True,
        positives=False,
        reward=_scaled_log_ratio,
    ),
    Objective(
        "simnpo",
        _simnpo,
        unit="group",
        needs=Needs.NEGATIVE,
        options={"beta": 2.5, "simnpo_delta": 0.0},
        positives=False,
    ),
    Objective("unlikelihood", _unlikelihood, unit="sequence", needs=Needs.ANY, options={"unlikelihood_alpha": 1.0}),
    Objective(
        "kto",
        _kto,
        unit="sequence",
        needs=Needs.ANY,
        options={"beta": 0.1, "kto_desirable_weight": 1.0, "kto_undesirable_weight": 1.0},
        reference=True,
        mismatches=True,
        separable=False,
        reward=_scaled_log_ratio,
    ),
    Objective(
        "orpo",
        _orpo,
        unit="group",
        needs=Needs.PAIR,
        options={"orpo_lambda": 0.1},
        reward=lambda scores, options: options.orpo_lambda * scores.logp / scores.length,
    ),
    Objective(
        "simpo",
        _simpo,
        unit="group",
        needs=Needs.PAIR,
        options={"beta": 2.0, "simpo_gamma": 0.5},
        reward=lambda scores, options: options.beta * scores.logp / scores.length,
    ),
    Objective(
        "nat",
        _nat,
        unit="token",
        needs=Needs.ANY,
        options={
            "nat_positive_suffix": " Please generate a solution that correctly answers the question.",
            "nat_negative_suffix": " Please generate a solution that incorrectly answers the question.",
        },
    ),
    Objective("gradient_ascent", _gradient_ascent, unit="group", needs=Needs.NEGATIVE, positives=False),
)

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _REGISTERED}
"""Every objective by its name."""

_ALIASES = {"sigmoid": "dpo"}


def _number(expected: str, valid: Callable[[float], bool]) -> Option:
    def is_valid(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and valid(value)

    return Option(expected, is_valid)


_POSITIVE = _number("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda value: value >= 0)
_FINITE = _number("a finite number", lambda value: True)
_SWITCH = Option("True or False", lambda value: isinstance(value, bool))
_TEXT = Option("text", lambda value: isinstance(value, str))

OPTIONS: dict[str, Option] = {
    "alpha": _NOT_NEGATIVE,
    "beta": _POSITIVE,
    "label_smoothing": _number("a share in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "length_normalize": _SWITCH,
    "allow_no_anchor": _SWITCH,
    "saturation_threshold": _number("a share between 0 and 1", lambda value: 0 < value < 1),
    "dpop_lambda": _NOT_NEGATIVE,
    "bdpo_lambda": _number("a share in (0, 1]", lambda value: 0 < value <= 1),
    "discopop_tau": _POSITIVE,
    "simpo_gamma": _FINITE,
    "simnpo_delta": _FINITE,
    "orpo_lambda": _NOT_NEGATIVE,
    "kto_desirable_weight": _NOT_NEGATIVE,
    "kto_undesirable_weight": _NOT_NEGATIVE,
    "unlikelihood_alpha": _NOT_NEGATIVE,
    "cringe_alpha": _NOT_NEGATIVE,
    "cringe_k": Option("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
    "cringe_detach_positive": _SWITCH,
    "cringe_margin": _FINITE,
    "cringe_temperature": _POSITIVE,
    "cringe_detach_gate": _SWITCH,
    "nat_positive_suffix": _TEXT,
    "nat_negative_suffix": _TEXT,
}
"""The options of objectives, in ``PreferenceConfig`` under the same names."""
