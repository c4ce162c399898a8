"""Fake CPU tensors that stand for those of a GPU: what CUDA does differently with the same Python code, as far as
tensors are made.

Fake tensors cannot say that they are on CUDA where there is none: autograd runs a GPU's backward in a thread for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_HALF = (torch.bfloat16, torch.float16)
# The memory-efficient kernel reads its bias in rows of a multiple of so many elements.
_BIAS_ALIGNMENT = 16

# What CUDA's autocast does in float32 and the CPU's does not: ATen/autocast_mode.h, AT_FORALL_FP32 and
# AT_FORALL_FP32_SET_OPT_DTYPE, those that models call.
_NORMS = ("group_norm", "layer_norm", "rms_norm")
_IN_FLOAT32 = frozenset((*_NORMS, "exp", "log", "logsumexp", "pow", "__pow__", "reciprocal", "rsqrt", "softplus"))
_INTO_FLOAT32 = frozenset(("cumprod", "cumsum", "log_softmax", "prod", "softmax", "sum"))


class FakeCuda(TorchFunctionMode):
    """A context in which fused attention keeps what CUDA's kernels keep, and autocast casts what CUDA's does.

    Attention is the flash kernel, or the memory-efficient one where there is a mask (which padding makes) or float32:
    beside the output both keep one number per head and token.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run what CUDA would run."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _float32, (args, kwargs))
        elif name in _INTO_FLOAT32 and torch.is_autocast_enabled("cpu") and _is_half(args[0]):
            kwargs = {**kwargs, "dtype": kwargs.get("dtype") or torch.float32}
        return func(*args, **kwargs)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALF


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``F.scaled_dot_product_attention``: ``[B, H, L, D]``."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is None and query.dtype in _HALF:
        kept = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return kept[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    kept = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )
    return kept[0]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """``[B, H, L, L]``: what is added to the scores, one copy for all heads."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=query.dtype))
    columns = mask.shape[-1]
    if columns % _BIAS_ALIGNMENT:
        mask = F.pad(mask, (0, -columns % _BIAS_ALIGNMENT))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
