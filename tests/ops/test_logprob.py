"""linear_logprob, linear_logodds and sequence_logprob against the float64 oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastd2o
from fastd2o.ops.backends import fuses
from tests.ops.oracle import Case, full_logits, logprob, make_case, relative_error, rms_error

pytestmark = pytest.mark.usefixtures("default_backend")

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"logit_scale": 0.0625},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": -1.5, "softcap": 4.0, "temperature": 1.3},
}
HEADS = ("trained", "frozen", "no_grad")


def small_tiles(case: Case, algorithm: Any = "recompute", tokens: int = 5, columns: int = 64) -> fastd2o.Plan:
    """A plan whose tiles divide neither the tokens nor the vocabulary, and are in memory even where a backend itself
    would fuse them."""
    plan = fastd2o.Plan.choose(
        tokens=case.target.numel(),
        hidden_size=case.weight.shape[1],
        vocab_size=case.weight.shape[0],
        algorithm=algorithm,
        dtype=case.hidden.dtype,
    )
    return dataclasses.replace(plan, block_tokens=tokens, block_vocab=columns, fused=False)


def run(case: Case, head: str = "trained", **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The operator's values, and the gradients that this head allows."""
    leaves = {name: tensor.detach().clone() for name, tensor in case.tensors.items()}
    trained = {"trained": list(leaves), "frozen": ["hidden"], "no_grad": []}[head]
    for name in trained:
        leaves[name].requires_grad_()
    value = fastd2o.linear_logprob(
        leaves["hidden"], leaves["weight"], case.target, bias=leaves.get("bias"), **case.options, **options
    )
    if not trained:
        return value, {}
    gradients = torch.autograd.grad((value * case.coef.to(value.dtype)).sum(), [leaves[name] for name in trained])
    return value.detach(), dict(zip(trained, gradients, strict=True))


def check(case: Case, head: str, tolerance: float, **options: Any) -> None:
    value, gradients = run(case, head, **options)
    expected, expected_gradients = case.oracle()
    assert value.dtype == (torch.float64 if case.hidden.dtype == torch.float64 else torch.float32)
    assert relative_error(value, expected) <= tolerance
    for name, gradient in gradients.items():
        assert gradient.dtype == case.tensors[name].dtype
        assert relative_error(gradient, expected_gradients[name]) <= tolerance, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_the_oracle(dtype: torch.dtype, tolerance: float, transform: str, head: str) -> None:
    case = make_case(dtype=dtype, **TRANSFORMS[transform])
    check(case, head, tolerance)
    algorithm = {"trained": "recompute", "frozen": "unit", "no_grad": "forward"}[head]
    check(case, head, tolerance, plan=small_tiles(case, algorithm))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("several_slabs", [False, pytest.param(True, marks=pytest.mark.backends("torch", "cpu"))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_less_accurate_than_eager(
    dtype: torch.dtype, several_slabs: bool, transform: str, head: str, default_backend: str
) -> None:
    """Root mean square error against float64, over that of 16-bit logits with a float32 softmax on the same inputs.

    Both sides round the same logits in the same way on the CPU; what differs is where sums and gradients round. 5 % is
    the spread of the ratio between two orders of summation, not an allowance.
    """
    shape = (33, 48, 499) if default_backend == "triton" else (96, 64, 1999)
    case = make_case(*shape, dtype=dtype, scale=2.0, **TRANSFORMS[transform])
    expected, expected_gradients = case.oracle()
    eager, eager_gradients = case.eager(torch.float32)
    algorithm = {"trained": "recompute", "frozen": "unit", "no_grad": "forward"}[head]
    value, gradients = run(case, head, plan=small_tiles(case, algorithm, 96, 128) if several_slabs else None)
    assert rms_error(value, expected) <= 1.05 * rms_error(eager, expected)
    for name, gradient in gradients.items():
        ours = rms_error(gradient, expected_gradients[name])
        assert ours <= 1.05 * rms_error(eager_gradients[name], expected_gradients[name]), name


@pytest.mark.backends("cpu", "triton")  # torch's products round logits to 16 bits on the CPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_large_logits_are_within_two_thousandths_of_a_nat(dtype: torch.dtype) -> None:
    case = make_case(tokens=33, hidden_size=48, vocab_size=499, dtype=dtype, bias=False, scale=7.0)
    assert 20 < case.logits({name: tensor.double() for name, tensor in case.tensors.items()}).abs().max() < 30
    value, _ = run(case, "no_grad")
    assert (value - case.oracle()[0]).abs().max() < 2e-3


@pytest.mark.backends("torch", "cpu")  # the interpreter's products are numpy's
@pytest.mark.parametrize("head", HEADS)
def test_float32_is_no_less_accurate_than_eager(head: str) -> None:
    """At the depth of a real model, where it matters how a product's terms are added up: all in one chain, the error is
    three times as large. 15 % is the spread between two good orders."""
    case = make_case(300, 2048, 1009, torch.float32, bias=False, ignored=0.0, scale=4.0)
    expected, expected_gradients = case.oracle()
    eager, eager_gradients = case.eager(torch.float32)
    value, gradients = run(case, head)
    assert rms_error(value, expected) <= 1.15 * rms_error(eager, expected)
    for name, gradient in gradients.items():
        ours = rms_error(gradient, expected_gradients[name])
        assert ours <= 1.15 * rms_error(eager_gradients[name], expected_gradients[name]), name


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
)
def test_mixed_dtypes_compute_in_the_dtype_of_hidden(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, head: str
) -> None:
    case = make_case(dtype=torch.float32)
    mixed = Case(case.hidden.to(hidden_dtype), case.weight.to(weight_dtype), case.target, case.bias)
    same = Case(mixed.hidden, mixed.weight.to(hidden_dtype), case.target, case.bias)
    value, gradients = run(mixed, head)
    expected, expected_gradients = run(same, head)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == mixed.tensors[name].dtype
        # Both are the same sum, rounded to two dtypes.
        coarser = min(gradient.dtype, expected_gradients[name].dtype, key=lambda dtype: dtype.itemsize)
        assert torch.equal(gradient.to(coarser), expected_gradients[name].to(coarser)), name


@pytest.mark.backends("torch", "cpu")  # bfloat16
def test_autocast_chooses_the_dtype_and_casts_slab_by_slab() -> None:
    case = make_case(dtype=torch.float32)
    low = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.target, case.bias)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradients = run(case)
    expected, expected_gradients = run(low)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert gradients["weight"].dtype == torch.float32
    torch.testing.assert_close(gradients["weight"].bfloat16(), expected_gradients["weight"], rtol=0, atol=0)


