"""ORPO against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastd2o.losses import orpo_loss
from tests.losses import reference

log_probs, lengths = st.floats(-60, -0.01, allow_subnormal=False), st.integers(1, 10)


def one_pair(chosen: float, rejected: float, chosen_length: int, rejected_length: int, weight: float) -> torch.Tensor:
    return orpo_loss(
        torch.tensor([chosen], dtype=torch.float64),
        torch.tensor([rejected], dtype=torch.float64),
        chosen_length=torch.tensor([chosen_length]),
        rejected_length=torch.tensor([rejected_length]),
        orpo_lambda=weight,
    )


@given(log_probs, log_probs, lengths, lengths, st.floats(0, 2))
def test_follows_the_formula(chosen: float, rejected: float, chosen_length: int, rejected_length: int, weight: float):
    expected = reference.orpo(chosen, rejected, chosen_length, rejected_length, weight)
    assert one_pair(chosen, rejected, chosen_length, rejected_length, weight).item() == pytest.approx(
        expected, rel=1e-8
    )


@pytest.mark.parametrize("certain", [0.0, -1e-12, -1e-7])
def test_a_certain_completion_keeps_the_loss_finite_and_learning(certain: float):
    """At P = 1 the odds are infinite: −log(1 − P) and its gradient stop at what float32 can resolve."""
    rejected = torch.tensor([certain], requires_grad=True)
    ones = torch.ones(1, dtype=torch.int64)
    loss = orpo_loss(torch.tensor([-1.0]), rejected, chosen_length=ones, rejected_length=ones)
    loss.backward()
    assert loss.isfinite()
    assert rejected.grad is not None
    assert rejected.grad.isfinite()
    assert rejected.grad.item() > 0


def test_rare_completions_keep_their_odds():
    """Where P underflows, logit P is log P: the difference of two such sequences must not become 0 or NaN."""
    assert one_pair(-900.0, -500.0, 1, 1, 0.1).item() == pytest.approx(900.0 + 0.1 * 400.0)
    assert one_pair(-500.0, -900.0, 1, 1, 0.1).item() == pytest.approx(500.0)


def test_lambda_must_not_be_negative():
    with pytest.raises(ValueError, match=r"orpo_lambda is -0\.1"):
        one_pair(-1.0, -1.0, 1, 1, -0.1)
