"""One forward of a batch: from token ids to what the objectives are made of.

S sequences (rows of the batch), L tokens, G groups, K positives in the largest group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from fastd2o.ops import linear_cringe, linear_logprob, shift_labels
from fastd2o.ops.grouped import Grouped, Part, linear_grouped

IGNORED = -100
UNITS = ("group", "sequence", "token")
"""What a loss can be a mean over, in the order of :meth:`Batch.counts`."""


@dataclass(frozen=True)
class Batch:
    """What :class:`fastd2o.data.PreferenceCollator` makes, with the roles of its rows.

    A row that is neither a negative nor a positive is a *mismatch*: a completion under a prompt it does not belong to
    (KTO).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    negative_row: Tensor
    positive_rows: Tensor
    line: Tensor
    ref_logp: Tensor | None = None
    harmful_ref_logp: Tensor | None = None

    @cached_property
    def target(self) -> Tensor:
        """[S, L] int64: the token that each position is to predict, -100 where none counts."""
        return shift_labels(self.labels)

    @cached_property
    def negative(self) -> Tensor:
        """[S] bool: the row is a negative."""
        return self._rows(self.negative_row)

    @cached_property
    def positive(self) -> Tensor:
        """[S] bool: the row is a positive."""
        return self._rows(self.positive_rows.flatten())

    def counts(self) -> Tensor:
        """[3] int64: how many of each of :data:`UNITS` the batch holds, mismatches left out."""
        tokens = (self.target != IGNORED).sum(1)
        rows = self.negative | self.positive
        return torch.stack([rows.new_tensor(len(self.line), dtype=torch.int64), rows.sum(), (tokens * rows).sum()])

    @cached_property
    def group_of_rows(self) -> list[int]:
        """The group of every row; a mismatch has none of its own and is put into the first."""
        owner = self.labels.new_zeros(len(self.labels) + 1)
        groups = torch.arange(len(self.line), device=owner.device)
        owner[self.negative_row] = groups
        owner[self.positive_rows] = groups[:, None].expand_as(self.positive_rows)
        return owner[:-1].tolist()

    def select(self, groups: range, rows: Tensor) -> Batch:
        """Some of the groups, and their rows."""
        some = slice(groups.start, groups.stop)
        place = self.labels.new_full((len(self.labels) + 1,), -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        return Batch(
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            labels=self.labels[rows],
            negative_row=place[self.negative_row[some]],
            positive_rows=place[self.positive_rows[some]],
            line=self.line[some],
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            harmful_ref_logp=None if self.harmful_ref_logp is None else self.harmful_ref_logp[rows],
        )

    def _rows(self, indices: Tensor) -> Tensor:
        # Absent rows are -1: they land in a slot behind the last row, here and above.
        return self.labels.new_zeros(len(self.labels) + 1).index_fill(0, indices, 1)[:-1].bool()


@dataclass(frozen=True)
class Wants:
    """What the objectives ask of a forward, beyond the log-probability of every token.

    Attributes:
        cringe_k: candidates of the Cringe loss on the tokens of the negatives; None: no Cringe loss.
        cringe_detach_positive: see :func:`fastd2o.linear_cringe`.
        negative_gradient: whether the log-probabilities of negatives are differentiated. If not, the pass over the
            vocabulary that the Cringe loss makes is the only one that negatives need.
    """

    cringe_k: int | None = None
    cringe_detach_positive: bool = False
    negative_gradient: bool = True


class Measure(NamedTuple):
    """A metric as a sum and its weight, so that micro-batches, logging windows and ranks add up exactly."""

    total: Tensor
    weight: Tensor


class Outcome(NamedTuple):
    """The loss of a batch, summed over its units and connected to the graph, and what to log of it."""

    loss: Tensor
    metrics: dict[str, Measure]


class TokenStatistics(NamedTuple):
    """Of the distribution that each target was drawn from, [S, L] without gradient.

    Attributes:
        known: bool, where the others were measured: not where the Cringe loss stands in for the log-odds.
        entropy: nats.
        top1: int64, the most likely token.
        mean_logit: over the vocabulary.
    """

    known: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor


class TokenScores(NamedTuple):
    """What the head gives, [S, L] each, aligned with :attr:`Batch.target` and 0 where nothing counts.

    Attributes:
        logp: log-probability of the target.
        logodds: its log-odds, exact where ``1 − p`` has been rounded away; 0 where the Cringe loss stands in for it.
        cringe: the Cringe loss of the tokens of negatives, or None.
        statistics: if they were asked for.
    """

    logp: Tensor
    logodds: Tensor
    cringe: Tensor | None
    statistics: TokenStatistics | None


class ReferenceLogps(NamedTuple):
    """[S] float32 each, without gradient: the completions under the (helpful) reference and under D2O's harmful one."""

    helpful: Tensor
    harmful: Tensor


@dataclass(frozen=True)
class Scores:
    """A scored batch, and its references: what an objective is a function of.

    Attributes:
        batch: the rows and their roles.
        tokens: per token.
        references: per sequence, or None where no objective has a reference.
        over_ranks: sums a small tensor over all processes (training), or returns it (evaluation).
    """

    batch: Batch
    tokens: TokenScores
    references: ReferenceLogps | None
    over_ranks: Callable[[Tensor], Tensor]

    @cached_property
    def mask(self) -> Tensor:
        """[S, L] bool: the tokens that count."""
        return self.batch.target != IGNORED

    @cached_property
    def length(self) -> Tensor:
        """[S] int64: tokens that count; at least 1, the data layer lets no empty completion through."""
        return self.mask.sum(1)

    @cached_property
    def logp(self) -> Tensor:
        """[S]: log-probability of each completion, summed over its tokens."""
        return self.tokens.logp.sum(1)

    @property
    def reference(self) -> Tensor:
        """[S]: log-probability of each completion under the reference."""
        assert self.references is not None
        return self.references.helpful

    @property
    def harmful_reference(self) -> Tensor:
        """[S]: the same under D2O's harmful reference."""
        assert self.references is not None
        return self.references.harmful

    @property
    def positive_mask(self) -> Tensor:
        """[G, K] bool: the positives that are there."""
        return self.batch.positive_rows >= 0

    def negatives(self, rows: Tensor) -> Tensor:
        """[S] -> [G]: the value of each group's negative, where it has one."""
        return rows[self.batch.negative_row.clamp(min=0)]

    def positives(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """[S] -> [G, K]: the values of each group's positives, ``fill`` where there is none."""
        return torch.where(self.positive_mask, rows[self.batch.positive_rows.clamp(min=0)], fill)


@dataclass(frozen=True)
class HeadOptions:
    """How much the fused head may take, and what it may leave out; see :func:`fastd2o.linear_preference_loss`.

    Attributes:
        memory_budget: bytes, a share of the free memory, or None for the default.
        coefficient_tol: in units of a group's own loss.
        vocab_mass_tol: share of a token's softmax.
    """

    memory_budget: float | None = None
    coefficient_tol: float = 0.0
    vocab_mass_tol: float = 0.0


def score(
    model: nn.Module,
    batch: Batch,
    wants: Wants,
    objective: Callable[[Scores], Outcome],
    *,
    references: ReferenceLogps | None,
    over_ranks: Callable[[Tensor], Tensor],
    seed: str,
    statistics: bool,
    separable: bool,
    unit_scale: Tensor | float = 1.0,
    options: HeadOptions,
) -> tuple[Outcome, Scores]:
    """Run ``model`` (attached, however wrapped) over the batch, once: the objective of its scores, and those scores
    without a gradient.

    Where the head trains and the objective is ``separable``, a sum over groups, it is called with some of the groups at
    a time, and gradients are formed group by group (:func:`fastd2o.ops.grouped.linear_grouped`); otherwise with all.

    Args:
        objective: scores -> loss and metrics, both sums.
        references, over_ranks: of the scores.
        seed: the draws of the Cringe loss depend on it and a row's dataset line alone, so that batching cannot change
            them.
        statistics: they cost about half as much again as the rest of the fold.
        unit_scale: what the objective multiplies a group's own loss with.
    """

    def head(hidden: Tensor, weight: Tensor, **head_options: Any) -> tuple[Tensor, dict[str, Measure], Scores]:
        target = batch.target
        cringe, cringe_logp = None, torch.zeros_like(target, dtype=torch.float32)
        if wants.cringe_k is not None:
            cringe, cringe_logp = _cringe(hidden, weight, batch, wants, seed, head_options)
            if not wants.negative_gradient:
                target = target.masked_fill(batch.negative[:, None], IGNORED)
        nothing = TokenScores(cringe_logp, cringe_logp, None, None)
        parts = _Parts(Scores(batch, nothing, references, over_ranks), target, cringe_logp, objective)
        result = linear_grouped(
            hidden,
            weight,
            target,
            torch.arange(len(target), device=target.device)[:, None].expand_as(target),
            batch.group_of_rows,
            parts,
            groups=len(batch.line),
            extra=() if cringe is None else (cringe,),
            separable=separable,
            memory_budget=options.memory_budget,
            coefficient_tol=options.coefficient_tol * unit_scale if options.coefficient_tol > 0 else 0.0,
            vocab_mass_tol=options.vocab_mass_tol,
            stats=statistics,
            **head_options,
        )
        return result.loss, parts.metrics | _measured(result, options), parts.scores()

    loss, metrics, scores = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, fused=head).head
    return Outcome(loss, metrics), scores


def sequence_logp(model: nn.Module, batch: Batch) -> Tensor:
    """[S] without gradient: the log-probability of every completion under ``model``, summed over its tokens."""

    def head(hidden: Tensor, weight: Tensor, **head_options: Any) -> Tensor:
        return linear_logprob(hidden, weight, batch.target, **head_options).sum(1)

    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, fused=head).head


