"""TileOps in plain torch: the readable reference, on every device and for every dtype.

Contract: see :mod:`fastd2o.ops.tile_ops`. Cost per logit: one read of the tile and, in cache, a maximum, a subtraction,
an exponential and a sum; ``grad`` adds a multiplication and one write of the tile. The exponential is three quarters of
it. Nothing here is larger than the tile itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastd2o.ops.philox import uniform
from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState

# A tile is worked on in bands of rows. On the CPU a band's float32 copy (2 MB) stays in the second-level cache: 1.3 to
# 1.5 times faster than whole tiles, as measured. A GPU would rather have few launches: there, bands bound temporaries.
_BAND_ELEMENTS = {"cpu": 512 * 1024}
_BAND_ELEMENTS_DEFAULT = 4 * 1024 * 1024

_BLOCK = 64


def band_elements(device: str) -> int:
    """How many logits are worked on at once; no temporary is larger, and fewer than eight of them are alive."""
    return _BAND_ELEMENTS.get(device, _BAND_ELEMENTS_DEFAULT)


class TorchTileOps:
    """See :class:`fastd2o.ops.tile_ops.TileOps`. ``dtype`` is that of sums and softmax: float32, or float64."""

    def __init__(self, transform: LogitTransform, dtype: torch.dtype) -> None:
        self.transform = transform
        self.dtype = dtype
        self._scratch: Tensor | None = None

    def product(
        self,
        out_MN: Tensor,
        left_MK: Tensor,
        right_KN: Tensor,
        bias_N: Tensor | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.product`.

        On CUDA sums of 16-bit factors stay float32; on the CPU the vendor's library rounds them to 16 bits once.
        """
        if out_MN.dtype == left_MK.dtype:
            if accumulate:
                out_MN.addmm_(left_MK, right_KN)
            elif bias_N is None:
                torch.mm(left_MK, right_KN, out=out_MN)
            else:
                torch.addmm(bias_N, left_MK, right_KN, out=out_MN)
            return
        if left_MK.is_cuda and accumulate:
            _add_product_(out_MN, left_MK, right_KN)
            return
        if left_MK.is_cuda:
            product_MN = torch.mm(left_MK, right_KN, out_dtype=out_MN.dtype, out=out_MN)
        elif left_MK.dtype == torch.float16:
            # Sums over a slab, or over many tokens, leave float16's range; nothing but wider factors keeps them.
            product_MN = torch.mm(left_MK.to(out_MN.dtype), right_KN.to(out_MN.dtype))
        else:
            product_MN = torch.mm(left_MK, right_KN)
        if accumulate:
            out_MN.add_(product_MN)
        elif product_MN is not out_MN:
            out_MN.copy_(product_MN)
        if bias_N is not None:
            out_MN.add_(bias_N)

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
            bend = self._bend(logits_TN[band]) if weights_TN is not None else None
            z = self._transformed(logits_TN[band])
            column, inside = locate(target_T1[band], vocab_start, z.shape[1])
            target_logit = z.gather(1, column)
            state.target_logit[band] = torch.where(inside, target_logit, state.target_logit[band])
            extra = state.statistics
            if extra is not None:
                extra.total[band] += z.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0).sum(1, keepdim=True)
            z.scatter_(1, column, torch.where(inside, -torch.inf, target_logit))

            old_max, old_sum = state.max[band], state.sum[band]
            tile_max = z.amax(1, keepdim=True)
            new_max = torch.maximum(old_max, tile_max)
            # While every logit so far is -inf, shifting by it would make NaN of them; by 0 it makes the zeros they are.
            shift = torch.where(new_max == -torch.inf, 0.0, new_max)
            rescale = (old_max - shift).exp()
            if extra is not None:
                first = _first_argmax(z) + vocab_start
                extra.argmax[band] = torch.where(tile_max > old_max, first, extra.argmax[band])
            z.sub_(shift)
            exponentials = z.exp() if extra is not None else z.exp_()
            tile_sum = exponentials.sum(1, keepdim=True)
            if extra is not None:
                # What was gathered relative to the old maximum moves along; 0 * -inf is the 0 it tends to, also where
                # what counts for nothing any more has overflowed.
                moved = extra.weighted[band] + torch.where(old_sum > 0, old_sum * (old_max - shift), 0.0)
                weighted = z.mul_(exponentials).nan_to_num_(nan=0.0).sum(1, keepdim=True)
                extra.weighted[band] = torch.where(rescale == 0, 0.0, moved * rescale) + weighted
            state.sum[band] = old_sum * rescale + tile_sum
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
            bend = self._bend(logits_TN[band])
            z = self._transformed(logits_TN[band])
            coef = coef_T1[band]
            gradient = z.sub_(shift_T1[band]).exp_().mul_(-coef)
            column, inside = locate(target_T1[band], vocab_start, gradient.shape[1])
            gradient.scatter_(1, column, torch.where(inside, 0.0, gradient.gather(1, column)))
            out_TN[band] = gradient if bend is None else gradient.mul_(bend)

    def scale(self, weights_TN: Tensor, scale_T1: Tensor, out_TN: Tensor) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.scale`."""
        scale_rows(weights_TN, scale_T1, out_TN)

    def topk(self, logits_TN: Tensor, target_T1: Tensor, vocab_start: int, state: TopKState) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.topk`."""
        k = state.values.shape[1]
        for band in self._bands(logits_TN):
            z = self._transformed(logits_TN[band], keep=True)
            column, inside = locate(target_T1[band], vocab_start, z.shape[1])
            z.scatter_(1, column, torch.where(inside, -torch.inf, z.gather(1, column)))
            values, index = _topk(z, min(k, z.shape[1]))
            values = torch.cat([state.values[band], values], 1)
            index = torch.cat([state.index[band], index + vocab_start], 1)
            state.values[band], order = values.topk(k, 1)
            state.index[band] = index.gather(1, order)

    def draw(self, state: TopKState, seed: int, counter_T: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.draw`."""
        index, by_column = state.index.sort(dim=1)
        values, by_value = state.values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
        index = index.gather(1, by_value)
        none_T1 = values[:, :1] == -torch.inf
        probabilities = torch.where(none_T1, 0.0, values).softmax(1)
        draw_T = uniform(seed, counter_T).to(self.dtype)
        # Summed step by step, so that every backend sums alike (and CUDA deterministically, which cumsum is not).
        # Rounding may leave the last step just under 1; a column at -inf has no probability and is never the one
        # picked.
        below, choice = torch.zeros_like(draw_T), torch.zeros_like(counter_T)
        for candidate in range(values.shape[1] - 1):
            below = below + probabilities[:, candidate]
            choice += below <= draw_T
        choice_T1 = choice.minimum((values != -torch.inf).sum(1) - 1).clamp_min(0).unsqueeze(1)
        positive_T1 = torch.where(none_T1, -1, index.gather(1, choice_T1))
        return positive_T1.squeeze(1), values.gather(1, choice_T1).squeeze(1)

    def _bands(self, tile_TN: Tensor) -> Iterator[slice]:
        tokens, columns = tile_TN.shape
        rows = max(1, band_elements(tile_TN.device.type) // columns)
        for start in range(0, tokens, rows):
            yield slice(start, min(start + rows, tokens))

    def _transformed(self, raw: Tensor, keep: bool = False) -> Tensor:
        """``z`` of a band in ``self.dtype``: in the band's own memory if that has the dtype and need not be kept, else
        in a scratch tensor that the next call overwrites."""
        if raw.dtype == self.dtype and not keep:
            z = raw
        else:
            if self._scratch is None or self._scratch.numel() < raw.numel():
                self._scratch = torch.empty(raw.numel(), dtype=self.dtype, device=raw.device)
            z = self._scratch[: raw.numel()].view(raw.shape).copy_(raw)
        transform = self.transform
        if transform.softcap is None and transform.slope == 1.0:
            return z
        # Padding stays at -inf even where a cap would lift it or a scale would turn it around.
        padding = z == -torch.inf if transform.softcap is not None or transform.slope <= 0 else None
        if transform.softcap is None:
            z.mul_(transform.slope)
        else:
            z.mul_(transform.logit_scale / transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
        return z if padding is None else z.masked_fill_(padding, -torch.inf)

    def _bend(self, raw: Tensor) -> Tensor | None:
        """The softcap's slope in a band, in memory of its own."""
        return None if self.transform.softcap is None else self.transform.bend(raw.to(self.dtype))


def _add_product_(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Add a product of 16-bit factors to float32 sums on CUDA, where no factor or sum is ever rounded to 16 bits."""
    with torch.cuda.device_of(out_MN):
        in_place = _adds_in_place(out_MN.device, left_MK.dtype)
    if in_place:
        # torch.addmm has not always taken float32 sums to add 16-bit factors to; its kin for batches, here of one, has.
        out_1MN = out_MN.unsqueeze(0)
        torch.baddbmm(out_1MN, left_MK.unsqueeze(0), right_KN.unsqueeze(0), out_dtype=out_MN.dtype, out=out_1MN)
        return
    # In bands of rows that are still in the second-level cache when they are added; narrower ones would leave
    # processors idle.
    rows = max(1, band_elements(out_MN.device.type) // max(1, out_MN.shape[1]))
    for start in range(0, len(out_MN), rows):
        band = slice(start, start + rows)
        out_MN[band] += torch.mm(left_MK[band], right_KN, out_dtype=out_MN.dtype)


# Whether the vendor's product of 16-bit factors adds to float32 sums, by device and dtype of the factors.
_adding: dict[tuple[torch.device, torch.dtype], bool] = {}


def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product can be added without memory of its own: tried once, because no promise of torch's says so."""
    key = (device, dtype)
    if key not in _adding:
        if torch.cuda.is_current_stream_capturing():  # which waits for nothing, so no result can be looked at
            return False
        _adding[key] = _try_to_add(device, dtype)
    return _adding[key]


def _try_to_add(device: torch.device, dtype: torch.dtype) -> bool:
    factors = torch.full((1, 16, 16), 3.0, dtype=dtype, device=device)
    sums = torch.full((1, 16, 16), 0.125, dtype=torch.float32, device=device)
    try:
        torch.baddbmm(sums, factors, factors, out_dtype=sums.dtype, out=sums)
    except torch.OutOfMemoryError:  # which says nothing about products
        raise
    except (RuntimeError, TypeError):
        return False
    return bool((sums == 16 * 9 + 0.125).all())


def scale_rows(weights_TN: Tensor, scale_T1: Tensor, out_TN: Tensor) -> None:
    """Write ``scale * weights``, rounded once, to ``out_TN``, which may be ``weights_TN`` itself. ``scale`` has the
    dtype of sums."""
    rows = len(weights_TN) if weights_TN.is_cuda else max(1, band_elements("cpu") // max(1, weights_TN.shape[1]))
    for start in range(0, len(weights_TN), max(1, rows)):
        band = slice(start, start + rows)
        torch.mul(weights_TN[band], scale_T1[band], out=out_TN[band])


def locate(target_T1: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
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
    width = columns // _BLOCK
    if columns % _BLOCK or width <= k:
        values, index = z.topk(k, 1)
        return values, index
    blocks = z.view(tokens, _BLOCK, width)
    best = blocks.amax(1).topk(k, 1).indices.unsqueeze(1)
    values, position = blocks.gather(2, best.expand(-1, _BLOCK, -1)).view(tokens, -1).topk(k, 1)
    return values, position // k * width + best.squeeze(1).gather(1, position % k)


def _first_argmax(z: Tensor) -> Tensor:
    """``z.argmax(1, keepdim=True)``, the first of equals, in two steps of which the first is a plain maximum: a fifth
    of the time."""
    tokens, columns = z.shape
    if columns % _BLOCK:
        return z.argmax(1, keepdim=True)
    blocks = z.view(tokens, -1, _BLOCK)
    best = blocks.amax(2).argmax(1, keepdim=True)
    inside = blocks.gather(1, best.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)
    return best * _BLOCK + inside.argmax(1, keepdim=True)
