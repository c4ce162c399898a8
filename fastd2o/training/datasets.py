"""The datasets of a run, fitted to its objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from fastd2o.data import PreferenceDataset, TokenizedGroup, TokenizedSequence, build_dataset

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
    if not isinstance(data, PreferenceDataset):
        data = build_dataset(
            data,
            processing_class,
            needs=mixture.needs,
            max_length=config.max_length,
            positives=config.positives,
            bad_rows=config.bad_rows,
            truncate_prompt=config.truncate_prompt,
            prompt_suffix=mixture.prompt_suffix,
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
