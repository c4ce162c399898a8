"""The float64 oracle: the operators as MATH defines them, on full logits, sharing no code with the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def logprob(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    ignored = target == ignore_index
    column = target.masked_fill(ignored, 0)
    return torch.log_softmax(logits, -1).gather(-1, column[..., None])[..., 0].masked_fill(ignored, 0.0)


@dataclass
class Case:
    """Inputs of one call, with the options that shape its logits."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    coef: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.coef = torch.randn(self.target.shape, generator=generator, dtype=torch.float64)

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def logits(self, tensors: dict[str, Tensor]) -> Tensor:
        """Full logits of these ``hidden``, ``weight`` and, where there is one, ``bias``."""
        return full_logits(tensors["hidden"], tensors["weight"], tensors.get("bias"), **self.options)

    def oracle(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities and the gradients of ``sum(coef * logprob)`` on the same inputs, in float64."""
        leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in self.tensors.items()}
        value = logprob(self.logits(leaves), self.target)
        gradients = torch.autograd.grad((value * self.coef).sum(), list(leaves.values()))
        return value.detach(), dict(zip(leaves, gradients, strict=True))

    def eager(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The same by ordinary torch code in the inputs' dtype, with a softmax in ``dtype``."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()}
        raw = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias")).to(dtype)
        one = torch.ones((1, 1), dtype=dtype)
        value = logprob(full_logits(raw[..., None], one, **self.options)[..., 0], self.target)
        gradients = torch.autograd.grad((value * self.coef.to(value.dtype)).sum(), list(leaves.values()))
        return value.detach(), dict(zip(leaves, gradients, strict=True))


def make_case(
    tokens: int = 13,
    hidden_size: int = 24,
    vocab_size: int = 211,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ignored: float = 0.3,
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random inputs whose logits have a standard deviation of about ``scale``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target = torch.randint(vocab_size, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    return Case(
        hidden=normal(tokens, hidden_size).to(dtype),
        weight=(normal(vocab_size, hidden_size) * scale / hidden_size**0.5).to(dtype),
        target=target,
        bias=(normal(vocab_size) * 0.5 * scale).to(dtype) if bias else None,
        options=options,
    )


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return ((value.double() - expected).abs().max() / scale).item()


def rms_error(value: Tensor, expected: Tensor) -> float:
    """Root mean square difference, relative to the root mean square of the expected values."""
    return (
        (value.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)
    ).item()
