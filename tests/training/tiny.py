"""A tiny Llama, a tokenizer of whole words, and preference data: everything a trainer needs, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastd2o import PreferenceConfig, PreferenceTrainer

WORDS = [f"w{i}" for i in range(93)]
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{word: 4 + i for i, word in enumerate(WORDS)}}


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # a model with opinions, so that losses and gradients are not all alike
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**{**options, **config}))
    return model.to(dtype)


def make_rows(count: int = 12, *, anchors: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a chosen, a rejected and, unless told otherwise, one to four anchors, all of ragged lengths."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    rows = []
    for index in range(count):
        row: dict[str, Any] = {"prompt": text(2, 6), "chosen": " " + text(1, 7), "rejected": " " + text(1, 7)}
        if anchors:
            row["anchors"] = [" " + text(1, 7) for _ in range(1 + index % 4)]
        rows.append(row)
    return rows


def make_trainer(output_dir: str | Path, **options: Any) -> PreferenceTrainer:
    """A trainer; keyword arguments of PreferenceTrainer go there, all others to PreferenceConfig."""
    names = ("model", "train_dataset", "eval_dataset", "ref_model", "harmful_ref_model", "peft_config", "callbacks")
    given = {name: options.pop(name) for name in names if name in options}
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        **options,
    }
    defaults: dict[str, Any] = {"train_dataset": make_rows()}
    if "model" not in given:
        defaults["model"] = make_model()
    return PreferenceTrainer(
        args=PreferenceConfig(**settings), processing_class=make_tokenizer(), **{**defaults, **given}
    )


class GradientRecorder(TrainerCallback):
    """Keeps the gradient of every step, as the optimiser is about to see it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def gradients(output_dir: str | Path, **options: Any) -> list[dict[str, Tensor]]:
    """Train with plain SGD, in the order of the rows, and return the gradient of each step.

    In float64, unless a model is given: what is equal is then equal to a dozen digits, and what is only close is not.
    """
    recorder = GradientRecorder()
    settings = {"optim": "sgd", "train_sampling_strategy": "sequential", "overwrite": True, **options}
    settings.setdefault("model", make_model(dtype=torch.float64))
    make_trainer(output_dir, callbacks=[recorder], **settings).train()
    return recorder.steps


def losses(trainer: PreferenceTrainer) -> list[float]:
    """Every training loss that was logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_gradients(
    actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], tolerance: float = 1e-12
) -> None:
    """Equal to ``tolerance``, relative to the largest gradient of the step."""
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        scale = max(float(gradient.abs().max()) for gradient in theirs.values())
        assert scale > 1e-4
        for name, gradient in theirs.items():
            error = float((ours[name] - gradient).abs().max())
            assert error <= tolerance * scale, f"{name}: off by {error:.2e}, the largest gradient being {scale:.2e}"
