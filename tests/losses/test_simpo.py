"""SimPO against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastd2o.losses import simpo_loss
from tests.losses import reference

log_probs, lengths = st.floats(-60, 0, allow_subnormal=False), st.integers(1, 50)


@given(log_probs, log_probs, lengths, lengths, st.floats(0.1, 5), st.floats(-2, 2))
def test_follows_the_formula(
    chosen: float, rejected: float, chosen_length: int, rejected_length: int, beta: float, gamma: float
):
    loss = simpo_loss(
        torch.tensor([chosen], dtype=torch.float64),
        torch.tensor([rejected], dtype=torch.float64),
        chosen_length=torch.tensor([chosen_length]),
        rejected_length=torch.tensor([rejected_length]),
        beta=beta,
        gamma=gamma,
    )
    expected = reference.simpo(chosen, rejected, chosen_length, rejected_length, beta, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_lengths_are_needed():
    with pytest.raises(ValueError, match="rejected_length holds 0"):
        simpo_loss(torch.zeros(1), torch.zeros(1), chosen_length=torch.tensor([1]), rejected_length=torch.tensor([0]))
