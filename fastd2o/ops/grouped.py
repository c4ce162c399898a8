"""Losses of groups of tokens, with their gradients formed group by group in the forward.

The gradient of a loss on log-probabilities is ``coef_t (onehot - softmax)`` for every token, and a loss that is a sum
over groups gives away the coefficients of a group as soon as that group's log-probabilities are known: while its
softmax is still in memory. Logits need not be formed a second time, which is a quarter of all operations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastd2o.ops import engine
from fastd2o.ops.autograd import check_differentiated_once, without_autocast
from fastd2o.ops.checks import (
    check_head,
    check_integer,
    check_not_forward_mode,
    check_target,
    check_transform,
    choose_plan,
)
from fastd2o.ops.counted import check_targets
from fastd2o.ops.logprob import linear_logodds
from fastd2o.ops.plan import Plan
from fastd2o.ops.tile_ops import LogitTransform


class Part(NamedTuple):
    """Whole groups, as the loss gets to see them: their tokens sequence by sequence, their sequences group by group. N
    tokens, S' sequences, G' groups.

    Attributes:
        groups: which of the G groups.
        sequences: [S'] int64, which of the S sequences.
        group_start: [G' + 1] int64, where in S' each group begins, and S'.
        sequence_start: [S' + 1] int64, where in N each sequence begins, and N.
        tokens: [N] int64, flat positions in ``target`` of the tokens that count.
        logodds: [N], differentiable.
        extra: what was given as ``extra``, whole, differentiable.
        statistics: [N] each, without gradient, if they were asked for.
    """

    groups: range
    sequences: Tensor
    group_start: Tensor
    sequence_start: Tensor
    tokens: Tensor
    logodds: Tensor
    extra: tuple[Tensor, ...]
    statistics: engine.Statistics | None


class Grouped(NamedTuple):
    """Result of :func:`linear_grouped`. Only ``loss`` carries a gradient.

    Attributes:
        loss: 0-d, the sum over the parts.
        skipped: [G] bool, the groups whose every coefficient is at most ``coefficient_tol``, or exactly 0 without one.
            Where the gradient is not formed in the forward it is filled in by the backward, if there is a tolerance;
            so is the next.
        skipped_bound: 0-d, no less than the Frobenius norm of what was left out of the weight's gradient with them:
            ``sqrt(2) slope sum_t |coef_t| |h_t|``.
        active_share: 0-d, the share of the vocabulary that the gradients were formed of, mean over the tokens that had
            one; None without ``vocab_mass_tol``.
        plan: what was done.
        parts: in how many parts.
    """

    loss: Tensor
    skipped: Tensor
    skipped_bound: Tensor
    active_share: Tensor | None
    plan: Plan
    parts: int


@torch.compiler.disable
def linear_grouped(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    sequence: Tensor,
    group: Sequence[int],
    loss: Callable[[Part], Tensor],
    *,
    groups: int,
    extra: Sequence[Tensor] = (),
    separable: bool = True,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    plan: Plan | None = None,
    memory_budget: int | float | None = None,
    coefficient_tol: float | Tensor = 0.0,
    vocab_mass_tol: float = 0.0,
    stats: bool = False,
) -> Grouped:
    """``sum over parts of loss(part)``, where a part is some of the groups.

    With a trained head, and if the loss is ``separable``, every part's gradient is formed in the forward
    (``Plan.algorithm`` is ``"grouped"``). Otherwise there is one part, of all groups, and autograd goes through
    :func:`fastd2o.linear_logodds`.

    The host waits for the device: to lay out the groups, and in every part, if ``plan.compact``, to know which
    coefficients are 0.

    Args:
        hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index, backend: as in
            :func:`fastd2o.linear_logprob`.
        sequence: int64 of target's shape, the sequence of every token, in ``[0, S)``; anything where ignored.
        group: the group of every one of the S sequences, in ``[0, groups)``.
        loss: a part -> its share of the loss, 0-d, differentiable in the part's log-odds and ``extra``.
        groups: G.
        extra: other floating-point tensors that the loss depends on and that may need a gradient.
        separable: whether the loss is a sum over groups at all.
        plan, memory_budget: how much memory the parts may take, see :meth:`fastd2o.Plan.choose`.
        coefficient_tol: a group is left out of the gradient if ``|dloss/dm_t|`` is no larger for any of its tokens; a
            number, or one for each group, infinite for those that do not count.
        vocab_mass_tol: columns are left out of the gradients of a part that together hold no more than this of the
            softmax of any of its tokens. Exact gradients with 0, and wherever softmax weights are not kept.
        stats: measure statistics for the loss to see.
    """
    check_head(hidden, weight, bias)
    check_target("target", target, hidden)
    check_target("sequence_ids", sequence, hidden)
    check_transform(logit_scale, softcap, temperature)
    check_integer("ignore_index", ignore_index)
    check_not_forward_mode(hidden, weight, bias, *extra)
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    target_T, hidden_TD = target.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    layout = Layout.of(target_T, sequence.reshape(-1), group, groups, len(weight), ignore_index)
    chosen = choose_plan(
        plan, backend, hidden_TD[: layout.tokens], weight, bias, grouped=True, memory_budget=memory_budget
    )
    skipping = _Skipping.empty(layout, coefficient_tol, transform)
    if chosen.algorithm == "grouped" and separable:
        head = engine.Head(weight.detach(), None if bias is None else bias.detach(), transform)
        call = _Call(head, layout.gather(target_T), layout, loss, chosen, skipping, vocab_mass_tol, stats)
        total = _GroupedLoss.apply(hidden_TD, weight, bias, call, *extra)
        return Grouped(total, skipping.skipped_G, skipping.bound, call.active_share, chosen, len(call.parts))

    if chosen.algorithm == "grouped":
        chosen = replace(chosen, algorithm="recompute", part_tokens=None)
    # Gathered here, so that what the operator keeps for its backward is of the tokens that count alone.
    hidden_CD = layout.gather(hidden_TD)
    result = linear_logodds(
        hidden_CD,
        weight,
        layout.gather(target_T),
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        plan=chosen,
        stats=stats,
    )
    logodds, *statistics = result if isinstance(result, tuple) else (result,)
    everything = layout.part(range(groups), slice(0, layout.tokens))
    total = loss(everything._replace(logodds=logodds, extra=tuple(extra), statistics=_statistics(statistics)))
    if logodds.requires_grad and total.requires_grad:
        skipping.watch(total, logodds, hidden_CD.detach())
    return Grouped(total, skipping.skipped_G, skipping.bound, None, chosen, 1)


def _statistics(columns: list[Tensor]) -> engine.Statistics | None:
    return engine.Statistics(*columns) if columns else None


@dataclass(frozen=True)
class Layout:
    """The C tokens that count, sequence by sequence, group by group.

    Attributes:
        positions: [C] int64, flat positions in target; None: all of them, as they are.
        order: the S sequences, group by group.
        lengths: of the sequences, in that order.
        sizes: how many sequences each group has.
        tokens: C.
        total: of positions in target.
        device: of the tensors that are made.
    """

    positions: Tensor | None
    order: list[int]
    lengths: list[int]
    sizes: list[int]
    tokens: int
    total: int
    device: torch.device

    @classmethod
    def of(
        cls,
        target_T: Tensor,
        sequence_T: Tensor,
        group: Sequence[int],
        groups: int,
        vocab_size: int,
        ignore_index: int,
    ) -> Layout:
        """That of target and sequence ``[T]``, given the group of every sequence.

        Raises:
            ValueError: a target or a sequence that counts is out of range.
        """
        tokens = check_targets(target_T, vocab_size, ignore_index)
        positions_C = torch.nonzero_static(target_T != ignore_index, size=tokens).squeeze(1)
        sequence_C = sequence_T[positions_C]
        # One wait for the device more: how long the sequences are.
        outside_C = (sequence_C < 0) | (sequence_C >= len(group))
        lengths_S = torch.where(outside_C, len(group), sequence_C).bincount(minlength=len(group) + 1).tolist()
        if lengths_S.pop():
            raise ValueError(
                f"sequence_ids holds {int(sequence_C[outside_C][0])} where target counts: expected ids in "
                f"[0, {len(group)}), one for each of the sequences of groups"
            )
        order = sorted(range(len(group)), key=group.__getitem__)
        rank = torch.empty(len(group), dtype=torch.int64)
        rank[order] = torch.arange(len(group))
        by_rank = rank.to(target_T.device)[sequence_C].argsort(stable=True)
        in_order = bool((by_rank.diff() > 0).all())
        sizes = [0] * groups
        for of_sequence in group:
            sizes[of_sequence] += 1
        return cls(
            positions=None if in_order and tokens == len(target_T) else positions_C[by_rank],
            order=order,
            lengths=[lengths_S[sequence] for sequence in order],
            sizes=sizes,
            tokens=tokens,
            total=len(target_T),
            device=target_T.device,
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows that count, in order."""
        return tensor if self.positions is None else tensor.index_select(0, self.positions)

    def scatter(self, values: Tensor) -> Tensor:
        """Back to all rows, 0 in those that do not count."""
        if self.positions is None:
            return values
        return values.new_zeros((self.total, *values.shape[1:])).index_copy_(0, self.positions, values)

    def parts(self, part_tokens: int | None) -> Iterator[tuple[range, slice]]:
        """Groups and their tokens: consecutive groups with no more tokens together than that, or one that has more by
        itself."""
        counts = self.tokens_of_groups
        first, start, end = 0, 0, 0
        for group, count in enumerate(counts):
            if part_tokens is not None and end > start and end - start + count > part_tokens:
                yield range(first, group), slice(start, end)
                first, start = group, end
            end += count
        yield range(first, len(counts)), slice(start, end)

    @cached_property
    def tokens_of_groups(self) -> list[int]:
        """How many tokens each group has."""
        lengths = iter(self.lengths)
        return [sum(itertools.islice(lengths, size)) for size in self.sizes]

    def part(self, groups: range, tokens: slice) -> Part:
        """What is known of a part before its forward."""
        first, last = (sum(self.sizes[:group]) for group in (groups.start, groups.stop))
        positions = torch.arange(self.total, device=self.device) if self.positions is None else self.positions
        order_S, group_start, sequence_start, _ = self.tensors
        return Part(
            groups=groups,
            sequences=order_S[first:last],
            group_start=group_start[groups.start : groups.stop + 1] - first,
            sequence_start=sequence_start[first : last + 1] - tokens.start,
            tokens=positions[tokens],
            logodds=torch.empty(0),
            extra=(),
            statistics=None,
        )

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """``order``, where in it each group begins, where in C each sequence begins, and ``tokens_of_groups``; int64,
        by one copy to the device."""
        starts = ([0, *itertools.accumulate(numbers)] for numbers in (self.sizes, self.lengths))
        lists = [self.order, *starts, self.tokens_of_groups]
        packed = torch.tensor(list(itertools.chain(*lists)), dtype=torch.int64, device=self.device)
        return packed.split([len(numbers) for numbers in lists])


@dataclass(frozen=True)
class _Skipping:
    """Which groups have coefficients too small to matter.

    Attributes:
        tolerance_G: [G]; None: only coefficients of exactly 0 do not matter, and products leave those out anyhow.
        norm_bound: of a row of a gradient by the logits, over its coefficient.
        skipped_G, bound: what was found.
    """

    layout: Layout
    tolerance_G: Tensor | None
    norm_bound: float
    skipped_G: Tensor
    bound: Tensor

    @classmethod
    def empty(cls, layout: Layout, tolerance: float | Tensor, transform: LogitTransform) -> _Skipping:
        groups = len(layout.sizes)
        tolerance_G = None
        if isinstance(tolerance, Tensor) or tolerance > 0:
            tolerance_G = torch.as_tensor(tolerance, dtype=torch.float64, device=layout.device).expand(groups)
        return cls(
            layout,
            tolerance_G,
            math.sqrt(2) * abs(transform.slope),
            torch.zeros(groups, dtype=torch.bool, device=layout.device),
            torch.zeros((), dtype=torch.float64, device=layout.device),
        )

    def watch(self, loss: Tensor, logodds: Tensor, hidden_CD: Tensor) -> None:
        """Skip in the backward: tolerances are for the gradient of ``loss``, whatever its own gradient is."""
        if self.tolerance_G is None:
            return
        upstream = [loss.new_ones(())]

        def of_loss(gradient: Tensor) -> None:
            upstream[0] = gradient.abs()

        def of_logodds(gradient: Tensor) -> Tensor:
            self.bound.zero_()
            return self(range(len(self.layout.sizes)), gradient, hidden_CD, upstream[0])

        loss.register_hook(of_loss)
        logodds.register_hook(of_logodds)

    def __call__(self, groups: range, coef_N: Tensor, hidden_ND: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Coefficients of the tokens of these groups, times ``scale``, with 0 for those of a group that is skipped."""
        some = slice(groups.start, groups.stop)
        *_, count_of_all = self.layout.tensors
        count_G = count_of_all[some]
        largest_G = torch.segment_reduce(coef_N.abs(), "max", lengths=count_G, initial=0.0, unsafe=True)
        if self.tolerance_G is None:
            self.skipped_G[some] = largest_G == 0
            return coef_N
        # A group that does not count may have a NaN for a coefficient; in any other that has to be seen.
        muted_G = self.tolerance_G[some] == torch.inf
        skipped_G = muted_G | (largest_G <= self.tolerance_G[some] * scale)
        self.skipped_G[some] = skipped_G
        skipped_N, muted_N = (
            torch.repeat_interleave(of_groups, count_G, output_size=len(coef_N)) for of_groups in (skipped_G, muted_G)
        )
        norm_N = hidden_ND.norm(dim=1, dtype=coef_N.dtype)
        lost = torch.where(skipped_N & ~muted_N, coef_N.abs() * norm_N, 0.0).sum()
        self.bound.add_(self.norm_bound * torch.where(lost > 0, lost / scale, 0.0))
        return torch.where(skipped_N, 0.0, coef_N)


@dataclass
class _Call:
    """What the autograd function below is to do, and what else it found out."""

    head: engine.Head
    target_C: Tensor
    layout: Layout
    loss: Callable[[Part], Tensor]
    plan: Plan
    skipping: _Skipping
    vocab_mass_tol: float
    stats: bool
    active_share: Tensor | None = None

    @cached_property
    def parts(self) -> list[tuple[range, slice]]:
        """Groups and tokens."""
        return list(self.layout.parts(self.plan.part_tokens))

    def run(
        self, hidden_CD: Tensor, extra: tuple[Tensor, ...], need: tuple[bool, bool, bool]
    ) -> tuple[Tensor, engine.GroupedResult, list[Tensor]]:
        """The loss, its gradients, and those of ``extra``."""
        plan = self.plan
        tiling = engine.Tiling(
            plan.block_tokens, plan.block_vocab, plan.dtype, plan.backend, plan.fused, plan.kept_bytes
        )
        groups_of = {tokens.start: groups for groups, tokens in self.parts}
        leaves = [tensor.detach().requires_grad_() for tensor in extra]
        extra_gradients = [torch.zeros_like(tensor) for tensor in extra]
        total = hidden_CD.new_zeros((), dtype=tiling.sum_dtype)

        def coefficients(tokens: slice, forward: engine.LogoddsResult) -> Tensor:
            nonlocal total
            groups = groups_of[tokens.start]
            logodds = forward.logodds.detach().requires_grad_()
            part = self.layout.part(groups, tokens)._replace(
                logodds=logodds, extra=tuple(leaves), statistics=forward.statistics
            )
            with torch.enable_grad():
                value = self.loss(part)
            total = total + value.detach()
            if not value.requires_grad:
                return torch.zeros_like(logodds)
            coef, *of_extra = torch.autograd.grad(value, [logodds, *leaves], allow_unused=True)
            for sums, gradient in zip(extra_gradients, of_extra, strict=True):
                if gradient is not None:
                    sums += gradient
            if coef is None:
                return torch.zeros_like(logodds)
            return self.skipping(groups, coef, hidden_CD[tokens])

        need_hidden, need_weight, need_bias = need
        with without_autocast(hidden_CD.device):
            result = engine.grouped(
                hidden_CD,
                self.head,
                self.target_C,
                [tokens for _, tokens in self.parts],
                coefficients,
                tiling,
                statistics=self.stats,
                need_hidden=need_hidden,
                need_weight=need_weight,
                need_bias=need_bias,
                compact=plan.compact,
                mass_tol=self.vocab_mass_tol,
            )
        if self.vocab_mass_tol > 0:
            self.active_share = torch.tensor(result.active_share, dtype=total.dtype, device=total.device)
        return total, result, extra_gradients


class _GroupedLoss(torch.autograd.Function):
    """Gradients are formed in the forward and multiplied with that of the loss in the backward, in place: there is no
    second copy of ``[V, D]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, *extra: Tensor) -> Tensor:
        need = ctx.needs_input_grad
        hidden_CD = call.layout.gather(hidden).to(call.plan.dtype)
        total, result, of_extra = call.run(hidden_CD, extra, (need[0], need[1], need[2]))
        ctx.gradients = [result.hidden_TD, result.weight_VD, result.bias_V, *of_extra]
        ctx.layout = call.layout
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype, *(x.dtype for x in extra)]
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through a loss whose gradients were handed out by the first. Fix: compute the loss "
                "again, or add losses up and call backward once"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if not (grad_loss.device.type == "cpu" and grad_loss == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        dhidden, dweight, dbias, *of_extra = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        need = ctx.needs_input_grad
        return (
            None if dhidden is None else ctx.layout.scatter(dhidden),
            dweight,
            dbias,
            None,
            *(gradient if needed else None for gradient, needed in zip(of_extra, need[4:], strict=True)),
        )
