"""From groups to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastd2o.data.groups import TokenizedGroup, TokenizedSequence

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PreferenceCollator:
    """Stacks groups into one padded batch. S sequences, G groups, K the most positives any of them has, L tokens.

    Called with a list of :class:`~fastd2o.data.groups.TokenizedGroup`, returns a dictionary:

    ====================  ==================  ==========================================================================
    ``input_ids``         ``[S, L]`` int64    padded on the right
    ``attention_mask``    ``[S, L]`` int64    1 on tokens, 0 on padding
    ``labels``            ``[S, L]`` int64    unshifted, as Hugging Face has it: -100 in prompt and padding
    ``negative_row``      ``[G]`` int64       index into S, -1 where the group has none
    ``positive_rows``     ``[G, K]`` int64    indices into S, padded with -1
    ``line``              ``[G]`` int64       the row of the dataset, for messages
    ``ref_logp``          ``[S]`` float32     only if every sequence of the batch has it
    ``harmful_ref_logp``  ``[S]`` float32     only if every sequence of the batch has it
    ====================  ==================  ==========================================================================

    Attributes:
        pad_token_id: fills ``input_ids``; any valid token does, EOS included, because padding is masked by position.
        pad_to_multiple_of: round L up to a multiple of it.

    Raises:
        ValueError: there is no pad token, ``pad_to_multiple_of`` is not positive, or the batch is empty.
    """

    pad_token_id: int | None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ValueError(
                "pad_token_id is None: the tokenizer has no pad token. Fix: tokenizer.pad_token = tokenizer.eos_token"
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected a positive number, or None")

    def __call__(self, groups: Sequence[TokenizedGroup]) -> dict[str, Tensor]:
        """Collate at least one group."""
        if not groups:
            raise ValueError("groups is empty; expected at least one group to collate")
        sequences = [sequence for group in groups for sequence in group.sequences]
        return {
            **self._pad(sequences),
            **_index_roles(groups),
            "line": torch.tensor([group.line for group in groups]),
            **_reference(sequences),
        }

    def _pad(self, sequences: Sequence[TokenizedSequence]) -> dict[str, Tensor]:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(sequence.input_ids) for sequence in sequences) // multiple) * multiple
        shape = (len(sequences), length)
        assert self.pad_token_id is not None
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, sequence in enumerate(sequences):
            start, end = sequence.completion_start, len(sequence.input_ids)
            input_ids[row, :end] = torch.tensor(sequence.input_ids)
            attention_mask[row, :end] = 1
            labels[row, start:end] = input_ids[row, start:end]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _index_roles(groups: Sequence[TokenizedGroup]) -> dict[str, Tensor]:
    negative_row = torch.full((len(groups),), -1)
    positive_rows = torch.full((len(groups), max(len(group.positives) for group in groups)), -1)
    first = 0
    for index, group in enumerate(groups):
        if group.negative >= 0:
            negative_row[index] = first + group.negative
        for place, positive in enumerate(group.positives):
            positive_rows[index, place] = first + positive
        first += len(group.sequences)
    return {"negative_row": negative_row, "positive_rows": positive_rows}


def _reference(sequences: Sequence[TokenizedSequence]) -> dict[str, Tensor]:
    columns = {
        "ref_logp": [sequence.ref_logp for sequence in sequences],
        "harmful_ref_logp": [sequence.harmful_ref_logp for sequence in sequences],
    }
    return {
        name: torch.tensor(values, dtype=torch.float32)
        for name, values in columns.items()
        if not any(value is None for value in values)
    }
