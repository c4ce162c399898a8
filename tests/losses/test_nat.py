"""NAT: cross-entropy on both sides."""

from __future__ import annotations

import math

import pytest
import torch

from fastd2o.losses import nat_loss


@pytest.mark.parametrize(("reduction", "N"), [("token", 3 + 2), ("sequence", 2 + 1), ("sum", 1)])
def test_both_sides_are_learnt(reduction: str, N: int):
    negative = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]], requires_grad=True)
    negative_mask = torch.tensor([[True, True], [True, False]])
    positive = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    positive_mask = torch.tensor([[True, True]])
    loss = nat_loss(negative, negative_mask, positive, positive_mask, reduction=reduction)
    assert loss.item() == pytest.approx((7.0 + 2.0) / N)
    loss.backward()
    torch.testing.assert_close(negative.grad, negative_mask * -1.0 / N)
    torch.testing.assert_close(positive.grad, positive_mask * -1.0 / N)


def test_negatives_alone():
    assert nat_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])).item() == 1.5
