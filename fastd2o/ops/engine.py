"""The engine: walks the ``[tokens, vocabulary]`` plane in tiles, multiplying with the vendor's library and handing each
tile to a :class:`~fastd2o.ops.tile_ops.TileOps` while it is in cache. No tensor as large as ``[tokens, vocabulary]``
ever exists.

Shapes: T tokens that count, D hidden, V vocabulary, N columns of one slab of the vocabulary.

What is differentiated is the *log-odds* of the target, ``m_t = z_y - logsumexp_{v != y} z_v``, because its gradient is
the same ``onehot - softmax`` row as everything else needs, with no cancellation at probability 1:

    dm/dz = onehot - softmax over the others,     log p = logsigmoid(m),     log(1 - p) = logsigmoid(-m)

Every function takes only tokens that count: the caller has already dropped the ignored ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.ops.backends import tile_dtype, tile_ops
from fastd2o.ops.counted import Counted
from fastd2o.ops.kept import Kept, active_columns
from fastd2o.ops.pages import in_huge_pages
from fastd2o.ops.plan import GATHER_BYTES, kept_columns
from fastd2o.ops.tile_ops import FoldState, FusedOps, LogitTransform, StatisticsState, TileOps, TopKState
from fastd2o.ops.torch_tile_ops import locate


@dataclass(frozen=True)
class Head:
    """The output layer and how its logits become ``z``."""

    weight_VD: Tensor
    bias_V: Tensor | None
    transform: LogitTransform

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight_VD.shape[0]

    @property
    def columns_in_use(self) -> Tensor | int:
        """V without padding, which is marked by a bias of -inf."""
        return self.vocab_size if self.bias_V is None else (self.bias_V != -torch.inf).sum().clamp_min(1)


@dataclass(frozen=True)
class Tiling:
    """How one call is cut up and computed: tile shape, dtype of the products, backend of the tile operations, whether
    that is to fuse them with the product, and how many bytes of softmax weights a forward may keep for its backward."""

    block_tokens: int
    block_vocab: int
    dtype: torch.dtype
    backend: str
    fused: bool = False
    kept_bytes: int = 0

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of softmax, sums and results: float32, or float64 when the products are."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def ops(self, head: Head) -> TileOps:
        """A fresh TileOps for one call."""
        return tile_ops(self.backend, head.transform, self.sum_dtype)

    def fused_ops(self, head: Head) -> FusedOps:
        """The same, of a backend that fuses."""
        return cast(FusedOps, self.ops(head))

    def tile(self, tokens: int, head: Head, *, logits: bool, factors: bool) -> _Tile:
        """Memory for one tile, used for all of them: of ``logits``, of ``factors`` of the next product, or of both."""
        elements = min(self.block_tokens, tokens) * min(self.block_vocab, head.vocab_size)
        device = head.weight_VD.device
        dtype = tile_dtype(self.dtype, device.type, self.backend) if logits else self.dtype
        memory = torch.empty(elements, dtype=dtype, device=device)
        if not factors or dtype == self.dtype:
            return _Tile(memory, memory)
        # 16-bit factors of the next product fit over 16-bit logits, but not over wider ones that are still being read.
        return _Tile(memory, torch.empty(elements, dtype=self.dtype, device=device))


@dataclass(frozen=True)
class _Tile:
    """Memory for a tile of logits, and for what is made of them to be multiplied again: perhaps the same."""

    logits: Tensor
    factors: Tensor

    def logits_TN(self, hidden_TD: Tensor, slab: _Slab, ops: TileOps) -> Tensor:
        """``hidden @ weight.T + bias`` of one tile."""
        out_TN = self._view(self.logits, len(hidden_TD), len(slab.weight_ND))
        bias_N = None if slab.bias_N is None else slab.bias_N.to(out_TN.dtype).contiguous()
        ops.product(out_TN, hidden_TD, slab.weight_ND.t(), bias_N)
        return out_TN

    def factors_TN(self, tokens: int, columns: int) -> Tensor:
        """Where to write what is made of as many logits."""
        return self._view(self.factors, tokens, columns)

    @staticmethod
    def _view(memory: Tensor, tokens: int, columns: int) -> Tensor:
        return memory[: tokens * columns].view(tokens, columns)


class Statistics(NamedTuple):
    """Per token, all ``[T]``: entropy ``lse - sum p z`` in nats, the most likely column, the mean of the finite
    logits."""

    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor


class LogoddsResult(NamedTuple):
    """What the forward leaves, per token: log-odds and ``logsumexp`` of the other columns ``[T]``; the gradient of the
    log-odds with respect to ``hidden``, ``[T, D]``, where it was asked for; statistics where asked for; what is kept
    for the backward."""

    logodds: Tensor
    lse_others: Tensor
    unit_TD: Tensor | None
    statistics: Statistics | None
    kept: Kept | None


class BackwardResult(NamedTuple):
    """Gradient of hidden ``[T, D]``, in the dtype of sums, and of how many columns the gradients were formed."""

    hidden_TD: Tensor | None
    columns: int


class GroupedResult(NamedTuple):
    """Gradients of hidden ``[T, D]``, in the dtype of sums, of weight and of bias; the share of the vocabulary that
    they were formed of, mean over the tokens that had a gradient."""

    hidden_TD: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    active_share: float


class CringeResult(NamedTuple):
    """Per token, all ``[T]``: the drawn positive column (-1 where there is none), the logits of the negative and of it,
    and the log-odds of the negative."""

    positive: Tensor
    negative_logit: Tensor
    positive_logit: Tensor
    logodds: Tensor


def logodds_forward(
    hidden_TD: Tensor, head: Head, target_T: Tensor, tiling: Tiling, *, unit: bool, statistics: bool, keep: bool = False
) -> LogoddsResult:
    """Log-odds of every target in one pass over the vocabulary: 2 T·D·V operations, 4 with ``unit``.

    With ``unit`` the pass also forms ``g_t = dm_t/dh_t = slope_y W[y] - sum_v softmax_v slope_v W[v]``, sums being
    rescaled whenever a slab raises the running maximum. A backward is then ``c_t g_t``.

    With ``keep`` it keeps the softmax weights of as many columns as ``tiling.kept_bytes`` hold, so that a backward need
    not form their logits again.
    """
    tokens, hidden_size = hidden_TD.shape
    state = FoldState.empty(tokens, hidden_TD, tiling.sum_dtype, statistics)
    unit_TD = hidden_TD.new_empty((tokens, hidden_size), dtype=tiling.sum_dtype) if unit else None
    columns = kept_columns(tiling.kept_bytes, tokens, head.vocab_size, tiling.block_vocab, tiling.dtype) if keep else 0
    kept = Kept.empty(hidden_TD, columns, tiling.block_vocab, tiling.sum_dtype) if columns else None
    # Softmax weights that are to be kept have to be in memory; a kernel that fuses serves the columns after them.
    in_tiles = columns if tiling.fused else head.vocab_size
    if in_tiles:
        _fold_tiles(hidden_TD, head, target_T, tiling, state, in_tiles, unit_TD, kept)
    if in_tiles < head.vocab_size:
        _fold_products(hidden_TD, head, target_T, tiling, state, start=in_tiles)
    lse_others = state.lse_others
    logodds = state.target_logit - lse_others
    return LogoddsResult(
        logodds.squeeze(1),
        lse_others.squeeze(1),
        unit_TD,
        _statistics(state, target_T, head) if statistics else None,
        kept,
    )


def _fold_products(
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    tiling: Tiling,
    state: FoldState,
    top: TopKState | None = None,
    start: int = 0,
) -> None:
    """Products and folds in one kernel, and the largest logits if asked for, from a column on. There is no tile to be
    bounded, and slabs only of a weight that is cast."""
    ops = tiling.fused_ops(head)
    if head.weight_VD.dtype == tiling.dtype:
        tiling = replace(tiling, block_vocab=head.vocab_size)
    for slab in _slabs(head, tiling, start):
        factors = (hidden_TD, slab.weight_ND, slab.bias_N, target_T.unsqueeze(1), slab.start, state)
        if top is None:
            ops.fold_product(*factors)
        else:
            ops.topk_product(*factors, top)


def _fold_tiles(
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    tiling: Tiling,
    state: FoldState,
    stop: int,
    unit_TD: Tensor | None,
    kept: Kept | None,
) -> None:
    """A product into a tile of memory, then its fold, up to a column; where it is asked for, the unit gradient, or the
    softmax weights for a backward."""
    tokens = len(hidden_TD)
    ops, tile = tiling.ops(head), tiling.tile(tokens, head, logits=True, factors=unit_TD is not None)
    for rows in _blocks(tokens, tiling.block_tokens):
        block = _rows_of(state, rows)
        mean_weight_TD: Tensor | None = None
        target_T1 = target_T[rows].unsqueeze(1)
        for slab in _slabs(head, tiling, stop=stop):
            logits_TN = tile.logits_TN(hidden_TD[rows], slab, ops)
            if kept is not None and slab.start < kept.columns:
                ops.fold(logits_TN, target_T1, slab.start, block, kept.slab(slab.start)[rows])
                kept.max_of(slab.start)[rows] = block.max
                continue
            if unit_TD is None:
                ops.fold(logits_TN, target_T1, slab.start, block)
                continue
            weights_TN = tile.factors_TN(*logits_TN.shape)
            rescale_T1 = ops.fold(logits_TN, target_T1, slab.start, block, weights_TN)
            if mean_weight_TD is None:
                mean_weight_TD = unit_TD[rows]
                ops.product(mean_weight_TD, weights_TN, slab.weight_ND)
            else:
                mean_weight_TD.mul_(rescale_T1)
                ops.product(mean_weight_TD, weights_TN, slab.weight_ND, accumulate=True)
        if mean_weight_TD is not None:
            _finish_unit_(mean_weight_TD, block, hidden_TD[rows], head, target_T[rows])


@dataclass(frozen=True)
class HeadGradients:
    """Where the gradients of weight and bias are written; None for one that nobody needs.

    ``accumulate``: they are added to what is there, rather than written over it.
    """

    weight_VD: Tensor | None
    bias_V: Tensor | None
    accumulate: bool

    @classmethod
    def of_one_sweep(cls, head: Head, *, need_weight: bool, need_bias: bool) -> HeadGradients:
        """Memory for the gradients of one backward, each entry to be rounded once from its sum."""
        weight_VD, bias_V = head.weight_VD, head.bias_V
        return cls._empty(
            head, weight_VD.dtype, None if bias_V is None else bias_V.dtype, need_weight, need_bias, False
        )

    @classmethod
    def zeros(cls, head: Head, dtype: torch.dtype | None, *, need_weight: bool, need_bias: bool) -> HeadGradients:
        """Zeros to add to: in the dtype of sums for several backwards, or in weight's and bias's own (None) for one
        that does not reach every entry."""
        weight_VD, bias_V = head.weight_VD, head.bias_V
        bias_dtype = None if bias_V is None else dtype or bias_V.dtype
        gradients = cls._empty(head, dtype or weight_VD.dtype, bias_dtype, need_weight, need_bias, True)
        gradients.zero_()
        return gradients

    @classmethod
    def _empty(
        cls,
        head: Head,
        weight_dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        need_weight: bool,
        need_bias: bool,
        accumulate: bool,
    ) -> HeadGradients:
        weight_VD = bias_V = None
        if need_weight:
            weight_VD = in_huge_pages(
                torch.empty_like(head.weight_VD, dtype=weight_dtype, memory_format=torch.contiguous_format)
            )
        if need_bias and head.bias_V is not None:
            bias_V = torch.empty_like(head.bias_V, dtype=bias_dtype)
        return cls(weight_VD, bias_V, accumulate)

    def zero_(self) -> None:
        """No gradient after all."""
        for gradient in (self.weight_VD, self.bias_V):
            if gradient is not None:
                gradient.zero_()

    def rounded(self, head: Head) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias in their dtypes."""
        bias_V = None if self.bias_V is None or head.bias_V is None else self.bias_V.to(head.bias_V.dtype)
        return None if self.weight_VD is None else self.weight_VD.to(head.weight_VD.dtype), bias_V

    def put(self, gradient: Tensor, start: int, columns: Tensor | None, sums: Tensor) -> None:
        """Write or add the sums of consecutive columns from ``start`` on, or of a choice of ``columns`` after it."""
        if columns is not None:
            gradient.index_add_(0, columns + start, sums.to(gradient.dtype))
        elif self.accumulate:
            gradient[start : start + len(sums)] += sums
        else:
            gradient[start : start + len(sums)] = sums


