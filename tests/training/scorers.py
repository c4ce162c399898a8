"""Scorers for the tests of rounds, named there as module:function."""

from __future__ import annotations

from typing import Any

calls: list[list[dict[str, Any]]] = []


def letters(batch: list[dict[str, Any]]) -> list[float]:
    """How often an e, less the length: hardly two completions are alike."""
    texts = [item["completion"] for item in batch]
    return [text.count("e") - len(text) / 100 for text in texts]


def raises(batch: list[dict[str, Any]]) -> list[float]:
    """Fails on the third prompt."""
    if "neighbour" in batch[0]["prompt"]:
        raise RuntimeError("no credit left")
    return letters(batch)


def nan(batch: list[dict[str, Any]]) -> list[float]:
    """Gives no number for the second completion of the third prompt."""
    scores = letters(batch)
    if "neighbour" in batch[0]["prompt"]:
        scores[1] = float("nan")
    return scores


def too_few(batch: list[dict[str, Any]]) -> list[float]:
    """Forgets a completion of the third prompt."""
    return letters(batch)[1:] if "neighbour" in batch[0]["prompt"] else letters(batch)


def remembers(batch: list[dict[str, Any]]) -> list[float]:
    """Keeps what it was asked in :data:`calls`."""
    calls.append(batch)
    return letters(batch)


NOT_A_FUNCTION = 3
