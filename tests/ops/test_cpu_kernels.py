"""``csrc/cpu``: every operator against float64, within intervals derived from float32's roundings.

``U`` is the largest relative error of one rounding. A result that takes n of them, each of the true value times at most
``1 + U``, is off by at most ``n U / (1 - n U)`` of the sum of its terms' sizes. What is not a sum is bounded by an
interval that is carried from step to step: no tolerance here was found by trying.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastd2o
from fastd2o.ops import native
from fastd2o.ops.native_tile_ops import CpuTileOps
from fastd2o.ops.philox import uniform
from fastd2o.ops.tile_ops import FoldState, LogitTransform, StatisticsState, TopKState
from fastd2o.ops.torch_tile_ops import TorchTileOps
from tests.ops.oracle import full_logits, logprob

_UNAVAILABLE = native.unavailable("cpu")
pytestmark = [
    pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE)),
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),  # which torch.backends.mkldnn.flags has nothing to do with
]

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 12345.0
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(scope="module")
def kernels() -> None:
    native.load("cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounded(roundings: float) -> float:
    """By how much of its size a result of so many roundings may be off."""
    return roundings * U / (1 - roundings * U)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN being equal to NaN."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one[~one.isnan()], other[~other.isnan()])


# ---- product_ --------------------------------------------------------------------------------------------------------

LAYOUTS = ["rows", "columns", "rows apart", "columns apart", "every third", "one row"]


def laid_out(values: Tensor, layout: str, offset: int) -> Tensor:
    """The values in memory of this layout, from an offset on. What lies between them is NaN: who reads it shows it."""
    rows, columns = values.shape
    strides = {
        "rows": (columns, 1),
        "columns": (1, rows),
        "rows apart": (columns + 5, 1),
        "columns apart": (1, rows + 3),
        "every third": (3 * columns + 1, 3),
        "one row": (0, 1),
    }[layout]
    memory = values.new_full((offset + 1 + (rows + 1) * strides[0] + (columns + 1) * strides[1],), torch.nan)
    view = memory[offset:].as_strided((rows, columns), strides)
    if layout == "one row" and rows:
        view[0] = values[0]
    else:
        view.copy_(values)
    return view


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def product(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, accumulate: bool = False) -> None:
    CpuTileOps(LogitTransform(), torch.float32).product(out, left, right, bias, accumulate=accumulate)


def exact_product(left: Tensor, right: Tensor, start: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """``start + left @ right`` in float64, and how far sums in float32 may be from it: each of K products is rounded
    once (where there is no fused multiplication), and each addition once."""
    left, right = left.double(), right.double()
    start = torch.as_tensor(start, dtype=torch.float64)
    terms = left.shape[1] + 1
    return start + left @ right, rounded(terms) * (start.abs() + left.abs() @ right.abs())


def sizes(*edges: int) -> st.SearchStrategy[int]:
    return st.sampled_from(edges) | st.integers(1, 9)


# Blocks of 128 rows, which end in blocks of powers of two; panels of 64 columns; up to 512 rows the transposed product.
@settings(max_examples=120)
@given(
    M=sizes(0, 31, 33, 127, 128, 129, 385, 512, 513),
    N=sizes(0, 63, 64, 65, 130, 513, 530),
    K=sizes(31, 32, 33, 100, 256, 257, 1023, 1024, 1025, 1058),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    offsets=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    start=st.sampled_from(["nothing", "bias", "accumulate"]),
    gap=st.integers(0, 2),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    vendor=st.booleans(),
    seed=st.integers(0, 99),
)
@example(129, 65, 1025, torch.bfloat16, ("rows", "columns"), (1, 1), "bias", 1, 1.0, True, 0)
@example(513, 130, 33, torch.bfloat16, ("columns apart", "rows apart"), (1, 3), "accumulate", 1, 1.0, True, 0)
@example(513, 63, 31, torch.float16, ("one row", "one row"), (1, 0), "nothing", 1, 1.0, False, 0)
@example(1, 1, 1, torch.bfloat16, ("every third", "every third"), (1, 1), "accumulate", 0, 1.0, True, 0)
def test_product(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    layouts: tuple[str, str],
    offsets: tuple[int, int],
    start: str,
    gap: int,
    scale: float,
    vendor: bool,
    seed: int,
) -> None:
    """Within the error of float32 sums, the same bits on any number of threads, and not an element beside ``out``."""
    left = laid_out(normal(M, K, seed=seed, dtype=dtype, scale=scale), layouts[0], offsets[0])
    right = laid_out(normal(K, N, seed=seed + 1, dtype=dtype), layouts[1], offsets[1])
    bias = normal(N, seed=seed + 2) if start == "bias" else None
    before = normal(M, N, seed=seed + 3) if start == "accumulate" else torch.full((M, N), torch.nan)
    results = []
    for count in (1, 2, 3):
        memory = torch.full((3 + (M + 1) * (N + gap) + 64,), GUARD)
        out = memory[3:].as_strided((M, N), (N + gap, 1))
        out.copy_(before)
        with threads(count), torch.backends.mkldnn.flags(enabled=vendor):
            product(out, left, right, bias, accumulate=start == "accumulate")
        results.append(out.clone())
        out.fill_(GUARD)
        assert (memory == GUARD).all()
    assert all(torch.equal(results[0], other) for other in results[1:])
    expected, error = exact_product(left, right, {"bias": bias, "accumulate": before}.get(start, 0.0))  # type: ignore[arg-type]
    assert ((results[0].double() - expected).abs() <= error).all()


@settings(max_examples=60)
@given(
    M=st.sampled_from([1, 2, 5, 33, 130]),
    N=st.sampled_from([1, 3, 65, 131]),
    K=st.sampled_from([1, 2, 3, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS[:-1]), st.sampled_from(LAYOUTS[:-1])),
    specials=st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 130), st.integers(0, 130), st.sampled_from([torch.nan, torch.inf, -torch.inf])
        ),
        max_size=4,
    ),
    vendor=st.booleans(),
    seed=st.integers(0, 99),
)
@example(33, 65, 33, torch.bfloat16, ("rows", "columns"), [(True, 32, 32, torch.inf)], True, 0)
@example(33, 65, 33, torch.float32, ("rows", "rows"), [(False, 32, 64, torch.nan)], False, 0)
def test_product_of_nan_and_infinity(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    layouts: tuple[str, str],
    specials: list[tuple[bool, int, int, float]],
    vendor: bool,
    seed: int,
) -> None:
    """They are where arithmetic puts them, in no other row or column, and zeros that fill up a block make none."""
    left, right = normal(M, K, seed=seed, dtype=dtype), normal(K, N, seed=seed + 1, dtype=dtype)
    right[K // 2] = 0  # 0 * inf is NaN
    for in_left, row, column, value in specials:
        factor = left if in_left else right
        factor[row % factor.shape[0], column % factor.shape[1]] = value
    out = torch.zeros(M, N)
    with torch.backends.mkldnn.flags(enabled=vendor):
        product(out, laid_out(left, layouts[0], 0), laid_out(right, layouts[1], 0))
    expected = (left.double().unsqueeze(2) * right.double()).sum(1)
    assert torch.equal(out.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(out[infinite].double(), expected[infinite])
    finite, error = exact_product(left.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0))
    ordinary = expected.isfinite()
    assert ((out.double() - finite).abs() <= error)[ordinary].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_product_of_rows_megabytes_apart(dtype: torch.dtype, layout: str) -> None:
    """Beyond the 32 bits in which the vendor's library counts the bytes of a block."""
    far = 2**22 + 1
    left = torch.empty(2 * far, dtype=dtype).as_strided((2, 40), (far, 1)).copy_(normal(2, 40, seed=0))
    right = laid_out(normal(40, 130, seed=1, dtype=dtype), layout, 0)
    out = torch.empty(2 * far).as_strided((2, 130), (far, 1))
    product(out, left, right)
    expected, error = exact_product(left, right)
    assert ((out.double() - expected).abs() <= error).all()