@pytest.mark.backends("torch")
def test_autocast_leaves_float64_alone() -> None:
    case = make_case(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = run(case)
    assert torch.equal(value, run(case)[0])


@pytest.mark.backends("torch")  # float64
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_gradcheck(head: str, transform: str) -> None:
    case = make_case(tokens=4, hidden_size=5, vocab_size=11, dtype=torch.float64, **TRANSFORMS[transform])
    hidden, weight, bias = (case.tensors[name].detach().clone() for name in ("hidden", "weight", "bias"))
    inputs: tuple[Tensor, ...] = (hidden.requires_grad_(),)
    if head == "trained":
        inputs = (hidden, weight.requires_grad_(), bias.requires_grad_())

    def call(*leaves: Tensor) -> Tensor:
        w, b = leaves[1:] if len(leaves) == 3 else (weight, bias)
        return fastd2o.linear_logprob(leaves[0], w, case.target, bias=b, **case.options)

    assert torch.autograd.gradcheck(call, inputs)


def test_a_head_alone_can_be_trained() -> None:
    case = make_case()
    weight = case.weight.clone().requires_grad_()
    value = fastd2o.linear_logprob(case.hidden, weight, case.target, bias=case.bias)
    (gradient,) = torch.autograd.grad((value * case.coef.float()).sum(), weight)
    assert relative_error(gradient, case.oracle()[1]["weight"]) <= 1e-5


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 16, 5), (1, 1, 2), (1, 7, 127), (5, 48, 131), (33, 16, 67), (37, 80, 97), (66, 40, 211)], ids=str
)
def test_shapes_that_fill_no_block(shape: tuple[int, int, int], bias: bool, head: str) -> None:
    """Tokens and hidden entries that are no multiple of a kernel's blocks, or an odd one of 16; a prime vocabulary."""
    case = make_case(*shape, torch.float32, bias=bias, **TRANSFORMS["all" if bias else "plain"])
    value, gradients = run(case, head)
    expected, expected_gradients = case.oracle()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected_gradients[name], rtol=1e-5, atol=1e-5)


