"""The operators on a CUDA device, by every backend, against the float64 oracle on the CPU. Skipped where there is
none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import fastd2o
from fastd2o import Groups
from fastd2o.losses import GROUPED_OBJECTIVES, grouped_loss
from fastd2o.ops.backends import supported
from tests.ops.oracle import Case, make_case, relative_error, rms_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS: list[dict[str, Any]] = [{}, {"logit_scale": 0.5, "softcap": 20.0, "temperature": 1.3}]


@pytest.fixture(params=["torch", "cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = fastd2o.backends()[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def needs(backend: str, dtype: torch.dtype) -> None:
    reason = supported(backend, "cuda", dtype)
    if reason is not None:
        pytest.skip(reason)


def run(case: Case, trained: bool, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: tensor.detach().cuda() for name, tensor in case.tensors.items()}
    names = list(leaves) if trained else ["hidden"]
    for name in names:
        leaves[name].requires_grad_()
    hidden, weight, bias = leaves["hidden"], leaves["weight"], leaves.get("bias")
    value = fastd2o.linear_logprob(hidden, weight, case.target.cuda(), bias=bias, **case.options, **options)
    loss = (value * case.coef.to(value.dtype).cuda()).sum()
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    return value.detach().cpu(), {name: gradient.cpu() for name, gradient in zip(names, gradients, strict=True)}


@pytest.fixture(autouse=True)
def _full_float32() -> Any:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_the_oracle(
    backend: str, dtype: torch.dtype, tolerance: float, trained: bool, options: dict[str, Any]
) -> None:
    needs(backend, dtype)
    case = make_case(tokens=301, hidden_size=64, vocab_size=9001, dtype=dtype, **options)
    value, gradients = run(case, trained, backend=backend)
    expected, expected_gradients = case.oracle()
    assert relative_error(value, expected) <= tolerance
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) <= tolerance, name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_more_accurate_than_eager(
    backend: str, dtype: torch.dtype, trained: bool, options: dict[str, Any]
) -> None:
    """Logits stay in float32 from the accumulator to the softmax: values must beat 16-bit logits by far."""
    case = make_case(tokens=301, hidden_size=64, vocab_size=9001, dtype=dtype, scale=2.0, **options)
    value, gradients = run(case, trained, backend=backend)
    expected, expected_gradients = case.oracle()
    eager, eager_gradients = case.eager(torch.float32)
    assert rms_error(value, expected) <= 0.5 * rms_error(eager, expected)
    for name, gradient in gradients.items():
        ours = rms_error(gradient, expected_gradients[name])
        assert ours <= 1.05 * rms_error(eager_gradients[name], expected_gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_large_logits_are_within_two_thousandths_of_a_nat(backend: str, dtype: torch.dtype) -> None:
    case = make_case(tokens=301, hidden_size=512, vocab_size=9001, dtype=dtype, bias=False, scale=5.5)
    assert 20 < case.logits({name: tensor.double() for name, tensor in case.tensors.items()}).abs().max() < 30
    value, _ = run(case, False, backend=backend)
    assert (value - case.oracle()[0]).abs().max() < 2e-3


@pytest.mark.parametrize("trained", [True, False])
def test_master_weights_under_autocast(backend: str, trained: bool) -> None:
    case = make_case(tokens=65, hidden_size=64, vocab_size=1001, dtype=torch.float32)
    low = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.target, case.bias)
    with torch.autocast("cuda", torch.bfloat16):
        value, gradients = run(case, trained, backend=backend)
    expected, expected_gradients = low.oracle()
    assert rms_error(value, expected) <= 5e-3
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert rms_error(gradient, expected_gradients[name]) <= 1e-2, name


@pytest.mark.parametrize("hidden_size", [1, 41, 1003, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_hidden_states_of_any_size(backend: str, dtype: torch.dtype, tolerance: float, hidden_size: int) -> None:
    case = make_case(tokens=131, hidden_size=hidden_size, vocab_size=1501, dtype=dtype)
    value, gradients = run(case, True, backend=backend)
    expected, expected_gradients = case.oracle()
    assert relative_error(value, expected) <= min(tolerance, 1e-4)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_apart_and_begin_anywhere(backend: str, dtype: torch.dtype) -> None:
    """The hidden states are columns of a wider tensor, the weight is a transpose, the targets are every second."""
    case = make_case(tokens=67, hidden_size=41, vocab_size=1501, dtype=dtype, bias=False)
    wide = torch.zeros(67, 50, dtype=dtype)
    wide[:, 5:46] = case.hidden
    leaves = [wide.cuda().requires_grad_(), case.weight.T.contiguous().cuda().requires_grad_()]
    target = torch.stack([case.target, case.target + 1], 1).cuda()[:, 0]
    value = fastd2o.linear_logprob(leaves[0][:, 5:46], leaves[1].T, target, backend=backend)
    gradients = torch.autograd.grad((value * case.coef.to(value.dtype).cuda()).sum(), leaves)
    expected, expected_gradients = case.oracle()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(value.detach().cpu(), expected) <= min(tolerance, 1e-4)
    assert relative_error(gradients[0].cpu()[:, 5:46], expected_gradients["hidden"]) <= tolerance
    assert relative_error(gradients[1].cpu().T, expected_gradients["weight"]) <= tolerance


@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_of_minus_infinity_is_padding(backend: str, trained: bool) -> None:
    case = make_case(tokens=131, hidden_size=64, vocab_size=1501, dtype=torch.float32)
    assert case.bias is not None
    case.bias[::7] = -torch.inf
    case.target[(case.target >= 0) & (case.target % 7 == 0)] += 1
    value, gradients = run(case, trained, backend=backend)
    expected, expected_gradients = case.oracle()
    assert relative_error(value, expected) <= 1e-5
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("trained", [True, False])
def test_two_runs_give_the_same_bits(backend: str, trained: bool) -> None:
    case = make_case(tokens=512, hidden_size=128, vocab_size=20_001, dtype=torch.bfloat16)
    first, second = run(case, trained, backend=backend), run(case, trained, backend=backend)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_statistics_match_the_cpu(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    needs(backend, dtype)
    case = make_case(tokens=65, vocab_size=1001, dtype=dtype)
    assert case.bias is not None
    exact = [tensor.double() for tensor in (case.hidden, case.weight, case.bias)]
    expected = fastd2o.linear_logprob(exact[0], exact[1], case.target, bias=exact[2], stats=True)
    arguments = (tensor.cuda() for tensor in (case.hidden, case.weight, case.target))
    out = fastd2o.linear_logprob(*arguments, bias=case.bias.cuda(), stats=True, backend=backend)
    for ours, theirs in zip(out, expected, strict=True):
        assert relative_error(ours.cpu(), theirs) <= tolerance


def test_deterministic_algorithms_are_all_it_uses(backend: str) -> None:
    case = make_case(tokens=65, vocab_size=1001, dtype=torch.float32)
    hidden, weight = case.hidden.cuda().requires_grad_(), case.weight.cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        for loss in (
            fastd2o.linear_logprob(hidden, weight, case.target.cuda(), backend=backend),
            fastd2o.linear_cringe(hidden, weight, case.target.cuda(), seed=1, backend=backend).loss,
        ):
            loss.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cringe_draws_and_gradients_match_the_cpu(backend: str, dtype: torch.dtype) -> None:
    """The draw is the CPU's in float64, and in float32 but where logits differ in the last bit; the gradient repeats
    bit for bit."""
    needs(backend, dtype)
    case = make_case(tokens=301, hidden_size=64, vocab_size=9001, dtype=dtype)

    def step(device: str) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = (t.detach().to(device).requires_grad_() for t in (case.hidden, case.weight))
        serving = backend if device == "cuda" else "torch"
        out = fastd2o.linear_cringe(hidden, weight, case.target.to(device), seed=3, softcap=30.0, backend=serving)
        gradients = torch.autograd.grad(out.loss.sum(), (hidden, weight))
        return out.positive.cpu(), gradients[0].cpu(), gradients[1].cpu()

    ours, again = step("cuda"), step("cuda")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    if dtype == torch.float64:
        positive, *gradients = step("cpu")
        assert torch.equal(ours[0], positive)
        for a, b in zip(ours[1:], gradients, strict=True):
            torch.testing.assert_close(a, b)
    if dtype == torch.float32:
        assert (ours[0] != step("cpu")[0]).sum() <= 3


@pytest.mark.parametrize("k", [1, 16, 33, 64])
def test_cringe_with_any_number_of_candidates(backend: str, k: int) -> None:
    case = make_case(tokens=301, hidden_size=64, vocab_size=9001, dtype=torch.float32)
    exact = fastd2o.linear_cringe(case.hidden.double(), case.weight.double(), case.target, k=k, seed=3)
    arguments = (tensor.cuda() for tensor in (case.hidden, case.weight, case.target))
    found = fastd2o.linear_cringe(*arguments, k=k, seed=3, backend=backend)
    same = found.positive.cpu() == exact.positive
    assert (~same).sum() <= 3
    torch.testing.assert_close(found.loss.cpu().double()[same], exact.loss[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [5, 40])
def test_equal_logits(backend: str, dtype: torch.dtype, k: int) -> None:
    """Small integers, so that every logit is exact and most have equals: the first is the most likely, and the first
    are the candidates; torch's own topk takes any of them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-1, 2, (size, 8), generator=generator).to(dtype) for size in (131, 1501))
    target = torch.randint(1501, (131,), generator=generator)
    logits = hidden.double() @ weight.double().T
    arguments = (tensor.cuda() for tensor in (hidden, weight, target))
    assert torch.equal(
        fastd2o.linear_logprob(*arguments, stats=True, backend=backend).top1.cpu(),
        logits.sort(dim=1, descending=True, stable=True).indices[:, 0],
    )
    others = logits.scatter(1, target[:, None], -torch.inf).sort(dim=1, descending=True, stable=True)
    arguments = (tensor.cuda() for tensor in (hidden, weight, target))
    positive = fastd2o.linear_cringe(*arguments, k=k, seed=3, backend=backend).positive.cpu()[:, None]
    assert (positive != target[:, None]).all()
    assert (logits.gather(1, positive) >= others.values[:, k - 1 : k]).all()
    assert backend == "torch" or (others.indices[:, :k] == positive).any(1).all()


