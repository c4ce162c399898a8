"""The operators as ``torch.library`` citizens: opcheck, torch.compile without a graph break, FakeTensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import fastd2o


def tensors(trained: bool, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).requires_grad_(trained)
    target = torch.randint(50, (9,), generator=generator)
    target[2] = -100
    return hidden, weight, torch.randn(50, generator=generator).requires_grad_(trained) if bias else None, target


@pytest.mark.parametrize(
    ("algorithm", "compact_unit"), [("recompute", False), ("unit", True), ("unit", False), ("forward", False)]
)
@pytest.mark.parametrize("options", [(1.0, None, 1.0), (0.5, 30.0, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_logodds(dtype: torch.dtype, algorithm: str, compact_unit: bool, options: tuple[Any, ...]) -> None:
    inputs = tensors(trained=algorithm == "recompute")
    if algorithm == "forward":
        inputs = tuple(t if t is None else t.detach() for t in inputs)  # type: ignore[assignment]
    operator = torch.ops.fastd2o.logodds
    results = torch.library.opcheck(
        operator, (*inputs, *options, -100, algorithm, 4, 16, dtype, "torch", False, 0, True, compact_unit, True)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_cringe(bias: bool) -> None:
    options = (
        torch.tensor(3),
        torch.arange(9),
        5,
        False,
        1.0,
        None,
        1.0,
        -100,
        4,
        16,
        torch.float32,
        "torch",
        False,
        True,
    )
    results = torch.library.opcheck(torch.ops.fastd2o.cringe, (*tensors(True, bias), *options))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_backwards() -> None:
    hidden, weight, bias, target = tensors(trained=True)
    hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    column = torch.rand(9) * (target >= 0)  # a coefficient at an ignored token is 0 by then
    shared = (1.0, 30.0, 1.0, 4, 16, torch.float32, "torch", False, True, True, True, True)
    inputs = (column, hidden, weight, bias, target)
    nothing_kept = (hidden.new_empty(0), hidden.new_empty(0))
    of_logodds = (*shared[:3], -100, *shared[3:])
    operator = torch.ops.fastd2o.logodds_backward
    results = torch.library.opcheck(operator, (*inputs, column, *nothing_kept, *of_logodds))
    assert set(results.values()) == {"SUCCESS"}
    operator = torch.ops.fastd2o.unit_backward
    for unit in (hidden, hidden[target >= 0]):
        results = torch.library.opcheck(operator, (column, unit, target >= 0, torch.bfloat16))
        assert set(results.values()) == {"SUCCESS"}
    positive = torch.where(target >= 0, (target + 1) % 50, -1)
    operator = torch.ops.fastd2o.cringe_backward
    results = torch.library.opcheck(operator, (*inputs, positive, column, column + 1, False, *shared))
    assert set(results.values()) == {"SUCCESS"}


class Model(nn.Module):
    """Everything the package offers, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(61, 16), nn.Linear(16, 16), nn.Linear(16, 61)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        arguments = (hidden, self.head.weight, labels)
        sequence = fastd2o.sequence_logprob(*arguments, bias=self.head.bias, softcap=20.0)
        cringe = fastd2o.linear_cringe(*arguments, bias=self.head.bias, k=3)
        out = fastd2o.linear_logprob(*arguments, bias=self.head.bias, stats=True)
        return sequence.sum() + cringe.loss.sum() + out.entropy.sum() + out.logprob.mean()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_compiles_without_a_graph_break(frozen: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    model = Model()
    model.head.requires_grad_(not frozen)
    ids, labels = torch.randint(61, (2, 5)), torch.randint(61, (2, 5))
    labels[0, :2] = -100

    def step(module: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(ids, labels)
        return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])  # type: ignore[return-value]

    torch._dynamo.reset()
    loss, gradients = step(model)
    compiled_loss, compiled_gradients = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradients, gradients)


class Checker(torch.fx.Interpreter):
    """Runs a graph, and finds that every tensor has the shape that was foretold."""

    def run_node(self, n: torch.fx.Node) -> Any:
        result: Any = super().run_node(n)
        foretold: Any = n.meta.get("val")
        several = isinstance(foretold, (tuple, list))
        for tensor, fake in zip(result, foretold, strict=True) if several else [(result, foretold)]:
            if isinstance(tensor, Tensor) and isinstance(fake, Tensor):
                assert (tensor.shape, tensor.dtype) == (fake.shape, fake.dtype), n.name
        return result


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_compiler_is_told_of_shapes_is_so(frozen: bool) -> None:
    """Without ``fullgraph`` a graph cannot hold sizes that only a run knows, such as how many tokens count. Inductor
    asserts what it was told."""
    hidden, weight, _, target = tensors(trained=not frozen, bias=False)
    leaves = [hidden] if frozen else [hidden, weight]
    graphs = 0

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return make_boxed_func(lambda *arguments: Checker(graph).run(*arguments))

    def call(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fastd2o.linear_logprob(hidden * 2, weight, target).sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=compiler))
    results = [torch.autograd.grad(each(hidden, weight, target), leaves) for each in (compiled, call)]
    torch.testing.assert_close(*results)
    assert graphs == 2  # of the forward and of the backward


def test_numbers_may_change_under_one_compiled_graph() -> None:
    """Floats and shapes that have become symbols: no graph break, and no wrong number."""
    torch._dynamo.reset()
    hidden, weight, _, target = tensors(trained=False)

    def call(hidden: Tensor, target: Tensor, temperature: float) -> Tensor:
        logprob = fastd2o.linear_logprob(hidden, weight, target, temperature=temperature)
        return fastd2o.losses.npo_loss(logprob, ref_negative_logp=logprob.detach(), beta=temperature)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, temperature in ((9, 1.0), (7, 0.7), (5, 1.3)):
        arguments = (hidden[:tokens], target[:tokens], temperature)
        torch.testing.assert_close(compiled(*arguments), call(*arguments))


def test_a_bad_target_is_refused_inside_a_compiled_graph_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="holds 61 at flat position"):
        compiled(torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), 61))


def test_fake_tensors_pass_through() -> None:
    with FakeTensorMode():
        hidden = torch.empty(2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128256, 16)
        target = torch.empty(2, 5, dtype=torch.int64)
        out = fastd2o.linear_logprob(hidden, weight, target)
        assert (out.shape, out.dtype) == ((2, 5), torch.float32)
        cringe = fastd2o.linear_cringe(hidden, weight, target, seed=0)
        assert (cringe.positive.shape, cringe.positive.dtype) == ((2, 5), torch.int64)
