"""One forward of a batch: from token ids to what the objectives are made of.

S sequences (rows of the batch), L tokens, G groups, K positives in the largest group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastd2o.ops import linear_cringe, linear_logodds, shift_labels

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

    def _rows(self, indices: Tensor) -> Tensor:
        # Absent rows are -1: they land in a slot behind the last row.
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


def score(model: nn.Module, batch: Batch, wants: Wants, *, seed: str, statistics: bool) -> TokenScores:
    """Run ``model`` (attached, however wrapped) over the batch, once.

    The draws of the Cringe loss depend on ``seed`` and a row's dataset line alone, so that batching cannot change them.
    ``statistics`` cost about half as much again as the rest of the fold.
    """

    def head(hidden: Tensor, weight: Tensor, **options: Any) -> TokenScores:
        target = batch.target
        cringe, cringe_logp = None, torch.zeros_like(target, dtype=torch.float32)
        if wants.cringe_k is not None:
            cringe, cringe_logp = _cringe(hidden, weight, batch, wants, seed, options)
            if not wants.negative_gradient:
                target = target.masked_fill(batch.negative[:, None], IGNORED)
        known = target != IGNORED
        result = linear_logodds(hidden, weight, target, stats=statistics, **options)
        logodds, *others = result if isinstance(result, tuple) else (result,)
        logp = torch.where(known, F.logsigmoid(logodds), cringe_logp)
        return TokenScores(logp, logodds, cringe, TokenStatistics(known, *others) if statistics else None)

    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, fused=head).head


def sequence_logp(model: nn.Module, batch: Batch) -> Tensor:
    """[S] without gradient: the log-probability of every completion under ``model``, summed over its tokens."""
    with torch.no_grad():
        return score(model, batch, Wants(), seed="", statistics=False).logp.sum(1)


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
        seed=_hash64(seed),
        counter=counter,
        **options,
    )
    return output.loss, output.logprob


def _hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
