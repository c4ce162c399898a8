"""Every loss with the kinds of input that it takes, for the tests of what all of them promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastd2o import losses
from tests.losses import reference

# G groups, K anchors, S sequences, L tokens.
SIZES = {"G": 5, "K": 3, "S": 4, "L": 6}

PER_PAIR = ("mean", "sum", "none")
PER_TOKEN = ("token", "sequence", "sum")


@dataclass(frozen=True)
class Case:
    """A loss, and its tensor arguments: name -> the letters of its shape."""

    name: str
    loss: Callable[..., Tensor]
    policy: dict[str, str]
    negative: str
    constants: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, str] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    reductions: tuple[str, ...] = PER_PAIR

    def __str__(self) -> str:
        return self.name

    def inputs(self, *, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Draw log-probabilities around −6, lengths 1 to 9, masks with both values; the policy's carry gradients."""
        generator = torch.Generator().manual_seed(seed)

        def shape(letters: str) -> list[int]:
            return [{**SIZES, **sizes}[letter] for letter in letters]

        def draw(letters: str) -> Tensor:
            return (-12 * torch.rand(shape(letters), generator=generator, dtype=torch.float64) - 0.1).to(dtype)

        return {
            **{name: draw(letters).requires_grad_() for name, letters in self.policy.items()},
            **{name: draw(letters) for name, letters in self.constants.items()},
            **{
                name: torch.randint(1, 10, shape(letters), generator=generator)
                for name, letters in self.lengths.items()
            },
            **{name: torch.rand(shape(letters), generator=generator) < 0.7 for name, letters in self.masks.items()},
        }

    def options(self, **options: Any) -> Case:
        return dataclasses.replace(self, loss=partial(self.loss, **options))


_PAIR = {"chosen_logp": "G", "rejected_logp": "G"}
_REF_PAIR = {"ref_chosen_logp": "G", "ref_rejected_logp": "G"}
_LENGTHS = {"chosen_length": "G", "rejected_length": "G"}
_TOKEN_MASKS = {"negative_mask": "SL", "positive_mask": "SL"}
_PAIRWISE_CRINGE = {**_PAIR, "chosen_nll": "G", "rejected_cringe": "G"}

DPO_CASES = [
    Case(
        f"dpo-{loss_type}",
        partial(
            losses.dpo_loss,
            loss_type=loss_type,
            label_smoothing=reference.SMOOTHING.get(loss_type, 0.0),
            bco_baseline=0.3,
        ),
        _PAIR,
        "rejected_logp",
        constants=_REF_PAIR,
        lengths=_LENGTHS if loss_type == "ipo" else {},
    )
    for loss_type in losses.DPO_LOSS_TYPES
]

CASES = [
    Case(
        "d2o",
        losses.d2o_loss,
        {"negative_logp": "G", "anchor_logp": "GK"},
        "negative_logp",
        constants={"ref_negative_logp": "G", "ref_anchor_logp": "GK"},
        masks={"anchor_mask": "GK"},
    ),
    *DPO_CASES,
    Case("simpo", losses.simpo_loss, _PAIR, "rejected_logp", lengths=_LENGTHS),
    Case("orpo", losses.orpo_loss, _PAIR, "rejected_logp", lengths=_LENGTHS),
    Case("gradient_ascent", losses.gradient_ascent_loss, {"negative_logp": "G"}, "negative_logp"),
    Case("npo", losses.npo_loss, {"negative_logp": "G"}, "negative_logp", constants={"ref_negative_logp": "G"}),
    Case("simnpo", losses.simnpo_loss, {"negative_logp": "G"}, "negative_logp", lengths={"negative_length": "G"}),
    Case(
        "unlikelihood",
        losses.unlikelihood_loss,
        {"negative_logodds": "SL", "positive_logp": "SL"},
        "negative_logodds",
        masks=_TOKEN_MASKS,
        reductions=PER_TOKEN,
    ),
    Case(
        "kto",
        partial(losses.kto_loss, reference_point=0.3, undesirable_weight=1.5),
        {"logp": "G"},
        "logp",
        constants={"ref_logp": "G"},
        masks={"desirable": "G"},
    ),
    Case(
        "cringe",
        losses.cringe_loss,
        {"negative_loss": "SL", "positive_logp": "SL"},
        "negative_loss",
        masks=_TOKEN_MASKS,
        reductions=PER_TOKEN,
    ),
    Case("pairwise_cringe", losses.pairwise_cringe_loss, _PAIRWISE_CRINGE, "rejected_cringe"),
    Case(
        "pairwise_cringe-live_gate",
        partial(losses.pairwise_cringe_loss, detach_gate=False, temperature=3.0),
        _PAIRWISE_CRINGE,
        "rejected_cringe",
    ),
    Case(
        "nat",
        losses.nat_loss,
        {"negative_logp": "SL", "positive_logp": "SL"},
        "negative_logp",
        masks=_TOKEN_MASKS,
        reductions=PER_TOKEN,
    ),
]
