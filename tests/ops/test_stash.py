"""``memory_budget``: softmax weights that a forward keeps for its backward change operations and memory, and nothing
else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastd2o
from fastd2o import Groups, Plan
from fastd2o.memory import measure_memory
from fastd2o.ops import budget, native, plan
from fastd2o.ops.native_tile_ops import CpuTileOps
from fastd2o.ops.torch_tile_ops import TorchTileOps
from tests.ops.oracle import Case, make_case, relative_error, rms_error

unavailable = native.unavailable("cpu")
needs_native = pytest.mark.skipif(unavailable is not None, reason=f"no native kernels: {unavailable}")
BACKENDS = [pytest.param("cpu", marks=needs_native), "torch"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [
    (backend, dtype)
    for backend in ("cpu", "torch")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if (backend, dtype) != ("cpu", torch.float64)
]
every_dtype = pytest.mark.parametrize(
    ("backend", "dtype"), [pytest.param(*pair, marks=needs_native if pair[0] == "cpu" else ()) for pair in DTYPES]
)

# Of 8 slabs, so that a part of the columns may be kept.
TOKENS, HIDDEN, VOCAB, BLOCK = 13, 24, 512, 64
SHARES = {0.0: 0.0, 0.3: 0.25, 0.55: 0.5, 1.0: 1.0}
"""What memory holds, as a share of all softmax weights -> what is kept: whole slabs."""


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own plans have tiles of 5 tokens and 64 columns."""
    monkeypatch.setitem(plan._BLOCK_TOKENS, "cpu", 5)
    monkeypatch.setitem(plan._TILE_BYTES, "cpu", 1)
    monkeypatch.setattr(plan, "_MIN_BLOCK_VOCAB", BLOCK)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Floating-point operations of every matrix product of the engine."""
    counts: list[int] = []
    for ops in (TorchTileOps, CpuTileOps):

        def product(self: Any, out: Tensor, left: Tensor, right: Tensor, *rest: Any, do: Any = ops.product, **kw: Any):
            counts.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
            do(self, out, left, right, *rest, **kw)

        monkeypatch.setattr(ops, "product", product)
    return counts


def tensors(case: Case) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in case.tensors.items()}


def bytes_for(case: Case, share: float, backend: str | None = None) -> int:
    """A budget that has room for this share of the softmax weights of all tokens."""
    leaves = tensors(case)
    nothing_kept = Plan.of(leaves["hidden"], leaves["weight"], leaves.get("bias"), backend=backend)
    sums = 8 if case.hidden.dtype == torch.float64 else 4
    maxima = case.target.numel() * -(-VOCAB // nothing_kept.block_vocab) * sums
    weights = int(share * case.target.numel() * VOCAB * case.hidden.element_size())
    return nothing_kept.extra_bytes + maxima + weights


def run(case: Case, coef: Tensor | None = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Values, and gradients of ``sum(coef * value)``."""
    leaves = tensors(case)
    value = fastd2o.linear_logprob(
        leaves["hidden"], leaves["weight"], case.target, bias=leaves.get("bias"), **case.options, **options
    )
    coef = (case.coef if coef is None else coef).to(value.dtype)
    gradients = torch.autograd.grad((value * coef).sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def agree(
    result: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """The values are the same bits. Gradients are the same to rounding: a weight that is kept in 16 bits is rounded
    once more than one that is formed again, 1.6e-3 of it, root mean square, in bfloat16."""
    assert torch.equal(result[0], right[0])
    for name, gradient in result[1].items():
        assert gradient.dtype == right[1][name].dtype
        if dtype.itemsize > 2:
            tolerance = 1e-13 if dtype == torch.float64 else 2e-6
            assert relative_error(gradient, right[1][name].double()) <= tolerance, name
        else:
            tolerance = 4e-3 if dtype == torch.bfloat16 else 5e-4
            assert rms_error(gradient, right[1][name].double()) <= tolerance, name


TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"logit_scale": -1.5, "softcap": 4.0, "temperature": 1.3},
}