# ---- intervals -------------------------------------------------------------------------------------------------------

PLAIN = LogitTransform()
TRANSFORMS = [
    PLAIN,
    LogitTransform(-0.5, None, 2.0),
    LogitTransform(1.0, None, 1.7),
    LogitTransform(0.7, 20.0, 1.3),
    LogitTransform(-1.5, 4.0, 0.9),
]
# What the kernels take for 0: exponentials below e^-87.33, the smallest normal number. Below e^-104 float32 has none.
TINY, NOTHING = 1.2e-38, -104.0


def z_of(raw: Tensor, transform: LogitTransform) -> Tensor:
    """The transformed logits by their definition, in float64; padding stays -inf."""
    u = raw.double()
    z = full_logits(u.unsqueeze(-1), u.new_ones(1, 1), None, **vars(transform)).squeeze(-1)
    return z.masked_fill(u == -torch.inf, -torch.inf)


def z_rounding(transform: LogitTransform) -> float:
    """The relative error of a transformed logit.

    Without a cap, the slope is rounded and the product. With one, the argument of tanh is off by two roundings, which
    tanh makes no more of, tanh itself by 2 units in the last place (four roundings), the outer factor and the product
    by one each.
    """
    if transform == PLAIN:
        return 0.0
    return rounded(2) if transform.softcap is None else rounded(8)


