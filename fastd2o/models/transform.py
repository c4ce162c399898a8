"""What a model does to its logits after the head: measured, not looked up.

Models scale and cap their logits under many names: ``logit_scale`` (Cohere), ``lm_head_multiplier`` (Falcon-H1),
``final_logit_softcapping`` (Gemma), ``output_multiplier`` (Muse Glimmer) … ``logits_scaling`` divides the logits in
Granite, multiplies them in HyperCLOVA X and divides the *hidden states* in MiniCPM3. Names cannot be trusted; the
forward can. Let the head answer with numbers of our choice, and read off what the model made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fastd2o.errors import FastD2OError
from fastd2o.models.head import open_heads, projecting
from fastd2o.models.mode import evaluating


@dataclass(frozen=True)
class HeadTransform:
    """From the head's outputs u to logits: ``softcap · tanh(logit_scale · u / softcap)``; no cap: ``logit_scale · u``.

    `vocab_size` is the number of columns that the model keeps, where it drops those that pad the vocabulary; None: all.
    """

    logit_scale: float
    softcap: float | None
    vocab_size: int | None = None

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """The logits, in the shape and dtype of `outputs`."""
        scaled = outputs * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


# Small enough for tanh(x) = x and large enough for tanh(x) = ±1 to the last bit, both finite in float32. Powers of
# two: to divide by them is exact.
_TINY, _HUGE = 2.0**-60, 2.0**60
_EXTREME = (_TINY, _HUGE, -_HUGE, -_TINY)
# Where logits live. Here the fit is checked, in every column of the vocabulary.
_ORDINARY = (0.5, -1.0, 0.0, 3.25, -7.5, 12.0, -25.0, 40.0, 75.0, -110.0)


def measure(model: PreTrainedModel, forward: Callable[..., Any], device: torch.device) -> HeadTransform:
    """Run the model on pairs of tokens, in evaluation mode and without gradient, and fit what happens after the head.

    The two pairs differ in their second token, which a causal model cannot see from the first.

    Args:
        model: a causal LM whose weights are ready to run.
        forward: its forward; called with ``input_ids`` on `device`.
        device: of the input.

    Raises:
        FastD2OError: a token sees those after it, or the logits are not a scaled and capped image of the head's
            outputs.
    """
    seen = probes = torch.empty(0)

    def probe(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal seen, probes
        seen = hidden
        probes = _probes(hidden, columns=weight.shape[0])
        return probes.clone()  # the model may scale and cap in place

    heads = open_heads(model)
    accelerators = [device] if device.type not in ("cpu", "mps", "meta") else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"),
        evaluating(model),
        projecting(heads, probe),
    ):
        output = forward(input_ids=_ordinary_tokens(model).to(device), return_dict=True, use_cache=False)
    name = type(model).__name__
    _check_causal(name, seen)
    if getattr(output, "logits", None) is None:
        raise FastD2OError(f"{name} returns no logits. Fix: load the model with AutoModelForCausalLM.from_pretrained")
    return _fit(name, probes, output.logits)


def _check_causal(name: str, hidden: torch.Tensor) -> None:
    """``hidden [2, 2, D]``: the first tokens are alike, and so must be what the head gets of them, up to rounding."""
    first, second = hidden[:, 0].float()
    # Most models give the same bits; experts chosen for other tokens can make a matrix product round in another way.
    rounding = max(1e-4, 4 * torch.finfo(hidden.dtype).eps)
    if (first - second).abs().max() > rounding * first.abs().max():
        raise FastD2OError(
            f"{name} is not causal: what it says of a token depends on the tokens after it. Fix: use a decoder-only "
            "causal LM (an encoder such as BERT predicts masked tokens, not the next one)"
        )


def _probes(hidden: torch.Tensor, columns: int) -> torch.Tensor:
    """``[..., tokens, columns]``: extreme values for even tokens, ordinary ones for odd tokens."""
    # float64 reads the constants to the last digit. Models keep the dtype that the head gives, or go to float32.
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    probes = torch.empty(*hidden.shape[:-1], columns, dtype=dtype, device=hidden.device)
    for parity, values in enumerate((_EXTREME, _ORDINARY)):
        row = torch.tensor(values, dtype=dtype, device=hidden.device).repeat(math.ceil(columns / len(values)))
        probes[..., parity::2, :] = row[:columns]
    return probes


def _fit(name: str, probes: torch.Tensor, logits: torch.Tensor) -> HeadTransform:
    columns, width = logits.shape[-1], probes.shape[-1]
    if logits.shape[:-1] != probes.shape[:-1] or not 2 <= columns <= width:
        raise _inimitable(name, f"from shape {list(probes.shape)} they come out as {list(logits.shape)}")
    probes, answers = probes[..., :columns], logits.to(probes.dtype)

    to_tiny, to_huge = answers.flatten()[:2].tolist()
    scale = to_tiny / _TINY
    softcap = None if math.isclose(to_huge, scale * _HUGE, rel_tol=1e-2) else to_huge
    if not (0 < scale < math.inf and (softcap is None or 0 < softcap < math.inf)):
        raise _inimitable(name, f"{_TINY:g} becomes {to_tiny:g} and {_HUGE:g} becomes {to_huge:g}")
    transform = HeadTransform(scale, softcap, vocab_size=None if columns == width else columns)

    expected = transform(probes)
    precision = torch.finfo(logits.dtype).eps
    wrong = ((answers - expected).abs() <= 16 * precision * expected.abs()).logical_not().nonzero().tolist()
    if wrong:
        at = tuple(wrong[0])
        raise _inimitable(
            name,
            f"a scale of {scale:g} and a softcap of {softcap} would make {probes[at].item():g} in column {at[-1]} "
            f"{expected[at].item():.9g}, but it becomes {answers[at].item():.9g}",
        )
    if precision > 1e-6 and (scale, softcap) != (1.0, None):
        raise _inimitable(
            name, f"rounded to {logits.dtype}, they do not tell scale {scale:g} and softcap {softcap} exactly"
        )
    return transform


def _inimitable(name: str, found: str) -> FastD2OError:
    return FastD2OError(
        f"{name} changes the outputs of its head in a way that a fused forward cannot follow (it can scale and "
        f"tanh-cap them): {found}. Fix: use this model without fused"
    )


def _ordinary_tokens(model: PreTrainedModel) -> torch.Tensor:
    """``[2, 2]`` token ids to which the configuration gives no meaning (padding, image placeholder …): a b, a c."""
    config = model.config.get_text_config()
    special = {
        value
        for settings in (model.config.to_dict(), config.to_dict())
        for key, value in settings.items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    first, second, third = [token for token in range(config.vocab_size) if token not in special][:3]
    return torch.tensor([[first, second], [first, third]])
