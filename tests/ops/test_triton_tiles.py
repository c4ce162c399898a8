"""``kernels/triton/tiles.py`` against TorchTileOps in float64: in Triton's interpreter, or on the GPU that is there."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastd2o.ops.tile_ops import FoldState, LogitTransform, StatisticsState, TopKState
from fastd2o.ops.torch_tile_ops import TorchTileOps

pytest.importorskip("triton")

from fastd2o.kernels import tiles
from fastd2o.kernels.tiles import DrawConfig, RowConfig
from fastd2o.ops.triton_tile_ops import TritonTileOps

# The interpreter works out both sides of a choice.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(-0.5, None, 2.0), LogitTransform(0.7, 20.0, 1.3)]
# Exponents of up to 30 times a float32's rounding, and sums of some hundred terms.
RTOL = 64 * torch.finfo(torch.float32).eps
# Rows become several blocks already when they are short.
SMALL = RowConfig(deep=2, lanes=16, num_warps=1)


@dataclass(frozen=True)
class Layout:
    """``[tokens, columns]`` in memory: elements before the first row and between rows."""

    tokens: int
    columns: int
    before: int = 0
    between: int = 0

    def tile(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in a tile of this layout; all around it lies a number that nobody could miss."""
        stride = self.columns + self.between
        memory = torch.full((self.before + self.tokens * stride + 16,), 12345.0, dtype=dtype, device=DEVICE)
        tile = memory[self.before :].as_strided((self.tokens, self.columns), (stride, 1))
        return tile.copy_(values)

    def surroundings(self, tile: Tensor) -> Tensor:
        """What lies around a tile."""
        memory = tile.as_strided((self.before + self.tokens * (self.columns + self.between) + 16,), (1,), 0).clone()
        memory[self.before :].as_strided(tile.shape, tile.stride()).fill_(12345.0)
        return memory


LAYOUTS = [Layout(5, 64), Layout(5, 37, before=3, between=5), Layout(4, 1), Layout(3, 211, between=1)]


def logits_like(layout: Layout, seed: int = 0) -> Tensor:
    """Logits a few of which are -inf, the last row's all."""
    generator = torch.Generator().manual_seed(seed)
    values = 4 * torch.randn(layout.tokens, layout.columns, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.1] = -torch.inf
    if layout.tokens > 1:
        values[-1] = -torch.inf
    return values.to(DEVICE)