def exponential(d: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Between what exp(d) may lie, d <= 0 being known up to an error: the kernels' exponential is off by at most 1.5
    units in the last place, which are three roundings."""
    error = torch.where(d == -torch.inf, 0.0, error)
    low = ((d - error).exp() * (1 - rounded(3)) - TINY).clamp_min(0)
    high = torch.where(d + error < NOTHING, 0.0, (d + error).clamp_max(0).exp() * (1 + rounded(3)) + TINY)
    return low, high


def bent(raw: Tensor, transform: LogitTransform, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The interval times the softcap's bend 4 e / (1 + e)^2, e = exp(-2|x|).

    x is off by two roundings, so e by a factor of 4|x| U in the exponent, and by three roundings; the bend by no more
    than e. 1 + e is rounded once and squared, the square, the quotient and the product with it once each.
    """
    if transform.softcap is None:
        return low, high
    x = (raw.double() * (transform.logit_scale / transform.softcap)).abs()
    bend = x.cosh().square().reciprocal()
    off = (rounded(4) * x).clamp_max(80).nan_to_num(80).exp() * (1 + rounded(8))
    return (low * bend / off - 4 * TINY).clamp_min(0), high * bend * off + 4 * TINY


def stored(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The interval after rounding to a 16-bit dtype, numbers below its normal ones perhaps to 0."""
    if dtype == torch.float32:
        return low, high
    info = torch.finfo(dtype)
    return low * (1 - info.eps / 2) - info.smallest_normal, high * (1 + info.eps / 2) + info.smallest_normal


def assert_within(actual: Tensor, low: Tensor, high: Tensor, what: str) -> None:
    actual = actual.double()
    wrong = ~((low <= actual) & (actual <= high))
    assert not wrong.any(), f"{what}: {actual[wrong][:3]} not in {low[wrong][:3]} to {high[wrong][:3]}"


# ---- fold_ and grad_ -------------------------------------------------------------------------------------------------


def padded_tile(values: Tensor, dtype: torch.dtype, gap: int) -> Tensor:
    """The values in rows with a gap between them; all around lies a number that nobody could miss."""
    tokens, columns = values.shape
    memory = torch.full((3 + (tokens + 1) * (columns + gap) + 32,), GUARD, dtype=dtype)
    tile = memory[3:].as_strided((tokens, columns), (columns + gap, 1))
    return tile.copy_(values)


def assert_surroundings_untouched(tile: Tensor) -> None:
    memory = torch.tensor([], dtype=tile.dtype).set_(tile.untyped_storage())
    outside = torch.ones(len(memory), dtype=torch.bool)
    outside[3:].as_strided(tile.shape, tile.stride()).fill_(False)
    assert (memory[outside] == torch.tensor(GUARD, dtype=tile.dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 33, 64, 501])
@pytest.mark.parametrize("in_place", [False, True])
def test_scaled_weights_are_the_same_bits_as_torchs(dtype: torch.dtype, columns: int, in_place: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    weights = padded_tile(torch.rand(5, columns, generator=generator), dtype, 3)
    # Of the last three rows one counts for nothing, one has left the range, and one is no number.
    scale = torch.cat([torch.randn(2, 1, generator=generator), torch.tensor([[0.0], [torch.inf], [torch.nan]])])
    expected = (weights.float() * scale).to(dtype)
    out = weights if in_place else padded_tile(torch.zeros(5, columns), dtype, 8)
    CpuTileOps(PLAIN, torch.float32).scale(weights, scale, out)
    assert torch.equal(out[:4], expected[:4])
    assert out[4].isnan().all()
    assert_surroundings_untouched(out)
    assert_surroundings_untouched(weights)


def cloned(state: FoldState, dtype: torch.dtype) -> FoldState:
    """With two columns between rows, as a slice of a wider tensor has."""

    def column(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((len(tensor), 3), 7, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        wide[:, 1:2] = tensor
        return wide[:, 1:2]

    extra = state.statistics
    if extra is not None:
        extra = StatisticsState(column(extra.weighted), column(extra.argmax), column(extra.total))
    return FoldState(column(state.max), column(state.sum), column(state.target_logit), extra)


def fold_and_check(
    raw: Tensor,
    target: Tensor,
    vocab_start: int,
    state: FoldState,
    transform: LogitTransform,
    weights_dtype: torch.dtype | None,
    gap: int,
) -> None:
    """Fold a tile into ``state`` and compare with float64, started from the same float32 state."""
    before, expected = cloned(state, torch.float64), cloned(state, torch.float64)
    logits = padded_tile(raw, torch.float32, gap)
    weights = None
    if weights_dtype is not None:
        weights = logits if weights_dtype == torch.float32 else padded_tile(raw * torch.nan, weights_dtype, gap + 1)
    exact = torch.empty(raw.shape, dtype=torch.float64) if weights is not None else None
    factor = CpuTileOps(transform, torch.float32).fold(logits, target, vocab_start, state, weights)
    TorchTileOps(transform, torch.float64).fold(raw.double(), target, vocab_start, expected, exact)
    assert_surroundings_untouched(logits)

    # NaN is where float64 has it: in the row's sums, and at its column.
    seen = expected.sum.isnan()
    assert torch.equal(state.sum.isnan(), seen)
    assert torch.equal(state.target_logit.isnan(), expected.target_logit.isnan())
    if weights is not None and exact is not None:
        nan = raw.isnan() & (torch.arange(raw.shape[1]) + vocab_start != target)
        assert weights[nan].isnan().all()
        assert not (weights.isnan() & ~exact.isnan()).any()
        assert_surroundings_untouched(weights)
    clean = ~seen.squeeze(1)

    rho, columns = z_rounding(transform), raw.shape[1]
    position = torch.arange(columns) + vocab_start
    z = z_of(raw, transform)
    others = z.masked_fill(position == target, -torch.inf)
    new_max = expected.max
    off = rho * new_max.abs().nan_to_num(0, 0, 0)
    assert_within(state.max[clean], (new_max - off)[clean], (new_max + off)[clean], "max")
    known = expected.target_logit.isfinite()
    distance = rho * expected.target_logit.abs() + TINY * (transform != PLAIN)
    assert_within(
        state.target_logit[known],
        (expected.target_logit - distance)[known],
        (expected.target_logit + distance)[known],
        "target_logit",
    )
    assert torch.equal(state.target_logit.isinf(), expected.target_logit.isinf())

    def argument(logit: Tensor) -> tuple[Tensor, Tensor]:
        """``logit - max``, and what is lost of it: the roundings of both, and of the difference."""
        d = logit - torch.where(new_max == -torch.inf, 0.0, new_max)
        return d, rho * logit.abs() + off + rounded(1) * d.abs()

    d_old = before.max - torch.where(new_max == -torch.inf, 0.0, new_max)
    old_low, old_high = exponential(d_old, off + rounded(1) * d_old.abs())
    assert_within(factor[clean], old_low[clean], old_high[clean], "rescale")
    d, error = argument(others)
    low, high = exponential(d, error)
    many = rounded(columns + 3)
    sum_low = (low.sum(1, keepdim=True) + before.sum * old_low) * (1 - many)
    sum_high = (high.sum(1, keepdim=True) + before.sum * old_high) * (1 + many)
    assert_within(state.sum[clean], sum_low[clean], sum_high[clean], "sum")
    if weights is not None:
        weight_low, weight_high = stored(*bent(raw, transform, low, high), weights.dtype)
        weight_low, weight_high = (side.masked_fill(position == target, 0.0) for side in (weight_low, weight_high))
        ordinary = clean.unsqueeze(1) & ~raw.isnan()  # the target's may be NaN, and bends its weight of 0 to NaN
        assert_within(weights[ordinary], weight_low[ordinary], weight_high[ordinary], "weights")

    extra, old, right = state.statistics, before.statistics, expected.statistics
    if extra is None or old is None or right is None:
        return
    error = torch.where(d == -torch.inf, 0.0, error)
    least = torch.where(high > 0, high * (d - error), 0.0).sum(1, keepdim=True)
    most = torch.where(low > 0, low * (d + error).clamp_max(0), 0.0).sum(1, keepdim=True)
    # What was gathered moves along: (weighted + sum (old max - new max)) factor, each step of it rounded.
    d_error = off + rounded(1) * d_old.abs()
    step_low = torch.where(before.sum > 0, before.sum * (d_old - d_error), 0.0) * (1 + rounded(2))
    step_high = torch.where(before.sum > 0, before.sum * (d_old + d_error).clamp_max(0), 0.0) * (1 - rounded(2))
    least += torch.where(old_high > 0, (old.weighted + step_low) * old_high, 0.0)
    most += torch.where(old_low > 0, (old.weighted + step_high) * old_low, 0.0)
    assert_within(extra.weighted[clean], (least * (1 + many))[clean], (most * (1 - many))[clean], "weighted")

    terms = z.masked_fill(z == -torch.inf, 0.0)
    size = terms.abs().sum(1, keepdim=True) + old.total.abs()
    assert extra.total[size.isnan()].isnan().all()
    in_range = size < LARGEST  # or a sum on the way may overflow
    slack = (rounded(columns + 1) + rho) * size
    assert_within(extra.total[in_range], (right.total - slack)[in_range], (right.total + slack)[in_range], "total")

    if transform == PLAIN:
        assert torch.equal(extra.argmax[clean], right.argmax[clean])
        return
    for token in torch.nonzero(clean).squeeze(1).tolist():
        top, column = new_max[token].item(), int(extra.argmax[token].item()) - vocab_start
        chosen = others[token, column].item() if 0 <= column < columns else before.max[token].item()
        assert chosen >= top - 2 * rho * abs(top), "argmax"
        assert 0 <= column < columns or extra.argmax[token] == old.argmax[token]


def made_logits(tokens: int, columns: int, magnitude: float, padding: float, seed: int) -> Tensor:
    """Logits of this size, a share of them -inf, and many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(tokens, columns, generator=generator).clamp(-1, 1) * magnitude
    again = torch.rand(raw.shape, generator=generator) < 0.2
    raw = torch.where(again, raw[:, :1], raw)
    return raw.masked_fill(torch.rand(raw.shape, generator=generator) < padding, -torch.inf)


@st.composite
def walks(draw: st.DrawFn) -> dict[str, Any]:
    """Some tiles of one vocabulary, and a target for every token: inside, at an edge, or in no tile."""
    widths = draw(
        st.lists(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 63, 64, 65, 128, 131, 300]), min_size=1, max_size=3)
    )
    tokens, first, end = draw(st.integers(1, 5)), draw(st.sampled_from([0, 1, 50257, 2**32 - 2000])), sum(widths)
    seed, magnitude = draw(st.integers(0, 999)), st.sampled_from([0.1, 3.0, 30.0, 1e4, 3e38])
    share = st.sampled_from([0.0, 0.0, 0.3, 1.0])
    tiles = [made_logits(tokens, width, draw(magnitude), draw(share), seed + i) for i, width in enumerate(widths)]
    target = st.integers(-1, end) | st.sampled_from([-(2**63), 2**63 - 1 - first, 0, end - 1])
    targets = torch.tensor(draw(st.lists(target, min_size=tokens, max_size=tokens)))
    special = draw(
        st.none() | st.tuples(st.integers(0, 4), st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf]))
    )
    if special is not None:
        row, column, value = special
        tile = tiles[column % len(tiles)]
        tile[row % tokens, column % tile.shape[1]] = value
    return {"tiles": tiles, "first": first, "target": (targets + first).unsqueeze(1)}


