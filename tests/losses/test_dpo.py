"""Every DPO type against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastd2o.losses import DPO_LOSS_TYPES, DPO_SMOOTHED_TYPES, dpo_loss
from tests.losses import reference

every_type = pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)

log_ratios = st.floats(-10, 10, allow_subnormal=False)


def one_pair(pair: reference.Pair, **options: Any) -> float:
    """Return the loss of one pair given by its log-ratios, each split between a policy and a reference."""

    def scalar(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return dpo_loss(
        scalar(pair.chosen - 7),
        scalar(pair.rejected - 9),
        ref_chosen_logp=scalar(-7),
        ref_rejected_logp=scalar(-9),
        beta=pair.beta,
        **options,
    ).item()


@every_type
@given(log_ratios, log_ratios, st.floats(0.05, 1), st.integers(1, 20), st.integers(1, 20))
def test_follows_the_formula(
    loss_type: str, chosen: float, rejected: float, beta: float, chosen_length: int, rejected_length: int
):
    pair = reference.Pair(chosen, rejected, beta, chosen_length, rejected_length)
    loss = one_pair(
        pair,
        loss_type=loss_type,
        label_smoothing=reference.SMOOTHING.get(loss_type, 0.0),
        chosen_length=torch.tensor([chosen_length]),
        rejected_length=torch.tensor([rejected_length]),
        bco_baseline=reference.BASELINE,
    )
    # Absolute, because 1 − σ and log(σ) of the naive formulas cancel down to about 1e-16 of a term of order 1.
    assert loss == pytest.approx(reference.DPO[loss_type](pair), rel=1e-9, abs=1e-9)


def test_every_type_has_a_formula():
    assert set(reference.DPO) == set(DPO_LOSS_TYPES)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_no_smoothing_is_plain_dpo(loss_type: str):
    pair = reference.Pair(1.5, -0.5, 0.3)
    assert one_pair(pair, loss_type=loss_type) == pytest.approx(-reference.log_sigmoid(pair.margin))


def test_label_smoothing_is_the_expectation_over_flipped_labels():
    """cDPO averages the losses of kept and flipped labels; robust DPO inverts that average, so that it is unbiased."""
    pair, flipped, rate = reference.Pair(1.5, -0.5, 0.3), reference.Pair(-0.5, 1.5, 0.3), 0.2
    kept_loss, flipped_loss = one_pair(pair), one_pair(flipped)
    smoothed = one_pair(pair, label_smoothing=rate)
    assert smoothed == pytest.approx((1 - rate) * kept_loss + rate * flipped_loss)
    robust, robust_flipped = (one_pair(either, loss_type="robust", label_smoothing=rate) for either in (pair, flipped))
    assert (1 - rate) * robust + rate * robust_flipped == pytest.approx(kept_loss)


def test_bdpo_with_the_whole_policy_is_dpo():
    pair = reference.Pair(1.5, -0.5, 0.3)
    assert one_pair(pair, loss_type="bdpo", bdpo_lambda=1.0) == pytest.approx(one_pair(pair))


def test_bdpo_bounds_what_the_rejected_completion_can_give():
    """λ e^r + 1 − λ stays above 1 − λ, so driving the rejected completion to probability 0 wins only so much."""
    unlikely, impossible = (one_pair(reference.Pair(0.0, r, 1.0), loss_type="bdpo") for r in (-20.0, -2000.0))
    assert unlikely == pytest.approx(impossible, abs=1e-8)
    assert impossible == pytest.approx(-reference.log_sigmoid(0.6931471805599453))


def test_dpop_lambda_is_read():
    pair = reference.Pair(-1.0, -2.0, 0.1)
    assert one_pair(pair, loss_type="dpop", dpop_lambda=0.0) == pytest.approx(one_pair(pair))
    assert one_pair(pair, loss_type="dpop", dpop_lambda=5.0) == pytest.approx(-reference.log_sigmoid(0.1 * (1 - 5)))


def test_discopop_tau_is_read():
    pair = reference.Pair(-3.0, 2.0, 0.1)
    gate = reference.sigmoid(pair.margin / 2.0)
    expected = -reference.log_sigmoid(pair.margin) * (1 - gate) + 2.718281828459045 ** (-pair.margin) * gate
    assert one_pair(pair, loss_type="discopop", discopop_tau=2.0) == pytest.approx(expected)


def test_bco_baseline_is_a_constant():
    baseline = torch.tensor(0.2, requires_grad=True)
    chosen = torch.tensor([-1.0], requires_grad=True)
    loss = dpo_loss(
        chosen,
        torch.tensor([-2.0]),
        ref_chosen_logp=torch.tensor([-1.5]),
        ref_rejected_logp=torch.tensor([-1.5]),
        loss_type="bco_pair",
        bco_baseline=baseline,
    )
    expected = -reference.log_sigmoid(0.1 * 0.5 - 0.2) - reference.log_sigmoid(0.2 + 0.1 * 0.5)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert chosen.grad is not None
    assert baseline.grad is None


def test_batches_may_have_any_shape_that_broadcasts():
    chosen, rejected = -torch.rand(4, 3), -torch.rand(4, 1)
    each = dpo_loss(
        chosen, rejected, ref_chosen_logp=torch.zeros(4, 3), ref_rejected_logp=torch.tensor(0.0), reduction="none"
    )
    torch.testing.assert_close(each, -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))


@pytest.mark.parametrize("loss_type", sorted(set(DPO_LOSS_TYPES) - set(DPO_SMOOTHED_TYPES)))
def test_label_smoothing_is_refused_where_it_would_be_ignored(loss_type: str):
    with pytest.raises(
        ValueError, match=f"loss_type '{loss_type}' has no label smoothing; these have: sigmoid, robust"
    ):
        one_pair(reference.Pair(0, 0, 0.1), loss_type=loss_type, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dop"}, "loss_type is 'dop', expected one of: sigmoid, hinge, ipo, robust"),
        ({"loss_type": "exo_pair"}, "label_smoothing is 0, expected a rate above 0.*Fix: label_smoothing=1e-3"),
        ({"loss_type": "ipo"}, "chosen_length is missing.*Fix: pass the number of completion tokens"),
        (
            {"loss_type": "ipo", "chosen_length": torch.tensor([3])},
            "rejected_length is missing",
        ),
        (
            {"loss_type": "ipo", "chosen_length": torch.tensor([0]), "rejected_length": torch.tensor([1])},
            "chosen_length holds 0, expected token counts of at least 1: an empty completion",
        ),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5, expected a rate in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0.1, expected a rate in \[0, 0.5\)"),
        ({"discopop_tau": 0.0}, "discopop_tau is 0.0, expected a number above 0"),
        ({"dpop_lambda": -1.0}, "dpop_lambda is -1.0, expected a number of at least 0"),
        ({"bdpo_lambda": 0.0}, "bdpo_lambda is 0.0, expected a number above 0"),
        ({"bdpo_lambda": 1.5}, r"bdpo_lambda is 1.5, expected a share in \(0, 1\]"),
        ({"bco_baseline": float("nan")}, "bco_baseline is nan, expected a finite number"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        one_pair(reference.Pair(0, 0, 0.1), **options)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf")])
def test_beta_must_be_positive(beta: float):
    with pytest.raises(ValueError, match="beta is"):
        one_pair(reference.Pair(0, 0, beta))


def test_pairs_that_do_not_match_are_refused():
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=r"do not broadcast: chosen_logp \[3\], rejected_logp \[2\]"):
        dpo_loss(zeros, torch.zeros(2), ref_chosen_logp=zeros, ref_rejected_logp=zeros)