@pytest.mark.backends("torch")  # float64
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9),
    hidden_size=st.integers(1, 9),
    vocab_size=st.integers(1, 131),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    head=st.sampled_from(["trained", "frozen"]),
    block=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    seed=st.integers(0, 99),
)
@example(1, 1, 2, 0.0, False, "plain", "trained", (1, 1), 0)
@example(1, 7, 127, 0.0, True, "all", "frozen", (1, 64), 1)
@example(0, 3, 5, 0.0, True, "plain", "trained", (4, 4), 2)
@example(6, 3, 5, 1.0, True, "softcap", "frozen", (4, 4), 3)
def test_shapes(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    ignored: float,
    bias: bool,
    transform: str,
    head: str,
    block: tuple[int, int],
    seed: int,
) -> None:
    case = make_case(
        tokens, hidden_size, vocab_size, torch.float64, bias=bias, ignored=ignored, seed=seed, **TRANSFORMS[transform]
    )
    check(case, head, 1e-10, plan=small_tiles(case, "recompute" if head == "trained" else "unit", *block))


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("transform", ["plain", "softcap", "temperature"])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_extreme_logits(magnitude: float, head: str, transform: str) -> None:
    """Logits up to +-1e4: as accurate as the raw logits themselves are, which float32 rounds to 1e-7 of their size."""
    case = make_case(tokens=6, bias=False, ignored=0.0, scale=magnitude, **TRANSFORMS[transform])
    value, gradients = run(case, head)
    expected, expected_gradients = case.oracle()
    assert relative_error(value, expected) <= 1e-5
    raw = full_logits(case.hidden.double(), case.weight.double())
    rounding = 1e-5 + 1e-6 * raw.abs().max().item()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) <= rounding, name


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_certain_targets_keep_their_precision(head: str) -> None:
    """Where p rounds to 1, log p and the gradient of log(1 - p) are still right: nothing is computed as 1 - p."""
    hidden = torch.tensor([[1.0], [1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[40.0], [0.0], [-1.0], [90.0]], requires_grad=head == "trained")
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    target = torch.tensor([0, 1, 2])
    odds = fastd2o.linear_logodds(hidden, weight, target, bias=bias)
    H, W = hidden.detach().double().requires_grad_(), weight.detach().double()
    z = H @ W.T + bias.double()
    others = torch.stack([torch.cat([z[i, :y], z[i, y + 1 :]]).logsumexp(0) for i, y in enumerate(target.tolist())])
    expected = z.gather(1, target[:, None])[:, 0] - others
    torch.testing.assert_close(odds.double(), expected, rtol=1e-6, atol=0)
    assert F.logsigmoid(odds)[0] < 0  # log_softmax in float32 says exactly 0 here
    (gradient,) = torch.autograd.grad(F.logsigmoid(-odds).sum(), hidden)
    (expected_gradient,) = torch.autograd.grad(F.logsigmoid(-expected).sum(), H)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_padding_columns_take_no_part(transform: str) -> None:
    """A bias of -inf removes a column, whatever scale and cap: same values and gradients, and none for the padding."""
    case = make_case(bias=True, **TRANSFORMS[transform])
    assert case.bias is not None
    padded = Case(
        case.hidden,
        torch.cat([case.weight, torch.randn(5, case.weight.shape[1])]),
        case.target,
        torch.cat([case.bias, torch.full((5,), -torch.inf)]),
        case.options,
    )
    for head in ("trained", "frozen"):
        value, gradients = run(padded, head)
        expected, expected_gradients = run(case, head)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            kept = gradient if name == "hidden" else gradient[:-5]
            torch.testing.assert_close(kept, expected_gradients[name], rtol=1e-5, atol=1e-6)
            if name != "hidden":
                assert torch.equal(gradient[-5:], torch.zeros_like(gradient[-5:]))


def test_a_target_without_probability_is_minus_infinity_and_harms_no_other() -> None:
    case = make_case(tokens=4, ignored=0.0)
    assert case.bias is not None
    case.bias[case.target[0]] = -torch.inf
    case.target[1:] = (case.target[0] + 1) % len(case.weight)
    for head in ("trained", "frozen"):
        value, gradients = run(case, head)
        assert value[0] == -torch.inf
        assert value[1:].isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_only_finite_column_is_certain() -> None:
    hidden = torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    value = fastd2o.linear_logprob(hidden, weight, torch.tensor([0, 0]), bias=bias)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(2))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros(2, 3))