def logodds_backward(
    coef_T: Tensor,
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    lse_others_T: Tensor,
    tiling: Tiling,
    *,
    need_hidden: bool,
    into: HeadGradients,
    kept: Kept | None = None,
    mass_tol_T1: Tensor | None = None,
) -> BackwardResult:
    """Gradients of ``sum_t coef_t m_t`` with respect to hidden, weight and bias: 4 T·D·V operations, and 2 for logits
    that are formed again, which those of ``kept`` are not.

    Slabs of the vocabulary outside, all tokens inside: a slab's weight gradient is finished in one sweep, summed in
    float32 and written once, with no float32 copy of ``[V, D]``.

    Args:
        into: where the gradients of weight and bias go.
        kept: of the forward, for these tokens.
        mass_tol_T1: leave out kept columns that together hold no more than this of a token's softmax over the others,
            for every token. Needs ``into.accumulate``.
    """
    tokens, hidden_size = hidden_TD.shape
    dweight_VD, dbias_V = into.weight_VD, into.bias_V
    if tokens == 0:
        if not into.accumulate:
            into.zero_()
        return BackwardResult(hidden_TD.new_zeros((0, hidden_size), dtype=tiling.sum_dtype), 0)
    coef_T1 = (coef_T * head.transform.slope).unsqueeze(1)
    unscale: Tensor | None = None
    if tiling.dtype == torch.float16:
        # float16 has no room for a scaled loss's coefficients, nor for the products of small ones. Bring the largest to
        # just under 1, by a power of two, which rounds nothing.
        largest = coef_T1.abs().amax().clamp_min(torch.finfo(tiling.sum_dtype).tiny)
        unscale = largest.frexp().exponent.to(tiling.sum_dtype).exp2()
        coef_T1 = coef_T1 / unscale
    # The target's entry is the largest of a row of the gradient. Left out of the products for hidden and added to their
    # sum here, it is not rounded with a slab's share of that sum.
    target = _Columns.of(head, target_T, hidden_TD)
    target_coef_T1 = coef_T1 if target.bend_T1 is None else coef_T1 * target.bend_T1
    dhidden_TD = target.weight_TD.mul_(target_coef_T1) if need_hidden else None
    ops, tile = tiling.ops(head), tiling.tile(tokens, head, logits=not tiling.fused, factors=True)
    lse_others_T1 = lse_others_T.unsqueeze(1)
    active = None
    if kept is not None and mass_tol_T1 is not None:
        blocks = list(_blocks(tokens, tiling.block_tokens))
        active = active_columns(kept, lse_others_T1, target_T, mass_tol_T1, blocks, tile.factors_TN, ops)
    # A gradient that has the dtype of sums is where they are summed.
    in_place = unscale is None and dweight_VD is not None and dweight_VD.dtype == tiling.sum_dtype
    sums_ND = hidden_TD.new_empty(
        (0 if in_place and active is None else min(tiling.block_vocab, head.vocab_size), hidden_size),
        dtype=tiling.sum_dtype,
    )
    for slab in _slabs(head, tiling):
        is_kept = kept is not None and slab.start < kept.columns
        columns = active.of(slab.start) if active is not None and is_kept else None
        if columns is not None:
            if len(columns) == 0:
                continue
            slab = slab.select(columns)
        direct = in_place and columns is None
        dweight_ND = sums_ND[: len(slab.weight_ND)]
        if direct and dweight_VD is not None:
            dweight_ND = dweight_VD[slab.start : slab.start + len(slab.weight_ND)]
        dbias_N = hidden_TD.new_zeros(0 if dbias_V is None else len(slab.weight_ND), dtype=tiling.sum_dtype)
        for rows in _blocks(tokens, tiling.block_tokens):
            block_TD = hidden_TD[rows]
            grad_TN = tile.factors_TN(len(block_TD), len(slab.weight_ND))
            if is_kept:
                assert kept is not None
                weights_TN = kept.take(slab.start, rows, columns, grad_TN)
                ops.scale(weights_TN, kept.factor(slab.start, rows, lse_others_T1[rows]) * -coef_T1[rows], grad_TN)
            else:
                of_rows = (target_T[rows].unsqueeze(1), slab.start, lse_others_T1[rows], coef_T1[rows], grad_TN)
                if tiling.fused:
                    tiling.fused_ops(head).grad_product(block_TD, slab.weight_ND, slab.bias_N, *of_rows)
                else:
                    ops.grad(tile.logits_TN(block_TD, slab, ops), *of_rows)
            if dhidden_TD is not None:
                ops.product(dhidden_TD[rows], grad_TN, slab.weight_ND, accumulate=True)
            if dweight_VD is None and dbias_V is None:
                continue
            _set_target_(grad_TN, target_T[rows], slab.start, target_coef_T1[rows], columns)
            if dweight_VD is not None:
                added = rows.start > 0 or (direct and into.accumulate)
                ops.product(dweight_ND, grad_TN.t(), block_TD, accumulate=added)
            if dbias_V is not None:
                dbias_N += grad_TN.sum(0, dtype=tiling.sum_dtype)
        if dweight_VD is not None and not direct:
            into.put(dweight_VD, slab.start, columns, dweight_ND if unscale is None else dweight_ND.mul_(unscale))
        if dbias_V is not None:
            into.put(dbias_V, slab.start, columns, dbias_N if unscale is None else dbias_N.mul_(unscale))
    if dhidden_TD is not None and unscale is not None:
        dhidden_TD *= unscale
    return BackwardResult(dhidden_TD, head.vocab_size if active is None else active.left_of(head.vocab_size))