@pytest.mark.parametrize("trained", [True, False])
def test_a_step_can_be_captured_in_a_graph(backend: str, trained: bool) -> None:
    """The capture fails at anything that waits for the device; replayed on other numbers, it computes with them."""
    case, other = (make_case(tokens=65, hidden_size=64, vocab_size=1001, dtype=torch.float32, seed=s) for s in (1, 2))
    hidden, weight = case.hidden.cuda().requires_grad_(), case.weight.cuda().requires_grad_(trained)
    target = case.target.cuda()
    leaves = [hidden, weight] if trained else [hidden]

    def step() -> list[Tensor]:
        logprob = fastd2o.linear_logprob(hidden, weight, target, backend=backend)
        cringe = fastd2o.linear_cringe(hidden, weight, target, seed=3, backend=backend).loss
        return [logprob.detach(), cringe.detach(), *torch.autograd.grad(logprob.sum() + cringe.sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(other.hidden)
        weight.copy_(other.weight)
        target.copy_(other.target)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("objective", GROUPED_OBJECTIVES)
def test_grouped_loss_matches_the_cpu(backend: str, objective: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logp, extra = -torch.rand(1000, generator=generator), torch.rand(1000, generator=generator)
    sequence_start = torch.arange(0, 1001, 50)
    group_start, positive = torch.tensor([0, 3, 4, 12, 20]), torch.ones(20, dtype=torch.bool)
    positive[[1, 3, 11, 12]] = False
    cringe = "cringe" in objective

    def step(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaf = logp.to(device, dtype).requires_grad_()
        result = grouped_loss(
            leaf,
            *(tensor.to(device) for tensor in (sequence_start, group_start, positive)),
            objective=objective,
            backend=backend,
            ref_logp=None if cringe else logp.view(20, 50).sum(1).to(device, dtype) + 0.5,
            token_cringe=extra.to(device, dtype) if cringe else None,
        )
        return [result.loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(result.loss.sum(), leaf))]

    ours, again = step("cuda", torch.float32, backend), step("cuda", torch.float32, backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for found, expected in zip(ours, step("cpu", torch.float64, "torch"), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part_tokens", [None, 64])
@pytest.mark.parametrize("mass_tol", [0.0, 1e-3])
def test_preference_loss_matches_the_cpu(
    backend: str, dtype: torch.dtype, part_tokens: int | None, mass_tol: float
) -> None:
    """One part and several, all of their softmax weights kept and a share of them; the same bits twice."""
    case = make_case(tokens=320, hidden_size=64, vocab_size=9001, dtype=dtype)
    groups = Groups(torch.arange(20) // 4, torch.arange(20) % 4 != 0)
    ref_logp = torch.full((20,), -150.0)

    def step(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        hidden, weight = (t.detach().to(device, dtype).requires_grad_() for t in (case.hidden, case.weight))
        plan = dataclasses.replace(
            fastd2o.Plan.of(hidden, weight, grouped=True, backend=backend), part_tokens=part_tokens, block_vocab=2048
        )
        plan = dataclasses.replace(plan, kept_bytes=plan.kept_bytes if part_tokens is None else 64 * 4096 * 2)
        out = fastd2o.linear_preference_loss(
            hidden,
            weight,
            case.target.to(device),
            (torch.arange(320) // 16).to(device),
            Groups(groups.group.to(device), groups.positive.to(device)),
            objective="d2o",
            ref_logp=ref_logp.to(device),
            plan=plan,
            vocab_mass_tol=mass_tol if device == "cuda" else 0.0,
        )
        return [out.loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out.loss, (hidden, weight)))]

    ours, again = step("cuda", dtype, backend), step("cuda", dtype, backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    tolerance = (1e-5 if dtype == torch.float32 else 1e-2) + 10 * mass_tol
    for found, expected in zip(ours, step("cpu", torch.float64, "torch"), strict=True):
        assert rms_error(found, expected) <= tolerance


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_kept_softmax_weights_give_the_gradient(backend: str, share: float) -> None:
    case = make_case(tokens=512, hidden_size=64, vocab_size=9001, dtype=torch.bfloat16)

    def step(memory_budget: int | None) -> tuple[Tensor, ...]:
        hidden, weight = (t.detach().cuda().requires_grad_() for t in (case.hidden, case.weight))
        plan = fastd2o.Plan.of(hidden, weight, backend=backend)
        plan = dataclasses.replace(plan, block_vocab=1024, kept_bytes=memory_budget or 0)
        logprob = fastd2o.linear_logprob(hidden, weight, case.target.cuda(), plan=plan)
        return torch.autograd.grad(logprob.sum(), (hidden, weight))

    kept, again = step(int(share * 512 * 9001 * 2)), step(None)
    for ours, theirs in zip(kept, again, strict=True):
        assert rms_error(ours, theirs.double()) <= 1e-2


@pytest.mark.parametrize("trained", [True, False])
def test_peak_memory_at_the_shape_of_a_real_model(backend: str, trained: bool) -> None:
    hidden = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 2048, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_(trained)
    target = torch.randint(128256, (8192,), device="cuda")
    leaves = [hidden, weight] if trained else [hidden]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastd2o.linear_logprob(hidden, weight, target, backend=backend).sum(), leaves)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    plan = fastd2o.Plan.of(hidden, weight, backend=backend)
    gradients = sum(leaf.nbytes for leaf in leaves)
    assert torch.cuda.max_memory_allocated() - before - gradients <= plan.extra_bytes
