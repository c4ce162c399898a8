"""CRINGE and Pairwise Cringe against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastd2o.losses import cringe_loss, cringe_token_loss, pairwise_cringe_gate, pairwise_cringe_loss
from tests.losses import reference

logits = st.floats(-30, 30, allow_subnormal=False)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@given(logits, logits)
def test_token_loss_and_its_gradients_follow_the_formula(negative: float, positive: float):
    s_negative, s_positive = f64(negative), f64(positive)
    loss = cringe_token_loss(s_negative, s_positive)
    assert loss.item() == pytest.approx(reference.cringe_token(negative, positive), rel=1e-9, abs=1e-12)
    loss.sum().backward()
    assert s_negative.grad is not None
    assert s_positive.grad is not None
    assert s_negative.grad.item() == pytest.approx(reference.sigmoid(negative - positive), rel=1e-9)
    assert s_positive.grad.item() == -s_negative.grad.item()


def test_positive_logit_can_be_detached():
    s_negative, s_positive = f64(1.0), f64(2.0)
    cringe_token_loss(s_negative, s_positive, detach_positive=True).sum().backward()
    assert s_negative.grad is not None
    assert s_positive.grad is None


def test_token_loss_at_the_ends_of_the_range():
    """Log-sum-exp of the two would overflow; no alternative (s⁺ = −inf) means nothing to learn, even from s⁻ = −inf."""
    inf = math.inf
    s_negative, s_positive = f64(1e4, -1e4, -inf, -inf, 3.0), f64(-1e4, 1e4, 0.0, -inf, -inf)
    loss = cringe_token_loss(s_negative, s_positive)
    assert loss.tolist() == [2e4, 0, 0, 0, 0]
    loss.sum().backward()
    assert s_negative.grad is not None
    assert s_positive.grad is not None
    assert s_negative.grad.tolist() == [1, 0, 0, 0, 0]
    assert s_positive.grad.tolist() == [-1, 0, 0, 0, 0]


def ragged(*rows: list[float], rubbish: float = math.nan) -> tuple[Tensor, Tensor]:
    """Return rows padded with rubbish to one length, and the mask of what is not padding."""
    longest = max(len(row) for row in rows)
    padded = [row + [rubbish] * (longest - len(row)) for row in rows]
    mask = [[column < len(row) for column in range(longest)] for row in rows]
    return torch.tensor(padded, dtype=torch.float64, requires_grad=True), torch.tensor(mask)


@pytest.mark.parametrize(("reduction", "N"), [("token", 3 + 4), ("sequence", 2 + 2), ("sum", 1)])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -5.0])
def test_cringe_is_cross_entropy_plus_contrast_over_one_count(reduction: str, N: int, rubbish: float):
    negative, negative_mask = ragged([0.5, 2.0], [1.0], [], rubbish=rubbish)
    positive, positive_mask = ragged([-1.0], [-2.0, -0.5, -0.25], rubbish=rubbish)
    loss = cringe_loss(negative, negative_mask, positive, positive_mask, alpha=2.0, reduction=reduction)
    assert loss.item() == pytest.approx((3.75 + 2.0 * 3.5) / N)
    loss.backward()
    torch.testing.assert_close(negative.grad, negative_mask.double() * 2.0 / N)
    torch.testing.assert_close(positive.grad, positive_mask.double() * -1.0 / N)


def test_cringe_without_positives():
    negative, mask = ragged([0.5, 2.0], [1.0])
    assert cringe_loss(negative, mask).item() == pytest.approx(3.5 / 3)


def test_positives_come_with_their_mask():
    negative, mask = ragged([0.5])
    with pytest.raises(
        ValueError, match="positive_mask is missing: positive_logp and positive_mask are given together"
    ):
        cringe_loss(negative, mask, negative)
    with pytest.raises(ValueError, match="positive_logp is missing"):
        cringe_loss(negative, mask, positive_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"negative_mask": torch.ones(2, 3)}, TypeError, r"negative_mask has dtype torch.float32, expected torch.bool"),
        (
            {"negative_mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"negative_mask has shape \[3\], expected \[2, 3\]",
        ),
        ({"alpha": -1.0}, ValueError, "alpha is -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str):
    good = {"negative_loss": torch.ones(2, 3), "negative_mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        cringe_loss(**{**good, **arguments})


log_probs = st.floats(-30, 0, allow_subnormal=False)
positives = st.floats(0, 30, allow_subnormal=False)


@given(log_probs, log_probs, positives, positives, st.floats(-5, 5), st.floats(0.5, 5), st.floats(0, 5))
def test_pairwise_cringe_follows_the_formula(
    chosen: float, rejected: float, nll: float, cringe: float, margin: float, temperature: float, alpha: float
):
    loss = pairwise_cringe_loss(
        *(f64(value) for value in (chosen, rejected, nll, cringe)), margin=margin, temperature=temperature, alpha=alpha
    )
    expected = reference.pairwise_cringe(
        chosen, rejected, nll, cringe, margin=margin, temperature=temperature, alpha=alpha
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_gate_closes_as_the_pair_separates():
    gate = pairwise_cringe_gate(
        torch.tensor([-90.0, -3.0, -3.0, 0.0]), torch.tensor([0.0, -3.0, -5.0, -90.0]), margin=2
    )
    torch.testing.assert_close(gate, torch.tensor([1.0, reference.sigmoid(2.0), 0.5, 0.0]))


@pytest.mark.parametrize("detach_gate", [True, False])
def test_gate_gradient(detach_gate: bool):
    """A live gate adds −(1/τ) g (1−g) L_bin ∇M; a detached one is a weight and nothing else."""
    chosen, rejected, nll, cringe = f64(-3.0), f64(-4.0), f64(2.0), f64(1.5)
    margin, temperature, alpha = 0.5, 2.0, 3.0
    pairwise_cringe_loss(
        chosen, rejected, nll, cringe, margin=margin, temperature=temperature, alpha=alpha, detach_gate=detach_gate
    ).backward()
    gate = reference.sigmoid((margin - 1.0) / temperature)
    assert nll.grad is not None
    assert cringe.grad is not None
    assert nll.grad.item() == pytest.approx(gate)
    assert cringe.grad.item() == pytest.approx(alpha * gate)
    if detach_gate:
        assert chosen.grad is None
        assert rejected.grad is None
        return
    assert chosen.grad is not None
    assert rejected.grad is not None
    through_margin = -gate * (1 - gate) * (2.0 + alpha * 1.5) / temperature
    assert chosen.grad.item() == pytest.approx(through_margin)
    assert rejected.grad.item() == pytest.approx(-through_margin)


@pytest.mark.parametrize(("option", "value"), [("temperature", 0.0), ("margin", math.inf), ("alpha", -1.0)])
def test_pairwise_options_are_checked(option: str, value: float):
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        pairwise_cringe_loss(ones, ones, ones, ones, **{option: value})  # type: ignore[arg-type]


def test_pairwise_losses_must_match_the_pairs():
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=r"rejected_cringe \[2\]"):
        pairwise_cringe_loss(ones, ones, ones, torch.ones(2))
