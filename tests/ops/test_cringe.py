"""linear_cringe: invariants of the draw, and value and gradients of the loss against the float64 oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastd2o
from fastd2o.ops.backends import fuses
from fastd2o.ops.torch_tile_ops import _topk
from tests.ops.oracle import Case, full_logits, logprob, make_case, relative_error, rms_error

pytestmark = pytest.mark.usefixtures("default_backend")


def plan_of(case: Case, tokens: int, columns: int) -> fastd2o.Plan:
    plan = fastd2o.Plan.choose(
        tokens=case.target.numel(),
        hidden_size=case.weight.shape[1],
        vocab_size=case.weight.shape[0],
        algorithm="cringe",
        dtype=case.hidden.dtype,
    )
    return dataclasses.replace(plan, block_tokens=tokens, block_vocab=columns, fused=False)


def oracle_loss(leaves: dict[str, Tensor], case: Case, positive: Tensor, detach_positive: bool = False) -> Tensor:
    """The loss for a given draw, in float64, from full logits."""
    logits = case.logits(leaves)
    s_negative = logits.gather(-1, case.target.clamp_min(0)[..., None])[..., 0]
    s_positive = logits.gather(-1, positive.clamp_min(0)[..., None])[..., 0]
    if detach_positive:
        s_positive = s_positive.detach()
    loss = -torch.log(s_positive.exp() / (s_positive.exp() + s_negative.exp()))
    return loss.masked_fill(positive < 0, 0.0)


@pytest.mark.parametrize("detach_positive", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_scale": -0.7, "softcap": 4.0, "temperature": 1.3}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients(
    dtype: torch.dtype, tolerance: float, options: dict[str, Any], detach_positive: bool, default_backend: str
) -> None:
    # Two blocks of tokens and two of columns are enough for the interpreter, which takes its time.
    tokens, columns = (17, 131) if default_backend == "triton" else (31, 211)
    case = make_case(tokens=tokens, vocab_size=columns, dtype=dtype, **options)
    tiled = plan_of(case, 16, 120)
    not_waiting = dataclasses.replace(tiled, compact=False, fused=fuses(tiled.backend, tiled.algorithm))
    for plan in (None, tiled, not_waiting):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
        out = fastd2o.linear_cringe(
            leaves["hidden"], leaves["weight"], case.target, bias=leaves["bias"], seed=5, plan=plan,
            detach_positive=detach_positive, **options,
        )  # fmt: skip
        exact = {name: tensor.double().requires_grad_() for name, tensor in case.tensors.items()}
        expected = oracle_loss(exact, case, out.positive, detach_positive)
        assert relative_error(out.loss.detach(), expected.detach()) <= tolerance
        gradients = torch.autograd.grad((out.loss * case.coef.to(dtype)).sum(), list(leaves.values()))
        expected_gradients = torch.autograd.grad((expected * case.coef).sum(), list(exact.values()))
        for name, ours, theirs in zip(leaves, gradients, expected_gradients, strict=True):
            assert relative_error(ours, theirs) <= tolerance, name
        expected_logprob = logprob(case.logits(exact), case.target).detach()
        assert relative_error(out.logprob, expected_logprob) <= tolerance
        assert not out.logprob.requires_grad


@pytest.mark.backends("torch")  # float64
@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen: bool) -> None:
    case = make_case(tokens=4, hidden_size=5, vocab_size=11, dtype=torch.float64, softcap=3.0)
    leaves = {name: tensor.clone() for name, tensor in case.tensors.items()}
    trained = ["hidden"] if frozen else list(leaves)

    def call(*inputs: Tensor) -> Tensor:
        named = leaves | dict(zip(trained, inputs, strict=True))
        hidden, weight, bias = named["hidden"], named["weight"], named["bias"]
        return fastd2o.linear_cringe(hidden, weight, case.target, bias=bias, k=3, seed=1, softcap=3.0).loss

    assert torch.autograd.gradcheck(call, tuple(leaves[name].requires_grad_() for name in trained))


@pytest.mark.backends("torch", "cpu")  # the interpreter goes to the edges at once
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9),
    vocab_size=st.integers(2, 140),
    k=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    block=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    ties=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_invariants_of_the_draw(
    tokens: int, vocab_size: int, k: int, ignored: float, block: tuple[int, int], ties: bool, seed: int
) -> None:
    check_the_draw(tokens, vocab_size, min(k, vocab_size - 1), ignored, block, ties, seed)


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "k", "ignored", "ties"),
    [(0, 5, 2, 0.0, False), (9, 131, 5, 0.5, False), (7, 67, 9, 0.0, True), (3, 7, 6, 1.0, False)],
)
def test_invariants_of_the_draw_at_the_edges(tokens: int, vocab_size: int, k: int, ignored: float, ties: bool) -> None:
    check_the_draw(tokens, vocab_size, k, ignored, (4, 40), ties, seed=2**40)


def check_the_draw(
    tokens: int, vocab_size: int, k: int, ignored: float, block: tuple[int, int], ties: bool, seed: int
) -> None:
    """The positive is one of the k largest other logits; never the negative; the same whatever the tiling."""
    case = make_case(tokens, 6, vocab_size, ignored=ignored, seed=seed % 1000)
    if ties:
        case.weight[:] = case.weight[0]
        case.bias = None
    arguments = (case.hidden, case.weight, case.target)
    out = fastd2o.linear_cringe(*arguments, bias=case.bias, k=k, seed=seed)
    tiled = fastd2o.linear_cringe(*arguments, bias=case.bias, k=k, seed=seed, plan=plan_of(case, *block))
    counted = case.target >= 0
    assert (out.positive[~counted] == -1).all()
    assert (out.loss[~counted] == 0).all()
    positive, target = out.positive[counted], case.target[counted]
    assert (positive >= 0).all()
    assert (positive < vocab_size).all()
    assert (positive != target).all()
    logits = full_logits(case.hidden, case.weight, case.bias)[counted]
    others = logits.scatter(1, target[:, None], -torch.inf)
    threshold = others.topk(k, 1).values[:, -1]
    assert (logits.gather(1, positive[:, None])[:, 0] >= threshold - 1e-5).all()
    torch.testing.assert_close(tiled.loss, out.loss, rtol=1e-5, atol=1e-5)
    if not ties:
        assert torch.equal(tiled.positive, out.positive)


@pytest.mark.backends("torch", "cpu")  # 20,000 tokens
def test_frequencies_follow_the_softmax_of_the_survivors() -> None:
    tokens, k = 20_000, 4
    row = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, 3.0, 0.5]])
    target = torch.full((tokens,), 5)
    out = fastd2o.linear_cringe(torch.ones(tokens, 1), row.T.contiguous(), target, k=k, seed=11)
    survivors = torch.tensor([0, 1, 2, 6])
    expected = row[0, survivors].softmax(0)
    observed = torch.stack([(out.positive == v).float().mean() for v in survivors])
    assert out.positive.unique().tolist() == sorted(survivors.tolist())
    # Four standard deviations of a binomial share.
    assert ((observed - expected).abs() < 4 * (expected * (1 - expected) / tokens).sqrt()).all()


def test_with_large_gaps_the_best_alternative_is_drawn() -> None:
    weight = torch.tensor([[0.0], [100.0], [50.0], [200.0]])
    out = fastd2o.linear_cringe(torch.ones(64, 1), weight, torch.full((64,), 3), k=3, seed=0)
    assert (out.positive == 1).all()
    torch.testing.assert_close(out.loss, torch.full((64,), 100.0))


def test_the_draw_belongs_to_the_position() -> None:
    """Ignoring other tokens, or another shape of the batch, leaves a token's draw alone; seeds and positions differ."""
    case = make_case(tokens=24, vocab_size=61, ignored=0.0)
    draw = fastd2o.linear_cringe(case.hidden, case.weight, case.target, seed=9).positive
    fewer = case.target.clone()
    fewer[::2] = -100
    kept = fastd2o.linear_cringe(case.hidden, case.weight, fewer, seed=9).positive
    assert torch.equal(kept[1::2], draw[1::2])
    folded = fastd2o.linear_cringe(case.hidden.view(4, 6, -1), case.weight, case.target.view(4, 6), seed=9).positive
    assert torch.equal(folded.view(-1), draw)
    same = Case(case.hidden[:1].expand(30, -1), case.weight, case.target[:1].expand(30))
    assert len(fastd2o.linear_cringe(same.hidden, same.weight, same.target, seed=9).positive.unique()) > 1
    assert not torch.equal(fastd2o.linear_cringe(case.hidden, case.weight, case.target, seed=10).positive, draw)