@settings(max_examples=120)
@given(
    walk=walks(),
    transform=st.sampled_from(TRANSFORMS),
    weights_dtype=st.sampled_from([None, *DTYPES]),
    statistics=st.booleans(),
    gap=st.integers(0, 3),
)
def test_fold(
    walk: dict[str, Any],
    transform: LogitTransform,
    weights_dtype: torch.dtype | None,
    statistics: bool,
    gap: int,
) -> None:
    """Several tiles, each from the state that the one before it has left."""
    tokens, start = len(walk["target"]), walk["first"]
    state = cloned(FoldState.empty(tokens, walk["target"], torch.float32, statistics), torch.float32)
    for raw in walk["tiles"]:
        fold_and_check(raw, walk["target"], start, state, transform, weights_dtype, gap)
        start += raw.shape[1]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [1, 16, 37, 150])
def test_fold_sees_nan_in_every_column(columns: int, value: float, transform: LogitTransform) -> None:
    """In every place of a register, and in the rest of a row; where it is the target's, the sums do without it."""
    raw = normal(columns, columns, seed=columns).fill_diagonal_(value)
    for target in (torch.full((columns, 1), -1), torch.arange(columns).unsqueeze(1)):
        state = FoldState.empty(columns, raw, torch.float32, True)
        fold_and_check(raw, target, 0, state, transform, torch.float32, 0)
        assert state.statistics is not None
        # A cap holds an infinity, and a negative scale makes padding of it.
        seen = value != torch.inf or (transform.softcap is None and transform.slope > 0)
        assert torch.equal(state.sum.isnan(), (target == -1) & seen)
        assert torch.equal(state.statistics.total.isfinite(), torch.full((columns, 1), not seen))


def test_an_old_sum_that_counts_for_nothing_leaves_no_nan() -> None:
    """The statistics of smaller logits vanish beside a huge one: 0 times an overflow is the 0 it tends to."""
    state = FoldState.empty(1, torch.empty(0), torch.float32, True)
    for start, raw in ((0, torch.zeros(1, 9)), (9, torch.full((1, 9), 3e38)), (18, torch.full((1, 9), -3e38))):
        fold_and_check(raw, torch.tensor([[-1]]), start, state, PLAIN, None, 0)
    assert state.statistics is not None
    assert (state.sum.item(), state.statistics.weighted.item()) == (9.0, 0.0)


def test_fold_of_no_columns_or_tokens_changes_nothing() -> None:
    for tokens, columns in ((3, 0), (0, 5)):
        maximum, total, logit = (torch.full((tokens, 1), value) for value in (2.0, 3.0, 4.0))
        state = FoldState(maximum, total, logit)
        target = torch.zeros(tokens, 1, dtype=torch.int64)
        factor = CpuTileOps(PLAIN, torch.float32).fold(torch.empty(tokens, columns), target, 0, state)
        assert [state.max.tolist(), state.sum.tolist(), state.target_logit.tolist()] == [
            [[x]] * tokens for x in (2, 3, 4)
        ]
        assert torch.equal(factor, torch.ones(tokens, 1))


def test_the_first_of_equals_is_the_argmax() -> None:
    raw = torch.zeros(1, 400)
    raw[0, [399, 321, 320, 100, 17]] = 2.0
    state = FoldState.empty(1, raw, torch.float32, True)
    assert state.statistics is not None
    for vocab_start in (1000, 2000, 0):
        CpuTileOps(PLAIN, torch.float32).fold(raw.clone(), torch.tensor([[1017]]), vocab_start, state)
        assert state.statistics.argmax.item() == 1100  # not the target at 1017, and a later tile does not beat an equal


@settings(max_examples=100)
@given(
    walk=walks(),
    transform=st.sampled_from(TRANSFORMS),
    out_dtype=st.sampled_from(DTYPES),
    coefs=st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-3]), min_size=5, max_size=5),
    gap=st.integers(0, 3),
)
def test_grad(
    walk: dict[str, Any], transform: LogitTransform, out_dtype: torch.dtype, coefs: list[float], gap: int
) -> None:
    """After a fold over all tiles. A token whose coefficient is 0 gets zeros, and is not read."""
    ops, target = CpuTileOps(transform, torch.float32), walk["target"]
    coef, start = torch.tensor(coefs[: len(target)]).unsqueeze(1), walk["first"]
    state = FoldState.empty(len(target), target, torch.float32)
    for raw in walk["tiles"]:
        ops.fold(raw.clone(), target, start, state)
        start += raw.shape[1]
    start, lse = walk["first"], state.lse_others
    none = (coef == 0).squeeze(1)
    lse[none] = torch.nan
    for raw in walk["tiles"]:
        raw[none] = torch.nan
        logits = padded_tile(raw, torch.float32, gap)
        out = logits if out_dtype == torch.float32 else padded_tile(raw * torch.nan, out_dtype, gap + 1)
        ops.grad(logits, target, start, lse, coef, out)
        exact = torch.empty(raw.shape, dtype=torch.float64)
        TorchTileOps(transform, torch.float64).grad(raw.double(), target, start, lse.double(), coef.double(), exact)
        own = torch.arange(raw.shape[1]) + start == target
        exact.masked_fill_(none.unsqueeze(1) | own, 0.0)  # whose logit may be NaN
        assert (out[none] == 0).all()
        assert (out[own] == 0).all()
        assert torch.equal(out.isnan(), exact.isnan())
        assert_surroundings_untouched(out)
        if out is not logits:
            assert same(logits, raw)

        z = z_of(raw, transform)
        d = z - torch.where(lse == -torch.inf, 0.0, lse).double()
        low, high = exponential(d, z_rounding(transform) * z.abs() + rounded(1) * d.abs())
        low, high = bent(raw, transform, low, high)
        size = coef.abs().double()
        low, high = stored(low * size * (1 - rounded(2)), high * size * (1 + rounded(2)), out_dtype)
        certain = ~exact.isnan() & ~none.unsqueeze(1) & ~own
        assert_within((out * -coef.sign())[certain], low[certain], high[certain], "grad")
        start += raw.shape[1]


