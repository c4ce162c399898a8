"""Validation at the door of every loss.

Each public loss checks its arguments once, with these, and then does plain arithmetic. An error names the argument,
what it was, what was expected and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

_HALF_DTYPES = (torch.float16, torch.bfloat16)


def logprobs(**tensors: Tensor) -> list[Tensor]:
    """Check that the named tensors are floating point and on one device; return them ready for arithmetic.

    bfloat16 and float16 become float32, because a difference of two long sums has no digits left in half precision;
    float32 and float64 stay as they are.
    """
    for name, tensor in tensors.items():
        _require_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected a floating-point tensor. Fix: pass {name}.float()."
            )
    same_device(**tensors)
    return [tensor.float() if tensor.dtype in _HALF_DTYPES else tensor for tensor in tensors.values()]


def mask(name: str, value: Tensor, *, like: Tensor) -> Tensor:
    """Check that ``value`` is boolean, of the shape of ``like`` and on its device; return it."""
    _require_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(
            f"{name} has dtype {value.dtype}, expected torch.bool (True where it counts). Fix: pass {name}.bool()."
        )
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {list(like.shape)}: one entry for each value it masks."
        )
    _require_device(name, value, like.device)
    return value


def lengths(name: str, value: Tensor | None, *, like: Tensor) -> Tensor:
    """Check that ``value`` holds completion lengths (numbers ≥ 1) that broadcast with ``like``; return it.

    The values are read only where that does not stall an accelerator; elsewhere a length of 0 surfaces as NaN or
    infinity.
    """
    if value is None:
        raise ValueError(
            f"{name} is missing: this loss uses per-token means. Fix: pass the number of completion tokens."
        )
    _require_tensor(name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}, expected integer (or floating-point) token counts.")
    same_rank(**{"the log-probabilities": like, name: value})
    _require_device(name, value, like.device)
    if values_readable(value) and bool((value < 1).any()):
        raise ValueError(
            f"{name} holds {value.min().item()}, expected token counts of at least 1: an empty completion has no mean "
            "log-probability. Fix: drop the empty completions."
        )
    return value


def constant(name: str, value: Tensor | float, *, like: Tensor) -> Tensor | float:
    """Check that ``value`` is a finite number, or a floating-point tensor that broadcasts with ``like``.

    A constant of the loss carries no gradient: tensors come back detached.
    """
    if not isinstance(value, Tensor):
        _require_finite(name, value)
        return value
    (tensor,) = logprobs(**{name: value})
    same_rank(**{"the log-probabilities": like, name: tensor})
    _require_device(name, tensor, like.device)
    return tensor.detach()


def same_device(**tensors: Tensor) -> None:
    """Raise unless the named tensors are on one device."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        _require_device(name, tensor, device)


def same_shape(**tensors: Tensor) -> None:
    """Raise unless the named tensors have one shape."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(reference.shape)}, the shape of {first}."
            )


def same_rank(**tensors: Tensor) -> None:
    """Raise unless the named tensors broadcast *and* have one number of dimensions (0-d tensors go with anything).

    Plain broadcasting would turn ``[G]`` against ``[G, 1]`` into ``[G, G]`` losses: every pair that was never meant,
    and no error.
    """
    shaped = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 0}
    if len({tensor.dim() for tensor in shaped.values()}) > 1:
        raise ValueError(
            f"shapes differ in their number of dimensions: {_shapes(shaped)}. Fix: give them the same dimensions."
        )
    try:
        torch.broadcast_shapes(*(tensor.shape for tensor in shaped.values()))
    except RuntimeError:
        raise ValueError(f"shapes do not broadcast: {_shapes(shaped)}. Fix: one value per pair in each.") from None


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def positive(**numbers: float) -> None:
    """Raise unless the named numbers are finite and above 0."""
    for name, value in numbers.items():
        _require_finite(name, value)
        if value <= 0:
            raise ValueError(f"{name} is {value}, expected a number above 0.")


def non_negative(**numbers: float) -> None:
    """Raise unless the named numbers are finite and at least 0."""
    for name, value in numbers.items():
        _require_finite(name, value)
        if value < 0:
            raise ValueError(f"{name} is {value}, expected a number of at least 0.")


def finite(**numbers: float) -> None:
    """Raise unless the named numbers are finite."""
    for name, value in numbers.items():
        _require_finite(name, value)


def label_smoothing(value: float) -> None:
    """Raise unless ``value``, the assumed rate of flipped labels, is in [0, 0.5)."""
    _require_finite("label_smoothing", value)
    if not 0 <= value < 0.5:
        raise ValueError(f"label_smoothing is {value}, expected a rate in [0, 0.5): at 0.5 the labels say nothing.")


def one_of(name: str, value: str, valid: Collection[str]) -> None:
    """Raise unless ``value`` is one of ``valid``, which the error lists."""
    if value not in valid:
        raise ValueError(f"{name} is {value!r}, expected one of: {', '.join(valid)}.")


def values_readable(tensor: Tensor) -> bool:
    """Whether looking at the values of ``tensor`` is free: no device to wait for, no graph being traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}, expected a torch.Tensor.")


def _require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, the other tensors on {device}. Fix: {name}.to({str(device)!r})."
        )


def _require_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is of type {type(value).__name__}, expected a number.")
    if not -math.inf < value < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name} is {value}, expected a finite number.")