@pytest.mark.usefixtures("small_tiles")
class TestTheSame:
    @pytest.mark.parametrize("share", SHARES)
    @pytest.mark.parametrize("ignored", [0.0, 0.4])
    @pytest.mark.parametrize("transform", TRANSFORMS)
    @every_dtype
    def test_as_without_a_budget(self, backend: str, dtype: torch.dtype, transform: str, ignored: float, share: float):
        case = make_case(TOKENS, HIDDEN, VOCAB, dtype, ignored=ignored, **TRANSFORMS[transform])
        result = run(case, backend=backend, memory_budget=bytes_for(case, share, backend))
        agree(result, run(case, backend=backend), dtype)
        if dtype.itemsize > 2:
            _, gradients = case.oracle()
            for name, gradient in result[1].items():
                assert relative_error(gradient, gradients[name]) <= (1e-12 if dtype == torch.float64 else 1e-5), name

    @pytest.mark.parametrize("share", [0.3, 1.0])
    @pytest.mark.parametrize("ignored", [0.0, 0.4])
    @pytest.mark.parametrize("compact", [True, False])
    @every_dtype
    def test_with_coefficients_of_zero(
        self, backend: str, dtype: torch.dtype, compact: bool, ignored: float, share: float
    ):
        """Rows of what was kept are gathered, of all tokens or of those that count."""
        case = make_case(TOKENS, HIDDEN, VOCAB, dtype, ignored=ignored)
        coef = case.coef.clone()
        coef[[0, 3, 4, 9]] = 0
        leaves = tensors(case)
        arguments = (leaves["hidden"], leaves["weight"], leaves["bias"])
        plans = [
            dataclasses.replace(Plan.of(*arguments, backend=backend, memory_budget=memory), compact=compact)
            for memory in (None, bytes_for(case, share, backend))
        ]
        right, result = (run(case, coef, plan=each) for each in plans)
        agree(result, right, dtype)
        assert torch.equal(result[1]["hidden"][[0, 3, 4, 9]], torch.zeros(4, HIDDEN, dtype=dtype))

    @pytest.mark.parametrize("compact", [True, False])
    @every_backend
    def test_a_coefficient_of_zero_beside_logits_that_overflow(self, backend: str, compact: bool):
        """What such a token keeps is relative to a maximum whose exponential is infinite; 0 times that is no number."""
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float32, ignored=0.4, scale=40.0)
        coef = case.coef.clone()
        coef[[0, 3, 4, 9]] = 0
        leaves = tensors(case)
        plan = Plan.of(*leaves.values(), backend=backend, memory_budget=bytes_for(case, 1.0, backend))
        assert plan.kept_columns == VOCAB
        _, gradients = run(case, coef, plan=dataclasses.replace(plan, compact=compact))
        _, formed_again = run(case, coef, backend=backend)
        for name, gradient in gradients.items():  # logits of hundreds are known to 1e-5
            assert relative_error(gradient, formed_again[name].double()) <= 1e-4, name

    @pytest.mark.parametrize("share", [0.3, 1.0])
    @every_dtype
    def test_sixteen_bits_are_as_accurate_as_their_roundings(self, backend: str, dtype: torch.dtype, share: float):
        """Against float64: two roundings of a weight where eager code has one."""
        case = make_case(96, 64, VOCAB, dtype, scale=2.0)
        _, expected = case.oracle()
        _, eager = case.eager(torch.float64 if dtype == torch.float64 else torch.float32)
        _, gradients = run(case, backend=backend, memory_budget=bytes_for(case, share, backend))
        for name, gradient in gradients.items():
            allowed = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
            assert rms_error(gradient, expected[name]) <= 1.05 * rms_error(eager[name], expected[name]) + allowed, name

    @pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias")])
    @pytest.mark.parametrize("share", [0.3, 1.0])
    def test_any_of_the_gradients(self, share: float, wanted: tuple[str, ...]):
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float64)
        leaves = case.tensors | {name: case.tensors[name].clone().requires_grad_() for name in wanted}
        value = fastd2o.linear_logprob(
            leaves["hidden"],
            leaves["weight"],
            case.target,
            bias=leaves["bias"],
            memory_budget=bytes_for(case, share),
        )
        gradients = torch.autograd.grad((value * case.coef).sum(), [leaves[name] for name in wanted])
        for name, gradient in zip(wanted, gradients, strict=True):
            assert relative_error(gradient, case.oracle()[1][name]) <= 1e-12, name

    @pytest.mark.parametrize("magnitude", [1e-4, 30.0, 1e4])
    @every_dtype
    def test_extreme_logits(self, backend: str, dtype: torch.dtype, magnitude: float):
        """The largest logit of an earlier slab may be far below that of a later one, which scales its weights to 0."""
        case = make_case(TOKENS, HIDDEN, VOCAB, dtype, bias=False, scale=min(magnitude, 1e3))
        result = run(case, backend=backend, memory_budget=bytes_for(case, 0.55, backend))
        right = run(case, backend=backend)
        assert all(gradient.isfinite().all() for gradient in result[1].values())
        agree(result, right, dtype)

    @every_backend
    def test_padding_columns_take_no_part(self, backend: str):
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float32)
        assert case.bias is not None
        case.bias[:70] = -torch.inf  # all of the first slab, and more
        case.target[case.target >= 0] = case.target[case.target >= 0].clamp(min=70)
        case.target[3] = 5  # of probability 0
        _, gradients = run(case, backend=backend, memory_budget=bytes_for(case, 0.55, backend))
        _, right = run(case, backend=backend)
        assert torch.equal(gradients["weight"][[0, 4, 69]], torch.zeros(3, HIDDEN))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-5, atol=1e-6)

    def test_statistics(self):
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float64)
        leaves = tensors(case)
        arguments = (leaves["hidden"], leaves["weight"], case.target)
        kept = fastd2o.linear_logprob(*arguments, stats=True, memory_budget=bytes_for(case, 0.55))
        assert all(map(torch.equal, kept, fastd2o.linear_logprob(*arguments, stats=True)))

    def test_log_odds_sequences_and_a_backward_that_runs_twice(self):
        case = make_case(12, HIDDEN, VOCAB, torch.float64, bias=False)
        leaves = tensors(case)
        memory = bytes_for(case, 0.55)
        arguments = (leaves["hidden"], leaves["weight"], case.target)
        for value, right in (
            (fastd2o.linear_logodds(*arguments, memory_budget=memory), fastd2o.linear_logodds(*arguments)),
            (
                fastd2o.sequence_logprob(
                    leaves["hidden"].view(3, 4, -1), leaves["weight"], case.target.view(3, 4), memory_budget=memory
                ),
                fastd2o.sequence_logprob(leaves["hidden"].view(3, 4, -1), leaves["weight"], case.target.view(3, 4)),
            ),
        ):
            expected = torch.autograd.grad(right.sum(), list(leaves.values()))
            first = torch.autograd.grad(value.sum(), list(leaves.values()), retain_graph=True)
            second = torch.autograd.grad(value.sum(), list(leaves.values()))
            for ours, again, theirs in zip(first, second, expected, strict=True):
                assert torch.equal(ours, again)
                assert relative_error(ours, theirs) <= 1e-13

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tokens", [0, 5])
    def test_nothing_counts(self, tokens: int, dtype: torch.dtype):
        case = make_case(tokens, HIDDEN, VOCAB, dtype, ignored=1.0)
        value, gradients = run(case, memory_budget=10**8)
        assert torch.equal(value, torch.zeros_like(value))
        for name, gradient in gradients.items():
            assert torch.equal(gradient, torch.zeros_like(case.tensors[name])), name

    def test_a_master_weight_under_autocast(self):
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            right = run(case)
            result = run(case, memory_budget=10**8)
        agree(result, right, torch.bfloat16)
        assert result[1]["weight"].dtype == torch.float32


