"""Builders of rounds: what is made of scored completions, and what is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fastd2o import FastD2OError
from fastd2o.data import Needs, build_dataset
from fastd2o.training.rounds import ScoredRow, build_anchors, build_labels, build_pairs
from tests.training.tiny import make_tokenizer


def scored(scores: list[float], texts: list[str] | None = None, cut: list[bool] | None = None) -> ScoredRow:
    texts = texts or [f" w{index}" for index in range(len(scores))]
    row = {"prompt": "w90", "rejected": " w91", "id": 7}
    return ScoredRow(3, row, texts, cut or [False] * len(scores), scores, [[4]] * len(scores))


def test_pairs_are_the_highest_against_the_lowest():
    built = build_pairs([scored([0.5, -1.0, 2.0, 0.0]), scored([1.0, 1.0]), scored([0.0, 3.0])])
    assert [(row["chosen"], row["rejected"]) for row in built.rows] == [(" w2", " w1"), (" w1", " w0")]
    assert built.counts == {"prompts": 3, "pairs": 2, "ties": 1, "fewer than two": 0, "duplicates": 0}


def test_of_equals_the_first_counts():
    (row,) = build_pairs([scored([0.0, 1.0, 1.0, 0.0])]).rows
    assert (row["chosen"], row["rejected"]) == (" w1", " w0")


def test_a_repeated_completion_makes_no_pair_with_itself():
    """A scorer may give the same text two scores."""
    rows = [scored([0.0, 1.0], texts=[" w1", " w1"]), scored([0.0, 2.0, 1.0], texts=[" w1", " w1", " w2"])]
    built = build_pairs(rows)
    assert [(row["chosen"], row["rejected"]) for row in built.rows] == [(" w2", " w1")]
    assert built.counts == {"prompts": 2, "pairs": 1, "ties": 0, "fewer than two": 1, "duplicates": 2}


def test_prompts_that_yield_only_ties():
    told = (
        r"1 of 2 prompts yield only ties: .*; 1 have fewer than two different ones\. .* are kept\. Fix: a finer scorer"
    )
    with pytest.raises(FastD2OError, match=told):
        build_pairs([scored([1.0, 1.0]), scored([])])
    with pytest.raises(FastD2OError, match="none of the 2 prompts has two different completions"):
        build_pairs([scored([1.0]), scored([])])


def test_anchors_are_refreshed_and_the_negative_stays():
    old = scored([0.0, 0.0, 0.0], texts=[" w1", " w2", " w1"], cut=[False, True, False])
    built = build_anchors([old, scored([])])
    assert built.rows == [{"prompt": "w90", "rejected": " w91", "anchors": [" w1", " w2"], "anchor_cut": [False, True]}]
    assert built.counts == {"prompts": 2, "groups": 1, "anchors": 2, "duplicates": 1}
    cut_negative = replace(old, row={**old.row, "rejected_cut": True})
    assert build_anchors([cut_negative]).rows[0]["rejected_cut"] is True
    with pytest.raises(FastD2OError, match="none of the 1 prompts got an anchor"):
        build_anchors([scored([])])


@pytest.mark.parametrize(
    ("good", "bad", "each", "most"), [(3, 10, 6, 2), (10, 3, 3, 1), (4, 6, 6, 2), (2, 2, 2, 1), (1, 9, 2, 2)]
)
def test_labels_are_balanced_with_at_most_two_copies(good, bad, each, most):
    rows = [scored([1.0] * good, [f" w{i}" for i in range(good)]), scored([0.0] * bad, [f" w{i}" for i in range(bad)])]
    built = build_labels(rows, threshold=1.0, seed=0)
    kept = [Counter(row["completion"] for row in built.rows if row["label"] is label) for label in (True, False)]
    assert [sum(texts.values()) for texts in kept] == [each, each]
    assert max(kept[0].values()) == most
    assert len(kept[0]) == min(good, each)  # none twice before every one is there once
    assert max(kept[1].values()) == 1
    assert built.counts["kept of each"] == each


def test_what_is_left_out_depends_on_the_seed_alone():
    rows = [scored([1.0, 1.0]), scored([0.0] * 9)]
    first = build_labels(rows, threshold=0.5, seed=0)
    assert build_labels(rows, threshold=0.5, seed=0) == first
    assert build_labels(rows, threshold=0.5, seed=1) != first


@pytest.mark.parametrize(("threshold", "kind"), [(0.5, "good"), (2.0, "bad")])
def test_labels_of_one_kind(threshold, kind):
    with pytest.raises(FastD2OError, match=rf"all 2 completions are {kind} by threshold={threshold:g}"):
        build_labels([scored([1.0, 1.0])], threshold=threshold, seed=0)


@pytest.mark.parametrize("build", [build_pairs, build_anchors, lambda rows: build_labels(rows, threshold=0.5, seed=0)])
def test_a_cut_completion_is_trained_on_without_an_end(build: Any):
    tokenizer = make_tokenizer()
    whole = build([scored([0.0, 1.0])]).rows
    cut = build([scored([0.0, 1.0], cut=[True, True])]).rows
    ends = [
        [
            sequence.completion_ids[-1] == tokenizer.eos_token_id
            for group in build_dataset(rows, tokenizer, needs=Needs.ANY).groups
            for sequence in group.sequences
            if sequence.completion_ids[0] != tokenizer.convert_tokens_to_ids("w91")  # the row's own negative is whole
        ]
        for rows in (whole, cut)
    ]
    assert ends == [[True, True], [False, False]]
