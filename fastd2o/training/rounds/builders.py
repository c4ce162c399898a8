"""Builders: from a round's scored completions to the rows that it trains on. Pure functions.

==============  ==============================================  =====================================================
builder         rows                                            of
==============  ==============================================  =====================================================
``pairs``       the highest against the lowest of N, no ties    Iterative DPO; PCO: Xu et al. 2023, arXiv 2312.16682
``anchors``     the row's negative against all K                D2O: Duan et al. 2024, arXiv 2403.03419
``labels``      each completion, good or bad, balanced          CRINGE: Adolphs et al. 2022, arXiv 2211.05826
==============  ==============================================  =====================================================

A completion that repeats an earlier one of its prompt counts once in all three: a second copy would be a second vote.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastd2o.errors import FastD2OError


@dataclass(frozen=True)
class ScoredRow:
    """A prompt with its scored completions.

    Attributes:
        line: of the dataset of prompts.
        row: the row: ``prompt``, and whatever else it came with.
        completions: in the row's own style.
        cut: for each, whether the length limit ended it.
        scores: for each.
        ids: for each, its tokens as drawn.
    """

    line: int
    row: dict[str, Any]
    completions: Sequence[Any]
    cut: Sequence[bool]
    scores: Sequence[float]
    ids: Sequence[Sequence[int]]

    def distinct(self) -> list[int]:
        """The indices of completions that repeat no earlier one."""
        return [index for index, text in enumerate(self.completions) if text not in self.completions[:index]]


@dataclass(frozen=True)
class Built:
    """What a builder made.

    Attributes:
        rows: for the trainer.
        counts: what became of prompts and completions, by name.
    """

    rows: list[dict[str, Any]]
    counts: dict[str, int] = field(default_factory=dict)


def build_pairs(rows: Sequence[ScoredRow]) -> Built:
    """The highest completion of each prompt against the lowest; prompts whose completions all score the same are
    dropped, as are those with fewer than two different ones. Of several with the same score the first counts.

    Raises:
        FastD2OError: no prompt is left.
    """
    built, ties, few = [], 0, 0
    for row in rows:
        distinct = row.distinct()
        if len(distinct) < 2:
            few += 1
            continue
        order = sorted(distinct, key=lambda index: row.scores[index])  # stable: the first of equals comes first
        if row.scores[order[0]] == row.scores[order[-1]]:
            ties += 1
            continue
        low = order[0]
        high = max(order, key=lambda index: (row.scores[index], -index))
        built.append(
            {
                "prompt": row.row["prompt"],
                "chosen": row.completions[high],
                "rejected": row.completions[low],
                "chosen_cut": row.cut[high],
                "rejected_cut": row.cut[low],
            }
        )
    if not built and not ties:
        raise FastD2OError(
            f"none of the {len(rows)} prompts has two different completions, so there is no pair to train on. The "
            "samples are kept. Fix: a larger num_samples or a higher temperature in a new run; or an earlier round's "
            "model, if this one has collapsed"
        )
    if not built:
        raise FastD2OError(
            f"{ties} of {len(rows)} prompts yield only ties: the scorer tells none of their completions apart"
            + (f"; {few} have fewer than two different ones" if few else "")
            + ". So there is no pair to train on. The samples and scores are kept. Fix: a finer scorer, a larger "
            "num_samples or a higher temperature in a new run; or nothing, if all completions are good by now"
        )
    counts = {"prompts": len(rows), "pairs": len(built), "ties": ties, "fewer than two": few}
    return Built(built, {**counts, **_duplicates(rows)})


def build_anchors(rows: Sequence[ScoredRow]) -> Built:
    """Each row's negative as it is, and the round's completions as its anchors in place of any there were. Scores do
    not matter: the paper sorts no sample out.

    Raises:
        FastD2OError: no prompt got a completion.
    """
    built = []
    for row in rows:
        kept = row.distinct()
        if kept:
            anchors = {
                "anchors": [row.completions[index] for index in kept],
                "anchor_cut": [row.cut[index] for index in kept],
            }
            negative: dict[str, Any] = {name: row.row[name] for name in ("rejected", "rejected_cut") if name in row.row}
            built.append({"prompt": row.row["prompt"], **negative, **anchors})
    if not built:
        raise FastD2OError(
            f"none of the {len(rows)} prompts got an anchor. Fix: another instruction, a higher temperature or "
            "max_new_tokens, in a new run"
        )
    anchors_kept = sum(len(row["anchors"]) for row in built)
    return Built(built, {"prompts": len(rows), "groups": len(built), "anchors": anchors_kept, **_duplicates(rows)})


def build_labels(rows: Sequence[ScoredRow], *, threshold: float, seed: int) -> Built:
    """Each completion as a good one, if its score is at least ``threshold``, or else as a bad one; as many of one kind
    as of the other.

    Where good ones are fewer, they are repeated, at most two copies of each. What is then too many of either kind is
    left out, drawn with ``seed``.

    Raises:
        FastD2OError: all are of one kind.
    """
    labelled = [
        (
            row.scores[index] >= threshold,
            {
                "prompt": row.row["prompt"],
                "completion": row.completions[index],
                "completion_cut": row.cut[index],
                "label": row.scores[index] >= threshold,
            },
        )
        for row in rows
        for index in row.distinct()
    ]
    good, bad = ([item for label, item in labelled if label is kind] for kind in (True, False))
    if not good or not bad:
        raise FastD2OError(
            f"all {len(labelled)} completions are {'bad' if bad else 'good'} by threshold={threshold:g}, so there is "
            "nothing to tell apart. The samples and scores are kept. Fix: another threshold or a larger num_samples in "
            "a new run; or nothing, if all completions are good by now"
        )
    size = min(len(bad), 2 * len(good))
    rng = random.Random(f"{seed}/balance")
    # Every good one once before any of them twice.
    repeated = [*rng.sample(good, min(size, len(good))), *rng.sample(good, max(0, size - len(good)))]
    built = [*repeated, *rng.sample(bad, size)]
    counts = {"prompts": len(rows), "good": len(good), "bad": len(bad), "kept of each": size}
    return Built(built, {**counts, **_duplicates(rows)})


def _duplicates(rows: Sequence[ScoredRow]) -> dict[str, int]:
    return {"duplicates": sum(len(row.completions) - len(row.distinct()) for row in rows)}