def grouped(
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    parts: Sequence[slice],
    coefficients: Callable[[slice, LogoddsResult], Tensor],
    tiling: Tiling,
    *,
    statistics: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    compact: bool = True,
    mass_tol: float = 0.0,
) -> GroupedResult:
    """Forward and backward of one part of the tokens after the other: 6 T·D·V operations for as much as
    ``tiling.kept_bytes`` hold of a part's softmax weights, 8 for the rest; 4 of them are only for tokens whose
    coefficient is not 0.

    Args:
        parts: consecutive slices of the tokens, all of them.
        coefficients: a part and its forward -> ``dL/dm``, ``[T]`` of the part.
        compact: wait for the device in every part to learn which coefficients are 0; if not, those tokens are
            multiplied as well.
        mass_tol: see :func:`logodds_backward`; here a share of the whole softmax, the target included.
    """
    needed = {"need_weight": need_weight, "need_bias": need_bias}
    # A float16 gradient is not to be rounded before it has been multiplied with the loss's own: that is its scale.
    scaled_later = head.weight_VD.dtype == torch.float16
    if len(parts) > 1 or scaled_later:
        into = HeadGradients.zeros(head, tiling.sum_dtype, **needed)
    elif mass_tol > 0:
        into = HeadGradients.zeros(head, None, **needed)
    else:
        into = HeadGradients.of_one_sweep(head, **needed)
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=tiling.sum_dtype) if need_hidden else None
    live_tokens, live_entries = 0, 0
    for part in parts:
        forward = logodds_forward(
            hidden_TD[part], head, target_T[part], tiling, unit=False, statistics=statistics, keep=True
        )
        coef_T = coefficients(part, forward)
        live = Counted.where(coef_T != 0, compact)
        others_T1 = torch.sigmoid(-live.gather(forward.logodds)).unsqueeze(1)
        backward = logodds_backward(
            live.gather(coef_T),
            live.gather(hidden_TD[part]),
            head,
            live.gather(target_T[part]),
            live.gather(forward.lse_others, fill=torch.inf),  # a softmax of 0, whatever the logits
            tiling,
            need_hidden=need_hidden,
            into=into,
            kept=None if forward.kept is None else forward.kept.of(live.rows),
            mass_tol_T1=mass_tol / others_T1 if mass_tol > 0 else None,
        )
        if dhidden_TD is not None and backward.hidden_TD is not None:
            if live.rows is None:
                dhidden_TD[part] = backward.hidden_TD
            else:
                dhidden_TD[part].index_copy_(0, live.rows, backward.hidden_TD)
        alive = len(coef_T) if live.rows is None else len(live.rows)
        live_tokens, live_entries = live_tokens + alive, live_entries + alive * backward.columns
        del forward, backward  # their memory is the next part's
    weight_VD, bias_V = (into.weight_VD, into.bias_V) if scaled_later else into.rounded(head)
    return GroupedResult(dhidden_TD, weight_VD, bias_V, live_entries / max(1, live_tokens * head.vocab_size))


