"""The loss operator in Triton against the losses it is made of, in float64, group by group; without a GPU, in Triton's
interpreter."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastd2o import losses
from fastd2o.kernels import loss as kernel
from fastd2o.kernels.loss import Sequence, d2o, log1p_of_share, log_ratio, log_ratio_slope, of_chosen, of_rejected
from fastd2o.kernels.loss import pair_loss as pair_loss_of
from fastd2o.losses.fused import OPTIONS
from tests.losses.test_fused import (
    SMALL,
    Case,
    every_objective,
    expected,
    make_case,
    operator_arguments,
    pairs_of,
    structures,
)

# The interpreter takes its time: few groups, and one that is of several blocks.
MIXED = make_case([[3], [5, 1, 7], [33, 2, 40, 4, 6]], [0, 2, 1])

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU alone")


def arguments_of(case: Case, objective: str, options: dict[str, Any]) -> list[Any]:
    """The launcher's, on the device."""
    arguments = operator_arguments(case, objective, options)
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]


def operator(arguments: list[Any]) -> tuple[Tensor, ...]:
    """Loss [G] and sequence_logp [S], differentiable."""
    results: tuple[Tensor, ...] = torch.ops.fastd2o.grouped_loss(*arguments, "triton")
    return results[:2]


def check(case: Case, objective: str, options: dict[str, Any]) -> None:
    """Losses and token gradients are those of the public losses in float64."""
    arguments = arguments_of(case, objective, options)
    leaves = [x.requires_grad_() for x in arguments[:2] if x is not None]
    loss, _ = operator(arguments)
    gradients = torch.autograd.grad((loss * case.upstream.to(DEVICE)).sum(), leaves)
    for result, right in zip((loss.detach(), *gradients), expected(case, objective, options), strict=False):
        torch.testing.assert_close(result.double().cpu(), right, rtol=1e-5, atol=1e-6)


# --- values and gradients ---------------------------------------------------------------------------------------------


@every_objective
def test_agrees_with_the_losses_it_is_made_of(objective: str, options: dict[str, Any]):
    check(MIXED, objective, options)


@given(drawn=structures())
@hypothesis_settings(max_examples=10)
def test_any_structure_of_groups(drawn: tuple[str, dict[str, Any], Case]):
    objective, options, case = drawn
    check(case, objective, options)


@pytest.mark.parametrize("objective", ["d2o", "cringe", "pairwise_cringe"])
@pytest.mark.parametrize("config", [(1, 8, 2), (8, 128, 64)])
def test_blocks_of_any_size(objective: str, config: tuple[int, int, int]):
    """Several of them, ragged, and one that holds all; sums of multiples of 1/64 are exact in whatever order."""
    arguments = arguments_of(make_case([[3, 19, 1, 0, 8], [7, 16]], [3, 1]), objective, {})
    results = kernel.loss(*arguments, config=kernel.Config(*config))
    for result, right in zip(results, kernel.loss(*arguments), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-6, atol=1e-7)
    assert torch.equal(results[1], kernel.loss(*arguments)[1])


@pytest.mark.parametrize("objective", ["d2o", "sigmoid", "cringe"])
def test_one_large_group(objective: str):
    check(make_case([[1 + i % 5 for i in range(70)]], [63]), objective, {})


@pytest.mark.parametrize("objective", ["d2o", "cringe"])
def test_long_sequences(objective: str):
    check(make_case([[2000, 1999, 1025], [1000, 1]], [1, 0], per_token=12.0), objective, {})


def test_sums_of_any_numbers_are_as_good_as_float32():
    tokens = -12 * torch.rand(len(MIXED.token_logp), generator=torch.Generator().manual_seed(3))
    case = replace(MIXED, token_logp=tokens)
    _, sums, *_ = kernel.loss(*arguments_of(case, "sigmoid", {}))
    exact = torch.stack([tokens[own].double().sum() for group in case.groups for _, own, _ in group])
    torch.testing.assert_close(sums.double().cpu(), exact, rtol=1e-6, atol=0)


def test_a_group_is_summed_up_in_float64():
    case = make_case([[1] * 101], [0])
    case.positive[0] = True
    case.token_logp[:] = -1
    case.token_logp[0] = -(2.0**25)  # float32 has no odd numbers here
    loss, *_ = kernel.loss(*arguments_of(case, "cringe", {}))
    assert loss.item() == 2**25 + 100


