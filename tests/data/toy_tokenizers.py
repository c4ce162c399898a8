"""Small tokenizers trained on the spot, and chat templates with the habits of the families in use."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "What color is the sky? The sky is blue. It is green, it is grey.",
    "Tell me how to bake bread. First mix the flour with water, then wait.",
    "user assistant system hello world how are you today fine thanks",
]
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS in the template, no generation prompt, content stripped, roles checked.
LLAMA2 = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}"
    "{% endfor %}"
)
# Keeps the reasoning of the last assistant turn alone, so an earlier turn changes once a later one exists.
FORGETFUL = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought that the finished conversation does not show.
HIDDEN_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Nothing closes a turn.
OPEN_ENDED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    add_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(add_prefix_space=False, trim_offsets=True), add_bos]
    )
    return str(tokenizer.to_str())


@cache
def bpe_tokenizer(chat_template: str | None = None, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS before plain text, like Llama 3's, or does not, like Qwen's. Shared."""
    backend = Tokenizer.from_str(_trained_bpe())
    if not bos:
        backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=chat_template,
    )


class WordTokenizer(PreTrainedTokenizer):
    """A slow tokenizer, without offsets: words, and single characters between them, numbered as they come."""

    def __init__(self, **options: object) -> None:
        self._words = ["</s>"]
        super().__init__(eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return 10_000

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return re.findall(r"\w+|\W", text)

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._words:
            self._words.append(token)
        return self._words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def decode(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """The text of token ids, special tokens written out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
