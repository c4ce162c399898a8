"""D2O against its formula, and the identities that follow from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastd2o.losses import d2o_logits, d2o_loss, dpo_loss
from tests.losses import reference

logps = st.floats(-60, 0, allow_subnormal=False)
weights = st.floats(0.01, 2)


@st.composite
def groups(draw: st.DrawFn, *, min_anchors: int = 1) -> dict[str, Any]:
    """Draw a batch with a ragged number of anchors and rubbish in the slots that are masked."""
    G, K = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(min_anchors, K), min_size=G, max_size=G))
    mask = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(n)) < n for n in counts])
    rubbish = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))

    def tensor(*shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(logps, min_size=count, max_size=count)), dtype=torch.float64).reshape(shape)

    return {
        "negative_logp": tensor(G).requires_grad_(),
        "anchor_logp": tensor(G, K).masked_fill(~mask, rubbish).requires_grad_(),
        "ref_negative_logp": tensor(G),
        "ref_anchor_logp": tensor(G, K).masked_fill(~mask, rubbish),
        "anchor_mask": mask,
    }


def reference_argument(batch: dict[str, Any], group: int, *, alpha: float, beta: float) -> float:
    mask = batch["anchor_mask"][group]
    return reference.d2o_argument(
        batch["negative_logp"][group].item(),
        batch["anchor_logp"][group][mask].tolist(),
        batch["ref_negative_logp"][group].item(),
        batch["ref_anchor_logp"][group][mask].tolist(),
        alpha=alpha,
        beta=beta,
    )


@given(groups(min_anchors=0), weights, weights)
def test_terms_and_losses_follow_the_formula(batch: dict[str, Any], alpha: float, beta: float):
    expected = [reference_argument(batch, group, alpha=alpha, beta=beta) for group in range(len(batch["anchor_mask"]))]
    terms = d2o_logits(**batch, alpha=alpha, beta=beta)
    torch.testing.assert_close(terms.argument.tolist(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.anchor_term - terms.negative_term, terms.argument)
    assert terms.valid_anchors.tolist() == batch["anchor_mask"].sum(-1).tolist()
    each = d2o_loss(**batch, alpha=alpha, beta=beta, allow_no_anchor=True, reduction="none")
    torch.testing.assert_close(each.tolist(), [-reference.log_sigmoid(z) for z in expected], rtol=1e-9, atol=1e-12)


@given(groups(), weights, weights)
def test_gradients_follow_the_formula(batch: dict[str, Any], alpha: float, beta: float):
    """∂L/∂lp(y_i) = −(β/K) σ(−z)/G, ∂L/∂lp(y_l) = +α σ(−z)/G, and exactly 0 in a masked slot."""
    d2o_loss(**batch, alpha=alpha, beta=beta).backward()
    G = len(batch["anchor_mask"])
    for group, mask in enumerate(batch["anchor_mask"]):
        pull = reference.sigmoid(-reference_argument(batch, group, alpha=alpha, beta=beta)) / G
        expected = mask.double() * (-beta / mask.sum().item() * pull)
        torch.testing.assert_close(batch["anchor_logp"].grad[group], expected, rtol=1e-9, atol=1e-15)
        assert batch["negative_logp"].grad[group].item() == pytest.approx(alpha * pull, rel=1e-9)


@given(groups(), weights)
def test_never_above_the_mean_of_the_dpo_losses_of_its_anchors(batch: dict[str, Any], beta: float):
    """Jensen: −log σ is convex, and the argument is the mean of the arguments of K DPO pairs."""
    d2o = d2o_loss(**batch, alpha=beta, beta=beta, reduction="none")
    dpo = dpo_loss(
        batch["anchor_logp"],
        batch["negative_logp"][:, None],
        ref_chosen_logp=batch["ref_anchor_logp"],
        ref_rejected_logp=batch["ref_negative_logp"][:, None],
        beta=beta,
        reduction="none",
    )
    mean_dpo = torch.stack([pairs[mask].mean() for pairs, mask in zip(dpo, batch["anchor_mask"], strict=True)])
    assert (d2o <= mean_dpo * (1 + 1e-12) + 1e-12).all()


@given(groups(), weights)
def test_one_anchor_is_dpo(batch: dict[str, Any], beta: float):
    anchors, ref_anchors = (batch[name].nan_to_num(0, 0, 0)[:, :1] for name in ("anchor_logp", "ref_anchor_logp"))
    negative, ref_negative = batch["negative_logp"], batch["ref_negative_logp"]
    d2o = d2o_loss(
        negative, anchors, ref_negative_logp=ref_negative, ref_anchor_logp=ref_anchors, alpha=beta, beta=beta
    )
    dpo = dpo_loss(
        anchors[:, 0], negative, ref_chosen_logp=ref_anchors[:, 0], ref_rejected_logp=ref_negative, beta=beta
    )
    torch.testing.assert_close(d2o, dpo, rtol=1e-12, atol=1e-12)


@given(groups(), st.integers(1, 7), weights, weights)
def test_identical_anchors_are_one_anchor(batch: dict[str, Any], copies: int, alpha: float, beta: float):
    """Neither the loss nor the whole pull on the anchors depends on how often the same anchor is repeated."""
    losses, anchor_pulls = [], []
    for count in (1, copies):
        anchor = batch["anchor_logp"].detach().nan_to_num(0, 0, 0)[:, :1].expand(-1, count).clone().requires_grad_()
        loss = d2o_loss(
            batch["negative_logp"],
            anchor,
            ref_negative_logp=batch["ref_negative_logp"],
            ref_anchor_logp=batch["ref_anchor_logp"].nan_to_num(0, 0, 0)[:, :1].expand(-1, count),
            alpha=alpha,
            beta=beta,
        )
        losses.append(loss)
        anchor_pulls.append(torch.autograd.grad(loss, anchor)[0].sum(-1))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(anchor_pulls[1], anchor_pulls[0], rtol=1e-9, atol=1e-15)


@given(groups(), st.floats(-100, 100))
def test_a_shift_of_policy_and_reference_changes_nothing(batch: dict[str, Any], shift: float):
    names = ("negative_logp", "anchor_logp", "ref_negative_logp", "ref_anchor_logp")
    shifted = {**batch, **{name: batch[name] + shift for name in names}}
    torch.testing.assert_close(d2o_loss(**shifted), d2o_loss(**batch), rtol=1e-9, atol=1e-12)


def test_references_cross():
    """Anchors go with ref_anchor_logp and beta, the negative with ref_negative_logp and alpha."""
    terms = d2o_logits(
        torch.tensor([-5.0]),
        torch.tensor([[-2.0, -4.0]]),
        ref_negative_logp=torch.tensor([-3.0]),
        ref_anchor_logp=torch.tensor([[-1.0, -7.0]]),
        alpha=0.5,
        beta=0.2,
    )
    torch.testing.assert_close(terms.anchor_term, torch.tensor([0.2 * (-1 + 3) / 2]))
    torch.testing.assert_close(terms.negative_term, torch.tensor([0.5 * -2.0]))


def test_averages_over_anchors_once():
    """β/K already is the mean: a mean over K on top of it would shrink the anchor term by another factor K."""
    K = 11
    anchors, zeros = torch.full((1, K), -3.0), torch.zeros(1)
    terms = d2o_logits(zeros, anchors, ref_negative_logp=zeros, ref_anchor_logp=torch.full((1, K), -5.0), beta=0.1)
    torch.testing.assert_close(terms.anchor_term, torch.tensor([0.1 * 2.0]))


def batch_with_an_empty_group() -> dict[str, Any]:
    return {
        "negative_logp": torch.tensor([-3.0, -8.0], requires_grad=True),
        "anchor_logp": torch.tensor([[-2.0, math.nan], [math.nan, math.nan]], requires_grad=True),
        "ref_negative_logp": torch.tensor([-4.0, -4.0]),
        "ref_anchor_logp": torch.tensor([[-2.5, math.nan], [math.nan, math.nan]]),
        "anchor_mask": torch.tensor([[True, False], [False, False]]),
    }


@pytest.mark.parametrize("its_negative", [-8.0, math.nan, math.inf])
def test_group_without_anchors_is_left_out(its_negative: float):
    batch = batch_with_an_empty_group()
    batch["negative_logp"] = torch.tensor([-3.0, its_negative], requires_grad=True)
    each = d2o_loss(**batch, reduction="none")
    assert each[1].item() == 0
    loss = d2o_loss(**batch)
    torch.testing.assert_close(loss, each[0])
    loss.backward()
    assert batch["negative_logp"].grad[1].item() == 0
    assert batch["anchor_logp"].grad.isfinite().all()


def test_group_without_anchors_can_stay_as_its_negative_term():
    batch = batch_with_an_empty_group()
    each = d2o_loss(**batch, allow_no_anchor=True, reduction="none")
    torch.testing.assert_close(each[1], torch.tensor(-reference.log_sigmoid(-0.1 * (-8 + 4))))
    torch.testing.assert_close(d2o_loss(**batch, allow_no_anchor=True), each.mean())


@pytest.mark.parametrize("K", [0, 2])
def test_no_anchor_anywhere_is_refused(K: int):
    negative, anchors, mask = torch.zeros(3), torch.zeros(3, K), torch.zeros(3, K, dtype=torch.bool)
    arguments: dict[str, Any] = {"ref_negative_logp": negative, "ref_anchor_logp": anchors, "anchor_mask": mask}
    with pytest.raises(ValueError, match=r"no group has an anchor.*Fix: sample anchors, or pass allow_no_anchor=True"):
        d2o_loss(negative, anchors, **arguments)
    loss = d2o_loss(negative, anchors, **arguments, allow_no_anchor=True)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor_logp": torch.zeros(3)}, r"ref_anchor_logp has shape \[2, 3\], expected \[3\]"),
        ({"anchor_logp": torch.zeros(3, 3), "ref_anchor_logp": torch.zeros(3, 3)}, r"anchor_logp has shape \[3, 3\]"),
        ({"anchor_logp": torch.zeros(2), "ref_anchor_logp": torch.zeros(2)}, r"anchor_logp has shape \[2\]"),
        ({"ref_negative_logp": torch.zeros(1)}, r"ref_negative_logp has shape \[1\], expected \[2\]"),
        ({"anchor_mask": torch.ones(2, 1, dtype=torch.bool)}, r"anchor_mask has shape \[2, 1\], expected \[2, 3\]"),
        ({"alpha": -0.1}, "alpha is -0.1, expected a number of at least 0"),
        ({"beta": 0.0}, "beta is 0.0, expected a number above 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str):
    good: dict[str, Any] = {
        "negative_logp": torch.zeros(2),
        "anchor_logp": torch.zeros(2, 3),
        "ref_negative_logp": torch.zeros(2),
        "ref_anchor_logp": torch.zeros(2, 3),
    }
    d2o_loss(**good)
    with pytest.raises(ValueError, match=message):
        d2o_loss(**{**good, **change})


def test_integer_mask_is_refused():
    with pytest.raises(TypeError, match=r"anchor_mask has dtype torch.int64, expected torch.bool"):
        d2o_loss(
            torch.zeros(2),
            torch.zeros(2, 3),
            ref_negative_logp=torch.zeros(2),
            ref_anchor_logp=torch.zeros(2, 3),
            anchor_mask=torch.ones(2, 3, dtype=torch.int64),
        )
