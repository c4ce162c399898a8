"""What the token-level losses share: CRINGE, unlikelihood and NAT sum over the counted tokens of both sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastd2o.losses import checks

TOKEN_REDUCTIONS = ("token", "sequence", "sum")


class TokenSide(NamedTuple):
    """Negatives or positives of a batch: the argument they came in, its ``loss`` [S, L], what counts, a weight."""

    name: str
    loss: Tensor
    mask: Tensor
    weight: float = 1.0


def cross_entropy_side(role: str, logp: Tensor | None, mask: Tensor | None) -> list[TokenSide]:
    """Return ``−logp`` as one side, or nothing where both are None. ``role`` is the arguments' prefix in errors."""
    if logp is None and mask is None:
        return []
    if logp is None or mask is None:
        missing = f"{role}_logp" if logp is None else f"{role}_mask"
        raise ValueError(f"{missing} is missing: {role}_logp and {role}_mask are given together or not at all.")
    name = f"{role}_logp"
    (logp,) = checks.logprobs(**{name: logp})
    return [TokenSide(name, -logp, checks.mask(f"{role}_mask", mask, like=logp))]


def reduce_tokens(*sides: TokenSide, reduction: str) -> Tensor:
    """Return ``Σ_sides weight · Σ_counted loss / N``, a 0 connected to the graph where nothing counts.

    N is shared by the sides: ``"token"``, all counted tokens; ``"sequence"``, all sequences (rows, along the last
    dimension) with a counted token; ``"sum"``, 1. N is at least 1.
    """
    checks.one_of("reduction", reduction, TOKEN_REDUCTIONS)
    checks.same_device(**{side.name: side.loss for side in sides})
    total = torch.stack([side.weight * torch.where(side.mask, side.loss, 0.0).sum() for side in sides]).sum()
    if reduction == "sum":
        return total
    counted = [side.mask if reduction == "token" else side.mask.any(dim=-1) for side in sides]
    return total / torch.stack([items.sum() for items in counted]).sum().clamp(min=1)