def targets_like(layout: Layout, vocab_start: int) -> Tensor:
    """In the first column, the last, the middle, outside on either side."""
    inside = torch.tensor([0, layout.columns - 1, layout.columns // 2, -1, layout.columns], device=DEVICE)
    return (vocab_start + inside[: layout.tokens]).unsqueeze(1)


def fold_state(tokens: int, dtype: torch.dtype, statistics: bool) -> FoldState:
    """Before the first tile, with a column between rows, as a slice of a wider tensor has."""

    def column(value: float, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full((tokens, 3), value, dtype=dtype, device=DEVICE)[:, 1:2]

    extra = StatisticsState(column(0.0), column(0, torch.int64), column(0.0)) if statistics else None
    return FoldState(column(-torch.inf), column(0.0), column(0.0), extra)


def assert_states_equal(actual: FoldState, expected: FoldState) -> None:
    def close(name: str, one: Tensor, other: Tensor) -> None:
        # Sums of terms of either sign are as precise as their largest.
        torch.testing.assert_close(
            one.double(), other.double(), rtol=RTOL, atol=2e-5, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )

    close("max", actual.max, expected.max)
    close("sum", actual.sum, expected.sum)
    close("target_logit", actual.target_logit, expected.target_logit)
    if actual.statistics and expected.statistics:
        close("weighted", actual.statistics.weighted, expected.statistics.weighted)
        close("total", actual.statistics.total, expected.statistics.total)
        assert torch.equal(actual.statistics.argmax, expected.statistics.argmax)


# ---- fold -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "negative", "softcap"])
@pytest.mark.parametrize("config", [None, SMALL], ids=["one block", "blocks"])
def test_fold_of_two_tiles(layout: Layout, transform: LogitTransform, config: RowConfig | None) -> None:
    """With statistics and weights, in place."""
    reference = TorchTileOps(transform, torch.float64)
    state, expected = (fold_state(layout.tokens, dtype, True) for dtype in (torch.float32, torch.float64))
    target = targets_like(layout, 100)
    for seed, vocab_start in ((0, 100), (1, 100 + layout.columns)):
        raw = logits_like(layout, seed)
        tile, exact = layout.tile(raw, torch.float32), raw.double()
        around = layout.surroundings(tile)
        rescale = tiles.fold(tile, target, vocab_start, state, transform, tile, config=config)
        expected_rescale = reference.fold(exact, target, vocab_start, expected, exact)
        assert_states_equal(state, expected)
        torch.testing.assert_close(rescale.double(), expected_rescale, rtol=RTOL, atol=1e-30)
        torch.testing.assert_close(tile.double(), exact, rtol=RTOL, atol=1e-6)
        assert torch.equal(layout.surroundings(tile), around)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weights_dtype"),
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [None, SMALL], ids=["one block", "blocks"])
def test_fold_of_every_dtype(
    statistics: bool, dtype: torch.dtype, weights_dtype: torch.dtype | None, config: RowConfig | None
) -> None:
    layout, transform = Layout(4, 83, before=1), TRANSFORMS[2]
    raw = logits_like(layout).to(dtype)
    tile, target = layout.tile(raw, dtype), targets_like(layout, 0)
    state, expected = (fold_state(layout.tokens, of, statistics) for of in (torch.float32, torch.float64))
    weights = None
    if weights_dtype is not None:
        weights = tile if weights_dtype == dtype else layout.tile(torch.zeros(4, 83), weights_dtype)
    tiles.fold(tile, target, 0, state, transform, weights, config=config)
    exact = raw.double()
    TorchTileOps(transform, torch.float64).fold(exact, target, 0, expected, exact)
    assert_states_equal(state, expected)
    if weights is not None:
        eps = torch.finfo(weights.dtype).eps
        torch.testing.assert_close(weights.double(), exact, rtol=max(RTOL, eps), atol=1e-6)
    if weights is not tile:
        assert torch.equal(tile, raw)


def test_equal_maxima_give_the_first_column() -> None:
    raw = torch.zeros(3, 70, device=DEVICE)
    raw[0, [17, 40, 69]] = 5.0
    raw[1, 0] = 5.0  # the target, which does not count
    target = torch.tensor([[0], [0], [1]], device=DEVICE)
    state = fold_state(3, torch.float32, True)
    for vocab_start in (7, 77):
        tiles.fold(raw, target + 7, vocab_start, state, PLAIN, config=SMALL)
    assert state.statistics is not None
    # The target of the second row is a column of the first tile alone: the second has a larger one.
    assert state.statistics.argmax.flatten().tolist() == [7 + 17, 77, 7]


@pytest.mark.parametrize("config", [None, SMALL], ids=["one block", "blocks"])
def test_nan_is_seen_in_its_row_alone(config: RowConfig | None) -> None:
    raw = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    raw[1, 33] = torch.nan
    raw[2, 5] = torch.nan  # the target's own
    raw[3] = torch.nan
    target = torch.tensor([[3], [3], [5], [100]], device=DEVICE)
    state = fold_state(4, torch.float32, True)
    for vocab_start in (0, 50):  # and does not get lost
        tiles.fold(raw if vocab_start == 0 else raw.nan_to_num(), target, vocab_start, state, PLAIN, config=config)
    assert state.lse_others.isnan().flatten().tolist() == [False, True, False, True]
    assert state.target_logit.isnan().flatten().tolist() == [False, False, True, False]
    assert state.statistics is not None
    assert state.statistics.total.isnan().flatten().tolist() == [False, True, True, True]


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_logits_of_any_size(size: float) -> None:
    raw = size * torch.randn(3, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target = torch.tensor([[0], [50], [89]], device=DEVICE)
    state, expected = (fold_state(3, dtype, True) for dtype in (torch.float32, torch.float64))
    tiles.fold(raw, target, 0, state, PLAIN, config=SMALL)
    TorchTileOps(PLAIN, torch.float64).fold(raw.double(), target, 0, expected)
    torch.testing.assert_close(state.lse_others.double(), expected.lse_others, rtol=RTOL, atol=1e-6)
    assert_states_equal(state, expected)


def test_what_a_mask_has_made_of_logits() -> None:
    """The smallest float32, in whole blocks: sums relative to it overflow when a larger logit comes, and count for
    nothing."""
    raw = torch.full((2, 96), torch.finfo(torch.float32).min, device=DEVICE)
    raw[0, [40, 90]] = torch.tensor([1.0, 2.0], device=DEVICE)
    target = torch.tensor([[0], [200]], device=DEVICE)
    state, expected = (fold_state(2, dtype, True) for dtype in (torch.float32, torch.float64))
    for vocab_start in (0, 96):
        tiles.fold(raw, target, vocab_start, state, PLAIN, config=SMALL)
        TorchTileOps(PLAIN, torch.float64).fold(raw.double(), target, vocab_start, expected)
    assert state.statistics is not None
    assert expected.statistics is not None
    torch.testing.assert_close(state.lse_others.double(), expected.lse_others, rtol=RTOL, atol=0)
    torch.testing.assert_close(state.statistics.weighted.double(), expected.statistics.weighted, rtol=RTOL, atol=1e-6)
    assert torch.equal(state.statistics.argmax, expected.statistics.argmax)


# ---- grad -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "negative", "softcap"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_grad(layout: Layout, transform: LogitTransform, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    raw, target = logits_like(layout), targets_like(layout, 30)
    generator = torch.Generator().manual_seed(2)
    coef = torch.randn(layout.tokens, 3, generator=generator).to(DEVICE)[:, :1]
    reference, expected_state = TorchTileOps(transform, torch.float64), fold_state(layout.tokens, torch.float64, False)
    reference.fold(raw.double(), target, 30, expected_state)
    lse_others = expected_state.lse_others.float()
    tile = layout.tile(raw, dtypes[0])
    in_place = dtypes[0] == dtypes[1]
    out = tile if in_place else layout.tile(torch.zeros_like(raw), dtypes[1])
    around = layout.surroundings(out)
    tiles.grad(tile, target, 30, lse_others, coef, out, transform, config=SMALL)
    expected = torch.empty_like(raw, dtype=torch.float64)
    reference.grad(raw.double(), target, 30, lse_others.double(), coef.double(), expected)
    # Small numbers of float16 are rounded to multiples of 6e-8.
    torch.testing.assert_close(
        out.double(), expected, rtol=max(RTOL, torch.finfo(dtypes[1]).eps), atol=1e-30 if in_place else 6e-8
    )
    assert torch.equal(layout.surroundings(out), around)
    if not in_place:
        assert torch.equal(tile, raw)


def test_a_row_without_a_coefficient_is_not_read() -> None:
    raw = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    raw[1] = torch.nan
    target = torch.tensor([[0], [50], [69]], device=DEVICE)
    zeros = torch.zeros(3, 1, device=DEVICE)
    tiles.grad(raw, target, 0, torch.full_like(zeros, torch.nan), zeros, raw, PLAIN)
    assert torch.equal(raw, torch.zeros_like(raw))


# ---- topk -----------------------------------------------------------------------------------------------------------


def topk_of(parts: list[tuple[int, Tensor]], target: Tensor, k: int, transform: LogitTransform) -> TopKState:
    """The state after tiles at these columns."""
    tokens = len(parts[0][1])
    wide = TopKState.empty(tokens + 2, k, parts[0][1], torch.float32)
    top = TopKState(wide.values[1:-1], wide.index[1:-1])
    for vocab_start, raw in parts:
        tiles.topk(raw, target, vocab_start, top, transform, config=SMALL)
    assert (wide.values[[0, -1]] == -torch.inf).all()
    assert (wide.index[[0, -1]] == 0).all()
    return top


def ordered(top: TopKState) -> tuple[Tensor, Tensor]:
    """By logit, NaN first, equal ones by column."""
    index, by_column = top.index.sort(dim=1)
    values, by_value = top.values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, by_value)


def best_columns(raw: Tensor, target: Tensor, k: int, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """The k best of whole rows, by a stable sort, in float32."""
    z = TorchTileOps(transform, torch.float32)._transformed(raw.float(), keep=True).clone()
    z.scatter_(1, target, -torch.inf)
    values, index = z.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "negative", "softcap"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_topk_whatever_the_tiles(k: int, transform: LogitTransform) -> None:
    generator = torch.Generator().manual_seed(k)
    raw = 4 * torch.randn(3, 101, generator=generator)
    raw[1] = raw[1].round()  # many are equal
    raw[2] = 0.0  # all are
    raw = raw.to(DEVICE)
    target = torch.tensor([[100], [3], [0]], device=DEVICE)
    values, index = best_columns(raw, target, k, transform)
    whole = ordered(topk_of([(0, raw)], target, k, transform))
    torch.testing.assert_close(whole[0], values, rtol=RTOL, atol=1e-6)
    assert torch.equal(whole[1], index)
    pieces = [(60, raw[:, 60:]), (0, raw[:, :7]), (7, raw[:, 7:60])]
    assert all(torch.equal(a, b) for a, b in zip(ordered(topk_of(pieces, target, k, transform)), whole, strict=True))


def test_topk_of_16_bits_leaves_its_tile_alone() -> None:
    layout = Layout(3, 45, before=3, between=2)
    raw = logits_like(layout).half()
    tile, target = layout.tile(raw, torch.float16), targets_like(layout, 0)
    top = TopKState.empty(3, 5, raw, torch.float32)
    tiles.topk(tile, target, 0, top, PLAIN)
    expected = TopKState.empty(3, 5, raw, torch.float32)
    TorchTileOps(PLAIN, torch.float32).topk(raw.float(), target, 0, expected)
    assert torch.equal(ordered(top)[0], expected.values)
    assert torch.equal(tile, raw)


def test_topk_of_few_of_nan_and_of_nothing() -> None:
    raw = torch.full((4, 40), -torch.inf, device=DEVICE)
    raw[0, [2, 9]] = torch.tensor([-3e38, 1.0], device=DEVICE)
    raw[1, 5] = 7.0  # the target
    raw[2] = 1.0
    raw[2, 33] = torch.nan
    raw[3, :7] = torch.nan  # more than there is room for
    target = torch.tensor([[90], [5], [0], [0]], device=DEVICE)
    values, index = ordered(topk_of([(0, raw)], target, 4, PLAIN))
    assert values[0].tolist() == pytest.approx([1.0, -3e38, -torch.inf, -torch.inf])
    assert index[0, :2].tolist() == [9, 2]
    assert values[1].tolist() == [-torch.inf] * 4
    assert values[2, 0].isnan()
    assert values[2, 1:].tolist() == [1.0] * 3
    assert sorted(index[2].tolist()) == [1, 2, 3, 33]
    assert values[3].isnan().all()
    assert sorted(index[3].tolist()) == [1, 2, 3, 4]


# ---- draw -----------------------------------------------------------------------------------------------------------


def candidates(tokens: int, k: int, seed: int) -> TopKState:
    """In no order, some equal, some at -inf, all of the last token's."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(tokens, k, generator=generator)
    values[::3] = values[::3].round()
    values[torch.rand(values.shape, generator=generator) < 0.1] = -torch.inf
    values[-1] = -torch.inf
    index = torch.stack([torch.randperm(50000, generator=generator)[:k] for _ in range(tokens)])
    return TopKState(values.to(DEVICE), index.to(DEVICE))


SEEDS = [0, 1, -1, 17, 2**31, 2**32 + 5, -(2**63), 2**63 - 1, 2**63 + 11, 2**64 - 1]


@pytest.mark.parametrize("k", [1, 5, 9, 64])
def test_draws_are_those_of_every_backend(k: int) -> None:
    reference = TorchTileOps(PLAIN, torch.float32)
    generator = torch.Generator().manual_seed(k)
    for seed in SEEDS if k == 5 else SEEDS[-2:]:
        top = candidates(25, k, seed % 1000)
        counter = torch.randint(2**62, (25, 2), generator=generator).to(DEVICE)[:, 0]
        positive, logit = tiles.draw(top, seed, counter, config=DrawConfig(tokens=16, num_warps=4))
        expected, expected_logit = reference.draw(top, seed if seed < 2**63 else seed - 2**64, counter)
        assert torch.equal(positive, expected)
        assert torch.equal(logit, expected_logit)
        assert positive[-1] == -1
        assert (positive[:-1] >= 0).any()


def test_draws_follow_the_softmax() -> None:
    top = TopKState(torch.tensor([[0.0, 1.0, -1.0]]).repeat(512, 1), torch.tensor([[4, 5, 6]]).repeat(512, 1))
    top = TopKState(top.values.to(DEVICE), top.index.to(DEVICE))
    positive, _ = tiles.draw(top, 3, torch.arange(512, device=DEVICE), config=DrawConfig(tokens=512, num_warps=4))
    share = torch.stack([(positive == column).double().mean() for column in (4, 5, 6)])
    torch.testing.assert_close(share, top.values[0].double().softmax(0), rtol=0, atol=0.08)


def test_a_nan_is_drawn() -> None:
    values = torch.tensor([[1.0, torch.nan, 2.0]] * 5, device=DEVICE)
    top = TopKState(values, torch.tensor([[4, 5, 6]] * 5, device=DEVICE))
    positive, logit = tiles.draw(top, 0, torch.arange(5, device=DEVICE))
    assert positive.tolist() == [5] * 5
    assert logit.isnan().all()


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    raw, target = torch.empty(shape, device=DEVICE), torch.zeros(shape[0], 1, dtype=torch.int64, device=DEVICE)
    state, top = fold_state(shape[0], torch.float32, True), TopKState.empty(shape[0], 3, raw, torch.float32)
    before = fold_state(shape[0], torch.float32, True)
    assert torch.equal(tiles.fold(raw, target, 0, state, PLAIN, raw), torch.ones(shape[0], 1, device=DEVICE))
    tiles.topk(raw, target, 0, top, PLAIN)
    tiles.grad(raw, target, 0, state.max, state.max, raw, PLAIN)
    assert_states_equal(state, before)
    assert (top.values == -torch.inf).all()
    positive, logit = tiles.draw(top, 0, target.squeeze(1))
    assert positive.tolist() == [-1] * shape[0]
    assert logit.shape == (shape[0],)


def test_what_is_refused() -> None:
    raw, target = torch.zeros(4, 6, device=DEVICE), torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    state = fold_state(4, torch.float32, False)
    with pytest.raises(ValueError, match=r"rows of logits_TN are not contiguous \(stride 4\). Fix: .contiguous"):
        tiles.fold(raw.view(6, 4).t(), target, 0, state, PLAIN)
    with pytest.raises(ValueError, match=r"rows of out_TN are not contiguous"):
        tiles.grad(raw, target, 0, state.max, state.max, torch.zeros(6, 4, device=DEVICE).t(), PLAIN)
    with pytest.raises(ValueError, match=r'weights_TN is float64.*Fix: backend="torch"'):
        tiles.fold(raw, target, 0, state, PLAIN, raw.double())
    with pytest.raises(ValueError, match=r"k=65, the kernels take 1 to 64"):
        tiles.topk(raw, target, 0, TopKState.empty(4, 65, raw, torch.float32), PLAIN)
    top = TopKState(torch.zeros(3, 4, device=DEVICE).t(), torch.zeros(4, 3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=r"rows of values are not contiguous"):
        tiles.draw(top, 0, target.squeeze(1))


def test_two_runs_give_the_same_bits() -> None:
    layout = Layout(4, 150)
    raw, target = logits_like(layout), targets_like(layout, 0)

    def run() -> list[Tensor]:
        weights = torch.empty_like(raw)
        state, top = fold_state(4, torch.float32, True), TopKState.empty(4, 9, raw, torch.float32)
        rescale = tiles.fold(raw, target, 0, state, TRANSFORMS[2], weights, config=SMALL)
        tiles.topk(raw, target, 0, top, TRANSFORMS[2], config=SMALL)
        assert state.statistics is not None
        return [weights, rescale, state.sum, state.statistics.weighted, state.statistics.total, top.values, top.index]

    assert all(torch.equal(one, two) for one, two in zip(run(), run(), strict=True))


def test_the_backend_calls_them() -> None:
    ops, reference = TritonTileOps(PLAIN, torch.float32), TorchTileOps(PLAIN, torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(90, 8, generator=generator)
    bias, target = torch.randn(90, generator=generator).to(DEVICE), torch.arange(6, device=DEVICE).unsqueeze(1)
    results = []
    for one in (ops, reference):
        logits = torch.empty(6, 90, device=DEVICE)
        one.product(logits, hidden.to(DEVICE), weight.to(DEVICE).t(), bias)
        top = TopKState.empty(6, 5, logits, torch.float32)
        one.topk(logits, target, 0, top)
        state = fold_state(6, torch.float32, False)
        weights, gradient = torch.empty_like(logits), torch.empty_like(logits)
        rescale = one.fold(logits.clone(), target, 0, state, weights)
        one.grad(logits, target, 0, state.lse_others, torch.ones(6, 1, device=DEVICE), gradient)
        results.append([*one.draw(top, 5, torch.arange(6, device=DEVICE)), weights, rescale, gradient, state.sum])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=RTOL, atol=1e-6)
