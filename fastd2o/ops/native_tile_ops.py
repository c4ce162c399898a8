"""TileOps by the operators of ``csrc``: one class a device, which differ in who multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState
from fastd2o.ops.torch_tile_ops import TorchTileOps


class _NativeTileOps:
    """See :class:`fastd2o.ops.tile_ops.TileOps`. Sums and softmax are float32, tiles too."""

    def __init__(self, transform: LogitTransform, dtype: torch.dtype) -> None:
        assert dtype == torch.float32
        self.transform = transform
        self._options = (transform.logit_scale, transform.softcap, transform.temperature)
        # A namespace of operators, which torch fills when the library is loaded.
        self._native: Any = torch.ops.fastd2o_native

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
        extra = state.statistics
        self._native.fold_(
            logits_TN,
            target_T1,
            vocab_start,
            state.max,
            state.sum,
            state.target_logit,
            rescale_T1,
            weights_TN,
            *((None, None, None) if extra is None else (extra.weighted, extra.argmax, extra.total)),
            *self._options,
        )
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
        self._native.grad_(out_TN, logits_TN, target_T1, vocab_start, lse_others_T1, coef_T1, *self._options)

    def topk(self, logits_TN: Tensor, target_T1: Tensor, vocab_start: int, state: TopKState) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.topk`."""
        self._native.topk_(logits_TN, target_T1, vocab_start, state.values, state.index, *self._options)

    def draw(self, state: TopKState, seed: int, counter_T: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.draw`."""
        positive_T, logit_T = self._native.draw(state.values, state.index, counter_T, seed)
        return positive_T, logit_T


class CpuTileOps(_NativeTileOps):
    """``csrc/cpu``: products too are our own, because they deliver float32."""

    def product(
        self,
        out_MN: Tensor,
        left_MK: Tensor,
        right_KN: Tensor,
        bias_N: Tensor | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.product`."""
        self._native.product_(out_MN, left_MK, right_KN, bias_N, accumulate)

    def scale(self, weights_TN: Tensor, scale_T1: Tensor, out_TN: Tensor) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.scale`."""
        self._native.scale_(out_TN, weights_TN, scale_T1)


class CudaTileOps(_NativeTileOps):
    """``csrc/cuda``: the vendor's library multiplies, and delivers float32."""

    # What a warp keeps of the largest logits; beyond it torch serves.
    _LARGEST_K = 64

    def __init__(self, transform: LogitTransform, dtype: torch.dtype) -> None:
        super().__init__(transform, dtype)
        self._torch = TorchTileOps(transform, dtype)
        self.product, self.scale = self._torch.product, self._torch.scale

    def topk(self, logits_TN: Tensor, target_T1: Tensor, vocab_start: int, state: TopKState) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.topk`."""
        if state.values.shape[1] > self._LARGEST_K:
            self._torch.topk(logits_TN, target_T1, vocab_start, state)
        else:
            super().topk(logits_TN, target_T1, vocab_start, state)

    def draw(self, state: TopKState, seed: int, counter_T: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.draw`."""
        if state.values.shape[1] > self._LARGEST_K:
            return self._torch.draw(state, seed, counter_T)
        return super().draw(state, seed, counter_T)
