"""The formulas of TRL's trainers, value and gradient, against ours on the same token log-probabilities.

TRL writes its losses into the trainers' methods. They are called here as they are, on an object that holds what they
read and a "model" that answers with given log-probabilities: the formulas alone are compared, on any numbers.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastd2o.losses import DPO_LOSS_TYPES, dpo_loss, kto_loss, kto_reference_point, orpo_loss, simpo_loss
from tests.losses import reference

pytest.importorskip("trl", reason="needs the extra `peers`")

PAIRS, TOKENS = 6, 7
IN_TRL = [loss_type for loss_type in DPO_LOSS_TYPES if loss_type not in ("dpop", "bdpo")]


@pytest.fixture(scope="module")
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


class Batch:
    """Log-probabilities of ragged completions under policy and reference, with the masks that TRL puts beside them."""

    def __init__(self, sequences: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, TOKENS + 1, (sequences,), generator=generator)
        self.mask = torch.arange(TOKENS) < self.lengths[:, None]
        draws = torch.randn(2, sequences, TOKENS, generator=generator).mul(3).sub(5).clamp(max=-0.1)
        self.token_logps = (draws[0] * self.mask).requires_grad_()
        self.ref_logps = (draws[1] * self.mask).sum(-1)

    @property
    def logps(self) -> Tensor:
        return self.token_logps.sum(-1)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Return the tensors that TRL's collators make; only their masks matter here."""
        completion_mask = torch.cat([torch.zeros(len(self.mask), 1, dtype=torch.long), self.mask.long()], dim=1)
        return {
            "input_ids": torch.zeros_like(completion_mask),
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
        }

    def model(self, **_: Any) -> SimpleNamespace:
        """Answer as a model whose head TRL has fused does."""
        zeros = torch.zeros_like(self.token_logps)
        return SimpleNamespace(log_probs=self.token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.token_logps)[0]


def trainer(accelerator: Any, **attributes: Any) -> Any:
    """Return what TRL's ``_compute_loss`` methods read of ``self``."""
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def assert_same(batch: Batch, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.gradient(ours), batch.gradient(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss_type", IN_TRL)
def test_dpo(accelerator: Any, loss_type: str, beta: float):
    from trl import DPOTrainer

    # TRL's `sigmoid` has no label smoothing.
    smoothing = 0.0 if loss_type == "sigmoid" else reference.SMOOTHING.get(loss_type, 0.0)
    batch = Batch(2 * PAIRS, seed=DPO_LOSS_TYPES.index(loss_type))
    chosen_ref, rejected_ref = batch.ref_logps.chunk(2)
    theirs = DPOTrainer._compute_loss(
        trainer(
            accelerator,
            args=SimpleNamespace(discopop_tau=0.05),
            beta=beta,
            loss_types=[loss_type],
            loss_weights=[1.0],
            label_smoothing=smoothing,
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
        ),
        batch.model,
        {**batch.tokens, "ref_chosen_logps": chosen_ref, "ref_rejected_logps": rejected_ref},
        return_outputs=False,
    )
    chosen, rejected = batch.logps.chunk(2)
    # TRL's completion masks, which `ipo` counts, hold every completion token, like our lengths.
    chosen_length, rejected_length = batch.lengths.chunk(2)
    ours = dpo_loss(
        chosen,
        rejected,
        ref_chosen_logp=chosen_ref,
        ref_rejected_logp=rejected_ref,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=smoothing,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    assert_same(batch, ours, theirs)


@pytest.mark.parametrize("drift", [-1.0, 1.0])
def test_kto(accelerator: Any, drift: float):
    """TRL's z₀ is the batch mean over mismatched completions: with a negative drift it is clamped to 0."""
    from trl import KTOTrainer

    batch, mismatched = Batch(PAIRS, seed=0), Batch(PAIRS, seed=1)
    desirable = torch.tensor([True, False, False, True, False, True])
    mismatched_logps = mismatched.ref_logps + drift
    theirs = KTOTrainer._compute_loss(
        trainer(
            accelerator,
            beta=0.2,
            loss_type="kto",
            calculate_KL=True,
            desirable_weight=1.0,
            undesirable_weight=1.3,
            _compute_kl_logps=lambda *_: mismatched_logps,
        ),
        batch.model,
        {**batch.tokens, "label": desirable, "ref_logps": batch.ref_logps, "ref_KL_logps": mismatched.ref_logps},
        return_outputs=False,
    )
    ours = kto_loss(
        batch.logps,
        ref_logp=batch.ref_logps,
        desirable=desirable,
        reference_point=kto_reference_point(mismatched_logps, ref_mismatched_logp=mismatched.ref_logps),
        beta=0.2,
        undesirable_weight=1.3,
    )
    assert_same(batch, ours, theirs)


def per_token_means(batch: Batch) -> tuple[Tensor, Tensor]:
    chosen_mean, rejected_mean = (batch.logps / batch.lengths).chunk(2)
    return chosen_mean, rejected_mean


def test_orpo(accelerator: Any):
    """TRL's odds-ratio term; its cross-entropy counts the prompt too, so that part is taken from the formula."""
    from trl.experimental.orpo import ORPOTrainer

    batch = Batch(2 * PAIRS, seed=0)
    chosen_mean, rejected_mean = per_token_means(batch)
    odds_ratio_loss: Any = ORPOTrainer.odds_ratio_loss
    odds_ratio, *_ = odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=accelerator), chosen_mean, rejected_mean)
    chosen, rejected = batch.logps.chunk(2)
    chosen_length, rejected_length = batch.lengths.chunk(2)
    ours = orpo_loss(chosen, rejected, chosen_length=chosen_length, rejected_length=rejected_length, orpo_lambda=0.3)
    assert_same(batch, ours, (-chosen_mean - odds_ratio).mean())


def test_simpo(accelerator: Any):
    from trl.experimental.cpo import CPOTrainer

    batch = Batch(2 * PAIRS, seed=0)
    cpo_loss: Any = CPOTrainer.cpo_loss
    losses, *_ = cpo_loss(
        SimpleNamespace(
            loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.0, alpha=0.0, accelerator=accelerator
        ),
        *per_token_means(batch),
    )
    chosen, rejected = batch.logps.chunk(2)
    chosen_length, rejected_length = batch.lengths.chunk(2)
    ours = simpo_loss(chosen, rejected, chosen_length=chosen_length, rejected_length=rejected_length)
    assert_same(batch, ours, losses.mean())