@pytest.mark.parametrize("objective", ["d2o", "bdpo", "cringe", "pairwise_cringe"])
def test_two_runs_give_the_same_bits(objective: str):
    case = replace(MIXED, token_logp=-3 * torch.rand(len(MIXED.token_logp)))
    arguments = arguments_of(case, objective, {})
    first, second = kernel.loss(*arguments), kernel.loss(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# --- nothing to do ----------------------------------------------------------------------------------------------------


@every_objective
def test_no_group_at_all(objective: str, options: dict[str, Any]):
    check(make_case([], []), objective, options)


@pytest.mark.parametrize("objective", ["d2o", "hinge", "cringe", "pairwise_cringe"])
def test_no_token_at_all(objective: str):
    check(make_case([[0, 0], [0]], [0, 0]), objective, {})


def test_groups_without_sequences():
    """None has a negative; to Cringe they are sums of nothing."""
    for objective, right in (("sigmoid", torch.nan), ("cringe", 0.0)):
        arguments = arguments_of(make_case([], []), objective, {})
        arguments[3] = arguments[3].new_zeros(3)
        loss, *others = kernel.loss(*arguments)
        torch.testing.assert_close(loss.cpu(), torch.full((2,), right), equal_nan=True)
        assert all(len(x) == 0 for x in others)


def test_what_does_not_count_may_hold_anything():
    """A group without an anchor has loss 0 whatever its negative holds; Cringe tokens of positives are not read."""
    case = make_case([[2], [3, 4]], [0, 1])
    case.token_logp[:2] = torch.nan
    for objective in ("d2o", "sigmoid", "nca_pair"):
        loss, _, logp_coef, _ = kernel.loss(*arguments_of(case, objective, {}))
        assert loss[0] == logp_coef[0] == 0
        assert (logp_coef[1:] != 0).all()
    case.token_cringe[2:5] = torch.nan
    for objective in ("cringe", "pairwise_cringe"):
        loss, _, *coefficients = kernel.loss(*arguments_of(case, objective, {}))
        assert loss[1].isfinite()
        assert all(x[1:].isfinite().all() for x in coefficients)


# --- the formulas at their extremes -----------------------------------------------------------------------------------


@triton.jit
def pairs_kernel(
    chosen_logp,
    rejected_logp,
    chosen_ref,
    rejected_ref,
    loss,
    by_chosen,
    by_rejected,
    numbers,
    OBJECTIVE: tl.constexpr,
    MEANS: tl.constexpr,
    DETACH_GATE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Pairs of sequences of one token, of which Cringe says 1, each a group of its own."""
    pair = tl.arange(0, PAIRS)
    one = tl.full([PAIRS], 1.0, tl.float32)
    chosen = Sequence(tl.load(chosen_logp + pair), tl.load(chosen_ref + pair), one, one)
    rejected = Sequence(tl.load(rejected_logp + pair), tl.load(rejected_ref + pair), one, one)
    if OBJECTIVE == "d2o":
        anchor = of_chosen(log_ratio(chosen, MEANS), log_ratio_slope(chosen, MEANS))
        result = d2o(numbers, anchor, of_rejected(log_ratio(rejected, MEANS), log_ratio_slope(rejected, MEANS)))
    else:
        result, _ = pair_loss_of(numbers, chosen, rejected, OBJECTIVE, MEANS, DETACH_GATE)
    tl.store(loss + pair, result.value)
    tl.store(by_chosen + pair, result.by_chosen)
    tl.store(by_rejected + pair, result.by_rejected)


every_pair = pytest.mark.parametrize(
    ("objective", "options"),
    [mark for mark in every_objective.args[1] if mark[0] != "cringe"],
    ids=str,
)


def pair_losses(case: Case, objective: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[G] losses and [G, 2] gradients of :func:`pairs_of`'s groups, as the kernel's formulas have them."""
    given = dict(zip(OPTIONS[objective], operator_arguments(case, objective, options)[-1], strict=True))
    groups = len(case.group_start) - 1
    padding = triton.next_power_of_2(groups) - groups
    ref_logp = case.ref_logp if "ref_logp" in case.inputs(objective) else torch.zeros_like(case.ref_logp)
    columns = [*case.token_logp.view(-1, 2).T, *ref_logp.view(-1, 2).T]
    inputs = [torch.cat([x, x.new_full((padding,), -1.0)]).to(DEVICE) for x in columns]
    outputs = [torch.empty_like(inputs[0]) for _ in range(3)]
    constants = kernel.constants(objective, given, kernel.Config())
    pairs_kernel[(1,)](
        *inputs,
        *outputs,
        kernel.numbers_of(given),
        **{name: constants[name] for name in ("OBJECTIVE", "MEANS", "DETACH_GATE")},
        PAIRS=groups + padding,
    )
    loss, *gradient = (x[:groups].cpu() for x in outputs)
    return loss, torch.stack(gradient, 1)


@every_pair
def test_saturation(objective: str, options: dict[str, Any]):
    corners = torch.tensor(list(itertools.product([-1e4, -30.0, -1e-4, 0.0, 1e-4, 30.0, 1e4], repeat=2)))
    assert pair_losses(pairs_of(corners), objective, options)[0].isfinite().all()
    if objective == "bdpo":  # of these two, all that is left is less than the distance of float32's numbers there
        corners = corners[(corners != 1e4).any(1)]
    loss, gradient = pair_losses(pairs_of(corners), objective, options)
    right, right_gradient, _ = expected(pairs_of(corners), objective, options)
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double().flatten(), right_gradient, rtol=1e-5, atol=1e-6)


@every_pair
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf - inf in the interpreter
def test_infinite_log_probabilities_are_what_they_are_in_torch(objective: str, options: dict[str, Any]):
    rows = torch.tensor(list(itertools.product([-torch.inf, -5.0, -1.0, torch.nan], repeat=4)))
    case = replace(pairs_of(rows[:, :2]), ref_logp=rows[:, 2:].flatten())
    inputs = case.inputs(objective)
    out = losses.grouped_loss(**inputs, backend="torch", **options)
    (torch_gradient,) = torch.autograd.grad(out.loss.sum(), inputs["token_logp"])
    loss, gradient = pair_losses(case, objective, options)
    torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    # Of a loss that is NaN, a gradient may be; which of its two parts are is no matter.
    kept = ~(out.loss.isnan().repeat_interleave(2) & torch_gradient.isnan())
    gradient = gradient.flatten()
    torch.testing.assert_close(gradient[kept], torch_gradient[kept], rtol=1e-5, atol=1e-6, equal_nan=True)


@triton.jit
def log1p_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, log1p_of_share(tl.load(x + i)))