def cringe_forward(
    hidden_TD: Tensor, head: Head, target_T: Tensor, seed: int, counter_T: Tensor, k: int, tiling: Tiling
) -> CringeResult:
    """One pass for CRINGE: log-odds of the negative token and a draw among the k largest other logits; 2 T·D·V
    operations.

    Args:
        seed, counter_T: of the draw from the softmax of the k survivors, see :meth:`TileOps.draw`.
    """
    tokens = hidden_TD.shape[0]
    state = FoldState.empty(tokens, hidden_TD, tiling.sum_dtype)
    top = TopKState.empty(tokens, k, hidden_TD, tiling.sum_dtype)
    ops = tiling.ops(head)
    if tiling.fused:
        _fold_products(hidden_TD, head, target_T, tiling, state, top)
    else:
        tile = tiling.tile(tokens, head, logits=True, factors=False)
        for rows in _blocks(tokens, tiling.block_tokens):
            block, block_top = _rows_of(state, rows), TopKState(top.values[rows], top.index[rows])
            target_T1 = target_T[rows].unsqueeze(1)
            for slab in _slabs(head, tiling):
                logits_TN = tile.logits_TN(hidden_TD[rows], slab, ops)
                ops.topk(logits_TN, target_T1, slab.start, block_top)
                ops.fold(logits_TN, target_T1, slab.start, block)
    positive_T, positive_logit_T = ops.draw(top, seed, counter_T)
    return CringeResult(
        positive=positive_T,
        negative_logit=state.target_logit.squeeze(1),
        positive_logit=positive_logit_T,
        logodds=(state.target_logit - state.lse_others).squeeze(1),
    )


