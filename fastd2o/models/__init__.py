"""Meeting Hugging Face models: log-probabilities from the model's own forward, without logits."""

from fastd2o.models.attachment import attach, detach
from fastd2o.models.output import FusedCausalLMOutput

__all__ = ["FusedCausalLMOutput", "attach", "detach"]