def test_exponential_is_right_to_three_roundings() -> None:
    """exp(x) is 2^n p(r), n = round(x / ln 2). Off are, in units of ``U`` of the result: r by 1/4 (a rounding at half
    its size), p's coefficients by 1/5, its last two additions by 1/2 and 1, its product with a power of two by nothing:
    two in all, and three where multiplication and addition are not one. Below e^-87.33, 0 or right."""
    halves = (torch.arange(-127, 0).double() + 0.5) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    ends = [halves.float(), halves.float().nextafter(torch.tensor(0.0)), -torch.logspace(-40, 2, 5000)]
    dense = -torch.rand(400_000, generator=torch.Generator().manual_seed(0)) * 88
    far = torch.tensor([-87.32, -87.33, -87.34, -88.0, -95.0, -103.9, -104.0, -150.0, -1e4, -1e30, -3e38, -torch.inf])
    x = torch.cat([torch.zeros(1), dense, *ends, far]).unsqueeze(0)
    exact = x.double().exp()
    state, weights, target = FoldState.empty(1, x, torch.float32), x.clone(), torch.tensor([[-1]])
    ops, gradient = CpuTileOps(PLAIN, torch.float32), torch.empty_like(x)
    ops.fold(weights, target, 0, state, weights)  # the maximum is 0: nothing is lost before the exponential
    ops.grad(x, target, 0, torch.zeros(1, 1), torch.tensor([[-1.0]]), gradient)
    for result in (weights.double(), gradient.double()):
        normal = x >= -87.33
        assert ((result - exact).abs() <= 3 * U * exact)[normal].all()
        assert (((result - exact).abs() <= 3 * U * exact) | (result == 0))[~normal].all()
        assert (result[x < NOTHING] == 0).all()
    assert ((state.sum.double() - exact.sum()).abs() <= rounded(x.shape[1] + 3) * exact.sum()).all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_lse_of_many_tiles(transform: LogitTransform) -> None:
    """One number in the end: log-odds of a vocabulary of 20 tiles, whose relative error is that of 20 sums at most."""
    raw = made_logits(7, 20 * 53, 8.0, 0.1, 5)
    target = torch.arange(7).unsqueeze(1) * 170
    state = FoldState.empty(7, raw, torch.float32)
    for start in range(0, raw.shape[1], 53):
        CpuTileOps(transform, torch.float32).fold(raw[:, start : start + 53].clone(), target, start, state)
    z = z_of(raw, transform)
    exact = z.scatter(1, target, -torch.inf).logsumexp(1, keepdim=True)
    largest = z[z > -torch.inf].abs().max()
    # Every exponent is off by the roundings of two logits and of a difference (at most twice the largest), in its own
    # tile and at each of 20 rescalings, where exponential, product and sum add five more.
    error = 21 * (2 * z_rounding(transform) * largest + rounded(1) * 2 * largest + rounded(5)) + rounded(53)
    assert ((state.lse_others.double() - exact).abs() <= error + rounded(2) * (exact.abs() + largest)).all()


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_the_bits(weights_dtype: torch.dtype) -> None:
    transform, raw = TRANSFORMS[3], made_logits(200, 1000, 30.0, 0.1, 0)
    target = torch.arange(200).unsqueeze(1) * 7
    ops, results = CpuTileOps(transform, torch.float32), []
    for count in (1, 2, 3):
        with threads(count):
            state, top = FoldState.empty(200, raw, torch.float32, True), TopKState.empty(200, 9, raw, torch.float32)
            weights, gradient = torch.empty(raw.shape, dtype=weights_dtype), torch.empty(raw.shape, dtype=weights_dtype)
            ops.topk(raw, target, 0, top)
            ops.fold(raw.clone(), target, 0, state, weights)
            ops.grad(raw, target, 0, state.lse_others, torch.full((200, 1), 0.3), gradient)
            assert state.statistics is not None
            sums = [state.max, state.sum, state.statistics.weighted, state.statistics.argmax, state.statistics.total]
            results.append([weights, gradient, top.values, top.index, *sums, *ops.draw(top, 5, torch.arange(200))])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# ---- topk_ and draw --------------------------------------------------------------------------------------------------


def by_rank(state: TopKState) -> tuple[Tensor, Tensor]:
    """Largest first; of equal logits the smaller column first; NaN before all."""
    index, order = state.index.sort(dim=1)
    values, by_value = state.values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, by_value)


@settings(max_examples=100)
@given(walk=walks(), transform=st.sampled_from(TRANSFORMS), k=st.integers(1, 64) | st.sampled_from([65, 400]))
def test_topk(walk: dict[str, Any], transform: LogitTransform, k: int) -> None:
    """Of raw logits exactly the k largest, of equal ones those in the smaller columns. Transformed ones are known up to
    their rounding, and so is the i-th largest of them."""
    tokens, start, target = len(walk["target"]), walk["first"], walk["target"]
    state = TopKState.empty(tokens, k, target, torch.float32)
    for raw in walk["tiles"]:
        logits = padded_tile(raw, torch.float32, 1)
        CpuTileOps(transform, torch.float32).topk(logits, target, start, state)
        assert same(logits, raw)
        start += raw.shape[1]
    values, index = by_rank(state)
    raw = torch.cat([*walk["tiles"], torch.full((tokens, k), -torch.inf)], 1)
    position = torch.arange(raw.shape[1]) + walk["first"]
    z = z_of(raw, transform).masked_fill(position == target, -torch.inf)
    expected, expected_index = (side[:, :k] for side in z.sort(dim=1, descending=True, stable=True))
    finite = expected != -torch.inf
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values == -torch.inf, ~finite)
    assert (index[~finite] == 0).all()
    for row, kept in zip(index, finite, strict=True):
        assert len(row[kept].unique()) == kept.sum()
    index = torch.where(finite, index - walk["first"], 0)
    if transform == PLAIN:
        assert same(values.double(), expected)
        assert torch.equal(index[finite], expected_index[finite])
        return
    largest = z.masked_fill(~z.isfinite(), 0.0).abs().amax(1, keepdim=True)
    for right in (expected, z.gather(1, index)):
        known = finite & right.isfinite()
        off = (z_rounding(transform) * largest).expand_as(right)
        assert_within(values[known], (right - off)[known], (right + off)[known], "values")