def test_log1p_is_right_to_a_few_units_in_the_last_place():
    x = np.concatenate([np.logspace(-44, 0, 4000), np.linspace(0, 1, 4192)]).astype(np.float32)
    out = torch.empty(len(x), device=DEVICE)
    log1p_kernel[(1,)](torch.from_numpy(x).to(DEVICE), out, len(x))
    exact = np.log1p(x.astype(np.float64))
    ulps = np.abs(out.cpu().double().numpy() - exact) / np.spacing(exact.astype(np.float32))
    assert ulps.max() < 4


# --- the operator -----------------------------------------------------------------------------------------------------


def test_views_with_gaps_are_taken():
    arguments = arguments_of(MIXED, "sigmoid", {})
    spread = [torch.stack([x, x], 1)[:, 0] if isinstance(x, Tensor) else x for x in arguments]
    assert torch.equal(operator(spread)[0], operator(arguments)[0])


def test_opcheck():
    arguments = arguments_of(SMALL, "pairwise_cringe", {})
    arguments[0].requires_grad_()
    results = torch.library.opcheck(torch.ops.fastd2o.grouped_loss, (*arguments, "triton"))
    assert set(results.values()) == {"SUCCESS"}


def test_the_inputs_are_left_as_they_were():
    case = replace(MIXED, **{f.name: getattr(MIXED, f.name).clone() for f in fields(MIXED)})
    operator(arguments_of(case, "pairwise_cringe", {}))
    assert all(torch.equal(getattr(case, f.name), getattr(MIXED, f.name)) for f in fields(MIXED))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["d2o", "cringe", "pairwise_cringe"])
