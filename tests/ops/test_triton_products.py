"""The Triton kernels that multiply, against TorchTileOps on float64 logits; interpreted where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from fastd2o.kernels import configs  # noqa: E402
from fastd2o.kernels.configs import ProductConfig  # noqa: E402
from fastd2o.kernels.cringe_forward import cringe_forward  # noqa: E402
from fastd2o.kernels.logprob import logprob_forward, logprob_grad_slab, partition  # noqa: E402
from fastd2o.ops.plan import PARTIAL_BYTES, Plan  # noqa: E402
from fastd2o.ops.tile_ops import FoldState, LogitTransform, StatisticsState, TopKState  # noqa: E402
from fastd2o.ops.torch_tile_ops import TorchTileOps  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not configs.INTERPRETED, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy, of NaN that is meant to be
]

# Small enough that small shapes have several blocks of everything.
CONFIG = ProductConfig(16, 32, 32, 4, 2)
PLAIN = LogitTransform()
BENT = LogitTransform(logit_scale=-1.3, softcap=3.0, temperature=0.7)


class Problem:
    """Inputs of one call. Targets lie in the slab, before it, behind it, and nowhere."""

    def __init__(
        self,
        tokens: int = 37,
        columns: int = 101,
        hidden_size: int = 24,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        transform: LogitTransform = PLAIN,
        vocab_start: int = 20,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.hidden = normal(tokens, hidden_size).to(DEVICE, dtype)
        self.weight = normal(columns, hidden_size).to(DEVICE, dtype)
        self.bias = normal(columns).to(DEVICE) if bias else None
        if self.bias is not None:
            self.bias[columns // 3] = -torch.inf
        target = torch.randint(0, vocab_start + columns + 20, (tokens, 1), generator=generator)
        target[0] = -100
        self.target = target.to(DEVICE)
        self.coef = normal(tokens, 1).to(DEVICE)
        self.transform = transform
        self.vocab_start = vocab_start

    @property
    def reference(self) -> TorchTileOps:
        return TorchTileOps(self.transform, torch.float64)

    def raw(self) -> Tensor:
        raw = self.hidden.double() @ self.weight.double().T
        return raw if self.bias is None else raw + self.bias.double()

    def state(self, dtype: torch.dtype = torch.float32, statistics: bool = False) -> FoldState:
        return FoldState.empty(len(self.hidden), self.hidden, dtype, statistics)

    def folded(self, statistics: bool = False) -> FoldState:
        """By the reference."""
        state = self.state(torch.float64, statistics)
        self.reference.fold(self.raw(), self.target, self.vocab_start, state)
        return state

    def fold(self, state: FoldState, columns: slice = slice(None), config: ProductConfig | None = CONFIG) -> None:
        """By the kernel, all columns or some."""
        bias = None if self.bias is None else self.bias[columns]
        start = self.vocab_start + (columns.start or 0)
        logprob_forward(self.hidden, self.weight[columns], bias, self.target, start, state, self.transform, config)

    def grad(self, lse: Tensor, out: Tensor, config: ProductConfig | None = CONFIG) -> None:
        factors = (self.hidden, self.weight, self.bias)
        logprob_grad_slab(*factors, self.target, self.vocab_start, lse, self.coef, out, self.transform, config)

    def expected_grad(self, lse: Tensor) -> Tensor:
        out = torch.empty_like(self.raw())
        arguments = (self.target, self.vocab_start, lse.double(), self.coef.double(), out)
        self.reference.grad(self.raw(), *arguments)
        return out

    def cringe(
        self, state: FoldState, top: TopKState, columns: slice = slice(None), config: ProductConfig | None = CONFIG
    ) -> None:
        bias = None if self.bias is None else self.bias[columns]
        start = self.vocab_start + (columns.start or 0)
        factors = (self.hidden, self.weight[columns], bias)
        cringe_forward(*factors, self.target, start, state, top, self.transform, config)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """float32 sums of the products of some 50 numbers around 1; relative, where they are larger."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def same_fold(actual: FoldState, expected: FoldState) -> None:
    close(actual.target_logit, expected.target_logit)
    close(actual.max, expected.max)
    close(actual.lse_others, expected.lse_others)
    if expected.statistics is None:
        return
    assert actual.statistics is not None
    close(actual.statistics.weighted / actual.sum, expected.statistics.weighted / expected.sum)
    close(actual.statistics.total, expected.statistics.total, 1e-4)
    assert torch.equal(actual.statistics.argmax, expected.statistics.argmax)