def test_topk_keeps_the_smaller_columns_of_equals() -> None:
    state = TopKState.empty(1, 5, torch.empty(0), torch.float32)
    for start in range(0, 600, 200):
        CpuTileOps(PLAIN, torch.float32).topk(torch.ones(1, 200), torch.tensor([[2]]), start, state)
    assert state.index.sort().values.tolist() == [[0, 1, 3, 4, 5]]


def drawn(values: Tensor, index: Tensor, counter: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return CpuTileOps(PLAIN, torch.float32).draw(TopKState(values, index), seed, counter)


COUNTERS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=40)


@given(seed=st.integers(-(2**63), 2**63 - 1), counter=COUNTERS, k=st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_the_draw_among_equals_is_philox(seed: int, counter: list[int], k: int) -> None:
    """Among a power of two of equal logits every probability is exact: the first bits of u choose."""
    counters = torch.tensor(counter)
    index = torch.stack(
        [torch.randperm(1000, generator=torch.Generator().manual_seed(i))[:k] for i in range(len(counter))]
    )
    positive, logit = drawn(torch.full((len(counter), k), -1.5), index, counters, seed)
    choice = (uniform(seed, counters) * k).long()
    assert torch.equal(positive, index.sort(dim=1).values.gather(1, choice.unsqueeze(1)).squeeze(1))
    assert (logit == -1.5).all()


@pytest.mark.parametrize("k", [11, 33, 63])
def test_the_draw_compares_with_all_bits_of_u(k: int) -> None:
    """Among k equal logits each has the probability 1/k, rounded, and these are summed up in float32. Of a million
    counters, those whose u lies within two units in the last place of such a border."""
    counters = torch.arange(2**20) * 2**20 + k
    u = uniform(-5, counters)
    borders = torch.stack(list(itertools.accumulate([torch.tensor(1 / k)] * (k - 1))))
    near = torch.stack([(u - border).abs() <= 2 * 2.0**-24 for border in borders]).any(0)
    counters, choice = counters[near], (borders <= u[near].unsqueeze(1)).sum(1)
    positive, _ = drawn(torch.zeros(len(counters), k), torch.arange(k).repeat(len(counters), 1), counters, -5)
    assert len(counters) > 0
    assert torch.equal(positive, choice)


@settings(max_examples=60)
@given(
    seed=st.integers(-(2**63), 2**63 - 1), k=st.integers(1, 64), tokens=st.integers(0, 300), special=st.integers(0, 9)
)
def test_draw(seed: int, k: int, tokens: int, special: int) -> None:
    """As torch draws in float64, but where u lies within rounding of two candidates' border; in chunks the same."""
    generator = torch.Generator().manual_seed(special)
    values = torch.randn(tokens, k, generator=generator).mul(2).round()  # many are equal
    values[special::3, (k + 1) // 2 :] = -torch.inf
    values[special::7] = -torch.inf
    index = torch.rand(tokens, 1000, generator=generator).argsort(dim=1)[:, :k].contiguous()
    counter = (torch.arange(2 * tokens) * 2**33 + special)[::2]
    positive, logit = drawn(values, index, counter, seed)
    ops = TorchTileOps(PLAIN, torch.float64)
    expected, expected_logit = ops.draw(TopKState(values.double(), index), seed, counter)
    ranked, _ = by_rank(TopKState(values, index))
    some = ranked[:, 0] > -torch.inf
    borders = ranked[some].double().softmax(1).cumsum(1)
    clear = torch.ones(tokens, dtype=torch.bool)
    # A probability is off by its logit's difference, exponential (2 units in the last place) and quotient, and by the
    # roundings of k sums above and below.
    error = (
        rounded(2 * k + ranked[some][:, :1].sub(ranked[some].clamp_min(-90)).abs().max().item() + 6)
        if some.any()
        else 0
    )
    clear[some] = ((borders - uniform(seed, counter)[some].unsqueeze(1)).abs() > error).all(1)
    assert torch.equal(positive[clear], expected[clear])
    assert torch.equal(logit[clear].double(), expected_logit[clear])
    assert (positive[~some] == -1).all()
    taken = (index == positive.unsqueeze(1)) & (values == logit.unsqueeze(1))
    assert taken[some].any(1).all()
    pieces = [drawn(*piece, seed) for piece in zip(values.split(64), index.split(64), counter.split(64), strict=True)]
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), positive)
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), logit)


def test_the_draw_sees_nan() -> None:
    positive, logit = drawn(
        torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), torch.tensor([[4, 9]] * 2), torch.arange(2), 0
    )
    assert positive[0] == 9
    assert logit.isnan().tolist() == [True, False]


# ---- what is refused -------------------------------------------------------------------------------------------------


def good(op: str) -> dict[str, Any]:
    """Arguments that the operator takes, in its order; 4 tokens, 10 columns."""
    logits, target = torch.zeros(4, 10), torch.zeros(4, 1, dtype=torch.int64)
    transform = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    candidates = {"values": torch.zeros(4, 3), "index": torch.zeros(4, 3, dtype=torch.int64)}
    names = ("max", "sum", "target_logit", "rescale", "weights", "weighted", "argmax", "total")
    state: dict[str, Any] = {name: torch.zeros(4, 1) for name in names}
    state |= {"weights": torch.zeros(4, 10, dtype=torch.bfloat16), "argmax": torch.zeros(4, 1, dtype=torch.int64)}
    located = {"logits": logits, "target": target, "vocab_start": 0}
    column = torch.zeros(4, 1)
    arguments: dict[str, dict[str, Any]] = {
        "product_": {"out": torch.zeros(4, 10), "left": torch.zeros(4, 6), "right": torch.zeros(6, 10)}
        | {"bias": torch.zeros(10), "accumulate": False},
        "fold_": located | state | transform,
        "grad_": {"out": torch.zeros(4, 10)} | located | {"lse_others": column, "coef": column} | transform,
        "scale_": {"out": torch.zeros(4, 10), "weights": torch.zeros(4, 10), "scale": column},
        "topk_": located | candidates | transform,
        "draw": candidates | {"counter": torch.zeros(4, dtype=torch.int64), "seed": 0},
    }
    return arguments[op]