def test_counters_carry_the_draw_along_with_the_data() -> None:
    case = make_case(tokens=24, vocab_size=61, ignored=0.0)
    counter = torch.arange(24) * 2**33 + 5
    draw = fastd2o.linear_cringe(case.hidden, case.weight, case.target, seed=9, counter=counter).positive
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = fastd2o.linear_cringe(
        case.hidden[order], case.weight, case.target[order], seed=9, counter=counter[order]
    ).positive
    assert torch.equal(moved, draw[order])
    assert not torch.equal(draw, fastd2o.linear_cringe(case.hidden, case.weight, case.target, seed=9).positive)
    with pytest.raises(ValueError, match=r"counter has shape \[23\]"):
        fastd2o.linear_cringe(case.hidden, case.weight, case.target, counter=counter[1:])


def test_without_a_seed_the_default_generator_decides() -> None:
    case = make_case(tokens=24, vocab_size=61, ignored=0.0)
    torch.manual_seed(4)
    first = fastd2o.linear_cringe(case.hidden, case.weight, case.target).positive
    second = fastd2o.linear_cringe(case.hidden, case.weight, case.target).positive
    torch.manual_seed(4)
    again = fastd2o.linear_cringe(case.hidden, case.weight, case.target).positive
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_nan_is_not_hidden_and_stays_in_its_row() -> None:
    case = make_case(tokens=3, ignored=0.0)
    case.hidden[1, 0] = torch.nan
    hidden = case.hidden.clone().requires_grad_()
    out = fastd2o.linear_cringe(hidden, case.weight, case.target, seed=0)
    out.loss.sum().backward()
    assert out.loss.isnan().tolist() == [False, True, False]
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"logit_scale": -1.0}])
def test_padding_columns_are_never_drawn(options: dict[str, Any], default_backend: str) -> None:
    case = make_case(tokens=16 if default_backend == "triton" else 200, vocab_size=11, ignored=0.0)
    assert case.bias is not None
    weight = torch.cat([case.weight, torch.ones(5, 24)])
    bias = torch.cat([case.bias, torch.full((5,), -torch.inf)])
    out = fastd2o.linear_cringe(case.hidden, weight, case.target, bias=bias, k=15, seed=0, **options)
    assert (out.positive < 11).all()
    plain = fastd2o.linear_cringe(case.hidden, case.weight, case.target, bias=case.bias, k=10, seed=0, **options)
    assert torch.equal(out.positive, plain.positive)