def bits(state: FoldState) -> list[Tensor]:
    extra = state.statistics
    more = [] if extra is None else [extra.weighted, extra.total, extra.argmax]
    return [state.max, state.sum, state.target_logit, *more]


# ---- fold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("transform", "bias", "statistics"),
    [(PLAIN, False, False), (PLAIN, True, True), (BENT, True, False), (BENT, False, True)],
)
def test_forward_folds_slab_after_slab(
    dtype: torch.dtype, transform: LogitTransform, bias: bool, statistics: bool
) -> None:
    problem = Problem(dtype=dtype, transform=transform, bias=bias)
    state = problem.state(statistics=statistics)
    for columns in (slice(0, 40), slice(40, 41), slice(41, 101)):
        problem.fold(state, columns)
    same_fold(state, problem.folded(statistics))


@pytest.mark.parametrize(
    ("tokens", "columns", "hidden_size"),
    [(1, 1, 1), (3, 2, 16), (16, 32, 32), (33, 67, 48), (5, 300, 80), (130, 31, 7)],
)
def test_forward_takes_every_shape(tokens: int, columns: int, hidden_size: int) -> None:
    problem = Problem(tokens, columns, hidden_size, vocab_start=0)
    state = problem.state(statistics=True)
    problem.fold(state, config=None)
    same_fold(state, problem.folded(statistics=True))


@pytest.mark.parametrize("parts", [2, 4])
def test_forward_in_parts(parts: int) -> None:
    problem = Problem(transform=BENT, bias=True)
    state = problem.state(statistics=True)
    problem.fold(state, config=ProductConfig(16, 64, 32, 4, 2, parts))
    same_fold(state, problem.folded(statistics=True))


def test_forward_makes_several_rounds_and_gives_the_same_bits() -> None:
    problem = Problem(tokens=90, columns=171, hidden_size=40)
    plan = partition(90, 171, 40 * 4, configs.multiprocessors(problem.hidden.device), CONFIG)
    assert DEVICE == "cuda" or 6 * plan.splits > 2 * 4, "more items than two rounds of the interpreter's programs"
    first, second = problem.state(statistics=True), problem.state(statistics=True)
    problem.fold(first)
    problem.fold(second)
    same_fold(first, problem.folded(statistics=True))
    for one, other in zip(bits(first), bits(second), strict=True):
        assert torch.equal(one, other)


def test_forward_takes_strides_and_offsets() -> None:
    problem = Problem(hidden_size=24)
    wide = torch.randn(37, 31, device=DEVICE)
    wide[:, 5:29] = problem.hidden
    problem.hidden = wide[:, 5:29]  # neither rows nor their beginnings are aligned
    problem.weight = problem.weight.T.contiguous().T  # columns are contiguous, not rows
    problem.target = torch.cat([problem.target, problem.target + 1], 1)[:, :1]
    floats = torch.full((37, 5), -7.0, device=DEVICE)
    floats[:, 0], floats[:, 1:] = -torch.inf, 0.0
    extra = StatisticsState(floats[:, 3:4], torch.zeros(37, 2, dtype=torch.int64, device=DEVICE)[:, 1:], floats[:, 4:])
    state = FoldState(floats[:, :1], floats[:, 1:2], floats[:, 2:3], extra)
    problem.fold(state)
    same_fold(state, problem.folded(statistics=True))