def test_nan_is_not_hidden_and_stays_in_its_row() -> None:
    case = make_case(tokens=3, ignored=0.0)
    case.hidden[1, 0] = torch.nan
    value, _ = run(case)
    assert value[1].isnan()
    assert value[[0, 2]].isfinite().all()


def test_garbage_at_ignored_positions_is_never_looked_at() -> None:
    case = make_case(tokens=6, ignored=0.0)
    case.target[[1, 4]] = -100
    garbage = dataclasses.replace(case, hidden=case.hidden.clone())
    garbage.hidden[[1, 4]] = torch.nan
    for head in ("trained", "frozen"):
        clean, clean_gradients = run(case, head)
        value, gradients = run(garbage, head)
        torch.testing.assert_close(value, clean, rtol=0, atol=0)
        assert torch.equal(gradients["hidden"][[1, 4]], torch.zeros(2, case.hidden.shape[1]))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, clean_gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_everything_ignored_is_a_zero_that_is_still_connected(dtype: torch.dtype, tokens: int, head: str) -> None:
    case = make_case(tokens=tokens, ignored=1.0, dtype=dtype)
    value, gradients = run(case, head)
    assert torch.equal(value, torch.zeros_like(value))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(case.tensors[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_without_waiting_for_the_device_nothing_changes(head: str, dtype: torch.dtype) -> None:
    """All tokens projected, as in a CUDA graph, with garbage where they do not count."""
    case = make_case(dtype=dtype, ignored=0.4)
    hidden = case.hidden.clone()
    hidden[case.target == -100] = torch.nan
    case = dataclasses.replace(case, hidden=hidden)
    algorithm = {"trained": "recompute", "frozen": "unit", "no_grad": "forward"}[head]
    plan = small_tiles(case, algorithm)
    expected, expected_gradients = run(case, head, plan=plan)
    fused = fuses(plan.backend, plan.algorithm)
    value, gradients = run(case, head, plan=dataclasses.replace(plan, compact=False, fused=fused))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # other sums share a rounding
    assert relative_error(value, expected) <= tolerance
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) <= tolerance, name


def test_without_waiting_a_wrong_target_is_still_refused_on_the_cpu() -> None:
    case = make_case()
    target = case.target.clone()
    target[3] = 10**6
    plan = dataclasses.replace(small_tiles(case), compact=False)
    with pytest.raises(ValueError, match="flat position 3"):
        fastd2o.linear_logprob(case.hidden, case.weight, target, plan=plan)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("trained", [True, False])
def test_leading_dimensions_and_strides_do_not_matter(dtype: torch.dtype, tolerance: float, trained: bool) -> None:
    case = make_case(tokens=12, dtype=dtype)
    assert case.bias is not None
    # bfloat16 is compared with what the same numbers give side by side: gradients are rounded to 8 bits.
    hidden = case.hidden.view(3, 4, -1).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    wide = torch.zeros(case.weight.shape[0], 2 * case.weight.shape[1], dtype=dtype)
    weight = wide[:, ::2].copy_(case.weight).requires_grad_(trained)
    bias = torch.stack([case.bias, case.bias], 1)[:, 0].requires_grad_(trained)
    assert not any(tensor.is_contiguous() for tensor in (hidden, weight, bias))
    value = fastd2o.linear_logprob(hidden, weight, case.target.view(3, 4), bias=bias)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias} if trained else {"hidden": hidden}
    gradients = torch.autograd.grad((value * case.coef.view(3, 4)).sum(), list(leaves.values()))
    expected, expected_gradients = case.oracle()
    assert relative_error(value.view(-1), expected) <= tolerance
    for name, gradient in zip(leaves, gradients, strict=True):
        right = expected_gradients[name]
        assert relative_error(gradient.reshape(right.shape), right) <= tolerance, name


def test_an_expanded_bias() -> None:
    case = make_case(dtype=torch.float32, bias=False)
    bias = torch.tensor([0.5]).expand(case.weight.shape[0])
    value = fastd2o.linear_logprob(case.hidden, case.weight, case.target, bias=bias)
    torch.testing.assert_close(value, fastd2o.linear_logprob(case.hidden, case.weight, case.target))