class TestTriton:
    """What is kept is formed in tiles in memory, and the columns after it in the kernels."""

    @pytest.mark.parametrize("share", [0.55, 1.0])
    def test_a_kernel_serves_the_other_columns(self, share: float):
        if (why := fastd2o.backends()["triton"]) is not None:
            pytest.skip(why)
        case = make_case(6, 16, 128, torch.float32)
        leaves = tensors(case)
        own = Plan.of(leaves["hidden"], leaves["weight"], leaves["bias"], backend="triton")
        kept = dataclasses.replace(own, block_tokens=4, block_vocab=32, kept_bytes=int(6 * 128 * 4 * share))
        value, gradients = run(case, plan=kept)
        expected, right = case.oracle()
        assert kept.fused
        assert kept.kept_columns == {0.55: 64, 1.0: 128}[share]
        assert relative_error(value, expected) <= 1e-5
        for name, gradient in gradients.items():
            assert relative_error(gradient, right[name]) <= 1e-5, name

    @pytest.mark.parametrize("share", [0.55, 1.0])
    def test_logits_stay_float32_on_the_way_to_what_is_kept(self, share: float):
        if (why := fastd2o.backends()["triton"]) is not None:
            pytest.skip(why)
        case = make_case(6, 16, 128, torch.float16, ignored=0.0, scale=8.0)
        leaves = tensors(case)
        own = Plan.of(leaves["hidden"], leaves["weight"], leaves["bias"], backend="triton")
        kept = dataclasses.replace(own, block_vocab=32, kept_bytes=int(6 * 128 * 2 * share))
        value, _ = run(case, plan=kept)
        expected, _ = case.oracle()
        assert kept.fused
        assert kept.kept_columns > 0
        logits = case.logits({name: tensor.double() for name, tensor in case.tensors.items()})
        assert logits.abs().amax() > 16  # where float16 is off by up to 8e-3
        assert (value - expected).abs().amax() <= 1e-3

    def test_a_loss_of_groups_keeps_everything(self):
        if (why := fastd2o.backends()["triton"]) is not None:
            pytest.skip(why)
        case = make_case(12, 16, 128, torch.float32, bias=False, ignored=0.0)
        sequence_ids = torch.arange(12) // 3
        groups = Groups(torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, False, False]))
        found = {}
        for backend in ("triton", "torch"):
            leaves = tensors(case)
            loss = fastd2o.linear_preference_loss(
                leaves["hidden"],
                leaves["weight"],
                case.target,
                sequence_ids,
                groups,
                objective="sigmoid",
                ref_logp=torch.zeros(4),
                backend=backend,
            ).loss
            found[backend] = (loss, *torch.autograd.grad(loss, list(leaves.values())))
        for ours, reference in zip(found["triton"], found["torch"], strict=True):
            assert relative_error(ours, reference.double()) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
