"""What every loss promises: dtypes, reductions, empty batches, extremes, constants, compilation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastd2o import losses
from tests.losses.cases import CASES, PER_PAIR, Case

every_loss = pytest.mark.parametrize("case", CASES, ids=str)
every_pair_loss = pytest.mark.parametrize("case", [case for case in CASES if case.reductions == PER_PAIR], ids=str)
every_loss_with_reference = pytest.mark.parametrize("case", [case for case in CASES if case.constants], ids=str)


def gradients(case: Case, inputs: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, [inputs[name] for name in case.policy], allow_unused=True, materialize_grads=True)
    return dict(zip(case.policy, grads, strict=True))


def test_every_public_loss_is_covered():
    functions = {getattr(case.loss, "func", case.loss) for case in CASES}
    elsewhere = {losses.cringe_token_loss, losses.grouped_loss, losses.linear_preference_loss}
    assert functions | elsewhere == {getattr(losses, name) for name in losses.__all__ if name.endswith("_loss")}


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(case: Case, seed: int):
    inputs = case.inputs(seed=seed)
    if case.loss is losses.pairwise_cringe_loss:
        # The gate is detached, so finite differences in the log-probabilities see what autograd must not.
        inputs = {
            name: tensor.detach() if name in ("chosen_logp", "rejected_logp") else tensor
            for name, tensor in inputs.items()
        }

    def loss(*values: Tensor) -> Tensor:
        return case.loss(**dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(loss, tuple(inputs.values()))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(case: Case, dtype: torch.dtype):
    inputs = case.inputs(dtype=dtype)
    upcast = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    loss = case.loss(**inputs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, case.loss(**upcast))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_keep_their_dtype(case: Case, dtype: torch.dtype):
    assert case.loss(**case.inputs(dtype=dtype)).dtype == dtype


@every_loss
def test_float32_agrees_with_float64(case: Case):
    inputs = case.inputs(dtype=torch.float32)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    torch.testing.assert_close(case.loss(**inputs).double(), case.loss(**exact), rtol=1e-5, atol=0)


@every_loss
def test_empty_batch_gives_a_zero_on_the_graph(case: Case):
    inputs = case.inputs(G=0, S=0)
    loss = case.loss(**inputs)
    assert loss.item() == 0
    assert all(grad.shape == inputs[name].shape for name, grad in gradients(case, inputs, loss).items())


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
@pytest.mark.parametrize("name", ["cringe", "unlikelihood", "nat"])
def test_all_masked_tokens_give_a_zero_on_the_graph(name: str, reduction: str):
    (case,) = (case for case in CASES if case.name == name)
    inputs = case.inputs()
    inputs |= {mask: torch.zeros_like(inputs[mask]) for mask in case.masks}
    loss = case.loss(**inputs, reduction=reduction)
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(case, inputs, loss).values())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_sums_keep_values_and_gradients_finite(case: Case, dtype: torch.dtype):
    corners = torch.tensor(list(itertools.product([-1e4, -1e-4, 0.0, 1e4], repeat=4)), dtype=dtype)
    inputs = case.inputs(dtype=dtype, G=len(corners), S=len(corners))
    columns = itertools.cycle(corners.unbind(dim=1))
    for name in [*case.policy, *case.constants]:
        column = next(columns)
        column = column if inputs[name].dim() == 1 else column[:, None].expand_as(inputs[name])
        inputs[name] = column.clone().requires_grad_(name in case.policy)
    loss = case.loss(**inputs, reduction="sum")
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(case, inputs, loss).values())


@every_pair_loss
def test_reductions_agree(case: Case):
    inputs = case.inputs()
    inputs |= {name: torch.ones_like(inputs[name]) for name in case.masks}
    each = case.loss(**inputs, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(case.loss(**inputs, reduction="sum"), each.sum())
    torch.testing.assert_close(case.loss(**inputs, reduction="mean"), each.mean())
    assert torch.equal(case.loss(**inputs), case.loss(**inputs, reduction="mean"))


@every_loss
def test_unknown_reduction_lists_the_valid_ones(case: Case):
    with pytest.raises(ValueError, match=f"reduction is 'average', expected one of: {', '.join(case.reductions)}"):
        case.loss(**case.inputs(), reduction="average")


@every_loss_with_reference
def test_references_are_constants(case: Case):
    inputs = case.inputs()
    inputs |= {name: inputs[name].requires_grad_() for name in case.constants}
    loss = case.loss(**inputs)
    grads = torch.autograd.grad(loss, [inputs[name] for name in case.constants], allow_unused=True)
    assert all(grad is None for grad in grads)


@every_loss_with_reference
def test_policy_as_its_own_reference_still_learns(case: Case):
    """A reference that shares the policy's graph must not cancel the gradient (the loss stuck at ln 2)."""
    inputs = case.inputs()
    inputs |= {name: torch.ones_like(inputs[name]) for name in case.masks}
    inputs |= {f"ref_{name}": inputs[name] for name in case.policy}
    # The negative's: on the chosen one, apo_down's two terms balance exactly at the reference.
    negative_gradient = gradients(case, inputs, case.loss(**inputs))[case.negative]
    assert negative_gradient.abs().min() > 0


@every_loss
def test_descent_lowers_the_negative(case: Case):
    """Minimising must push what should not be said down: cross-entropy on the negatives is NAT's business alone."""
    inputs = case.inputs()
    inputs |= {name: torch.full_like(inputs[name], name != "desirable") for name in case.masks}
    for name in case.constants:  # a policy that has the pair the wrong way round
        shift = 10.0 if "rejected" in name or "negative" in name else -10.0
        inputs[name] = inputs[name.removeprefix("ref_")].detach() - shift
    negative_gradient = gradients(case, inputs, case.loss(**inputs))[case.negative]
    assert (negative_gradient < 0).all() if case.name == "nat" else (negative_gradient > 0).all()


@every_loss
def test_integer_logprobs_are_refused(case: Case):
    name, *_ = case.policy
    with pytest.raises(TypeError, match=rf"{name} has dtype torch.int64, expected a floating-point tensor. Fix"):
        case.loss(**{**case.inputs(), name: torch.zeros(5, dtype=torch.int64)})


@every_loss
def test_lists_are_refused(case: Case):
    name, *_ = case.policy
    with pytest.raises(TypeError, match=f"{name} is of type list, expected a torch.Tensor"):
        case.loss(**{**case.inputs(), name: [0.0]})


@every_loss_with_reference
def test_a_column_against_a_row_is_refused(case: Case):
    """[G] against [G, 1] would broadcast to [G, G]: a number, and the wrong one."""
    name = next(name for name, letters in case.constants.items() if letters == "G")
    inputs = case.inputs()
    with pytest.raises(ValueError, match=name):
        case.loss(**{**inputs, name: inputs[name][:, None]})


@every_loss
def test_devices_that_differ_are_refused(case: Case):
    inputs: dict[str, Any] = case.inputs()
    others = [*case.policy, *case.constants, *case.lengths, *case.masks][1:]
    for name in others:
        with pytest.raises(ValueError, match=r"on meta|on cpu"):
            case.loss(**{**inputs, name: inputs[name].to("meta")})


@every_loss
def test_compiles_without_a_graph_break(case: Case):
    torch._dynamo.reset()
    inputs = case.inputs(dtype=torch.float32)
    compiled = torch.compile(case.loss, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs)
    eager = case.loss(**inputs)
    torch.testing.assert_close(loss, eager)
    for name, grad in gradients(case, inputs, loss).items():
        torch.testing.assert_close(grad, gradients(case, inputs, case.loss(**inputs))[name])
