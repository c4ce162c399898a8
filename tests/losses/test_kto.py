"""KTO against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastd2o.losses import kto_loss, kto_reference_point
from tests.losses import reference

log_probs = st.floats(-60, 0, allow_subnormal=False)


@given(log_probs, log_probs, st.booleans(), st.floats(0, 10), st.floats(0.05, 1))
def test_follows_the_formula(logp: float, ref: float, desirable: bool, z0: float, beta: float):
    loss = kto_loss(
        torch.tensor([logp], dtype=torch.float64),
        ref_logp=torch.tensor([ref], dtype=torch.float64),
        desirable=torch.tensor([desirable]),
        reference_point=z0,
        beta=beta,
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    expected = reference.kto(logp - ref, desirable, z0, beta, 1.3 if desirable else 0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_mean_counts_both_kinds():
    logp, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0])
    loss = kto_loss(logp, ref_logp=ref, desirable=torch.tensor([True, False, False]), reference_point=0.0)
    expected = [reference.kto(r, good, 0.0, 0.1, 1.0) for r, good in [(1.0, True), (0.0, False), (-1.0, False)]]
    assert loss.item() == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize(
    ("policy", "ref", "expected"),
    [
        ([-3.0, -5.0], [-4.0, -7.0], 1.5),
        ([-3.0, -9.0], [-4.0, -7.0], 0.0),  # the mean, −0.5, is clamped; not each completion on its own
        ([], [], 0.0),
    ],
)
def test_reference_point_is_the_clamped_mean(policy: list[float], ref: list[float], expected: float):
    logp = torch.tensor(policy, requires_grad=True)
    z0 = kto_reference_point(logp, ref_mismatched_logp=torch.tensor(ref))
    assert z0.shape == ()
    assert z0.item() == expected
    assert not z0.requires_grad


def test_reference_point_carries_no_gradient():
    logp = torch.tensor([-1.0], requires_grad=True)
    z0 = torch.tensor(0.5, requires_grad=True)
    kto_loss(logp, ref_logp=torch.zeros(1), desirable=torch.tensor([False]), reference_point=z0).backward()
    assert logp.grad is not None
    assert z0.grad is None


def test_desirable_must_be_boolean():
    with pytest.raises(TypeError, match=r"desirable has dtype torch.int64, expected torch.bool"):
        kto_loss(torch.zeros(2), ref_logp=torch.zeros(2), desirable=torch.tensor([1, 0]), reference_point=0.0)


@pytest.mark.parametrize("option", ["desirable_weight", "undesirable_weight"])
def test_weights_must_not_be_negative(option: str):
    with pytest.raises(ValueError, match=f"{option} is -1.0"):
        kto_loss(
            torch.zeros(1),
            ref_logp=torch.zeros(1),
            desirable=torch.tensor([True]),
            **{"reference_point": 0.0, option: -1.0},  # type: ignore[arg-type]
        )