@pytest.mark.parametrize("hidden_size", [24, 40])
def test_descriptors_give_what_pointers_do(hidden_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(hidden_size=hidden_size, bias=True)
    pointers, descriptors = problem.state(), problem.state()
    lse = problem.folded().lse_others.float()
    by_pointers, by_descriptors = torch.empty(2, 37, 101, device=DEVICE)
    for tma, state, out in ((False, pointers, by_pointers), (True, descriptors, by_descriptors)):
        if DEVICE == "cpu":
            monkeypatch.setattr(configs, "has_tma", lambda *_, tma=tma: tma)
        problem.fold(state)
        problem.grad(lse, out)
    for one, other in zip(bits(pointers), bits(descriptors), strict=True):
        close(one, other)
    close(by_pointers, by_descriptors)


def test_a_nan_reaches_the_sum_of_its_token_only() -> None:
    problem = Problem(tokens=20, columns=70)
    problem.hidden[3, 2] = torch.nan
    problem.weight[50, 1] = torch.inf  # of either sign, or NaN, in every token's logits
    state = problem.state()
    problem.fold(state, slice(0, 40))
    assert torch.equal(state.sum.isnan().squeeze(1).nonzero().squeeze(1), torch.tensor([3], device=DEVICE))
    problem.fold(state, slice(40, 70))
    expected = problem.folded()
    assert torch.equal(state.lse_others.isnan(), expected.lse_others.isnan())
    close(state.lse_others, expected.lse_others)


@pytest.mark.parametrize("transform", [PLAIN, BENT])
def test_padding_takes_no_part(transform: LogitTransform) -> None:
    problem = Problem(tokens=20, columns=70, bias=True, transform=transform)
    assert problem.bias is not None
    problem.bias[:] = -torch.inf
    problem.target[5] = problem.vocab_start + 30
    state = problem.state(statistics=True)
    problem.fold(state)
    assert (state.max == -torch.inf).all()
    assert (state.sum == 0).all()
    assert state.target_logit[5] == -torch.inf
    assert state.statistics is not None
    assert (state.statistics.total == 0).all()
    assert (state.statistics.weighted == 0).all()
    problem.bias[60:] = 0.5
    problem.fold(state)
    same_fold(state, problem.folded(statistics=True))


def test_large_logits_do_not_overflow() -> None:
    problem = Problem(transform=LogitTransform(logit_scale=1000.0))
    state = problem.state(statistics=True)
    problem.fold(state)
    same_fold(state, problem.folded(statistics=True))


@pytest.mark.parametrize("ends", [[128], [32, 128]])
def test_what_counts_for_nothing_any_more_may_overflow(ends: list[int]) -> None:
    """A maximum near float32's limit after one near the opposite limit: in another block, in another slab."""
    problem = Problem(tokens=3, columns=128, hidden_size=16)
    problem.hidden.fill_(1.0)
    problem.weight.zero_()
    problem.weight[:, 0] = -2e38
    problem.weight[-1, 0] = 2e38
    problem.weight[1:-1, 0] = -torch.inf
    problem.target.fill_(0)
    state = problem.state(statistics=True)
    for begin, end in zip([0, *ends], ends, strict=False):
        problem.fold(state, slice(begin, end))
    assert state.statistics is not None
    assert state.statistics.weighted.tolist() == [[0.0]] * 3
    assert state.sum.tolist() == [[1.0]] * 3


def test_the_first_of_equal_logits_is_the_argmax() -> None:
    problem = Problem(tokens=70, columns=250, hidden_size=8)
    # Small integers: every logit is exact, and most have equals.
    problem.hidden = problem.hidden.round().clamp(-1, 1)
    problem.weight = problem.weight.round().clamp(-1, 1)
    state = problem.state(statistics=True)
    problem.fold(state)
    # The same logits again, in columns further on.
    problem.vocab_start += 250
    problem.fold(state)
    problem.vocab_start -= 250
    assert state.statistics is not None
    first = best(problem.raw(), problem.target, problem.vocab_start, 1)
    assert state.statistics.argmax.tolist() == first


@pytest.mark.parametrize(("tokens", "columns"), [(0, 5), (5, 0)])
def test_nothing_changes_where_there_is_nothing(tokens: int, columns: int) -> None:
    problem = Problem(tokens=max(tokens, 1), columns=max(columns, 1))
    problem.hidden, problem.weight, problem.target = (
        problem.hidden[:tokens],
        problem.weight[:columns],
        problem.target[:tokens],
    )
    state = problem.state()
    top = TopKState.empty(tokens, 3, problem.hidden, torch.float32)
    problem.fold(state)
    problem.cringe(state, top)
    problem.coef = problem.coef[:tokens]
    problem.grad(state.max, torch.empty(tokens, columns, device=DEVICE))
    assert (state.max == -torch.inf).all()
    assert (top.values == -torch.inf).all()


# ---- grad ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "transform", "bias", "parts"),
    [
        (torch.float32, torch.float32, PLAIN, False, 1),
        (torch.float32, torch.float32, BENT, True, 2),
        (torch.float16, torch.float16, BENT, True, 1),
        (torch.float16, torch.float32, PLAIN, True, 4),
    ],
)
def test_grad_is_that_of_the_reference(
    dtype: torch.dtype, out_dtype: torch.dtype, transform: LogitTransform, bias: bool, parts: int
) -> None:
    problem = Problem(dtype=dtype, transform=transform, bias=bias)
    problem.coef[16:32] = 0.0  # a whole block of 16 tokens
    problem.coef[3] = 0.0
    lse = problem.folded().lse_others.float()
    # Rows of a wider tensor; what is beside them stays.
    wide = torch.full((37, 110), 9.0, dtype=out_dtype, device=DEVICE)
    problem.grad(lse, wide[:, 4:105], ProductConfig(16, 64, 32, 4, 2, parts))
    assert (wide[:, :4] == 9.0).all()
    assert (wide[:, 105:] == 9.0).all()
    out = wide[:, 4:105]
    close(out, problem.expected_grad(lse), 2e-5 if out_dtype == torch.float32 else 2e-3)
    inside = (problem.target >= 20) & (problem.target < 121)
    rows = inside.squeeze(1).nonzero().squeeze(1)
    assert (out[rows, problem.target[rows, 0] - 20] == 0).all()


