"""The small operations a backend supplies to the engine: what happens to a tile of logits while it is still in cache.

The engine walks; a :class:`TileOps` multiplies, folds, differentiates, ranks and draws. All but the product see the
*raw* tile ``u = W h + b`` and apply the logit transform ``z = softcap(logit_scale * u) / temperature`` themselves, in
float32 (float64 for float64 inputs). A column whose raw logit is -inf is padding: it takes no part, whatever the
transform.

Shapes: T tokens of the tile, N columns of the tile, starting at column ``vocab_start`` of the vocabulary. Per-token
state is kept as ``[T, 1]`` columns, so that it broadcasts against a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``z = softcap(logit_scale * u) / temperature`` with ``softcap(x) = c * tanh(x / c)``; ``softcap=None`` means
    none."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """``dz/du`` where no softcap bends it; with a softcap, the constant factor of ``slope * (1 - tanh^2)``."""
        return self.logit_scale / self.temperature

    def bend(self, raw: Tensor) -> Tensor | None:
        """The factor ``1 - tanh^2`` of ``dz/du`` at raw logits ``u``, or None where it is 1 everywhere.

        Formed as ``1 / cosh^2``: from ``z`` it would cancel where the softcap saturates.
        """
        if self.softcap is None:
            return None
        return (raw * (self.logit_scale / self.softcap)).cosh_().square_().reciprocal_()


@dataclass
class FoldState:
    """What one pass over the vocabulary leaves behind for every token, all ``[T, 1]``.

    The sums run over every column *but the target's*. The log-odds ``m = z_y - logsumexp_{v != y} z_v`` then keep their
    full precision when the target's probability rounds to 1, and give both ``log p = logsigmoid(m)`` and ``log(1 - p) =
    logsigmoid(-m)``.
    """

    max: Tensor
    sum: Tensor
    target_logit: Tensor
    statistics: StatisticsState | None = None

    @classmethod
    def empty(cls, tokens: int, like: Tensor, dtype: torch.dtype, statistics: bool = False) -> FoldState:
        """The state before the first tile, on the device of ``like``."""

        def column(value: float) -> Tensor:
            return torch.full((tokens, 1), value, dtype=dtype, device=like.device)

        extra = None
        if statistics:
            index = torch.zeros((tokens, 1), dtype=torch.int64, device=like.device)
            extra = StatisticsState(weighted=column(0.0), argmax=index, total=column(0.0))
        return cls(column(-torch.inf), column(0.0), column(0.0), extra)

    @property
    def lse_others(self) -> Tensor:
        """``logsumexp_{v != y} z_v``, ``[T, 1]``; -inf where the target is the only finite column."""
        return self.sum.log() + self.max


@dataclass
class StatisticsState:
    """Extra sums for metrics: over the other columns ``weighted = sum exp(z - max) (z - max)`` and the first
    ``argmax``; over all but padding, ``total``."""

    weighted: Tensor
    argmax: Tensor
    total: Tensor


@dataclass
class TopKState:
    """The k largest logits so far, the target's own left out, and their columns: both ``[T, k]``."""

    values: Tensor
    index: Tensor

    @classmethod
    def empty(cls, tokens: int, k: int, like: Tensor, dtype: torch.dtype) -> TopKState:
        """The state before the first tile, on the device of ``like``."""
        values = torch.full((tokens, k), -torch.inf, dtype=dtype, device=like.device)
        return cls(values, torch.zeros((tokens, k), dtype=torch.int64, device=like.device))


class TileOps(Protocol):
    """One backend's implementation. Instances live for one call of the engine and may hold scratch memory."""

    def product(
        self,
        out_MN: Tensor,
        left_MK: Tensor,
        right_KN: Tensor,
        bias_N: Tensor | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """Write ``left @ right + bias`` to ``out``, or add ``left @ right`` to it.

        ``out`` has the factors' dtype or the wider one of sums; how precise a sum of 16-bit factors arrives in the
        latter is the backend's: the better ones add in float32 and stay there. ``bias`` has out's dtype and is
        contiguous.
        """

    def fold(
        self,
        logits_TN: Tensor,
        target_T1: Tensor,
        vocab_start: int,
        state: FoldState,
        weights_TN: Tensor | None = None,
    ) -> Tensor:
        """Fold a tile into ``state`` and return ``[T, 1]`` factors by which sums gathered before must be multiplied.

        The tile's memory may be used as scratch: what is in it afterwards is undefined, but for ``weights_TN``.

        ``weights_TN``, when given, receives ``exp(z - max) * bend`` of every column but the target's, where it receives
        0. It may be ``logits_TN`` itself.
        """

    def grad(
        self,
        logits_TN: Tensor,
        target_T1: Tensor,
        vocab_start: int,
        lse_others_T1: Tensor,
        coef_T1: Tensor,
        out_TN: Tensor,
    ) -> None:
        """Write ``-coef * bend * softmax over the others`` to ``out_TN``, which may be ``logits_TN`` itself, and 0 to
        the target's column: the engine adds that entry in full precision."""

    def scale(self, weights_TN: Tensor, scale_T1: Tensor, out_TN: Tensor) -> None:
        """Write ``scale * weights``, rounded once, to ``out_TN``, which has weights' dtype and may be weights itself;
        ``scale`` has that of sums."""

    def topk(self, logits_TN: Tensor, target_T1: Tensor, vocab_start: int, state: TopKState) -> None:
        """Merge a tile's largest logits into ``state``; the target's column does not take part. The tile is left as it
        was."""

    def draw(self, state: TopKState, seed: int, counter_T: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one of every token's candidates from their softmax, by Philox at (seed, counter): its column, -1 where
        no candidate is finite, and its logit, ``[T]`` each. docs/engine.md says exactly how."""


class FusedOps(TileOps, Protocol):
    """A backend that also has the product and what follows it in one kernel: logits live in registers, no tile is ever
    in memory. ``hidden_TD @ weight_ND.T + bias_N`` takes the place of ``logits_TN``, with N up to all of the
    vocabulary."""

    def fold_product(
        self,
        hidden_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        target_T1: Tensor,
        vocab_start: int,
        state: FoldState,
    ) -> None:
        """``product``, then ``fold``."""

    def grad_product(
        self,
        hidden_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        target_T1: Tensor,
        vocab_start: int,
        lse_others_T1: Tensor,
        coef_T1: Tensor,
        out_TN: Tensor,
    ) -> None:
        """``product``, then ``grad``. Tokens whose coefficient is exactly 0 need not be multiplied."""

    def topk_product(
        self,
        hidden_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        target_T1: Tensor,
        vocab_start: int,
        state: FoldState,
        top: TopKState,
    ) -> None:
        """``product``, then ``fold`` and ``topk``."""

    def cringe_grad(
        self,
        coef_T: Tensor,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        positive_T: Tensor,
        *,
        detach_positive: bool,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of ``sum_t coef_t (z_t[target_t] - z_t[positive_t])`` with respect to hidden, weight and bias."""
