"""The losses on negatives alone against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastd2o.losses import gradient_ascent_loss, npo_loss, npo_offset, simnpo_loss, unlikelihood_loss
from tests.losses import reference

log_probs = st.floats(-60, 0, allow_subnormal=False)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_gradient_ascent_is_the_log_probability():
    negative = f64(-3.0, -5.0)
    loss = gradient_ascent_loss(negative)
    assert loss.item() == -4
    loss.backward()
    assert negative.grad is not None
    assert negative.grad.tolist() == [0.5, 0.5]


@given(log_probs, log_probs, st.floats(0.01, 2))
def test_npo_follows_the_formula(negative: float, ref: float, beta: float):
    loss = npo_loss(f64(negative), ref_negative_logp=f64(ref), beta=beta)
    assert loss.item() == pytest.approx(reference.npo(negative - ref, beta), rel=1e-9, abs=1e-12)


def test_npo_starts_at_its_offset():
    assert npo_loss(f64(-7.0), ref_negative_logp=f64(-7.0), beta=0.3).item() == pytest.approx(npo_offset(0.3))


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    negative, ref = f64(-3.0, -8.0), f64(-4.0, -4.0)
    excess = npo_loss(negative, ref_negative_logp=ref, beta=1e-6).item() - npo_offset(1e-6)
    assert excess == pytest.approx(gradient_ascent_loss(negative - ref).item(), abs=1e-5)


@given(log_probs, st.integers(1, 50), st.floats(0.01, 5), st.floats(-2, 2))
def test_simnpo_follows_the_formula(negative: float, length: int, beta: float, delta: float):
    loss = simnpo_loss(f64(negative), negative_length=torch.tensor([length]), beta=beta, delta=delta)
    assert loss.item() == pytest.approx(reference.simnpo(negative, length, beta, delta), rel=1e-9, abs=1e-12)


def test_simnpo_refuses_an_empty_completion():
    with pytest.raises(ValueError, match="negative_length holds 0, expected token counts of at least 1"):
        simnpo_loss(f64(-1.0, 0.0), negative_length=torch.tensor([3, 0]))


@pytest.mark.parametrize("length", [[3.0], torch.tensor([True])])
def test_simnpo_refuses_lengths_that_are_no_counts(length: object):
    with pytest.raises(TypeError, match="negative_length"):
        simnpo_loss(f64(-1.0), negative_length=length)  # type: ignore[arg-type]


@given(st.lists(st.floats(-25, 25, allow_subnormal=False), min_size=1, max_size=6))
def test_unlikelihood_follows_the_formula(logodds: list[float]):
    loss = unlikelihood_loss(f64(*logodds)[None], torch.ones(1, len(logodds), dtype=torch.bool))
    assert loss.item() == pytest.approx(sum(map(reference.unlikelihood_token, logodds)), rel=1e-5)


def test_unlikelihood_is_exact_where_one_minus_p_has_no_digits_left():
    """At log-odds 40, p is 1 in float32: −log(1 − p) is 40 all the same, with its full gradient."""
    logodds = torch.tensor([[40.0, 1e4, -40.0]], requires_grad=True)
    loss = unlikelihood_loss(logodds, torch.ones(1, 3, dtype=torch.bool), reduction="sum")
    torch.testing.assert_close(loss, torch.tensor(1e4 + 40))
    loss.backward()
    torch.testing.assert_close(logodds.grad, torch.tensor([[1.0, 1.0, math.exp(-40)]]))


@pytest.mark.parametrize(("reduction", "N"), [("sequence", 2 + 1), ("token", 3 + 2), ("sum", 1)])
def test_unlikelihood_with_positives_and_rubbish_in_masked_slots(reduction: str, N: int):
    negative = torch.tensor([[1.0, math.nan], [-2.0, 3.0], [math.inf, math.nan]], requires_grad=True)
    negative_mask = torch.tensor([[True, False], [True, True], [False, False]])
    positive = torch.tensor([[math.nan, -0.5, -1.5]], requires_grad=True)
    positive_mask = torch.tensor([[False, True, True]])
    loss = unlikelihood_loss(negative, negative_mask, positive, positive_mask, alpha=0.5, reduction=reduction)
    unlikely = sum(map(reference.unlikelihood_token, [1.0, -2.0, 3.0]))
    assert loss.item() == pytest.approx((2.0 + 0.5 * unlikely) / N)
    loss.backward()
    assert negative.grad is not None
    assert positive.grad is not None
    assert (negative.grad[~negative_mask] == 0).all()
    expected = 0.5 / N * torch.sigmoid(torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(negative.grad[negative_mask], expected)
    torch.testing.assert_close(positive.grad, positive_mask * -1.0 / N)