def test_grad_of_tokens_that_do_not_count_is_zero_whatever_they_are() -> None:
    problem = Problem(tokens=48)
    lse = problem.folded().lse_others.float()
    problem.coef[16:32] = -0.0
    problem.hidden[16:32] = torch.nan
    problem.coef[2], problem.hidden[2], lse[20] = 0.0, torch.inf, torch.nan
    out = torch.full((48, 101), 9.0, device=DEVICE)
    problem.grad(lse, out)
    counted = [row for row in range(48) if row != 2 and not 16 <= row < 32]
    assert (out[16:32] == 0).all()
    assert (out[2] == 0).all()
    close(out[counted], problem.expected_grad(lse)[counted])


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
def test_grad_does_not_multiply_tokens_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    products = []
    dot = interpreter_builder.create_dot

    def counted(*factors: Any) -> Any:
        products.append(factors)
        return dot(*factors)

    monkeypatch.setattr(interpreter_builder, "create_dot", counted)
    problem = Problem(tokens=48, columns=64)
    out = torch.empty(48, 64)
    problem.coef[16:32] = 0.0
    problem.grad(torch.zeros(48, 1), out)
    assert len(products) == 2 * 2, "two blocks of tokens that count, two of columns"


def test_grad_without_any_other_column_is_zero() -> None:
    problem = Problem(tokens=3, columns=20, bias=True, vocab_start=0)
    assert problem.bias is not None
    problem.bias[1:] = -torch.inf
    problem.target[:] = 0
    state = problem.state()
    problem.fold(state)
    out = torch.full((3, 20), 9.0, device=DEVICE)
    problem.grad(state.lse_others, out, None)
    assert (out == 0).all()


