"""The demo's model: a BPE tokenizer and a very small Llama, trained from scratch on the conversations of the world."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastd2o.cli.demo_world import Messages

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2000
BATCH_SIZE = 24
LEARNING_RATE = 4e-3  # so small a model stands it; 8e-3 learned no faster
_PAD, _END = "<|pad|>", "<|end|>"
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Sequences sorted by length within this many batches, so that little is padded and the order stays random.
_SORTED_BATCHES = 8


@dataclass(frozen=True)
class Batch:
    """``input_ids`` [B, L] int64, ``attention_mask`` [B, L] int64, ``labels`` [B, L] int64 with -100 on the padding."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def build_tokenizer(conversations: Sequence[Messages]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 2,000 tokens on the conversations and give it a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_PAD, _END, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] for messages in conversations for message in messages), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=_PAD, eos_token=_END, additional_special_tokens=_ROLES
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a Llama of 650 thousand weights: 2 layers, hidden size 128, embeddings tied with the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def teach(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Messages], seed: int
) -> float:
    """Train the model on every conversation once, in an order that ``seed`` gives.

    Returns:
        The mean loss of the last batches, in nats per token.
    """
    from tqdm.auto import tqdm

    texts = tokenizer.apply_chat_template(list(conversations), tokenize=False)
    sequences = tokenizer(texts, add_special_tokens=False).input_ids
    batches = list(_batches(sequences, tokenizer.pad_token_id, random.Random(seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(batches), pct_start=0.1)
    losses: list[float] = []
    model.train()
    progress = tqdm(batches, desc="learning the language", unit="batch", mininterval=0.5)
    for batch in progress:
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    model.eval()
    recent = losses[-_SORTED_BATCHES:]
    return sum(recent) / len(recent)


def _batches(sequences: Sequence[Sequence[int]], pad_token_id: int, rng: random.Random) -> Iterator[Batch]:
    stride = BATCH_SIZE * _SORTED_BATCHES
    for start in range(0, len(sequences), stride):
        similar = sorted(sequences[start : start + stride], key=len)
        groups = [similar[first : first + BATCH_SIZE] for first in range(0, len(similar), BATCH_SIZE)]
        rng.shuffle(groups)
        for group in groups:
            length = max(map(len, group))
            ids = torch.tensor([[*sequence, *[pad_token_id] * (length - len(sequence))] for sequence in group])
            mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in group])
            yield Batch(ids, mask, ids.masked_fill(mask == 0, -100))
