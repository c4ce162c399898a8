"""``linear_preference_loss``: from hidden states and the head's weight to the loss of groups, and all gradients, in one
pass over the vocabulary's logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.errors import FastD2OWarning
from fastd2o.losses import checks
from fastd2o.losses.fused import (
    CRINGE_OBJECTIVES,
    GROUPED_OBJECTIVES,
    grouped_loss,
    resolve_options,
    segment_lengths,
    segment_owner,
    sum_segments,
)
from fastd2o.ops.autograd import without_autocast
from fastd2o.ops.grouped import Part, linear_grouped
from fastd2o.ops.logprob import HeadOptions, LogprobOptions
from fastd2o.ops.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

PREFERENCE_OBJECTIVES: tuple[str, ...] = tuple(name for name in GROUPED_OBJECTIVES if name not in CRINGE_OBJECTIVES)
"""Every ``objective`` of :func:`linear_preference_loss` that has a name."""

# Two ways to sum a loss may differ by so much, relative, and it still is the same sum.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Groups:
    """Which group each of S sequences belongs to, and on which side it is.

    Attributes:
        group: [S] int64, in ``[0, G)``; a group's sequences need not lie side by side.
        positive: [S] bool, True for positives (chosen completions, anchors), False for negatives.
        number: G; default: one more than the largest of ``group``.
    """

    group: Tensor
    positive: Tensor
    number: int | None = None

    @cached_property
    def count(self) -> int:
        """G."""
        if self.number is not None:
            return self.number
        return int(self.group.max()) + 1 if len(self.group) else 0

    def negatives(self, values: Tensor) -> Tensor:
        """[S] -> [G]: the sum over each group's negatives, of which it has one as a rule; 0 where there is none."""
        return self._sum(torch.where(self.positive, 0.0, values))

    def positives(self, values: Tensor) -> Tensor:
        """[S] -> [G]: the mean over each group's positives; 0 where there is none."""
        number = self._sum(self.positive.to(values.dtype))
        return self._sum(torch.where(self.positive, values, 0.0)) / number.clamp(min=1)

    def _sum(self, values: Tensor) -> Tensor:
        order = self.group.argsort(stable=True)  # segments are summed in one order, whatever the device
        return sum_segments(values[order], self.group.bincount(minlength=self.count))


Objective = Callable[[Tensor, "Tensor | None", Groups], Tensor]
"""A loss of one's own: log-probabilities of sequences [S] under the policy, the same under the reference (None without
``ref_logp``), and their groups -> the loss [G] of each group. It may be called with some of the groups at a time, whose
sequences come in the caller's order: what it needs of each sequence besides has to follow from its arguments."""