@pytest.mark.parametrize("algorithm", ["recompute", "grouped"])
@pytest.mark.parametrize("budget", [10**8, 5 * 10**8, 10**9, 4 * 10**9])
def test_a_plan_for_a_gpu_stays_within_its_budget(backend: str, algorithm: Any, budget: int):
    of_call = {"tokens": 8192, "hidden_size": 4096, "vocab_size": 128256, "algorithm": algorithm, "device": "cuda"}
    least = Plan.choose(**of_call, backend=backend, memory_budget=0)
    chosen = Plan.choose(**of_call, backend=backend, memory_budget=budget)
    assert chosen.extra_bytes <= max(budget, least.extra_bytes)
    assert (chosen.kept_columns > 0) == (budget >= 10**9)


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
class TestOperations:
    @pytest.mark.parametrize(("share", "kept"), SHARES.items())
    @every_dtype
    def test_eight_less_two_for_what_is_kept(
        self, backend: str, dtype: torch.dtype, share: float, kept: float, operations: list[int]
    ):
        case = make_case(TOKENS, HIDDEN, VOCAB, dtype, ignored=0.0)
        leaves = tensors(case)
        memory = bytes_for(case, share, backend)
        chosen = Plan.of(leaves["hidden"], leaves["weight"], leaves["bias"], backend=backend, memory_budget=memory)
        assert (chosen.block_tokens, chosen.block_vocab) == (5, BLOCK)
        assert chosen.kept_columns == kept * VOCAB
        assert chosen.flops_factor == 8 - 2 * kept
        assert chosen.flops == (8 - 2 * kept) * TOKENS * HIDDEN * VOCAB
        assert f"{chosen.flops_factor:.3g} T·D·V" in str(chosen)
        run(case, backend=backend, memory_budget=memory)
        assert sum(operations) == chosen.flops

    @pytest.mark.parametrize(("share", "kept"), SHARES.items())
    def test_only_tokens_with_a_coefficient_have_a_backward(self, share: float, kept: float, operations: list[int]):
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float32, ignored=0.0)
        coef = case.coef.clone()
        coef[:6] = 0
        run(case, coef, memory_budget=bytes_for(case, share))
        assert sum(operations) == 2 * HIDDEN * VOCAB * (TOKENS + (3 - kept) * (TOKENS - 6))

    def test_tokens_that_do_not_count_leave_room(self, operations: list[int]):
        """Fewer tokens than a plan was made for: more of their columns are kept than it says."""
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float32, ignored=0.6)
        counted = int((case.target >= 0).sum())
        assert counted <= 0.55 * TOKENS
        run(case, memory_budget=bytes_for(case, 0.55))
        assert sum(operations) == 6 * counted * HIDDEN * VOCAB

    @pytest.mark.parametrize("head", ["frozen", "no_grad"])
    def test_without_a_trained_head_nothing_is_kept(self, head: str, operations: list[int]):
        case = make_case(TOKENS, HIDDEN, VOCAB, torch.float32, ignored=0.0)
        hidden = case.hidden.clone().requires_grad_(head == "frozen")
        value = fastd2o.linear_logprob(hidden, case.weight, case.target, memory_budget=10**9)
        if head == "frozen":
            value.sum().backward()
        assert sum(operations) == {"frozen": 4, "no_grad": 2}[head] * TOKENS * HIDDEN * VOCAB
        assert Plan.of(hidden, case.weight, memory_budget=10**9).kept_bytes == 0


