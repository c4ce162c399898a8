"""Carrying the result of a head call out of the head, through the model, as if it were the logits.

FSDP2 and ZeRO-3 gather the head's weight for the backward when a gradient reaches what the head's forward
*returned*. A result smuggled out on the side would never wake them. So the head returns zeros, one for each number of
the result, whose gradient is the result's gradient. Zero stays zero under scaling and capping, with the slope
``logit_scale``; added to the result outside, the zeros change no bit of it, and its gradient takes the way of any
model's gradient: into the logits, and from there into the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastd2o.models.transform import HeadTransform

# head_call(hidden [B, L, D], weight [V, D], *, bias, logit_scale, softcap, backend)
HeadCall = Callable[..., Any]


class Relay:
    """One fused forward's way through the model: :meth:`send` in the head, :meth:`receive` behind the model."""

    def __init__(self, head_call: HeadCall, transform: HeadTransform, backend: str | None) -> None:
        self.head_call = head_call
        self.transform = transform
        self.backend = backend

    def send(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Make the head call; return what the head shall return."""
        transform = self.transform
        if transform.vocab_size is not None:
            weight = weight[: transform.vocab_size]
            bias = None if bias is None else bias[: transform.vocab_size]
        result = self.head_call(
            hidden,
            weight,
            bias=bias,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            backend=self.backend,
        )
        self.leaves, self.structure = pytree.tree_flatten(result)
        differentiable = [leaf.flatten() for leaf in self.leaves if _needs_grad(leaf)]
        values = torch.cat(differentiable) if differentiable else torch.zeros(1, device=hidden.device)
        # One column: a model that drops the padding of its vocabulary drops nothing here.
        return _Zeros.apply(values[None, :, None])

    def receive(self, logits: torch.Tensor) -> Any:
        """What the head call returned, now with its gradient by way of the model's `logits`."""
        zeros = logits.flatten() / self.transform.logit_scale
        leaves, start = [], 0
        for leaf in self.leaves:
            if _needs_grad(leaf):
                own = zeros[start : start + leaf.numel()].view_as(leaf)
                start += leaf.numel()
                leaves.append(leaf.detach() + own.to(leaf.dtype))
            else:
                leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self.structure)


def _needs_grad(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


class _Zeros(torch.autograd.Function):
    """Zeros that pass their gradient on to `values`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad
