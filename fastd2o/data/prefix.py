"""What two sequences begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """The number of leading items (characters, tokens, messages) in which two sequences agree."""
    for index, (mine, yours) in enumerate(zip(left, right, strict=False)):
        if mine != yours:
            return index
    return min(len(left), len(right))