class _Parts:
    """An objective as the loss of a part of the batch; it gathers what its parts leave behind.

    Args:
        whole: the scores of the batch, tokens still to come.
        target: [S, L], that log-odds are formed of.
        cringe_logp: [S, L], the log-probabilities of the other tokens.
        objective: scores -> loss and metrics, both sums.
    """

    def __init__(
        self, whole: Scores, target: Tensor, cringe_logp: Tensor, objective: Callable[[Scores], Outcome]
    ) -> None:
        self.whole, self.target, self.cringe_logp, self.objective = whole, target, cringe_logp, objective
        self.metrics: dict[str, Measure] = {}
        self._rows: list[Tensor] = []
        self._tokens: list[TokenScores] = []

    def __call__(self, part: Part) -> Tensor:
        """The objective's loss of a part; its metrics are added up."""
        whole = self.whole
        if len(part.groups) == len(whole.batch.line):
            rows = torch.arange(len(self.target), device=self.target.device)
            scores = replace(whole, tokens=self._token_scores(part, slice(None)))
        else:
            rows = part.sequences
            references = whole.references
            scores = replace(
                whole,
                batch=whole.batch.select(part.groups, rows),
                tokens=self._token_scores(part, rows),
                references=None if references is None else ReferenceLogps(*(logps[rows] for logps in references)),
            )
        outcome = self.objective(scores)
        for name, measure in outcome.metrics.items():
            before = self.metrics.get(name, Measure(torch.zeros_like(measure.total), torch.zeros_like(measure.weight)))
            self.metrics[name] = Measure(before.total + measure.total, before.weight + measure.weight)
        self._rows.append(rows)
        self._tokens.append(tree_map_only(Tensor, Tensor.detach, scores.tokens))
        return outcome.loss

    def scores(self) -> Scores:
        """Those of the batch, without a gradient."""
        order = torch.cat(self._rows).argsort()
        tokens = tree_map(
            lambda *fields: None if fields[0] is None else torch.cat(fields)[order], self._tokens[0], *self._tokens[1:]
        )
        return replace(self.whole, tokens=tokens)

    def _token_scores(self, part: Part, rows: Tensor | slice) -> TokenScores:
        """[S', L] of some rows."""

        def grid(values: Tensor) -> Tensor:
            flat = values.new_zeros(self.target.numel()).index_copy(0, part.tokens, values)
            return flat.view(self.target.shape)[rows]

        known = (self.target != IGNORED)[rows]
        logodds = grid(part.logodds)
        logp = torch.where(known, F.logsigmoid(logodds), self.cringe_logp[rows])
        statistics = None if part.statistics is None else TokenStatistics(known, *map(grid, part.statistics))
        return TokenScores(logp, logodds, part.extra[0][rows] if part.extra else None, statistics)