def test_the_default_device_does_not_matter() -> None:
    case = make_case(vocab_size=61)
    expected = fastd2o.linear_cringe(case.hidden, case.weight, case.target, seed=1)
    with torch.device("meta"):
        out = fastd2o.linear_cringe(case.hidden, case.weight, case.target, seed=1)
    assert torch.equal(out.positive, expected.positive)


def test_no_finite_alternative_costs_nothing() -> None:
    bias = torch.tensor([0.0, -torch.inf, -torch.inf])
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(3, 4, requires_grad=True)
    out = fastd2o.linear_cringe(hidden, weight, torch.tensor([0, 1]), bias=bias, k=2)
    assert out.positive.tolist() == [-1, 0]
    assert out.loss.tolist() == [0.0, 0.0]  # the second negative has no probability left to lose
    out.loss.sum().backward()
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_fewer_finite_alternatives_than_k() -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, 0.0])
    out = fastd2o.linear_cringe(torch.randn(60, 3), torch.randn(5, 3), torch.zeros(60).long(), bias=bias, k=4, seed=1)
    assert set(out.positive.tolist()) <= {2, 4}
    assert out.loss.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_less_accurate_than_eager(dtype: torch.dtype, default_backend: str) -> None:
    shape = (33, 48, 131) if default_backend == "triton" else (96, 64, 1999)
    case = make_case(*shape, dtype=dtype, scale=2.0)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    out = fastd2o.linear_cringe(leaves["hidden"], leaves["weight"], case.target, bias=leaves["bias"], seed=2)
    gradients = torch.autograd.grad((out.loss * case.coef.float()).sum(), list(leaves.values()))

    eager = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    logits = F.linear(eager["hidden"], eager["weight"], eager["bias"]).float()
    picked = [logits.gather(1, ids.clamp_min(0)[:, None])[:, 0] for ids in (case.target, out.positive)]
    eager_loss = F.softplus(picked[0] - picked[1]).masked_fill(case.target < 0, 0.0)
    eager_gradients = torch.autograd.grad((eager_loss * case.coef.float()).sum(), list(eager.values()))

    exact = {name: tensor.double().requires_grad_() for name, tensor in case.tensors.items()}
    expected = oracle_loss(exact, case, out.positive)
    expected_gradients = torch.autograd.grad((expected * case.coef).sum(), list(exact.values()))
    assert rms_error(out.loss.detach(), expected.detach()) <= 1.05 * rms_error(eager_loss.detach(), expected.detach())
    for name, ours, theirs, right in zip(leaves, gradients, eager_gradients, expected_gradients, strict=True):
        assert rms_error(ours, right) <= 1.05 * rms_error(theirs, right), name