class TestPlan:
    def test_a_budget_is_bytes_or_a_share_of_what_is_free(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(budget, "free_bytes", lambda device: 10**9)
        cpu = torch.device("cpu")
        cases: list[tuple[int | float | None, int | None]] = [
            (None, None),
            (0, 0),
            (12345, 12345),
            (1024, 1024),
            (1.0, 10**9),
            (0.25, 25 * 10**7),
            (0.0, 0),
            (2048.0, 2048),
            (3e9, 3 * 10**9),
            (10**15, 10**15),
        ]
        for given, resolved in cases:
            assert budget.resolve_budget(given, cpu) == resolved, given
        leaves = torch.empty(100, 8, requires_grad=True), torch.empty(4096, 8, requires_grad=True)
        assert Plan.of(*leaves, memory_budget=0.1) == Plan.of(*leaves, memory_budget=10**8)
        assert Plan.of(*leaves, memory_budget=0.1).kept_bytes == 100 * 4096 * 4
        assert Plan.of(*leaves).kept_bytes == 0
        assert Plan.of(*leaves, grouped=True) == Plan.of(*leaves, grouped=True, memory_budget=1 << 30)

    def test_free_memory_is_a_positive_number(self):
        assert 1 << 20 < budget.free_bytes(torch.device("cpu")) < 1 << 50

    @pytest.mark.parametrize("algorithm", ["recompute", "grouped"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("memory", [0, 1 << 20, 100 << 20, 300 << 20, 1 << 30, 5 << 30, 1 << 40])
    def test_a_plan_stays_within_its_budget(self, memory: int, dtype: torch.dtype, algorithm: Any):
        """By its own count, where one without anything kept would."""
        shape: dict[str, Any] = {"tokens": 16384, "hidden_size": 1024, "vocab_size": 50000, "dtype": dtype}
        least = Plan.choose(**shape, algorithm=algorithm, memory_budget=0)
        chosen = Plan.choose(**shape, algorithm=algorithm, memory_budget=memory)
        assert least.flops_factor == 8
        assert chosen.extra_bytes <= max(memory * 1.01, least.extra_bytes)
        assert 6 <= chosen.flops_factor <= 8
        if memory == 1 << 40:
            assert chosen.flops_factor == 6
            assert chosen.part_tokens is None

    def test_more_memory_is_no_more_operations(self):
        shape: dict[str, Any] = {"tokens": 16384, "hidden_size": 1024, "vocab_size": 50000}
        for algorithm in ("recompute", "grouped"):
            factors = [
                Plan.choose(**shape, algorithm=algorithm, memory_budget=memory << 20).flops_factor
                for memory in range(0, 4000, 97)
            ]
            # Where three quarters can be kept, one part that forms the rest again goes before several.
            below = [factor for factor in factors if algorithm == "recompute" or not 6 <= factor <= 6.5]
            assert below == sorted(below, reverse=True), algorithm
            assert factors[0] == 8
            assert factors[-1] == 6


# --- memory -----------------------------------------------------------------------------------------------------------


def measured(case: tuple[Tensor, ...], **options: Any) -> int:
    """Bytes beyond inputs and gradients."""
    hidden, weight, target = case

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastd2o.linear_logprob(hidden, weight, target, **options).sum(), [hidden, weight])

    return measure_memory(step, warm_up=False).peak - hidden.nbytes - weight.nbytes


def head_of(tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(0.1).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (tokens,), generator=generator)


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @every_backend
    def test_of_linear_logprob(self, backend: str, dtype: torch.dtype):
        case = head_of(512, 64, 16384, dtype)
        hidden, weight, _ = case
        all_weights = 512 * 16384 * dtype.itemsize
        least = Plan.of(hidden, weight, backend=backend)
        sizes = []
        for share in (0.0, 0.55, 1.0):
            memory = least.extra_bytes + int(1.01 * share * all_weights)
            chosen = Plan.of(hidden, weight, backend=backend, memory_budget=memory)
            # A tile has 8192 columns, or all of the 16384 where logits are 16 bits.
            several = least.block_vocab < 16384
            assert chosen.kept_columns == {0.0: 0, 0.55: 8192 * several, 1.0: 16384}[share]
            sizes.append(measured(case, backend=backend, memory_budget=memory))
            assert sizes[-1] <= 1.1 * memory
            assert sizes[-1] <= chosen.extra_bytes
        assert sizes[2] - sizes[0] >= 0.6 * all_weights  # the tile of the backward lies beside what is kept
        assert measured(case, backend=backend) == sizes[0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @every_backend
    def test_of_linear_preference_loss(self, backend: str, dtype: torch.dtype):
        """With all of the softmax weights, in several parts, and with neither."""
        tokens, vocab = 2048, 4096
        hidden, weight, target = head_of(tokens, 32, vocab, dtype)
        sequence_ids = torch.arange(tokens) // 64  # 32 sequences in 16 groups
        groups = Groups(torch.arange(32) // 2, torch.arange(32) % 2 == 0)

        def step(memory: int | None) -> tuple[Tensor, ...]:
            out = fastd2o.linear_preference_loss(
                *(hidden, weight, target, sequence_ids, groups),
                objective="sigmoid",
                ref_logp=torch.full((32,), -500.0),
                memory_budget=memory,
                backend=backend,
            )
            return torch.autograd.grad(out.loss, [hidden, weight])

        least = Plan.of(hidden, weight, grouped=True, backend=backend, memory_budget=0)
        row = vocab * dtype.itemsize
        whole = least.extra_bytes + int(1.01 * tokens * row)
        sums = weight.numel() * 4 if dtype == torch.bfloat16 else 0
        right: tuple[Tensor, ...] = ()
        parts = least.extra_bytes + sums + int(1.01 * 900 * row)
        for memory, part_tokens in ((0, False), (parts, True), (whole, False), (None, False)):
            chosen = Plan.of(hidden, weight, grouped=True, backend=backend, memory_budget=memory)
            assert (chosen.part_tokens is not None) == part_tokens
            assert chosen.flops_factor == (8 if memory == 0 else 6)
            extra = measure_memory(lambda memory=memory: step(memory), warm_up=False).peak  # type: ignore[misc]
            extra -= hidden.nbytes + weight.nbytes
            assert extra <= chosen.extra_bytes
            assert extra <= 1.1 * (memory or (least.extra_bytes if memory == 0 else 1 << 30))
            gradients = step(memory)
            right = right or gradients  # of the first, which keeps nothing
            for gradient, exact in zip(gradients, right, strict=True):
                assert rms_error(gradient, exact.double()) <= (4e-3 if dtype == torch.bfloat16 else 1e-6)
            if part_tokens:
                assert 2 <= tokens / (chosen.part_tokens or 1) <= 3
                assert extra <= 0.8 * whole

    def test_a_part_gives_back_what_it_kept(self):
        """Eight parts take no more memory than two, but for sums of each token."""
        extra = []
        for parts in (2, 8):
            tokens = parts * 256
            hidden, weight, target = head_of(tokens, 16, 2048, torch.float32)
            sequences = tokens // 64
            groups = Groups(torch.arange(sequences) // 2, torch.arange(sequences) % 2 == 0)
            own = dataclasses.replace(
                Plan.of(hidden, weight, grouped=True), part_tokens=256, kept_bytes=256 * 2048 * 4, block_vocab=256
            )

            def step(
                head: tuple[Tensor, Tensor, Tensor] = (hidden, weight, target),
                groups: Groups = groups,
                plan: Plan = own,
            ) -> object:
                hidden, weight, target = head
                out = fastd2o.linear_preference_loss(
                    *(hidden, weight, target, torch.arange(len(target)) // 64, groups),
                    objective="sigmoid",
                    ref_logp=torch.full((len(groups.group),), -500.0),
                    plan=plan,
                )
                return torch.autograd.grad(out.loss, [hidden, weight])

            extra.append(measure_memory(step, warm_up=False).peak - hidden.nbytes - weight.nbytes)
        assert extra[1] - extra[0] <= 0.4 * own.kept_bytes

    def test_of_linear_preference_loss_with_a_share_of_the_columns(self):
        """Choosing columns, and gathering rows of some groups, takes no more than the budget either."""
        tokens, vocab = 2048, 4096
        hidden, weight, target = head_of(tokens, 32, vocab, torch.float32)
        sequence_ids = torch.arange(tokens) // 64
        groups = Groups(torch.arange(32) // 2, torch.arange(32) % 2 == 0)
        group_weight = (torch.arange(16) % 4 > 0).float()
        memory = Plan.of(hidden, weight, grouped=True, memory_budget=0).extra_bytes + int(1.01 * tokens * vocab * 4)

        def step() -> tuple[Tensor, ...]:
            out = fastd2o.linear_preference_loss(
                *(hidden, weight, target, sequence_ids, groups),
                objective="sigmoid",
                ref_logp=torch.full((32,), -500.0),
                group_weight=group_weight,
                vocab_mass_tol=0.3,
                memory_budget=memory,
            )
            return torch.autograd.grad(out.loss, [hidden, weight])

        extra = measure_memory(step, warm_up=False).peak - hidden.nbytes - weight.nbytes
        assert extra <= 1.1 * memory


# --- a citizen of torch.library ---------------------------------------------------------------------------------------


class TestCompiled:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kept_bytes", [9 * 32 * 4, 10**6])
    def test_opcheck(self, kept_bytes: int, dtype: torch.dtype):
        """What is kept has a size that depends on how many tokens count. Its memory is not filled where nothing counts
        on it, so that two runs are alike."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(9, 8, generator=generator).requires_grad_()
        weight = torch.randn(50, 8, generator=generator).requires_grad_()
        target = torch.randint(50, (9,), generator=generator)
        target[2] = -100
        options = (1.0, None, 1.0, -100, "recompute", 4, 16, dtype, "torch", False, kept_bytes, True, False, False)
        results = torch.library.opcheck(torch.ops.fastd2o.logodds, (hidden, weight, None, target, *options))
        assert set(results.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("memory_budget", [None, 0, 10**8])
    @every_backend
    def test_a_step_compiles_without_a_graph_break(self, backend: str, memory_budget: int | None):
        torch._dynamo.reset()
        case = make_case(9, 8, 61, torch.float32)
        leaves = tensors(case)

        def step(hidden: Tensor, weight: Tensor) -> Tensor:
            options: dict[str, Any] = {"memory_budget": memory_budget, "backend": backend}
            return fastd2o.linear_logprob(hidden * 2, weight, case.target, **options).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        arguments = (leaves["hidden"], leaves["weight"])
        results = [(loss := each(*arguments), *torch.autograd.grad(loss, arguments)) for each in (step, compiled)]
        torch.testing.assert_close(*results)

    def test_fake_tensors_pass_through(self):
        with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()):
            hidden = torch.empty(2, 5, 16, requires_grad=True)
            weight = torch.empty(1024, 16, requires_grad=True)
            out = fastd2o.linear_logprob(hidden, weight, torch.empty(2, 5, dtype=torch.int64), memory_budget=10**8)
            assert (out.shape, out.dtype) == ((2, 5), torch.float32)


# --- bad input --------------------------------------------------------------------------------------------------------


class TestBadInput:
    @pytest.mark.parametrize(
        ("memory_budget", "kind", "message"),
        [
            (True, TypeError, r"memory_budget is a bool: expected bytes, or a share in \(0, 1\]"),
            ("1GiB", TypeError, "memory_budget is a str: expected bytes"),
            (torch.tensor(5), TypeError, "memory_budget is a Tensor: expected bytes"),
            (-1, ValueError, "memory_budget=-1 must not be negative"),
            (-0.5, ValueError, "memory_budget=-0.5 must not be negative"),
            (float("nan"), ValueError, "memory_budget=nan"),
            (float("inf"), ValueError, "memory_budget=inf"),
            (1.5, ValueError, r"memory_budget=1.5 is neither a whole number of bytes nor a share .* Fix: 2 \* 1024"),
            (2.0, ValueError, r"memory_budget=2.0 is fewer than 1,024 bytes. Fix: a float for a share .* 2 \* 1024"),
        ],
    )
    @pytest.mark.parametrize("trained", [True, False])
    def test_of_a_budget(self, trained: bool, memory_budget: Any, kind: type[Exception], message: str):
        case = make_case(5, 8, 61)
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trained)
        for operator in (fastd2o.linear_logprob, fastd2o.linear_logodds):
            with pytest.raises(kind, match=message):
                operator(hidden, weight, case.target, memory_budget=memory_budget)
        with pytest.raises(kind, match=message):
            Plan.of(hidden, weight, memory_budget=memory_budget)

    def test_a_plan_and_a_budget(self):
        case = make_case(5, 8, 61)
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        own = Plan.of(hidden, weight, memory_budget=10**6)
        fastd2o.linear_logprob(hidden, weight, case.target, plan=own)
        with pytest.raises(
            ValueError, match=r"plan and memory_budget are both given.* Fix: leave one out, or Plan.of\("
        ):
            fastd2o.linear_logprob(hidden, weight, case.target, plan=own, memory_budget=0)

    def test_cringe_has_nothing_to_keep(self):
        case = make_case(5, 8, 61)
        with pytest.raises(TypeError, match="memory_budget"):
            fastd2o.linear_cringe(case.hidden, case.weight, case.target, memory_budget=10**6)  # type: ignore[call-arg]
