"""From text to token ids: every sequence is tokenised once, as a whole, and the boundary is found among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastd2o.data.prefix import common_prefix_length
from fastd2o.data.render import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence, before truncation.

    Attributes:
        ids: prompt and completion, EOS included.
        start: index of the completion's first token, at least 1: a first token has nothing to be predicted from.
        clipped: whether ``start`` was moved to 1, so that the completion's first token only serves as context.
        repair: what the chat template did to the prompt, if anything (:class:`~fastd2o.data.render.Rendered`).
    """

    ids: tuple[int, ...]
    start: int
    clipped: bool
    repair: str | None


class Encoder:
    """Tokenises rendered sequences, many at a time.

    - A token that straddles the boundary belongs to the completion. Fast tokenizers tell by character offsets; for slow
      ones the prompt's tokens are the common prefix of the sequence and of the prompt tokenised alone.
    - Text gets the special tokens the tokenizer adds by itself, and EOS at the end; a conversation has those its
      template wrote, and EOS only where the template leaves the last turn open. A completion that was cut gets none.
    - A BOS that is both in the text and added by the tokenizer is kept once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A tokenizer makes a new int for every token; sharing them cuts the memory of a dataset to a fifth.
        self._shared: dict[int, int] = {}

    def __call__(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """Encode sequences, in order."""
        encoded: dict[int, Encoded] = {}
        for conversational in (False, True):
            indices = [i for i, rendered in enumerate(batch) if rendered.conversational is conversational]
            picked = [batch[i] for i in indices]
            encoded.update(zip(indices, self._encode(picked, add_special_tokens=not conversational), strict=True))
        return [encoded[i] for i in range(len(batch))]

    def _encode(self, batch: Sequence[Rendered], *, add_special_tokens: bool) -> list[Encoded]:
        if not batch:
            return []
        texts = [rendered.text for rendered in batch]
        output = self._tokenize(texts, add_special_tokens, return_offsets_mapping=self.tokenizer.is_fast)
        if self.tokenizer.is_fast:
            starts = [
                _first_ending_after(rendered.boundary, offsets)
                for rendered, offsets in zip(batch, output["offset_mapping"], strict=True)
            ]
        else:
            prompts = self._tokenize([rendered.text[: rendered.boundary] for rendered in batch], add_special_tokens)
            pairs = zip(output["input_ids"], prompts["input_ids"], strict=True)
            starts = [common_prefix_length(ids, prompt_ids) for ids, prompt_ids in pairs]
        triples = zip(output["input_ids"], starts, batch, strict=True)
        return [self._finish(ids, start, rendered) for ids, start, rendered in triples]

    def _tokenize(self, texts: list[str], add_special_tokens: bool, **options: Any) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
            **options,
        )

    def _finish(self, ids: list[int], start: int, rendered: Rendered) -> Encoded:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not rendered.conversational and bos is not None and ids[:2] == [bos, bos]:
            ids, start = ids[1:], start - 1
        ended = eos is not None and ids[-1:] == [eos]
        if rendered.cut and ended:
            ids = ids[:-1]  # added by a tokenizer that closes every text
        elif eos is not None and not (rendered.cut or rendered.closed or ended):
            ids = [*ids, eos]
        shared = tuple(map(self._shared.setdefault, ids, ids))
        return Encoded(shared, max(start, 1), clipped=start < 1, repair=rendered.repair)


def _first_ending_after(boundary: int, offsets: Sequence[tuple[int, int]]) -> int:
    # The end decides, not the start: some tokenizers leave the space that a token begins with out of its offsets.
    return next((index for index, (_, end) in enumerate(offsets) if end > boundary), len(offsets))
