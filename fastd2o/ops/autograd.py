"""What the autograd of all operators shares."""

from __future__ import annotations

import torch
from torch import Tensor

from fastd2o.ops.counted import Counted


def without_autocast(device: torch.device) -> torch.autocast:
    """The engine has chosen its dtypes; an autocast that is on around it must not choose again."""
    return torch.autocast(device.type, enabled=False)


def check_differentiated_once() -> None:
    """Inside a backward, gradients are recorded only when a second derivative is wanted: refuse instead of leaving
    terms out."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastd2o operators are differentiable once: there is no second derivative through them (create_graph=True)"
        )


def pack_gradients(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None], hidden: Tensor, counted: Counted
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward operator returns: hidden's gradient spread over all rows, and an empty tensor for each None (an
    operator has no way to return None)."""
    dhidden, dweight, dbias = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
    if gradients[0] is not None:
        dhidden = counted.scatter(dhidden.to(hidden.dtype), hidden.shape[0])
    return dhidden, dweight, dbias


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of what needs one, and empty tensors for the rest: what a fake backward returns."""
    tensors = (hidden, weight, hidden if bias is None else bias)
    grads = [t.new_empty(t.shape) if needed else hidden.new_empty(0) for t, needed in zip(tensors, need, strict=True)]
    return grads[0], grads[1], grads[2]
