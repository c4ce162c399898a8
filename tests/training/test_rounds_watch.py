"""What a round's samples are measured by, and where a run stops."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from fastd2o import FastD2OError
from fastd2o.training.generators import Prompt
from fastd2o.training.rounds import Limits, Measures, ScoredRow
from fastd2o.training.rounds.watch import distinct, measure, sample_logps
from tests.training.tiny import make_model

ROWS = [
    ScoredRow(1, {}, ["a", "b"], [False, True], [1.0, 3.0], [[5, 6, 2], [5, 6, 5, 6, 5]]),
    ScoredRow(2, {}, [], [], [], []),
    ScoredRow(3, {}, ["c", "c"], [False, False], [0.0, 0.0], [[7, 2], [7, 2]]),
]


def test_measures_by_hand():
    found = measure(ROWS, [-1.0, -2.0, -3.0, -4.0], [-2.0, -2.5, -3.0, -5.5], first_length=6.0, empty=1)
    assert asdict(found) == pytest.approx(
        {
            "samples": 4,
            "reward": 1.0,
            "reward_best": 1.5,
            "reward_worst": 0.5,
            "length": 3.0,
            "length_ratio": 0.5,
            "cut": 0.25,
            "duplicates": 0.25,
            "empty": 0.2,
            "distinct_1": (1 + 2 / 5 + 1 + 1) / 4,
            "distinct_2": (1 + 2 / 4 + 1 + 1) / 4,
            "distinct_2_overall": 4 / 8,  # 56 62 56 65 56 65 72 72
            "logp": -2.5,
            "kl": 0.75,
            "kl_per_token": 0.25,
        }
    )
    assert distinct([[1], [2]], 2) == 1.0


def test_log_probabilities_are_those_of_the_drawn_tokens_under_the_prompt_that_was_read():
    model = make_model()
    prompts = {line: Prompt(line, (1, 8 + line, 9), None, {}, False) for line in (1, 2, 3)}
    expected = []
    for row in ROWS:
        for ids in row.ids:
            whole = torch.tensor([[*prompts[row.line].ids, *ids]])
            with torch.no_grad():
                logp = model(input_ids=whole).logits.double().log_softmax(-1)
            expected.append(sum(logp[0, 2 + place, token].item() for place, token in enumerate(ids)))
    for batch_size in (1, 3):
        torch.testing.assert_close(
            torch.tensor(sample_logps(model, prompts, ROWS, batch_size=batch_size)),
            torch.tensor(expected),
            rtol=1e-5,
            atol=1e-4,
        )


GOOD: dict[str, Any] = {
    **asdict(measure(ROWS, [-1.0] * 4, [-1.5] * 4, first_length=3.0)),
    "distinct_2": 0.9,
    "distinct_2_overall": 0.6,
}


@pytest.mark.parametrize(
    ("limit", "change", "told"),
    [
        ({"max_kl": 0.6}, {"kl": 0.7}, "0.7 nats from the model that the run began with, past limits: max_kl=0.6"),
        ({"max_length_ratio": 2.0}, {"length_ratio": 2.5}, r"2\.5 times the first round's, past .*_ratio=2"),
        ({"max_length_ratio": 2.0}, {"length_ratio": 0.4}, r"0\.4 times the first round's"),
        ({"max_empty": 0.1}, {"empty": 0.3}, r"30% of what was drawn was nothing but an end, past .*_empty=0\.1"),
        ({"min_distinct_2": 0.5}, {"distinct_2": 0.4}, r"distinct-2 is 0\.4, past limits: min_distinct_2=0\.5"),
        ({"min_distinct_2_overall": 0.5}, {"distinct_2_overall": 0.2}, r"over all of them is 0\.2"),
    ],
)
def test_a_collapse_stops_the_round(limit, change, told):
    Limits(**limit).check_samples(2, Measures(**GOOD))
    Limits().check_samples(2, Measures(**{**GOOD, **change}))
    with pytest.raises(
        FastD2OError, match=rf"round 2: the samples show a collapse: .*{told}.* Fix: look at the report"
    ):
        Limits(**limit).check_samples(2, Measures(**{**GOOD, **change}))


def test_saturated_groups_stop_the_run():
    Limits(max_saturated=0.5).check_training(1, 0.5)
    Limits(max_saturated=0.5).check_training(1, None)
    with pytest.raises(FastD2OError, match=r"round 1: 80% of the groups were saturated .* max_saturated=0\.5"):
        Limits(max_saturated=0.5).check_training(1, 0.8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_kl", 0), ("max_kl", "high"), ("max_length_ratio", 1), ("min_distinct_2", 1.5), ("max_saturated", True)],
)
def test_limits_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"limits: {name} is {value!r}; expected"):
        Limits(**{name: value})