# ---- Cringe ----------------------------------------------------------------------------------------------------------


def best(z_TN: Tensor, target_T1: Tensor, vocab_start: int, k: int) -> list[list[int]]:
    """The columns of the k largest, NaN before all, of equals the first; those at -inf, and the target's, never."""
    ranked = []
    for row, target in zip(z_TN.tolist(), target_T1[:, 0].tolist(), strict=True):
        able = [c for c, z in enumerate(row) if z != -math.inf and c + vocab_start != target]
        able.sort(key=lambda c: (0, 0.0, c) if math.isnan(row[c]) else (1, -row[c], c))
        ranked.append([c + vocab_start for c in able[:k]])
    return ranked


def chosen(top: TopKState) -> list[list[int]]:
    return [
        [column for column, value in zip(columns, values, strict=True) if value != -math.inf]
        for columns, values in zip(top.index.tolist(), top.values.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("k", "dtype", "transform", "bias"),
    [(1, torch.float32, PLAIN, True), (3, torch.float16, BENT, True), (5, torch.float32, PLAIN, False)],
)
def test_cringe_finds_the_largest_and_folds(k: int, dtype: torch.dtype, transform: LogitTransform, bias: bool) -> None:
    problem = Problem(tokens=20, dtype=dtype, transform=transform, bias=bias)
    state, top = problem.state(), TopKState.empty(20, k, problem.hidden, torch.float32)
    for columns in (slice(0, 2), slice(2, 45), slice(45, 101)):
        problem.cringe(state, top, columns)
    same_fold(state, problem.folded())
    expected = TopKState.empty(20, k, problem.hidden, torch.float64)
    problem.reference.topk(problem.raw(), problem.target, problem.vocab_start, expected)
    close(top.values, expected.values)
    assert torch.equal(top.index, expected.index)


@pytest.mark.parametrize(("k", "parts"), [(4, 1), (7, 2)])
def test_cringe_keeps_the_first_of_equal_logits(k: int, parts: int) -> None:
    problem = Problem(tokens=18, columns=90)
    # Small integers: every logit is exact, and most have equals.
    problem.hidden = problem.hidden.round().clamp(-1, 1)
    problem.weight = problem.weight.round().clamp(-1, 1)
    top = TopKState.empty(18, k, problem.hidden, torch.float32)
    config = ProductConfig(16, 32, 32, 4, 2, parts)
    for columns in (slice(0, 33), slice(33, 90)):
        problem.cringe(problem.state(), top, columns, config)
    assert chosen(top) == best(problem.raw(), problem.target, problem.vocab_start, k)


def test_zeros_of_either_sign_are_equal() -> None:
    problem = Problem(tokens=2, columns=40)
    problem.hidden[:] = 0.0
    top = TopKState(torch.full((2, 1), -0.0, device=DEVICE), torch.tensor([[7], [7]], device=DEVICE))
    problem.cringe(problem.state(), top)
    assert (top.index == 7).all()


def test_cringe_with_as_many_candidates_as_there_can_be() -> None:
    problem = Problem(tokens=2, columns=130, hidden_size=8)
    top = TopKState.empty(2, 64, problem.hidden, torch.float32)
    problem.cringe(problem.state(), top)
    assert chosen(top) == best(problem.raw(), problem.target, problem.vocab_start, 64)


def test_cringe_puts_nan_first_and_leaves_infinities_out() -> None:
    problem = Problem(tokens=6, columns=60, bias=True)
    assert problem.bias is not None
    problem.bias[10:] = -torch.inf  # 10 columns are left for 12 places
    problem.bias[4], problem.bias[6] = torch.nan, torch.inf
    problem.target[:] = 25  # column 5 of the slab
    top = TopKState.empty(6, 12, problem.hidden, torch.float32)
    problem.cringe(problem.state(), top)
    columns = best(problem.raw(), problem.target, problem.vocab_start, 12)
    assert all(row[:2] == [24, 26] and len(row) == 9 for row in columns)
    assert chosen(top) == columns
    assert (top.index[:, 9:] == 0).all()


def test_cringe_finds_nan_and_leaves_infinities_out_in_later_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 1)
    problem = Problem(tokens=20, columns=250, hidden_size=8, bias=True)
    assert partition(20, 250, 8 * 4, 1, CONFIG).blocks_per_split == 8
    assert problem.bias is not None
    negative_nan = torch.tensor(-(2**22), dtype=torch.int32).view(torch.float32)
    # The second block of the split has nothing above what the first one had but a NaN.
    problem.bias[:32], problem.bias[32:] = 50.0, -50.0
    problem.bias[40] = negative_nan
    top = TopKState.empty(20, 3, problem.hidden, torch.float32)
    problem.cringe(problem.state(), top)
    assert chosen(top) == best(problem.raw(), problem.target, problem.vocab_start, 3)
    assert (top.index[:, 0] == 60)[problem.target[:, 0] != 60].all()
    # A NaN in the first block, nothing but padding in the second, and room left.
    problem.bias[:] = -torch.inf
    problem.bias[64:76], problem.bias[65] = 0.0, negative_nan
    top = TopKState.empty(20, 16, problem.hidden, torch.float32)
    problem.cringe(problem.state(), top)
    assert chosen(top) == best(problem.raw(), problem.target, problem.vocab_start, 16)
    assert (top.index[:, 12:] == 0).all()


