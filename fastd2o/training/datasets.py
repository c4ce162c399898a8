"""The datasets of a run, fitted to its objectives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from fastd2o.data import PreferenceDataset, TokenizedGroup, TokenizedSequence, build_dataset
from fastd2o.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from fastd2o.data.rows import Source
    from fastd2o.training.config import PreferenceConfig
    from fastd2o.training.objectives import Mixture

Data: TypeAlias = "PreferenceDataset | Source"


def prepare_dataset(
    data: Data,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    mixture: Mixture,
    config: PreferenceConfig,
    *,
    role: str,
) -> PreferenceDataset:
    """Tokenise ``data`` if it is not, check that it has what ``mixture`` needs, and fit it to that.

    Raises:
        fastd2o.DataError: rows that cannot be used.
        ValueError: a dataset built for another need.
    """
    online = role == "train" and config.resample_every is not None
    if not isinstance(data, PreferenceDataset):
        data = build_dataset(
            data,
            processing_class,
            needs=mixture.needs,
            max_length=config.max_length,
            # What is drawn anew must have been drawn: a chosen answer was written.
            positives="anchors" if online else config.positives,
            bad_rows=config.bad_rows,
            truncate_prompt=config.truncate_prompt,
            prompt_suffix=mixture.prompt_suffix,
        )
    elif online:
        raise ValueError(
            "resample_every is set, but the train dataset is tokenised, and an instruction goes in front of the text. "
            "Fix: give the rows, or the file they are in"
        )
    for group in data.groups:
        missing = mixture.needs.missing(int(group.negative >= 0), len(group.positives))
        if missing is not None:
            raise ValueError(
                f"the {role} dataset has {missing} on line {group.line}, but the objective "
                f"{' '.join(config.objective)} needs {mixture.needs.value} in every group. Fix: build_dataset(..., "
                f"needs={mixture.needs})"
            )
    if role == "train" and not mixture.positives:
        data = without_positives(data)
    return with_mismatches(data) if mixture.mismatches else data


def check_fits(model: nn.Module, name: str, dataset: PreferenceDataset, role: str) -> None:
    """Check that ``model`` knows every token of ``dataset`` and has room for every sequence.

    Raises:
        fastd2o.DataError: it does not; the message calls the model ``name`` and gives the lines and the fix.
    """
    known, context = vocabulary(model), context_length(model)
    lengths = dataset.lengths
    long = [group.line for group, length in zip(dataset.groups, lengths, strict=True) if length > context]
    if long:
        raise DataError(
            f"{name} reads at most {context:.0f} tokens (max_position_embeddings), but the {role} dataset has "
            f"sequences of up to {max(lengths)}: {_lines(long)}. Fix: set max_length to {context:.0f} (and "
            "truncate_prompt, where prompts alone are longer)"
        )
    largest = [max(map(max, (sequence.input_ids for sequence in group.sequences))) for group in dataset.groups]
    unknown = [group.line for group, token in zip(dataset.groups, largest, strict=True) if token >= known]
    if unknown:
        raise DataError(
            f"{name} has embeddings for {known:.0f} tokens, but the {role} dataset has token ids up to {max(largest)}: "
            f"{_lines(unknown)}. Fix: use the tokenizer that belongs to that model; if tokens were added "
            "to it, save the model after model.resize_token_embeddings(len(tokenizer))"
        )


def vocabulary(model: Any) -> float:
    """How many tokens ``model`` has embeddings for."""
    return getattr(model.get_input_embeddings(), "num_embeddings", math.inf)


def context_length(model: Any) -> float:
    """How many tokens ``model`` was made for, by its configuration; some models without a limit say so with -1."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else math.inf


def _lines(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
    return f"{len(lines)} of its rows (line {shown})" if len(lines) > 1 else f"line {shown}"


def without_positives(dataset: PreferenceDataset) -> PreferenceDataset:
    """Keep of each group the negative alone: positives that no objective looks at would cost a forward each."""

    def strip(group: TokenizedGroup) -> TokenizedGroup:
        return replace(group, sequences=(group.sequences[group.negative],), negative=0, positives=())

    return PreferenceDataset([strip(group) for group in dataset.groups], dataset.report)


def with_mismatches(dataset: PreferenceDataset) -> PreferenceDataset:
    """Give each group one more sequence: its prompt with the first completion of the next group, for KTO's reference
    point.

    It is neither the group's negative nor a positive, and no longer than the longest sequence there was. A single group
    has no other to borrow from and stays as it is.
    """
    if len(dataset) < 2:
        return dataset
    longest, groups = max(dataset.lengths), []
    for index, group in enumerate(dataset.groups):
        own, other = group.sequences[0], dataset.groups[(index + 1) % len(dataset)].sequences[0]
        ids = (*own.input_ids[: own.completion_start], *other.completion_ids)[:longest]
        groups.append(replace(group, sequences=(*group.sequences, TokenizedSequence(ids, own.completion_start))))
    return PreferenceDataset(groups, dataset.report)
