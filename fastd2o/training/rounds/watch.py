"""The collapse watch: what a round's samples say of the model that gave them, and the limits at which a run stops.

A model that is trained on its own samples can learn to please the scorer at the price of its language: answers grow or
shrink, repeat themselves, leave what the model knew. Nothing in the loss has to show that, so it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from fastd2o.data import PreferenceCollator, TokenizedGroup, TokenizedSequence
from fastd2o.errors import FastD2OError
from fastd2o.models import attach
from fastd2o.models.mode import evaluating
from fastd2o.training.generators import Prompt
from fastd2o.training.rounds.builders import ScoredRow
from fastd2o.training.scoring import Batch, sequence_logp


@dataclass(frozen=True)
class Measures:
    """Of all samples of a round, drawn from the model that the round begins with.

    Attributes:
        samples: how many there are.
        reward: mean score.
        reward_best, reward_worst: mean over prompts of the highest and the lowest score.
        length: mean tokens, the one that ends an answer included.
        length_ratio: of that to the first round's.
        cut: share that the length limit ended.
        duplicates: share that repeats an earlier completion of its prompt.
        empty: draws that were nothing but an end, and so drawn anew or given up, to all draws. All other measures are
            of what was kept.
        distinct_1, distinct_2: distinct tokens, and pairs of neighbouring tokens, of all such in a sample; mean over
            the samples. Low where they go round in circles.
        distinct_2_overall: the same over all samples together: how varied they are.
        logp: mean log-probability of a sample under the model that drew it, in nats.
        kl: mean over the samples of log π(y|x) − log π₀(y|x), π₀ being the model that the run began with: an estimate
            of the divergence from it, in nats per sample, under the prompt as it was read (instruction included). At a
            temperature of 1, with all tokens (top_p 1) and nothing drawn anew it is unbiased; it may then fall below 0
            by chance.
        kl_per_token: the same, divided by the mean length.
    """

    samples: int
    reward: float
    reward_best: float
    reward_worst: float
    length: float
    length_ratio: float
    cut: float
    duplicates: float
    empty: float
    distinct_1: float
    distinct_2: float
    distinct_2_overall: float
    logp: float
    kl: float
    kl_per_token: float


@dataclass(frozen=True)
class Limits:
    """Where a run stops; None: nowhere.

    Attributes:
        max_kl: highest ``kl``, in nats per sample.
        max_length_ratio: how many times longer, or shorter, than in the first round the samples may be; above 1.
        max_empty: largest ``empty``.
        min_distinct_2: lowest ``distinct_2``.
        min_distinct_2_overall: lowest ``distinct_2_overall``.
        max_saturated: largest share of groups, at the end of a round's training, that hardly teach any more.

    Raises:
        ValueError: a value outside its range.
    """

    max_kl: float | None = None
    max_length_ratio: float | None = None
    max_empty: float | None = None
    min_distinct_2: float | None = None
    min_distinct_2_overall: float | None = None
    max_saturated: float | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_kl": ("a number above 0", lambda value: value > 0),
            "max_length_ratio": ("a number above 1", lambda value: value > 1),
        }
        share = ("a share between 0 and 1", lambda value: 0 < value < 1)
        for limit in fields(self):
            value = getattr(self, limit.name)
            expected, valid = ranges.get(limit.name, share)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and valid(value)):
                raise ValueError(f"limits: {limit.name} is {value!r}; expected {expected}")

    def check_samples(self, round_: int, measures: Measures) -> None:
        """Stop a round whose samples show a collapse, before anything is trained on them.

        Raises:
            FastD2OError: a limit is passed; names it, the value, and the fix.
        """
        drift = max(measures.length_ratio, 1 / measures.length_ratio)
        found = (
            ("max_kl", measures.kl, f"they are {measures.kl:.3g} nats from the model that the run began with", 1),
            ("max_length_ratio", drift, f"their mean length is {measures.length_ratio:.3g} times the first round's", 1),
            ("max_empty", measures.empty, f"{measures.empty:.0%} of what was drawn was nothing but an end", 1),
            ("min_distinct_2", measures.distinct_2, f"their distinct-2 is {measures.distinct_2:.3g}", -1),
            (
                "min_distinct_2_overall",
                measures.distinct_2_overall,
                f"distinct-2 over all of them is {measures.distinct_2_overall:.3g}",
                -1,
            ),
        )
        for name, value, told, sign in found:
            self._check(round_, name, value, f"the samples show a collapse: {told}", sign)

    def check_training(self, round_: int, saturated: float | None) -> None:
        """Stop after a round whose groups are mostly saturated; ``saturated`` is None where that was not logged.

        Raises:
            FastD2OError: the limit is passed.
        """
        if saturated is not None:
            told = f"{saturated:.0%} of the groups were saturated at the end of its training"
            self._check(round_, "max_saturated", saturated, told, 1)

    def _check(self, round_: int, name: str, value: float, told: str, sign: int) -> None:
        limit = getattr(self, name)
        if limit is not None and sign * value > sign * limit:
            raise FastD2OError(
                f"round {round_}: {told}, past limits: {name}={limit:g}. The run stopped here, and everything up to "
                "here is kept. Fix: look at the report; take an earlier round's model, go on with another limit, or "
                "start a new run with a lower learning rate, fewer steps or a higher beta"
            )


def measure(
    rows: Sequence[ScoredRow],
    logps: Sequence[float],
    original_logps: Sequence[float],
    first_length: float | None,
    empty: int = 0,
) -> Measures:
    """Measure a round's samples.

    Args:
        rows: of all prompts; at least one has a completion.
        logps: one for each sample, row after row: under the model that drew it.
        original_logps: the same under the model that the run began with.
        first_length: the first round's mean length; None: this is the first.
        empty: draws that were empty, and are not among the samples.
    """
    ids = [sample for row in rows for sample in row.ids]
    scores = [score for row in rows for score in row.scores]
    length = _mean(len(sample) for sample in ids)
    kl = _mean(logp - original for logp, original in zip(logps, original_logps, strict=True))
    return Measures(
        samples=len(ids),
        reward=_mean(scores),
        reward_best=_mean(max(row.scores) for row in rows if row.scores),
        reward_worst=_mean(min(row.scores) for row in rows if row.scores),
        length=length,
        length_ratio=1.0 if first_length is None else length / first_length,
        cut=_mean(cut for row in rows for cut in row.cut),
        duplicates=1 - sum(len(row.distinct()) for row in rows) / len(ids),
        empty=empty / (len(ids) + empty),
        distinct_1=_mean(distinct([sample], 1) for sample in ids),
        distinct_2=_mean(distinct([sample], 2) for sample in ids),
        distinct_2_overall=distinct(ids, 2),
        logp=_mean(logps),
        kl=kl,
        kl_per_token=kl / length,
    )


def distinct(samples: Iterable[Sequence[int]], n: int) -> float:
    """The share of the runs of ``n`` tokens in ``samples`` that differ; 1 where there are none to repeat."""
    grams = [tuple(sample[start : start + n]) for sample in samples for start in range(len(sample) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def sample_logps(
    model: nn.Module, prompts: Mapping[int, Prompt], rows: Sequence[ScoredRow], *, batch_size: int
) -> list[float]:
    """The log-probability of every sample, as drawn and under the prompt as it was read, row after row.

    Args:
        model: a causal language model; it stays attached.
        prompts: by line.
        rows: the samples.
        batch_size: sequences scored together.
    """
    attach(model)
    collate = PreferenceCollator(0)  # padding is masked: any token does
    device = next(model.parameters()).device
    sequences = [
        TokenizedSequence((*prompts[row.line].ids, *ids), len(prompts[row.line].ids)) for row in rows for ids in row.ids
    ]
    logps = torch.zeros(len(sequences))
    # Like lengths together, so that little is padding.
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].input_ids), reverse=True)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            groups = [TokenizedGroup(0, (sequences[index],), -1, (0,)) for index in some]
            batch = Batch(**{name: tensor.to(device) for name, tensor in collate(groups).items()})
            logps[some] = sequence_logp(model, batch).float().cpu()
    return logps.tolist()


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
