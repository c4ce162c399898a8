"""TileOps by the kernels of ``fastd2o.kernels``: fused with the product, or on tiles that the vendor's library
multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from fastd2o.ops.tile_ops import FoldState, LogitTransform, TopKState
from fastd2o.ops.torch_tile_ops import TorchTileOps


class TritonTileOps:
    """See :class:`fastd2o.ops.tile_ops.FusedOps`. Sums and softmax are float32; tiles float32, bfloat16 or float16."""

    def __init__(self, transform: LogitTransform, dtype: torch.dtype) -> None:
        # Here and not above: Triton is an optional dependency.
        from fastd2o.kernels import cringe_backward, cringe_forward, logprob, tiles

        assert dtype == torch.float32
        self.transform = transform
        self._kernels, self._products = tiles, logprob
        self._cringe_forward = cringe_forward.cringe_forward
        self._cringe_backward = cringe_backward.cringe_backward
        of_torch = TorchTileOps(transform, dtype)
        self.product, self.scale = of_torch.product, of_torch.scale

    def fold(
        self,
        logits_TN: Tensor,
        target_T1: Tensor,
        vocab_start: int,
        state: FoldState,
        weights_TN: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.fold`."""
        rescale_T1: Tensor = self._kernels.fold(logits_TN, target_T1, vocab_start, state, self.transform, weights_TN)
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
        self._kernels.grad(logits_TN, target_T1, vocab_start, lse_others_T1, coef_T1, out_TN, self.transform)

    def topk(self, logits_TN: Tensor, target_T1: Tensor, vocab_start: int, state: TopKState) -> None:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.topk`."""
        self._kernels.topk(logits_TN, target_T1, vocab_start, state, self.transform)

    def draw(self, state: TopKState, seed: int, counter_T: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`fastd2o.ops.tile_ops.TileOps.draw`."""
        positive_T, positive_logit_T = self._kernels.draw(state, seed, counter_T)
        return positive_T, positive_logit_T

    def fold_product(
        self,
        hidden_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        target_T1: Tensor,
        vocab_start: int,
        state: FoldState,
    ) -> None:
        """See :meth:`fastd2o.ops.tile_ops.FusedOps.fold_product`."""
        self._products.logprob_forward(hidden_TD, weight_ND, bias_N, target_T1, vocab_start, state, self.transform)

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
        """See :meth:`fastd2o.ops.tile_ops.FusedOps.grad_product`."""
        self._products.logprob_grad_slab(
            hidden_TD,
            weight_ND,
            bias_N,
            target_T1,
            vocab_start,
            lse_others_T1,
            coef_T1,
            out_TN,
            self.transform,
        )

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
        """See :meth:`fastd2o.ops.tile_ops.FusedOps.topk_product`."""
        self._cringe_forward(hidden_TD, weight_ND, bias_N, target_T1, vocab_start, state, top, self.transform)

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
        """See :meth:`fastd2o.ops.tile_ops.FusedOps.cringe_grad`."""
        return self._cringe_backward(
            coef_T,
            hidden_TD,
            weight_VD,
            bias_V,
            target_T,
            positive_T,
            self.transform,
            detach_positive=detach_positive,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