@pytest.mark.backends("torch")  # float64
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics(transform: str) -> None:
    case = make_case(tokens=20, dtype=torch.float64, **TRANSFORMS[transform])
    assert case.bias is not None
    logits = full_logits(case.hidden, case.weight, case.bias, **case.options)
    counted = case.target != -100
    log_p = logits.log_softmax(-1)
    for plan in (None, small_tiles(case, "forward")):
        out = fastd2o.linear_logprob(
            case.hidden, case.weight, case.target, bias=case.bias, stats=True, plan=plan, **case.options
        )
        torch.testing.assert_close(out.logprob, logprob(logits, case.target))
        torch.testing.assert_close(out.entropy, -(log_p.exp() * log_p).sum(-1) * counted)
        assert torch.equal(out.top1, logits.argmax(-1) * counted)
        torch.testing.assert_close(out.mean_logit, logits.mean(-1) * counted)


def test_statistics_leave_padding_columns_out() -> None:
    case = make_case(ignored=0.0)
    padding = torch.full((5,), -torch.inf)
    weight, bias = torch.cat([case.weight, torch.ones(5, 24)]), torch.cat([case.bias, padding])  # type: ignore[list-item]
    out = fastd2o.linear_logprob(case.hidden, weight, case.target, bias=bias, stats=True)
    plain = fastd2o.linear_logprob(case.hidden, case.weight, case.target, bias=case.bias, stats=True)
    for padded, expected in zip(out, plain, strict=True):
        torch.testing.assert_close(padded, expected)


def test_statistics_carry_no_gradient_and_do_not_change_the_value() -> None:
    case = make_case()
    weight = case.weight.clone().requires_grad_()
    out = fastd2o.linear_logprob(case.hidden, weight, case.target, stats=True)
    assert [tensor.requires_grad for tensor in out] == [True, False, False, False]
    assert torch.equal(out.logprob, fastd2o.linear_logprob(case.hidden, weight, case.target))


@pytest.mark.parametrize("shift", [0.0, 20.0, 500.0])
@pytest.mark.parametrize("sharpness", [1.0, 3.0, 10.0])
def test_entropy_keeps_its_precision(shift: float, sharpness: float) -> None:
    """Entropy does not change with a shift of all logits, and is small where they are sharp: nothing may cancel."""
    case = make_case(tokens=64, bias=True, scale=sharpness, ignored=0.0)
    assert case.bias is not None
    bias = case.bias + shift
    out = fastd2o.linear_logprob(case.hidden, case.weight, case.target, bias=bias, stats=True)
    log_p = full_logits(case.hidden.double(), case.weight.double(), bias.double()).log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1)
    assert (out.entropy >= 0).all()
    # The logits themselves are known to float32's rounding of their size.
    assert relative_error(out.entropy, expected) <= 1e-5 + 1e-6 * (shift + sharpness)


@pytest.mark.backends("torch", "cpu")  # bfloat16
def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    """Small whole numbers: every sum is exact in any dtype, and many are equal."""
    case = make_case(tokens=256, vocab_size=8192, dtype=torch.bfloat16, bias=False, ignored=0.0)
    case = dataclasses.replace(case, hidden=case.hidden.sign(), weight=case.weight.sign())
    logits = case.hidden @ case.weight.T
    expected = logits.argmax(-1)
    assert ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any()
    for plan in (None, small_tiles(case, "forward", 100, 1024), small_tiles(case, "forward", 256, 1000)):
        out = fastd2o.linear_logprob(case.hidden, case.weight, case.target, stats=True, plan=plan)
        assert torch.equal(out.top1, expected)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.backends("torch", "cpu"))])
