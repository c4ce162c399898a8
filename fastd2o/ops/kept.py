"""Softmax weights that a forward keeps for its backward, so that logits need not be formed again, and which of their
columns matter.

What is kept is not the logits but ``exp(z - max) * bend``, in the dtype of the products: rounded to bfloat16, a weight
is off by 2^-9 of itself, and a logit of 20 by 2^-5, which is a weight off by 3 %.

Shapes: T tokens of the forward, N columns of a slab, S slabs, B bins of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastd2o.ops.pages import in_huge_pages
from fastd2o.ops.tile_ops import TileOps
from fastd2o.ops.torch_tile_ops import band_elements

# Columns are dropped in so many steps of equal size. The sums of a step over its columns are a product with B columns.
_BINS = 64
# Rows are gathered so many at a time, at least, where columns are to be gathered from them.
_BAND_ROWS = 64


@dataclass(frozen=True)
class Kept:
    """Softmax weights of the first columns of the vocabulary.

    Attributes:
        weights: ``[columns * T]``, slab after slab, each ``[T, N]``; 0 for the target.
        max_ST1: ``[S, T, 1]``, what the logits of each slab's weights are relative to.
        columns: how many.
        block_vocab: columns of a slab; the last may have fewer.
        rows: ``[T']`` int64, the tokens that a backward is about; None: all.
    """

    weights: Tensor
    max_ST1: Tensor
    columns: int
    block_vocab: int
    rows: Tensor | None = None

    @classmethod
    def empty(cls, hidden_TD: Tensor, columns: int, block_vocab: int, sum_dtype: torch.dtype) -> Kept:
        """Memory for the first ``columns``, of every token of ``hidden_TD`` and in its dtype."""
        tokens, slabs = len(hidden_TD), -(-columns // block_vocab)
        return cls(
            in_huge_pages(hidden_TD.new_empty(columns * tokens)),
            hidden_TD.new_empty((slabs, tokens, 1), dtype=sum_dtype),
            columns,
            block_vocab,
        )

    def of(self, rows: Tensor | None) -> Kept:
        """The same for some of the tokens."""
        return replace(self, rows=rows)

    def slab(self, start: int) -> Tensor:
        """``[T, N]``: the weights of the slab that starts at this column."""
        tokens, columns = self.max_ST1.shape[1], min(self.block_vocab, self.columns - start)
        return self.weights[start * tokens : (start + columns) * tokens].view(tokens, columns)

    def max_of(self, start: int) -> Tensor:
        """``[T, 1]``: what that slab's logits are relative to."""
        return self.max_ST1[start // self.block_vocab]

    def take(self, start: int, block: slice, columns: Tensor | None, out_TN: Tensor) -> Tensor:
        """The weights of a block of the tokens that the backward is about, and of a choice of the slab's columns: where
        they lie, or gathered in ``out_TN``."""
        slab_TN = self.slab(start)
        if self.rows is None:
            slab_TN = slab_TN[block]
            return slab_TN if columns is None else torch.index_select(slab_TN, 1, columns, out=out_TN)
        rows = self.rows[block]
        if columns is None:
            return torch.index_select(slab_TN, 0, rows, out=out_TN)
        step = max(_BAND_ROWS, band_elements(slab_TN.device.type) // slab_TN.shape[1])
        for start_row in range(0, len(rows), step):
            band = slice(start_row, start_row + step)
            torch.index_select(slab_TN.index_select(0, rows[band]), 1, columns, out=out_TN[band])
        return out_TN

    def factor(self, start: int, block: slice, lse_others_T1: Tensor) -> Tensor:
        """``[T, 1]``: what makes a softmax over the others of that slab's weights, for a block of the tokens that the
        backward is about."""
        max_T1 = self.max_of(start)
        max_T1 = max_T1[block] if self.rows is None else max_T1[self.rows[block]]
        return torch.where(max_T1 == -torch.inf, 0.0, (max_T1 - lse_others_T1).exp())


@dataclass(frozen=True)
class ActiveColumns:
    """The columns that the products of a gradient are about, of those that are kept.

    Attributes:
        dropped: how many others there are.
    """

    dropped: int
    _by_slab: dict[int, Tensor]

    def of(self, start: int) -> Tensor:
        """int64, rising: those of the slab that starts at this column, relative to it."""
        return self._by_slab[start]

    def left_of(self, columns: int) -> int:
        """How many columns of a vocabulary are left."""
        return columns - self.dropped


def active_columns(
    kept: Kept,
    lse_others_T1: Tensor,
    target_T: Tensor,
    tol_T1: Tensor,
    blocks: Sequence[slice],
    memory: Callable[[int, int], Tensor],
    ops: TileOps,
) -> ActiveColumns:
    """Few columns such that all others together hold, for every token, no more than its ``tol`` of the softmax over
    the others; all targets are among them.

    Columns are dropped in the order of the largest share of a tolerance that they take from any token, 1/64 of them at
    a time, for as long as that is so. Two reads of what is kept, block by block of the tokens.

    Args:
        memory: rows, columns -> where to work on as many weights.
    """
    starts = range(0, kept.columns, kept.block_vocab)
    largest_V = lse_others_T1.new_zeros(kept.columns)
    for start in starts:
        for block in blocks:
            weights_TN, share_T1 = _shares(kept, start, block, lse_others_T1, tol_T1, memory)
            # In the dtype of the weights, and its range: this is but an order to try.
            share_T1 = share_T1.clamp(max=torch.finfo(weights_TN.dtype).max).to(weights_TN.dtype)
            shares_TN = torch.mul(weights_TN, share_T1, out=memory(*weights_TN.shape))
            largest_N = largest_V[start : start + weights_TN.shape[1]]
            torch.maximum(largest_N, shares_TN.amax(0).to(largest_N.dtype), out=largest_N)
    is_target_V = torch.zeros_like(largest_V, dtype=torch.bool)
    is_target_V[target_T[target_T < kept.columns]] = True
    largest_V[is_target_V] = torch.inf  # the last to go, and never gone

    rank_V = torch.empty_like(largest_V, dtype=torch.int64)
    rank_V[largest_V.argsort(stable=True)] = torch.arange(kept.columns, device=rank_V.device)
    bin_V = rank_V * _BINS // kept.columns
    share_TB = lse_others_T1.new_zeros((len(target_T), _BINS))
    for start in starts:
        bin_N = bin_V[start : start + kept.block_vocab]
        member_NB = torch.zeros((len(bin_N), _BINS), dtype=kept.weights.dtype, device=bin_N.device)
        member_NB.scatter_(1, bin_N.unsqueeze(1), 1.0)
        for block in blocks:
            weights_TN, share_T1 = _shares(kept, start, block, lse_others_T1, tol_T1, memory)
            sums_TB = torch.empty_like(share_TB[block])
            ops.product(sums_TB, weights_TN, member_NB)
            share_TB[block] += sums_TB.mul_(share_T1)
    # Sums up to each bin, by a product, because a parallel cumsum may not be the same twice.
    up_to_BB = torch.ones((_BINS, _BINS), dtype=share_TB.dtype, device=share_TB.device).triu()
    dropped_bins = ((share_TB @ up_to_BB).amax(0) <= 1.0).sum()

    active = ((bin_V >= dropped_bins) | is_target_V).nonzero().squeeze(1)
    ends = torch.searchsorted(active, torch.tensor([*starts, kept.columns], device=active.device)).tolist()
    by_slab = {
        start: active[first:last] - start for start, first, last in zip(starts, ends[:-1], ends[1:], strict=True)
    }
    return ActiveColumns(kept.columns - len(active), by_slab)


def _shares(
    kept: Kept,
    start: int,
    block: slice,
    lse_others_T1: Tensor,
    tol_T1: Tensor,
    memory: Callable[[int, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """A slab's weights for a block of tokens, and what makes shares of the tolerance of them."""
    columns = min(kept.block_vocab, kept.columns - start)
    weights_TN = kept.take(start, block, None, memory(block.stop - block.start, columns))
    return weights_TN, kept.factor(start, block, lse_others_T1[block]) / tol_T1[block]
