"""From many losses to one number.

A mean over nothing is a zero that still hangs on the graph, never NaN: a rank of a distributed run whose batch is empty
must take part in the backward pass all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastd2o.losses import checks

REDUCTIONS = ("mean", "sum", "none")


def reduce(losses: Tensor, reduction: str, *, keep: Tensor | None = None) -> Tensor:
    """Reduce per-pair or per-sequence ``losses``: ``"mean"``, ``"sum"``, or ``"none"`` for the losses as they are.

    ``keep`` (bool, the shape of ``losses``) takes the others out: they become exactly 0 and do not count in the mean.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    if keep is not None:
        losses = torch.where(keep, losses, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if keep is None:
        return total / max(losses.numel(), 1)
    return total / keep.sum().clamp(min=1)
