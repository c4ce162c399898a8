"""Tiny random models of many families, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

VOCAB = 67

_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 2, "head_dim": 8}


def _muse_glimmer() -> hf.PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**_GROUPED, "output_multiplier": 0.3, "final_logit_softcapping": 4.0}
    config = hf.MuseGlimmerConfig(
        text_config=text,
        vision_config=vision,
        out_hidden_size=16,
        projector_hidden_size=16,
        image_token_id=3,
        video_token_id=4,
    )
    return hf.MuseGlimmerForConditionalGeneration(config)


def _falcon_h1() -> hf.PreTrainedModel:
    mamba: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return hf.FalconH1ForCausalLM(hf.FalconH1Config(**_GROUPED, **mamba, lm_head_multiplier=0.7))


def _minicpm3() -> hf.PreTrainedModel:
    low_rank: dict[str, Any] = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**_SIZE, **low_rank, num_key_value_heads=4, dim_model_base=8))


def _inkling() -> hf.PreTrainedModel:
    swa = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    size: dict[str, Any] = {**_GROUPED, **swa, **moe, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 61}
    return hf.InklingForCausalLM(hf.InklingTextConfig(**size, logits_mup_width_multiplier=2.0))


FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, final_logit_softcapping=5.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GROUPED, final_logit_softcapping=4.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_GROUPED, logit_scale=0.0625)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**_GROUPED, logit_scale=0.25)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_GROUPED, logits_scaling=3.0)),
    "hyperclovax": lambda: hf.HyperCLOVAXForCausalLM(hf.HyperCLOVAXConfig(**_GROUPED, logits_scaling=3.0)),
    "falcon_h1": _falcon_h1,
    "minicpm3": _minicpm3,
    "muse_glimmer": _muse_glimmer,
    "inkling": _inkling,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZE)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SIZE)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
}


def tiny(family: str = "llama") -> Any:
    """A model of `family` in evaluation mode, with weights wide enough for logits that differ from token to token."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, Tensor]:
    """Two sequences of 9 tokens, one right-padded, with prompt and padding masked in the labels."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 60, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def eager_log_probs(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What ``out.log_probs`` must be, from the logits of the model itself."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return log_probs_of(model(**inputs).logits, batch["labels"])


def log_probs_of(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, L]`` log-probabilities of labels, in their own places."""
    target = labels[:, 1:]
    picked = logits.float()[:, :-1].log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return F.pad(picked.masked_fill(target == -100, 0.0), (1, 0))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted(log_probs: Tensor) -> Tensor:
    """A loss in which every token has a weight of its own."""
    return (log_probs * torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)).sum()


def assert_same_gradients(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    assert ours.keys() == eager.keys()
    largest = max(gradient.abs().max().item() for gradient in eager.values())
    for name, gradient in eager.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-6 * largest), name