def test_two_runs_give_the_same_bits(threads: int, default_backend: str) -> None:
    if default_backend == "triton":
        case = make_case(tokens=30, vocab_size=601, dtype=torch.float16)
    else:
        case = make_case(tokens=64, vocab_size=3001, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for head in ("trained", "frozen"):
            plan = small_tiles(case, "recompute" if head == "trained" else "unit", 25, 512)
            first, second = run(case, head, plan=plan), run(case, head, plan=plan)
            assert torch.equal(first[0], second[0])
            assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.backends("cpu")  # torch's own products promise no such thing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_the_number_of_threads_does_not_change_the_bits(head: str, dtype: torch.dtype) -> None:
    case = make_case(tokens=300, hidden_size=70, vocab_size=3001, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value, gradients = run(case, head)
            results.append([value, *gradients.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


def test_a_second_derivative_is_refused() -> None:
    case = make_case()
    for trained in (True, False):
        hidden = case.hidden.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_(trained)
        value = fastd2o.linear_logprob(hidden, weight, case.target)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(value.sum(), hidden, create_graph=True)


def test_float16_gradients_survive_a_loss_scale() -> None:
    """Coefficients beyond float16's range, and far below it, reach hidden and weight."""
    case = make_case(dtype=torch.float16, ignored=0.0)
    expected = case.oracle()[1]["weight"]
    for factor in (65536.0 * 16, 2.0**-20):
        hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            value = fastd2o.linear_logprob(hidden, weight, case.target, bias=case.bias)
        (gradient,) = torch.autograd.grad((value * case.coef.float() * factor).sum(), weight)
        assert relative_error(gradient / factor, expected) < 2e-3


@pytest.mark.backends("torch", "cpu")  # 16,384 columns
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_float16_sums_beyond_its_range(head: str) -> None:
    """Flat logits over a large vocabulary and large weights: a slab's sum of exp(z - max) W is beyond 65504."""
    generator = torch.Generator().manual_seed(0)
    weight = 10 + torch.rand(16384, 4, generator=generator)
    target = torch.zeros(8, dtype=torch.int64)
    case = Case(torch.full((8, 4), 1e-3).half(), weight.half(), target)
    _, gradients = run(case, head)
    expected = case.oracle()[1]
    for name, gradient in gradients.items():
        # The gradient of hidden is a difference of sums of the size of the weight, and rounds as they do.
        assert (gradient.double() - expected[name]).abs().max() < 2e-3 * weight.max(), name


@pytest.mark.backends("torch")  # float64
class TestSequenceLogprob:
    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(3, 7, 8, generator=generator, dtype=torch.float64)
        weight = torch.randn(29, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(29, (3, 7), generator=generator)
        labels[0, :3] = -100
        labels[1, 5:] = -100
        return hidden, weight, labels

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("shift", [True, False])
    def test_matches_the_oracle(self, reduction: Any, shift: bool) -> None:
        hidden, weight, labels = self.batch()
        out = fastd2o.sequence_logprob(hidden, weight, labels, reduction=reduction, shift=shift)
        logits = hidden @ weight.T
        tokens = logprob(logits[:, :-1], labels[:, 1:]) if shift else logprob(logits, labels)
        counted = ((labels[:, 1:] if shift else labels) != -100).sum(1)
        expected = tokens.sum(1) if reduction == "sum" else tokens.sum(1) / counted
        torch.testing.assert_close(out, expected)

    def test_options_reach_the_operator(self) -> None:
        hidden, weight, labels = self.batch()
        out = fastd2o.sequence_logprob(hidden, weight, labels, softcap=2.0, temperature=0.5)
        logits = full_logits(hidden, weight, softcap=2.0, temperature=0.5)
        torch.testing.assert_close(out, logprob(logits[:, :-1], labels[:, 1:]).sum(1))

    def test_empty_sequences(self) -> None:
        out = fastd2o.sequence_logprob(torch.zeros(2, 0, 8), torch.zeros(29, 8), torch.zeros(2, 0, dtype=torch.int64))
        assert out.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_a_sequence_without_tokens_is_a_connected_zero(self, reduction: Any) -> None:
        hidden, weight, labels = self.batch()
        labels[2] = -100
        hidden.requires_grad_()
        out = fastd2o.sequence_logprob(hidden, weight, labels, reduction=reduction)
        assert out[2] == 0.0
        (gradient,) = torch.autograd.grad(out.sum(), hidden)
        assert torch.equal(gradient[2], torch.zeros(7, 8, dtype=torch.float64))
        assert gradient.isfinite().all()

    def test_padding_does_not_change_a_bit_of_the_labels_that_count(self) -> None:
        hidden, weight, labels = self.batch()
        longer = F.pad(hidden, (0, 0, 0, 4), value=3.0)
        out = fastd2o.sequence_logprob(longer, weight, F.pad(labels, (0, 4), value=-100))
        torch.testing.assert_close(out, fastd2o.sequence_logprob(hidden, weight, labels), rtol=1e-14, atol=0)