def test_cringe_gives_the_same_bits_twice() -> None:
    problem = Problem(tokens=40, columns=80)
    found = []
    for _ in range(2):
        state, top = problem.state(), TopKState.empty(40, 2, problem.hidden, torch.float32)
        problem.cringe(state, top, config=None)
        found.append([*bits(state), top.values, top.index])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---- what is served, and how -----------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused() -> None:
    problem = Problem(tokens=4, columns=8)
    state, top = problem.state(), TopKState.empty(4, 65, problem.hidden, torch.float32)
    with pytest.raises(ValueError, match="k=65"):
        problem.cringe(state, top)
    with pytest.raises(ValueError, match="no statistics"):
        problem.cringe(problem.state(statistics=True), TopKState(top.values[:, :2], top.index[:, :2]))
    with pytest.raises(ValueError, match=r"out has shape \[4, 9\]"):
        problem.grad(state.max, torch.empty(4, 9, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous rows"):
        problem.grad(state.max, torch.empty(8, 4, device=DEVICE).T)
    problem.bias = torch.zeros(7, device=DEVICE)
    with pytest.raises(ValueError, match=r"bias \[7\]"):
        problem.fold(state)
    problem.weight = problem.weight.half()
    with pytest.raises(ValueError, match=r"weight torch\.float16"):
        problem.fold(state)


@pytest.mark.parametrize("programs", [4, 108, 132, 148])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (8192, 128256), (2048, 128256), (4096, 4096), (129, 151936)])
def test_a_partition_covers_everything_and_wastes_little(programs: int, tokens: int, columns: int) -> None:
    config = ProductConfig(128, 256, 64, 8, 4)
    plan = partition(tokens, columns, 8192, programs, config)
    token_blocks, column_blocks = -(-tokens // 128), -(-columns // 256)
    assert plan.splits * plan.blocks_per_split >= column_blocks
    assert (plan.splits - 1) * plan.blocks_per_split < column_blocks, "no split is empty"
    assert 1 <= plan.group <= token_blocks
    if token_blocks * column_blocks >= 20 * programs:
        rounds = -(-token_blocks * plan.splits // programs)
        assert rounds * plan.blocks_per_split <= 1.1 * token_blocks * column_blocks / programs + 1


@pytest.mark.parametrize("tokens", [1, 2048, 8192, 16384, 100_000])
@pytest.mark.parametrize("split_bytes", [8, 20, 8 + 8 * 8, 8 + 8 * 64])
def test_what_is_left_to_be_merged_is_bounded_and_planned_for(tokens: int, split_bytes: int) -> None:
    config = ProductConfig(128, 128, 64, 8, 4)
    splits = partition(tokens, 128256, 8192, 132, config, split_bytes).splits
    assert splits == 1 or splits * tokens * split_bytes <= PARTIAL_BYTES
    plan = Plan.choose(
        tokens=tokens,
        hidden_size=4096,
        vocab_size=128256,
        algorithm="cringe" if split_bytes > 20 else "forward",
        device="cuda",
        backend="triton",
    )
    assert plan.fused
    assert plan.extra_bytes >= splits * tokens * split_bytes


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch's newer flag, after which reading the older one raises."""
    with torch.backends.flags(fp32_precision="tf32"):
        yield


@pytest.mark.usefixtures("tf32")
def test_the_product_takes_tf32_from_pytorch() -> None:
    problem = Problem()
    state = problem.state()
    problem.fold(state)
    if DEVICE == "cpu":  # the interpreter multiplies float32 as it is
        same_fold(state, problem.folded())
    else:
        close(state.lse_others, problem.folded().lse_others, 5e-3)


def test_only_float32_is_multiplied_in_tf32_where_pytorch_does_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [configs.precision(dtype) for dtype in configs.DTYPES] == ["ieee"] * 3
    with torch.backends.flags(fp32_precision="tf32"):
        assert [configs.precision(dtype) for dtype in configs.DTYPES] == ["tf32", "ieee", "ieee"]
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert configs.precision(torch.float32) == "ieee"


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_ragged_rows_have_smaller_blocks(arch: int) -> None:
    def ragged(factor: Tensor) -> bool:
        return configs.is_ragged(factor, arch >= 90)

    rows = torch.zeros(6, 128, dtype=torch.bfloat16)
    assert rows.data_ptr() % 16 == 0
    assert not ragged(rows)
    assert not ragged(rows[:, 16:80])
    assert ragged(rows[:, 1:65])
    assert ragged(rows.T)
    assert ragged(torch.zeros(6, 65, dtype=torch.bfloat16))
    # Rows of a multiple of 16 bytes: descriptors take them, but Triton does not know it of pointers.
    assert ragged(torch.zeros(6, 72, dtype=torch.bfloat16)) == (arch < 90)
    assert configs.is_ragged(torch.zeros(6, 36), tma=False)  # float32, which without TF32 has pointers everywhere
    for kernel, by_arch in configs.TABLE.items():
        assert configs.table_entry(kernel, arch, torch.bfloat16) == by_arch[arch][16]
        assert configs.table_entry(kernel, arch, torch.bfloat16, ragged=True) == configs.RAGGED[kernel][16]
        assert configs.table_entry(kernel, 0, torch.bfloat16, ragged=True) == by_arch[0][16]


def test_only_the_flag_has_a_call_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    call = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16, shape=(300, 64))
    entry = configs.table_entry("fold", 90, torch.bfloat16)
    favourite = configs.neighbours(entry)[1]
    measured = []
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def milliseconds(config: ProductConfig, trial: Any) -> float:
        assert current[-1] == call.device
        measured.append(config)
        return 1.0 if config == favourite else 2.0

    monkeypatch.setattr(configs, "architecture", lambda _: 90)
    monkeypatch.setattr(configs, "is_ragged", lambda *_: False)
    monkeypatch.setattr(configs, "_milliseconds", milliseconds)
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    def choose() -> ProductConfig:
        arguments: Any = ("fold", call, torch.empty(7, 1), (True,), lambda _: None)
        return configs.choose(*arguments)

    monkeypatch.delenv("FASTD2O_AUTOTUNE", raising=False)
    assert choose() == entry
    assert measured == []
    monkeypatch.setenv("FASTD2O_AUTOTUNE", "1")
    assert choose() == favourite
    assert measured[0] == entry
    count = len(measured)
    assert choose() == favourite
    assert len(measured) == count, "measured once"