class PreferenceOutput(NamedTuple):
    """Result of :func:`linear_preference_loss`. Only ``loss`` carries a gradient.

    Attributes:
        loss: 0-d.
        group_loss: [G], before ``group_weight``.
        sequence_logp: [S], nats, summed over the tokens that count.
        metrics: 0-d tensors by name: ``logps/chosen``, ``logps/rejected``; with ``ref_logp`` and a ``beta``,
            ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies`` and ``rewards/margins``, means over groups
            that have both sides. Where the gradient was formed in the forward also ``skipped``, the share of groups
            without one, and ``skipped_bound`` (see ``coefficient_tol``), and with ``vocab_mass_tol``
            ``active_columns``, the share of the vocabulary that gradients were formed of.
        plan: what was done.
    """

    loss: Tensor
    group_loss: Tensor
    sequence_logp: Tensor
    metrics: dict[str, Tensor]
    plan: Plan


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    sequence_ids: Tensor,
    groups: Groups,
    *,
    objective: str | Objective,
    ref_logp: Tensor | None = None,
    options: dict[str, Any] | None = None,
    group_weight: Tensor | None = None,
    reduction: str = "mean",
    coefficient_tol: float = 0.0,
    vocab_mass_tol: float = 0.0,
    **head: Unpack[LogprobOptions],
) -> PreferenceOutput:
    """Loss on the log-probabilities of groups of sequences, its gradients formed group by group in the forward.

    ::

        out = fastd2o.linear_preference_loss(
            hidden, weight, target, sequence_ids, Groups(group, positive), objective="d2o", ref_logp=ref_logp
        )
        out.loss.backward()

    A token's gradient is ``coef (onehot - softmax)`` with one coefficient for each sequence, known as soon as the
    log-probabilities of its group are. So groups are packed into parts under ``memory_budget``; of each part the
    softmax weights are kept, in the dtype of the products, until its coefficients are there: 6 T·D·V operations in
    place of 8.
    Of a part that does not fit (one very long group) as many columns are kept as do, and the rest is formed again. With
    a frozen head, and without a gradient, the general path is taken: 4 and 2 T·D·V.

    Args:
        hidden: ``[..., D]``; dtypes as in :func:`fastd2o.linear_logprob`.
        weight: ``[V, D]``.
        target: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        sequence_ids: ``[...]`` int64, the sequence of every token, in ``[0, S)``; anything where ignored.
        groups: :class:`Groups` of the S sequences.
        objective: ``"d2o"`` or a type of :func:`~fastd2o.losses.dpo_loss` (:data:`PREFERENCE_OBJECTIVES`): what
            :func:`~fastd2o.losses.grouped_loss` makes of it, one negative a group. Or a callable
            ``(logp [S], ref_logp [S] or None, groups) -> [G]``, given some of the groups at a time, renumbered from 0.
            One that turns out not to be a sum over groups (a batch statistic in it) is computed again on all of them by
            the general path, 8 T·D·V, with a warning.
        ref_logp: [S] floating point, sequence log-probabilities under the reference; see ``grouped_loss``.
        options: of the named objective: ``{"beta": 0.1}``.
        group_weight: [G] weights of the groups' losses, constants.
        reduction: ``"mean"``: the weighted sum divided by the number of groups that have a positive (all groups, for a
            callable and for D2O with ``allow_no_anchor``); ``"sum"``.
        coefficient_tol: leave groups out of the gradient for whose every token ``|dl_g/dm_t|`` is at most this, l_g
            being the group's loss before weight and reduction and m_t the token's log-odds. What the gradient of the
            weight loses has a Frobenius norm of at most ``metrics["skipped_bound"]``. 0: only groups whose coefficients
            are exactly 0 cost nothing in the backward.
        vocab_mass_tol: leave columns out of the gradients of a part that together hold no more than this of the softmax
            of any of its tokens (targets stay): ``|dX_t|`` is off by at most ``|coef_t| tol max |W_v|``, ``dW`` by
            ``sum_t |coef_t| tol |h_t|``; docs/active-vocabulary.md derives it. Applies where softmax weights are kept.
        **head: ``bias, logit_scale, softcap, temperature, ignore_index, backend, plan, memory_budget`` of
            :func:`fastd2o.linear_logprob`. ``memory_budget`` is 1 GiB by default.

    Returns:
        :class:`PreferenceOutput`; the loss is differentiable once in hidden, weight and bias, and its own gradient may
        be anything (loss scaling, accumulation).

    Raises:
        TypeError, ValueError: input that does not fit, as in ``linear_logprob`` and ``grouped_loss``; an option that
            the objective does not have.
    """
    if isinstance(groups, Groups) and isinstance(groups.group, Tensor) and isinstance(hidden, Tensor):
        checks.same_device(**{"hidden": hidden, "groups.group": groups.group})
    call = _Call.checked(groups, objective, ref_logp, options, group_weight, reduction)
    checks.non_negative(coefficient_tol=coefficient_tol, vocab_mass_tol=vocab_mass_tol)
    unknown = set(head) - set(LogprobOptions.__annotations__) - set(HeadOptions.__annotations__)
    if unknown:
        raise TypeError(f"linear_preference_loss has no argument {min(unknown)!r}.")
    if vocab_mass_tol >= 1:
        raise ValueError(f"vocab_mass_tol is {vocab_mass_tol}, expected a share of the softmax below 1.")

    def run(separable: bool) -> Any:
        call.group_loss = hidden.new_zeros(call.groups.count, dtype=torch.float64)
        call.sequence_logp = hidden.new_zeros(len(call.group), dtype=torch.float64)
        call.coefficient = torch.zeros_like(call.sequence_logp)
        return linear_grouped(
            hidden,
            weight,
            target,
            sequence_ids,
            call.group,
            call,
            groups=call.groups.count,
            separable=separable,
            coefficient_tol=call.tolerance(coefficient_tol),
            vocab_mass_tol=vocab_mass_tol,
            **head,
        )

    result = run(separable=True)
    if result.parts > 1 and not call.is_a_sum(result.loss.dtype):
        tokens = result.plan.tokens
        del result  # and the gradients it holds
        warnings.warn(
            "the objective is not a sum over groups: on all of them at once it is not what it is on some of them at a "
            "time. All gradients are formed again, in one piece. Fix: memory_budget= large enough for one part "
            f"({tokens} tokens), or compute it from fastd2o.sequence_logprob",
            FastD2OWarning,
            stacklevel=2,
        )
        result = run(separable=False)
    dtype = result.loss.dtype
    group_loss, sequence_logp = call.group_loss.to(dtype), call.sequence_logp.to(dtype)
    metrics = call.metrics()
    if result.plan.algorithm == "grouped":
        metrics["skipped"] = result.skipped.to(dtype).sum() / max(1, len(result.skipped))
        metrics["skipped_bound"] = result.skipped_bound
    if result.active_share is not None:
        metrics["active_columns"] = result.active_share
    return PreferenceOutput(result.loss, group_loss, sequence_logp, metrics, result.plan)