OPERATORS = ["product_", "fold_", "grad_", "scale_", "topk_", "draw"]


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.fastd2o_native, op)(*arguments.values())


INT32, HALF, DOUBLE = torch.int32, torch.float16, torch.float64
SHARED = torch.zeros(4, 12)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("product_", {"out": torch.zeros(4, 10, dtype=DOUBLE)}, "out has dtype Double"),
    ("product_", {"out": torch.zeros(4, 10, dtype=HALF)}, "out has dtype Half"),
    ("product_", {"left": torch.zeros(4, 6, dtype=INT32)}, "left has dtype Int"),
    (
        "product_",
        {"left": torch.zeros(4, 6, dtype=DOUBLE), "right": torch.zeros(6, 10, dtype=DOUBLE)},
        "left has dtype",
    ),
    ("product_", {"right": torch.zeros(6, 10, dtype=HALF)}, "right has dtype Half"),
    ("product_", {"bias": torch.zeros(10, dtype=HALF)}, "bias has dtype Half"),
    ("product_", {"bias": torch.zeros(9)}, r"expected a contiguous bias \[10\]"),
    ("product_", {"bias": torch.zeros(10, 1)}, r"expected a contiguous bias \[10\]"),
    ("product_", {"bias": torch.zeros(20)[::2]}, r"expected a contiguous bias \[10\]"),
    ("product_", {"accumulate": True}, "expected no bias where accumulate is true"),
    ("product_", {"out": torch.zeros(40)}, "out, left and right must be matrices"),
    ("product_", {"left": torch.zeros(1, 4, 6)}, "out, left and right must be matrices"),
    ("product_", {"left": torch.zeros(4, 5)}, r"left \[4, 5\] @ right \[6, 10\]"),
    ("product_", {"out": torch.zeros(5, 10)}, r"out \[5, 10\] does not fit"),
    ("product_", {"right": torch.zeros(6, 11)}, r"right \[6, 11\]"),
    ("product_", {"left": torch.zeros(4, 0), "right": torch.zeros(0, 10)}, r"left \[M, K\] with K of at least 1"),
    ("product_", {"out": torch.zeros(10, 4).t()}, "out as a matrix whose rows are contiguous"),
    ("product_", {"out": torch.zeros(10).expand(4, 10)}, "the rows of out overlap"),
    ("product_", {"out": torch.zeros(40).as_strided((4, 10), (9, 1))}, "the rows of out overlap"),
    ("fold_", {"logits": torch.zeros(4, 10, dtype=torch.bfloat16)}, "logits has dtype BFloat16"),
    ("fold_", {"logits": torch.zeros(40)}, "logits as a matrix"),
    ("fold_", {"logits": torch.zeros(10, 4).t()}, "logits as a matrix whose rows are contiguous"),
    ("fold_", {"logits": torch.zeros(10).expand(4, 10)}, "the rows of logits overlap"),
    ("fold_", {"logits": torch.zeros(5, 10)}, r"expected target as \[5, 1\]"),
    ("fold_", {"target": torch.zeros(4, 1, dtype=INT32)}, "target has dtype Int"),
    ("fold_", {"target": torch.zeros(4, dtype=torch.int64)}, r"expected target as \[4, 1\]"),
    ("fold_", {"target": torch.zeros(1, 4, dtype=torch.int64)}, r"expected target as \[4, 1\]"),
    ("fold_", {"vocab_start": -1}, "vocab_start is -1"),
    ("fold_", {"vocab_start": 2**32 - 5}, r"vocab_start is 4294967291, expected columns in \[0, 2\^32\)"),
    ("fold_", {"vocab_start": 2**63 - 1}, "vocab_start is"),
    ("fold_", {"max": torch.zeros(4, 1, dtype=DOUBLE)}, "max has dtype Double"),
    ("fold_", {"sum": torch.zeros(4, 2)}, r"expected sum as \[4, 1\]"),
    ("fold_", {"target_logit": torch.zeros(3, 1)}, r"expected target_logit as \[4, 1\]"),
    ("fold_", {"rescale": torch.zeros(1, 1).expand(4, 1)}, "the rows of rescale are one and the same"),
    ("fold_", {"weights": torch.zeros(4, 10, dtype=DOUBLE)}, "weights has dtype Double"),
    ("fold_", {"weights": torch.zeros(4, 9)}, r"expected weights of logits' shape \[4, 10\]"),
    ("fold_", {"weights": torch.zeros(40, dtype=HALF).as_strided((4, 10), (5, 1))}, "the rows of weights overlap"),
    ("fold_", {"logits": SHARED[:, :10], "weights": SHARED.view(HALF)[:, :10]}, "weights shares memory with logits"),
    ("fold_", {"logits": SHARED[:, :10], "weights": SHARED.view(-1)[:40].view(4, 10)}, "weights shares memory"),
    ("fold_", {"weighted": None}, "weighted, argmax and total are statistics: pass all three, or none"),
    ("fold_", {"argmax": torch.zeros(4, 1)}, "argmax has dtype Float"),
    ("fold_", {"total": torch.zeros(4, 1, dtype=HALF)}, "total has dtype Half"),
    ("grad_", {"logits": torch.zeros(4, 10, dtype=HALF)}, "logits has dtype Half"),
    ("grad_", {"out": torch.zeros(4, 10, dtype=INT32)}, "out has dtype Int"),
    ("grad_", {"out": torch.zeros(3, 10)}, r"expected out of logits' shape \[4, 10\]"),
    ("grad_", {"out": torch.zeros(10).expand(4, 10)}, "the rows of out overlap"),
    ("grad_", {"out": torch.zeros(10, 4).t()}, "out as a matrix whose rows are contiguous"),
    ("grad_", {"target": torch.zeros(4, 2, dtype=torch.int64)}, r"expected target as \[4, 1\]"),
    ("grad_", {"vocab_start": -7}, "vocab_start is -7"),
    ("grad_", {"lse_others": torch.zeros(4)}, r"expected lse_others as \[4, 1\]"),
    ("grad_", {"coef": torch.zeros(4, 1, dtype=HALF)}, "coef has dtype Half"),
    ("scale_", {"weights": torch.zeros(4, 10, dtype=DOUBLE)}, "weights has dtype Double"),
    ("scale_", {"out": torch.zeros(4, 10, dtype=HALF)}, "out has dtype Half"),
    ("scale_", {"out": torch.zeros(4, 9)}, r"expected out of weights' shape \[4, 10\]"),
    ("scale_", {"out": torch.zeros(10).expand(4, 10)}, "the rows of out overlap"),
    ("scale_", {"weights": torch.zeros(10, 4).t()}, "weights as a matrix whose rows are contiguous"),
    ("scale_", {"weights": SHARED[:, :10], "out": SHARED.view(-1)[:40].view(4, 10)}, "out shares memory with weights"),
    ("scale_", {"scale": torch.zeros(4)}, r"expected scale as \[4, 1\]"),
    ("scale_", {"scale": torch.zeros(4, 1, dtype=HALF)}, "scale has dtype Half"),
    ("topk_", {"logits": torch.zeros(10, 4).t()}, "logits as a matrix whose rows are contiguous"),
    ("topk_", {"target": torch.zeros(4, 1)}, "target has dtype Float"),
    ("topk_", {"vocab_start": -1}, "vocab_start is -1"),
    ("topk_", {"values": torch.zeros(4, 3, dtype=DOUBLE)}, "values has dtype Double"),
    ("topk_", {"index": torch.zeros(4, 3, dtype=INT32)}, "index has dtype Int"),
    (
        "topk_",
        {"values": torch.zeros(4, 0), "index": torch.zeros(4, 0, dtype=torch.int64)},
        "values and index .* at least 1",
    ),
    ("topk_", {"values": torch.zeros(5, 3)}, r"expected values and index as contiguous \[4, k\]"),
    ("topk_", {"index": torch.zeros(4, 2, dtype=torch.int64)}, "expected values and index"),
    ("topk_", {"values": torch.zeros(3, 4).t()}, "expected values and index as contiguous"),
    ("draw", {"values": torch.zeros(4, 3, dtype=HALF)}, "values has dtype Half"),
    ("draw", {"index": torch.zeros(4, 3)}, "index has dtype Float"),
    ("draw", {"counter": torch.zeros(4)}, "counter has dtype Float"),
    ("draw", {"counter": torch.zeros(5, dtype=torch.int64)}, r"expected counter as \[4\]"),
    ("draw", {"counter": torch.zeros(4, 1, dtype=torch.int64)}, r"expected counter as \[4\]"),
    (
        "draw",
        {"values": torch.zeros(4, 0), "index": torch.zeros(4, 0, dtype=torch.int64)},
        "values and index .* at least 1",
    ),
    ("draw", {"index": torch.zeros(3, 4, dtype=torch.int64).t()}, "expected values and index as contiguous"),
    ("draw", {"values": torch.zeros(12)}, "expected values and index"),
]