def test_two_runs_give_the_same_bits(default_backend: str) -> None:
    case = make_case(tokens=17 if default_backend == "triton" else 200, vocab_size=11, ignored=0.0)

    def gradient() -> Tensor:
        weight = case.weight.clone().requires_grad_()
        fastd2o.linear_cringe(case.hidden, weight, case.target, seed=3).loss.sum().backward()
        assert weight.grad is not None
        return weight.grad

    assert torch.equal(gradient(), gradient())


@pytest.mark.backends("torch")
@pytest.mark.parametrize("columns", [64, 640, 641, 1280])
@pytest.mark.parametrize("k", [1, 5])
def test_topk_by_blocks_finds_the_same_values(columns: int, k: int) -> None:
    z = torch.randint(0, 50, (40, columns), generator=torch.Generator().manual_seed(columns)).float()
    values, index = _topk(z, k)
    assert torch.equal(values, z.topk(k, 1).values)
    assert torch.equal(z.gather(1, index), values)
    assert all(len(row.unique()) == k for row in index)


@pytest.mark.parametrize("need", ["hidden", "both"])
def test_under_autocast_a_gradient_is_not_rounded_to_16_bits(need: str) -> None:
    """Hidden states in float32 get theirs from sums in float32, though the products are in bfloat16."""
    case = make_case(12, 32, 61, torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(need == "both")
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastd2o.linear_cringe(hidden, weight, case.target, seed=0).loss.sum()
    (gradient, *_) = torch.autograd.grad(loss, [leaf for leaf in (hidden, weight) if leaf.requires_grad])
    assert not torch.equal(gradient, gradient.bfloat16().float())
