"""What a dataset holds: groups of tokenised sequences that fit the model, none of them empty."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastd2o.data.formats import Completion, Group
from fastd2o.data.render import BadRow
from fastd2o.data.tokenize import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Repairs, besides those of fastd2o.data.render.
CUT_COMPLETION = "completion cut at max_length"
CUT_PROMPT = "prompt cut on the left"
NO_CONTEXT = "no token before the completion, so its first token is not scored"
EMPTY_ANCHOR = "empty anchor removed"
SAME_AS_NEGATIVE = "positive identical to the negative removed"
STALE_REFERENCE = "reference log-probs ignored because the sequence was changed"
# Notes.
DUPLICATE_POSITIVES = "identical positives"


@dataclass(frozen=True)
class TokenizedSequence:
    """A prompt and one completion.

    Attributes:
        input_ids: token ids of both, at most ``max_length``.
        completion_start: the completion is ``input_ids[completion_start:]``, never empty; at least 1.
        ref_logp: the reference model's log-probability of the completion, summed over its tokens, if known.
        harmful_ref_logp: the same of D2O's harmful reference.
    """

    input_ids: tuple[int, ...]
    completion_start: int
    ref_logp: float | None = None
    harmful_ref_logp: float | None = None

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """Token ids of the completion, EOS included unless it was cut."""
        return self.input_ids[self.completion_start :]


@dataclass(frozen=True)
class TokenizedGroup:
    """The sequences of one prompt.

    Attributes:
        line: the row it came from, counted from 1.
        sequences: every sequence, the negative first.
        negative: index of the negative in ``sequences``, -1 if there is none.
        positives: indices of the positives (the chosen completion, or the anchors); may be empty.
    """

    line: int
    sequences: tuple[TokenizedSequence, ...]
    negative: int
    positives: tuple[int, ...]


@dataclass(frozen=True)
class Assembled:
    """A finished group, with what was done to it."""

    group: TokenizedGroup
    repairs: list[str]
    notes: list[str]


class Assembler:
    """Truncates the sequences of a group and removes positives that teach nothing.

    - Completions are cut at their end, EOS included; something visible remains, or the row is bad.
    - Prompts are cut only with ``truncate_prompt``: on the left, BOS kept, to one length for the whole group, so that
      all its completions are judged under the same context. That length leaves the completions the smaller of what the
      longest of them needs and half of ``max_length``. Without it, a prompt of ``max_length`` tokens makes the row bad.
    - An empty anchor is removed (models do answer nothing at times); any other empty completion makes the row bad.
    - A positive with exactly the negative's tokens is removed. Positives identical to one another stay, with a note:
      they are samples, and dropping repetitions would change the distribution they stand for.
    - Reference log-probabilities of a row describe the sequence as it was; where it was cut, or where its prompt is not
      the row's own (``own_prompt=False``), they are ignored.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
        truncate_prompt: bool,
        own_prompt: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = sys.maxsize if max_length is None else max_length
        self.truncate_prompt = truncate_prompt
        self.own_prompt = own_prompt

    def __call__(self, group: Group, encoded: Sequence[Encoded]) -> Assembled:
        """Assemble one group.

        Args:
            group: the group as text.
            encoded: its completions, in the order of ``group.completions``.

        Raises:
            BadRow: a completion is empty, or the prompt leaves no room for one.
        """
        repairs: list[str] = []
        negative: TokenizedSequence | None = None
        positives: list[TokenizedSequence] = []
        present = self._without_empty(group, encoded, repairs)
        prompt_limit = self.max_length - self._completion_room(sequence for _, sequence in present)
        for completion, sequence in present:
            fitted = self._fit(completion, sequence, prompt_limit, repairs)
            if completion is group.negative:
                negative = fitted
            elif negative is not None and fitted.completion_ids == negative.completion_ids:
                repairs.append(SAME_AS_NEGATIVE)
            else:
                positives.append(fitted)
        sequences = (*([] if negative is None else [negative]), *positives)
        first_positive = len(sequences) - len(positives)
        finished = TokenizedGroup(
            group.line, sequences, -1 if negative is None else 0, tuple(range(first_positive, len(sequences)))
        )
        distinct = {positive.completion_ids for positive in positives}
        return Assembled(finished, repairs, [DUPLICATE_POSITIVES] if len(distinct) < len(positives) else [])

    def _without_empty(
        self, group: Group, encoded: Sequence[Encoded], repairs: list[str]
    ) -> list[tuple[Completion, Encoded]]:
        present = []
        for completion, sequence in zip(group.completions, encoded, strict=True):
            if not completion.blank and self._is_visible(sequence.ids[sequence.start :]):
                present.append((completion, sequence))
            elif group.sampled and completion is not group.negative:
                repairs.append(EMPTY_ANCHOR)
            else:
                raise BadRow("empty completion", "give every completion some visible text")
        return present

    def _completion_room(self, encoded: Iterable[Encoded]) -> int:
        """Tokens that a prompt must leave to the completions of its group."""
        if not self.truncate_prompt:
            return 1
        longest = max((len(sequence.ids) - sequence.start for sequence in encoded), default=1)
        return min(longest, self.max_length // 2)

    def _fit(
        self, completion: Completion, encoded: Encoded, prompt_limit: int, repairs: list[str]
    ) -> TokenizedSequence:
        ids, start = encoded.ids, encoded.start
        no_room = BadRow(
            f"prompt leaves no room within max_length={self.max_length}",
            "raise max_length, or set truncate_prompt=True to cut prompts on the left",
        )
        if start > prompt_limit:
            if not self.truncate_prompt:
                raise no_room
            ids, start = self._cut_prompt(ids, start, prompt_limit), prompt_limit
            repairs.append(CUT_PROMPT)
        if len(ids) > self.max_length:
            ids = ids[: self.max_length]
            repairs.append(CUT_COMPLETION)
            if not self._is_visible(ids[start:]):
                raise no_room
        if encoded.clipped:
            repairs.append(NO_CONTEXT)
        if encoded.repair is not None:
            repairs.append(encoded.repair)
        fitted = TokenizedSequence(ids, start, completion.ref_logp, completion.harmful_ref_logp)
        unchanged = ids is encoded.ids and not encoded.clipped and self.own_prompt
        if unchanged or (fitted.ref_logp is None and fitted.harmful_ref_logp is None):
            return fitted
        repairs.append(STALE_REFERENCE)
        return TokenizedSequence(ids, start)

    def _cut_prompt(self, ids: tuple[int, ...], start: int, length: int) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        head = ids[:1] if bos is not None and ids[0] == bos else ()
        return (*head, *ids[start - length + len(head) :])

    def _is_visible(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return bool(str(text).strip())