@pytest.mark.parametrize("op", OPERATORS)
def test_good_arguments_are_taken(op: str) -> None:
    result = call(op, good(op))
    if op == "draw":
        assert [tensor.shape for tensor in result] == [(4,), (4,)]
    else:
        assert result is None


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    REFUSED,
    ids=[f"{op}-{'+'.join(changes)}-{message}" for op, changes, message in REFUSED],
)
def test_bad_arguments_are_refused(op: str, changes: dict[str, Any], message: str) -> None:
    arguments = good(op)
    assert changes.keys() <= arguments.keys()
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        call(op, arguments | changes)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPERATORS for name, value in good(op).items() if isinstance(value, Tensor)]
)
def test_tensors_of_another_device_or_layout_are_refused(op: str, name: str) -> None:
    arguments = good(op)
    for stranger, backend in ((arguments[name].to("meta"), "Meta"), (arguments[name].to_sparse(), "SparseCPU")):
        with pytest.raises(NotImplementedError, match=f"fastd2o_native::{op}.*{backend}"):
            call(op, arguments | {name: stranger})


POOL = [
    tensor
    for dtype in (torch.float32, torch.bfloat16, torch.int64)
    for tensor in (
        torch.ones(4, 10, dtype=dtype),
        torch.ones(10, 4, dtype=dtype).t(),
        torch.ones(4, 1, dtype=dtype),
        torch.ones(1, 1, dtype=dtype).expand(4, 1),
        torch.ones(4, 3, dtype=dtype),
        torch.ones(4, 4, dtype=dtype),
        torch.ones(4, dtype=dtype),
        torch.ones(0, 10, dtype=dtype),
        torch.ones(4, 0, dtype=dtype),
        torch.ones((), dtype=dtype),
        torch.ones(2, 4, 10, dtype=dtype),
    )
]


@settings(max_examples=200)
@given(op=st.sampled_from(OPERATORS), data=st.data())
def test_any_mixture_of_tensors_is_taken_or_refused(op: str, data: st.DataObject) -> None:
    arguments = good(op)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in data.draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique=True)):
        arguments[name] = POOL[data.draw(st.integers(0, len(POOL) - 1))].clone(memory_format=torch.preserve_format)
    try:
        call(op, arguments)
    except RuntimeError as refusal:
        assert re.search(rf"\b{op}: ", str(refusal))  # noqa: PT017


# ---- what the operators promise for it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "vocab_size"), [(1, 64, 1000), (33, 896, 5003), (7, 2048, 20_011), (700, 128, 3001)]
)
def test_bfloat16_log_probabilities_are_within_two_thousandths_of_a_nat(
    tokens: int, hidden_size: int, vocab_size: int
) -> None:
    """Logits up to 30, in one tile of the vocabulary and in several. Backend "torch" rounds them to bfloat16 first: the
    inputs are such that this shows."""
    hidden = normal(tokens, hidden_size, seed=1, dtype=torch.bfloat16)
    weight = normal(vocab_size, hidden_size, seed=2)
    raw = hidden.double() @ weight.double().T
    weight = (weight * (29.5 / raw.abs().max().item())).bfloat16()
    logits = hidden.double() @ weight.double().T
    assert 29 < logits.abs().max() <= 30
    target = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(3))
    target[::2] = logits.argmax(1)[::2]
    expected = logprob(logits, target)
    plan = fastd2o.Plan.choose(
        tokens=tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        algorithm="forward",
        dtype=torch.bfloat16,
    )
    for tiling in (None, dataclasses.replace(plan, block_tokens=64, block_vocab=777)):
        value = fastd2o.linear_logprob(hidden, weight, target, backend="cpu", plan=tiling)
        assert (value.double() - expected).abs().max() <= 2e-3
    rounded_first = fastd2o.linear_logprob(hidden, weight, target, backend="torch")
    assert (rounded_first.double() - expected).abs().max() > 2e-3