def test_nonsense_is_answered_with_nan(objective: str):
    """Nothing outside is read, nothing is left unwritten, and groups that make sense are not touched."""
    options = {"allow_no_anchor": True} if objective == "d2o" else {}
    case = make_case([[2, 9], [5], [33, 4, 5], [4] * 6, [6, 7]], [0, 0, 2, 5, 1])
    good = kernel.loss(*arguments_of(case, objective, options))
    wild_tokens, wild_groups, two_negatives, no_negative = (
        x.clone() for x in (case.sequence_start, case.group_start, case.positive, case.positive)
    )
    wild_tokens[1], wild_tokens[4] = -(2**62), 2**62
    wild_groups[0], wild_groups[4] = 1, 2**40
    two_negatives[1], no_negative[0] = False, True
    of_roles = [] if objective == "cringe" else [two_negatives, no_negative]
    changes = [
        (replace(case, sequence_start=wild_tokens), [0, 2]),
        (replace(case, group_start=wild_groups), [0, 3, 4]),
        *((replace(case, positive=positive), [0]) for positive in of_roles),
    ]
    for changed, lost in changes:
        loss, _, *coefficients = kernel.loss(*arguments_of(changed, objective, options))
        assert loss.isnan().nonzero().flatten().tolist() == lost
        for g, group in enumerate(case.groups):
            own = [s for *_, s in group]
            if g not in lost:
                assert torch.equal(loss[g], good[0][g])
                assert all(torch.equal(x[own], y[own]) for x, y in zip(coefficients, good[2:], strict=True))
            elif changed.sequence_start is case.sequence_start:  # a sequence that is none: its group's loss alone
                assert all(x[own].isnan().all() for x in coefficients)


@on_the_cpu
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, [0, 3, 2, 9, 10], r"sequence_start is \[0, 3, 2, 9, 10\], expected offsets that rise from 0 to 10"),
        (3, [0, 2, 2**40], "group_start is .* the number of sequences. Fix"),
        (4, [False, False, True, False], "group 0 has 2 negatives in positive, expected exactly one. Fix"),
    ],
)
def test_bad_values_are_refused(place: int, value: list[Any], message: str):
    arguments = arguments_of(SMALL, "d2o", {})
    arguments[place] = torch.tensor(value)
    with pytest.raises(ValueError, match=message):
        operator(arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(10).double(), "token_logp has dtype torch.float64, expected torch.float32"),
        (0, torch.zeros(2, 5), r"token_logp has shape \[2, 5\], expected \[10\]"),
        (1, torch.zeros(10), "token_cringe is given, but objective 'd2o' does not read it. Fix: leave it out"),
        (2, torch.tensor([0, 3, 5, 10]), r"sequence_start has shape \[4\], expected \[5\]"),
        (3, torch.zeros(0).long(), "group_start is empty"),
        (3, torch.zeros(1).long(), "positive has 4 sequences, but group_start no group"),
        (4, torch.tensor([True, False] * 4)[::2], "positive is not contiguous; pass positive.contiguous()"),
        (4, torch.zeros(4, device="meta").bool(), "positive is on meta, token_logp on"),
        (5, None, "ref_logp is missing: objective 'd2o' reads it"),
        (6, "dpo", "objective is 'dpo', expected one of: d2o, sigmoid"),
        (7, [0.1], r"'d2o' has 4 parameters \(alpha, beta, length_normalize, allow_no_anchor\), but 1 are given"),
    ],
)
def test_the_launcher_has_a_door_of_its_own(place: int, value: Any, message: str):
    arguments = arguments_of(SMALL, "d2o", {})
    kernel.loss(*arguments)
    # A view with gaps must stay one on its way to the device.
    arguments[place] = value
    if isinstance(value, Tensor) and value.device.type != "meta" and value.is_contiguous():
        arguments[place] = value.to(DEVICE)
    elif isinstance(value, Tensor) and value.device.type != "meta":
        arguments[place] = torch.tensor([True, False] * 4, device=DEVICE)[::2]
    with pytest.raises(ValueError, match=message):
        kernel.loss(*arguments)