@dataclass
class _Call:
    """One call's objective, as the loss of a part."""

    groups: Groups
    group: list[int]
    objective: str | Objective
    ref_logp: Tensor | None
    options: dict[str, Any]
    is_weighted: bool
    scale_G: Tensor
    group_loss: Tensor
    sequence_logp: Tensor
    coefficient: Tensor

    @classmethod
    def checked(
        cls,
        groups: Groups,
        objective: str | Objective,
        ref_logp: Tensor | None,
        options: dict[str, Any] | None,
        group_weight: Tensor | None,
        reduction: str,
    ) -> _Call:
        """The door for everything but the head."""
        if not isinstance(groups, Groups):
            raise TypeError(
                f"groups is of type {type(groups).__name__}, expected fastd2o.losses.Groups(group, positive)."
            )
        if not isinstance(groups.group, Tensor) or groups.group.dtype != torch.int64 or groups.group.dim() != 1:
            what = type(groups.group).__name__
            if isinstance(groups.group, Tensor):
                what = f"{groups.group.dtype} of shape {list(groups.group.shape)}"
            raise TypeError(f"groups.group is {what}, expected an int64 tensor [S]: the group of each sequence.")
        if groups.number is not None and (type(groups.number) is not int or groups.number < 0):
            raise ValueError(f"groups.number is {groups.number!r}, expected how many groups there are.")
        checks.mask("groups.positive", groups.positive, like=groups.group)
        checks.one_of("reduction", reduction, ("mean", "sum"))
        group = groups.group.tolist()
        outside = [value for value in group if not 0 <= value < groups.count]
        if outside:
            raise ValueError(f"groups.group holds {outside[0]}, expected groups in [0, {groups.count}).")
        given = {"ref_logp": (ref_logp, len(group)), "group_weight": (group_weight, groups.count)}
        for name, (tensor, length) in given.items():
            if tensor is not None:
                checks.logprobs(**{name: tensor})
                checks.same_device(groups=groups.group, **{name: tensor})
                if list(tensor.shape) != [length]:
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{length}].")
        counted = groups.count
        if isinstance(objective, str):
            checks.one_of("objective", objective, PREFERENCE_OBJECTIVES)
            resolved = dict(resolve_options(objective, options or {}))
            if ref_logp is None:
                raise ValueError(f"ref_logp is missing: objective {objective!r} reads it. Fix: pass ref_logp.")
            _check_roles(groups, group, objective, resolved)
            if not resolved.get("allow_no_anchor"):
                counted = len(_with_positives(groups, group))
        else:
            if not callable(objective):
                raise TypeError(f"objective is of type {type(objective).__name__}, expected a name or a callable.")
            if options:
                raise ValueError("options go with an objective's name. Fix: bind them to the callable.")
            resolved = {}
        scale_G = torch.ones(groups.count, dtype=torch.float64, device=groups.group.device)
        if group_weight is not None:
            scale_G = group_weight.detach().to(scale_G.dtype)
        if reduction == "mean":
            scale_G = scale_G / max(1, counted)
        empty = groups.group.new_empty(0)
        reference = None if ref_logp is None else ref_logp.detach()
        return cls(
            groups, group, objective, reference, resolved, group_weight is not None, scale_G, empty, empty, empty
        )

    def tolerance(self, coefficient_tol: float) -> float | Tensor:
        """[G], in units of the loss; infinite for groups without weight, which may hold anything, if it is known that
        no other group's loss depends on them."""
        tolerance_G = coefficient_tol * self.scale_G.abs()
        if isinstance(self.objective, str) and self.is_weighted:
            return torch.where(self.scale_G == 0, torch.inf, tolerance_G)
        return tolerance_G if coefficient_tol > 0 else 0.0

    def __call__(self, part: Part) -> Tensor:
        """A part's share of the loss."""
        loss_G, logp_S = self._of_part(part)
        some = slice(part.groups.start, part.groups.stop)
        self.group_loss[some] = loss_G.detach().to(self.group_loss.dtype)
        self.sequence_logp[part.sequences] = logp_S.detach().to(self.sequence_logp.dtype)
        # A weight of 0 takes a group out of the loss, whatever that is.
        scale_G = self.scale_G[some].to(loss_G.dtype)
        return torch.where(scale_G == 0, 0.0, scale_G * loss_G).sum()

    def _of_part(self, part: Part) -> tuple[Tensor, Tensor]:
        """[G'] losses and [S'] log-probabilities."""
        positive_S = self.groups.positive[part.sequences]
        token_logp = F.logsigmoid(part.logodds)
        reference_S = None if self.ref_logp is None else self.ref_logp[part.sequences].to(token_logp.dtype)
        length_S = segment_lengths(part.sequence_start, len(token_logp))
        if not isinstance(self.objective, str):
            logp_S = sum_segments(token_logp, length_S)
            own_S = segment_owner(part.group_start, len(positive_S))
            return self._in_given_order(part, logp_S, reference_S, own_S), logp_S
        if self.objective == "ipo" or self.options.get("length_normalize"):
            empty = part.sequences[length_S == 0].tolist()
            if empty:
                raise ValueError(
                    f"sequence {empty[0]} is empty: it has no mean log-probability. Fix: drop the empty sequences."
                )
        options = self.options
        if self.objective == "d2o" and not options["allow_no_anchor"] and not positive_S.any():
            # Groups without an anchor have no loss; all of a part's may be, if not all of the call's.
            logp_S = sum_segments(token_logp, length_S)
            return logp_S.new_zeros(len(part.groups)) + logp_S[:0].sum(), logp_S
        result = grouped_loss(
            token_logp,
            part.sequence_start,
            part.group_start,
            positive_S,
            objective=self.objective,
            ref_logp=reference_S,
            **options,
        )
        return result.loss, result.sequence_logp

    def _in_given_order(self, part: Part, logp_S: Tensor, reference_S: Tensor | None, own_S: Tensor) -> Tensor:
        """A callable's [G'] losses, its sequences in the order in which the caller has them, not group by group."""
        sequences, order = part.sequences.sort()
        groups = Groups(own_S[order], self.groups.positive[sequences], len(part.groups))
        logp_S = logp_S[order]
        if logp_S.requires_grad:
            logp_S.register_hook(lambda gradient: self._remember(sequences, gradient))
        return self._by_callable(logp_S, None if reference_S is None else reference_S[order], groups)

    def _by_callable(self, logp_S: Tensor, reference_S: Tensor | None, groups: Groups) -> Tensor:
        assert not isinstance(self.objective, str)
        loss_G = self.objective(logp_S, reference_S, groups)
        if not isinstance(loss_G, Tensor) or list(loss_G.shape) != [groups.count]:
            what = f"shape {list(loss_G.shape)}" if isinstance(loss_G, Tensor) else f"a {type(loss_G).__name__}"
            raise ValueError(f"objective returned {what}, expected [{groups.count}], the loss of each group.")
        return loss_G

    def _remember(self, sequences: Tensor, gradient: Tensor) -> None:
        self.coefficient[sequences] = gradient.to(self.coefficient.dtype)

    def is_a_sum(self, dtype: torch.dtype) -> bool:
        """Whether a callable's losses, and their derivatives by the log-probabilities, are on all groups at once what
        they were on some of them at a time, in the same dtype."""
        if isinstance(self.objective, str):
            return True
        logp_S = self.sequence_logp.to(dtype).requires_grad_()
        reference_S = None if self.ref_logp is None else self.ref_logp.to(dtype)
        with torch.enable_grad(), without_autocast(logp_S.device):
            loss_G = self._by_callable(logp_S, reference_S, self.groups).double()
            total = torch.where(self.scale_G == 0, 0.0, self.scale_G * loss_G).sum()
        derivative = torch.autograd.grad(total, logp_S)[0] if total.requires_grad else torch.zeros_like(logp_S)
        return _same(self.group_loss, loss_G.detach()) and _same(self.coefficient, derivative.double())

    def metrics(self) -> dict[str, Tensor]:
        """What there is to log, from the log-probabilities of all sequences."""
        groups, logp_S = self.groups, self.sequence_logp
        has_positive = groups.positives(groups.positive.to(logp_S.dtype)) > 0
        has_negative = groups.negatives(torch.ones_like(logp_S)) > 0
        both = has_positive & has_negative

        def mean(values_G: Tensor, where_G: Tensor) -> Tensor:
            return torch.where(where_G, values_G, 0.0).sum() / where_G.sum().clamp(min=1)

        measured = {
            "logps/chosen": mean(groups.positives(logp_S), has_positive),
            "logps/rejected": mean(groups.negatives(logp_S), has_negative),
        }
        if self.ref_logp is not None and "beta" in self.options:
            reward_S = self.options["beta"] * (logp_S - self.ref_logp)
            chosen, rejected = groups.positives(reward_S), groups.negatives(reward_S)
            beaten = (reward_S > rejected[groups.group]).to(reward_S.dtype)
            measured |= {
                "rewards/chosen": mean(chosen, both),
                "rewards/rejected": mean(rejected, both),
                "rewards/accuracies": mean(groups.positives(beaten), both),
                "rewards/margins": mean(chosen - rejected, both),
            }
        return {name: value.float() for name, value in measured.items()}


def _same(ours: Tensor, whole: Tensor) -> bool:
    """Equal but for rounding, of which more is allowed to what is small beside the rest."""
    finite = whole[whole.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    return torch.allclose(ours, whole, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True)


def _check_roles(groups: Groups, group: list[int], objective: str, options: dict[str, Any]) -> None:
    """What the named objectives want of every group."""
    negatives = [0] * groups.count
    for number, positive in zip(group, groups.positive.tolist(), strict=True):
        negatives[number] += not positive
    for number, count in enumerate(negatives):
        if count != 1:
            raise ValueError(
                f"group {number} has {count} negatives in groups.positive, expected exactly one. Fix: make a group for "
                "each negative, with the positives it is compared with."
            )
    if objective == "d2o" and not options["allow_no_anchor"] and negatives and not groups.positive.any():
        raise ValueError(
            "no group has an anchor: groups.positive is False throughout. Fix: sample anchors, or pass "
            'options={"allow_no_anchor": True} to train on the negatives alone.'
        )


def _with_positives(groups: Groups, group: list[int]) -> set[int]:
    return {number for number, positive in zip(group, groups.positive.tolist(), strict=True) if positive}