def cringe_backward(
    coef_T: Tensor,
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    positive_T: Tensor,
    tiling: Tiling,
    *,
    hidden_dtype: torch.dtype,
    detach_positive: bool,
    wait: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum_t coef_t (z_t[target_t] - z_t[positive_t])``: two rows of the weight per token, O(T·D).

    Args:
        hidden_dtype: of the gradient of hidden, which is rounded once.
        wait: whether the host may wait for the device, to learn which columns were touched.
    """
    if tiling.fused:
        return tiling.fused_ops(head).cringe_grad(
            coef_T,
            hidden_TD,
            head.weight_VD,
            head.bias_V,
            target_T,
            positive_T,
            detach_positive=detach_positive,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    weight_VD, bias_V = head.weight_VD, head.bias_V
    signs = ((target_T, 1.0),) if detach_positive else ((target_T, 1.0), (positive_T, -1.0))
    columns = [column_T for column_T, _ in signs]
    coefs = [torch.empty_like(coef_T).unsqueeze(1) for _ in signs]
    dhidden_TD = hidden_TD.new_empty(hidden_TD.shape, dtype=hidden_dtype) if need_hidden else None
    # Two gathered rows of the weight for each of some tokens, in the dtype of sums.
    step = max(1, GATHER_BYTES // (2 * hidden_TD.shape[1] * tiling.sum_dtype.itemsize))
    for rows in _blocks(len(target_T), step):
        sums_TD: Tensor | None = None
        for (column_T, sign), all_coef_T1 in zip(signs, coefs, strict=True):
            column = _Columns.of(head, column_T[rows], hidden_TD[rows])
            coef_T1 = (sign * head.transform.slope * coef_T[rows]).unsqueeze(1)
            if column.bend_T1 is not None:
                coef_T1 = coef_T1 * column.bend_T1
            all_coef_T1[rows] = coef_T1
            if need_hidden:
                product_TD = column.weight_TD.mul_(coef_T1)
                sums_TD = product_TD if sums_TD is None else sums_TD.add_(product_TD)
        if dhidden_TD is not None and sums_TD is not None:
            dhidden_TD[rows] = sums_TD
    dweight_VD = dbias_V = None
    if need_weight or need_bias:
        # E edges from tokens to columns, sorted by column: a segmented sum gives the same bits on every run, which
        # adding atomically would not.
        column_E, order_E = torch.cat(columns).sort(stable=True)
        coef_E1, token_E = torch.cat(coefs)[order_E], order_E % max(1, len(target_T))
        touched, counts = column_E.unique_consecutive(return_counts=True) if wait else (column_E, column_E)

        def add_into(gradient: Tensor, rows_E: Tensor) -> None:
            if not wait:
                # torch sorts by itself, so this too is the same on every run, but rounds once for every edge.
                gradient.index_put_((column_E,), rows_E.to(gradient.dtype), accumulate=True)
            elif len(counts):  # segment_reduce refuses to sum nothing
                gradient[touched] = torch.segment_reduce(rows_E, "sum", lengths=counts).to(gradient.dtype)

        if need_bias and bias_V is not None:
            dbias_V = torch.zeros_like(bias_V)
            add_into(dbias_V, coef_E1.squeeze(1))
        if need_weight:
            dweight_VD = torch.zeros_like(weight_VD, memory_format=torch.contiguous_format)
            step = max(1, GATHER_BYTES // (max(1, len(column_E)) * tiling.sum_dtype.itemsize))
            for dims in _blocks(hidden_TD.shape[1], step):
                add_into(dweight_VD[:, dims], hidden_TD[:, dims].to(tiling.sum_dtype)[token_E].mul_(coef_E1))
    return dhidden_TD, dweight_VD, dbias_V


@dataclass(frozen=True)
class _Slab:
    """N consecutive columns of the vocabulary, the weight in the dtype of the products."""

    start: int
    weight_ND: Tensor
    bias_N: Tensor | None

    def select(self, columns: Tensor) -> _Slab:
        """Some of the columns, which then are no longer consecutive."""
        bias_N = None if self.bias_N is None else self.bias_N.index_select(0, columns)
        return _Slab(self.start, self.weight_ND.index_select(0, columns), bias_N)


def _slabs(head: Head, tiling: Tiling, start: int = 0, stop: int | None = None) -> Iterator[_Slab]:
    """Slab after slab; a weight of another dtype is cast into memory that the next slab overwrites."""
    cast: Tensor | None = None
    if head.weight_VD.dtype != tiling.dtype:
        shape = (min(tiling.block_vocab, head.vocab_size), head.weight_VD.shape[1])
        cast = torch.empty(shape, dtype=tiling.dtype, device=head.weight_VD.device)
    for columns in _blocks(head.vocab_size if stop is None else stop, tiling.block_vocab, start):
        weight_ND = head.weight_VD[columns]
        if cast is not None:
            weight_ND = cast[: len(weight_ND)].copy_(weight_ND)
        yield _Slab(columns.start, weight_ND, None if head.bias_V is None else head.bias_V[columns])


def _blocks(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def _rows_of(state: FoldState, rows: slice) -> FoldState:
    """A view of some tokens' state: folding into it folds into ``state``."""
    extra = state.statistics
    if extra is not None:
        extra = StatisticsState(extra.weighted[rows], extra.argmax[rows], extra.total[rows])
    return FoldState(state.max[rows], state.sum[rows], state.target_logit[rows], extra)


def _finish_unit_(mean_weight_TD: Tensor, state: FoldState, hidden_TD: Tensor, head: Head, target_T: Tensor) -> None:
    """Turn ``sum_v exp(z_v - max) bend_v W[v]`` in place into ``slope (bend_y W[y] - mean)``."""
    # A token with no other finite logit has sum 0 and a mean of nothing.
    mean_weight_TD.div_(torch.where(state.sum > 0, state.sum, 1.0).neg_())
    column = _Columns.of(head, target_T, hidden_TD)
    mean_weight_TD.add_(column.weight_TD if column.bend_T1 is None else column.weight_TD * column.bend_T1)
    if head.transform.slope != 1.0:
        mean_weight_TD.mul_(head.transform.slope)


def _set_target_(
    grad_TN: Tensor, target_T: Tensor, vocab_start: int, coef_T1: Tensor, chosen: Tensor | None = None
) -> None:
    """Write the target's entry into every row whose target lies in this slab, or among its ``chosen`` columns.

    Through flat positions: ``scatter_`` would make a float32 copy of a whole 16-bit tile.
    """
    tokens, columns = grad_TN.shape
    if chosen is None:
        column, inside = locate(target_T, vocab_start, columns)
    else:
        column = torch.searchsorted(chosen, target_T - vocab_start).clamp_(max=columns - 1)
        inside = chosen[column] == target_T - vocab_start
    position = torch.arange(tokens, device=grad_TN.device) * columns + column
    flat = grad_TN.view(-1)
    entry = torch.where(inside, coef_T1.squeeze(1).to(grad_TN.dtype), flat[position])
    flat.index_copy_(0, position, entry)


@dataclass(frozen=True)
class _Columns:
    """One column of the head per token, as the products see it but in the dtype of sums, and the softcap's slope."""

    weight_TD: Tensor
    bend_T1: Tensor | None

    @classmethod
    def of(cls, head: Head, column_T: Tensor, hidden_TD: Tensor) -> _Columns:
        dtype = hidden_TD.dtype
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        weight_TD = head.weight_VD.index_select(0, column_T).to(dtype).to(sums)
        if head.transform.softcap is None:
            return cls(weight_TD, None)
        raw_T1 = (hidden_TD * weight_TD).sum(1, keepdim=True)
        if head.bias_V is not None:
            raw_T1 += head.bias_V.index_select(0, column_T).to(sums).unsqueeze(1)
        return cls(weight_TD, head.transform.bend(raw_T1))


def _statistics(state: FoldState, target_T: Tensor, head: Head) -> Statistics:
    """Entropy in two parts that are both sums of terms of one sign: that of "the target or another", and that among the
    others. ``lse - sum p z`` would subtract two numbers of the size of the logits."""
    extra = state.statistics
    assert extra is not None
    logodds = state.target_logit - state.lse_others
    target_p, others_p = logodds.sigmoid(), (-logodds).sigmoid()
    entropy = torch.where(target_p > 0, -target_p * F.logsigmoid(logodds), 0.0)
    among_others = state.sum.log() - extra.weighted / state.sum
    entropy += torch.where(others_p > 0, others_p * (among_others - F.logsigmoid(-logodds)), 0.0)
    target_T1 = target_T.unsqueeze(1)
    target_first = (state.target_logit > state.max) | ((state.target_logit == state.max) & (target_T1 < extra.argmax))
    return Statistics(
        entropy=torch.where(logodds.isnan(), logodds, entropy).squeeze(1),
        top1=torch.where(target_first, target_T1, extra.argmax).squeeze(1),
        mean_logit=(extra.total / head.columns_in_use).squeeze(1),
    )
