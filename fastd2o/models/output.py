"""What an attached model returns from a fused forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """The output of ``model(..., fused=...)``, for a model given to :func:`fastd2o.attach`.

    ``loss`` and ``logits`` are always None; they are there for code that looks for them. The fields below ``head``
    are the model's own, where it has them and was asked for them.

    Attributes:
        log_probs: with ``fused=True``, ``[B, L]`` float32 (float64 in a float64 model): log p(labels[b, t] | tokens
            before t), 0.0 where the label is -100 and at t = 0, which nothing precedes.
        head: with ``fused=head_call``, what the call returned.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    head: Any = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
