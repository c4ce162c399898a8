"""TileOps in plain torch: the readable reference, on every device and for every dtype.

Contract: see :mod:`fastd2o.ops.tile_ops`. Cost per logit: one read of the tile and, in cache, a maximum, a subtraction,
    an
exponential and a sum; ``grad`` adds a multiplication and one write of the tile. Nothing here is larger than the tile
itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState

# On the CPU a tile is worked on in bands of rows whose float32 copy (2 MB) stays in the second-level cache: measured
# 1.3 to 1.5 times faster than whole tiles. A GPU would rather have the whole tile in one launch; its bands only bound
# the float32 copy.
_BAND_ELEMENTS = {"cpu": 512 * 1024}
_BAND_ELEMENTS_DEFAULT = 16 * 1024 * 1024

_TOPK_BLOCK = 64


class TorchTileOps:
    """See :class:`fastd2o.ops.tile_ops.TileOps`. ``dtype`` is that of sums and softmax: float32, or float64."""

    def __init__(self, transform: LogitTransform, dtype: torch.dtype) -> None:
        self.transform = transform
        self.dtype = dtype
        self._scratch: Tensor | None = None

    def fold(
        self,
        logits_TN: Tensor,
        target_T1: Tensor,
        vocab_start: int,
        state: FoldState,
        weights_TN: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.fold`."""
        rescale_T1 = torch.empty_like(state.max)
        for band in self._bands(logits_TN):
            z = self._transformed(logits_TN[band])
            bend = self.transform.bend(logits_TN[band].to(self.dtype)) if weights_TN is not None else None
            column, inside = _locate(target_T1[band], vocab_start, z.shape[1])
            target_logit = z.gather(1, column)
            state.target_logit[band] = torch.where(inside, target_logit, state.target_logit[band])
            extra = state.statistics
            if extra is not None:
                extra.total[band] += z.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0).sum(1, keepdim=True)
            z.scatter_(1, column, torch.where(inside, -torch.inf, target_logit))

            old_max = state.max[band]
            tile_max = z.amax(1, keepdim=True)
            new_max = torch.maximum(old_max, tile_max)
            # While every logit so far is -inf, shifting by it would make NaN of them; by 0 it makes the zeros they are.
            shift = torch.where(new_max == -torch.inf, 0.0, new_max)
            rescale = (old_max - shift).exp()
            if extra is not None:
                tile_argmax = _topk(z, 1)[1] + vocab_start
                extra.argmax[band] = torch.where(tile_max > old_max, tile_argmax, extra.argmax[band])
            z.sub_(shift)
            exponentials = z.exp() if extra is not None else z.exp_()
            tile_sum = exponentials.sum(1, keepdim=True)
            if extra is not None:
                # sum exp(z - shift) z, where 0 * -inf is the 0 it tends to.
                weighted = z.mul_(exponentials).nan_to_num_(nan=0.0).sum(1, keepdim=True) + shift * tile_sum
                extra.weighted[band] = extra.weighted[band] * rescale + weighted
            state.sum[band] = state.sum[band] * rescale + tile_sum
            state.max[band] = new_max
            rescale_T1[band] = rescale
            if weights_TN is not None:
                weights_TN[band] = exponentials if bend is None else exponentials.mul_(bend)
        return rescale_T1

    def grad(
        self,
        logits_TN: Tensor,
        target_T1: Tensor,
        vocab_start: int,
        lse_others_T1: Tensor,
        coef_T1: Tensor,
        out_TN: Tensor,
    ) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.grad`."""
        # A token whose other logits are all -inf has no softmax over them; shifting by 0 leaves their exponentials at
        # 0.
        shift_T1 = torch.where(lse_others_T1 == -torch.inf, 0.0, lse_others_T1)
        for band in self._bands(logits_TN):
            z = self._transformed(logits_TN[band])
            bend = self.transform.bend(logits_TN[band].to(self.dtype))
            coef = coef_T1[band]
            gradient = z.sub_(shift_T1[band]).exp_().mul_(-coef)
            column, inside = _locate(target_T1[band], vocab_start, gradient.shape[1])
            gradient.scatter_(1, column, torch.where(inside, coef, gradient.gather(1, column)))
            out_TN[band] = gradient if bend is None else gradient.mul_(bend)

    def topk(self, logits_TN: Tensor, target_T1: Tensor, vocab_start: int, state: TopKState) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.topk`."""
        k = state.values.shape[1]
        for band in self._bands(logits_TN):
            z = self._transformed(logits_TN[band])
            column, inside = _locate(target_T1[band], vocab_start, z.shape[1])
            z.scatter_(1, column, torch.where(inside, -torch.inf, z.gather(1, column)))
            values, index = _topk(z, min(k, z.shape[1]))
            values = torch.cat([state.values[band], values], 1)
            index = torch.cat([state.index[band], index + vocab_start], 1)
            state.values[band], order = values.topk(k, 1)
            state.index[band] = index.gather(1, order)

    def _bands(self, tile_TN: Tensor) -> Iterator[slice]:
        tokens, columns = tile_TN.shape
        elements = _BAND_ELEMENTS.get(tile_TN.device.type, _BAND_ELEMENTS_DEFAULT)
        rows = max(1, elements // columns)
        for start in range(0, tokens, rows):
            yield slice(start, min(start + rows, tokens))

    def _transformed(self, raw: Tensor) -> Tensor:
        """``z`` of a band in ``self.dtype``: a scratch tensor that the next call overwrites."""
        if self._scratch is None or self._scratch.numel() < raw.numel():
            self._scratch = torch.empty(raw.numel(), dtype=self.dtype, device=raw.device)
        z = self._scratch[: raw.numel()].view(raw.shape)
        transform = self.transform
        if transform.softcap is None:
            if transform.slope == 1.0:
                return z.copy_(raw)
            return z.copy_(raw).mul_(transform.slope)
        z.copy_(raw).mul_(transform.logit_scale / transform.softcap).tanh_()
        return z.mul_(transform.softcap / transform.temperature)


def _locate(target_T1: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """The target's column within the tile, clamped into it, and whether it really lies there."""
    column = target_T1 - vocab_start
    inside = (column >= 0) & (column < columns)
    return column.clamp(0, columns - 1), inside


def _topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``z.topk(k, 1)``, looking closely only at the k blocks with the largest maxima: no other can hold a winner.

    A block is 64 columns spread evenly, so that its maximum is taken down whole rows of contiguous memory: a quarter of
    the time of ``topk`` over all of them.
    """
    tokens, columns = z.shape
    width = columns // _TOPK_BLOCK
    if columns % _TOPK_BLOCK or width <= k:
        values, index = z.topk(k, 1)
        return values, index
    blocks = z.view(tokens, _TOPK_BLOCK, width)
    best = blocks.amax(1).topk(k, 1).indices.unsqueeze(1)
    values, position = blocks.gather(2, best.expand(-1, _TOPK_BLOCK, -1)).view(tokens, -1).topk(k, 1)
    return values, position // k * width + best.squeeze(1).gather(1, position % k)