def _measured(result: Grouped, options: HeadOptions) -> dict[str, Measure]:
    """What the head left out of its gradients."""
    metrics = {}
    if result.plan.algorithm == "grouped" and options.coefficient_tol > 0:
        metrics["head/skipped"] = Measure(
            result.skipped.sum(), torch.full_like(result.skipped_bound, len(result.skipped))
        )
        metrics["head/skipped_bound"] = Measure(result.skipped_bound, torch.ones_like(result.skipped_bound))
    if result.active_share is not None:
        metrics["head/active_columns"] = Measure(result.active_share, torch.ones_like(result.active_share))
    return metrics


def _cringe(
    hidden: Tensor, weight: Tensor, batch: Batch, wants: Wants, seed: str, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """[S, L] Cringe loss and log-probability of the tokens of negatives, 0 elsewhere."""
    assert wants.cringe_k is not None
    absent = batch.negative_row < 0
    line = torch.zeros_like(batch.labels[:, 0])
    line[batch.negative_row[~absent]] = batch.line[~absent]
    # A token's counter is its line and its place in it: 2^32 of either are more than there are.
    counter = line[:, None] * 2**32 + torch.arange(batch.labels.shape[1], device=line.device)
    output = linear_cringe(
        hidden,
        weight,
        batch.target.masked_fill(~batch.negative[:, None], IGNORED),
        k=wants.cringe_k,
        detach_positive=wants.cringe_detach_positive,
        seed=hash64(seed),
        counter=counter,
        **options,
    )
    return output.loss, output.logprob


def hash64(text: str) -> int:
    """A number below 2^64 that seeds what ``text`` describes."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
