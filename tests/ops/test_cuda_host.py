"""``csrc/cuda`` without a GPU: what the host decides before a launch, the scalar arithmetic, the logic of the kernels.

``cuda_host.cpp`` puts the very headers that nvcc compiles behind a C interface; ``cuda_emulator.h`` runs the kernels'
threads as fibers. Grids, alignments and messages are exact here. What only a GPU shows (its memory model, its
exponential, speed) is left to ``tests/gpu``.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastd2o.ops.philox import philox_4x32, uniform
from fastd2o.ops.tile_ops import FoldState, LogitTransform, StatisticsState, TopKState
from fastd2o.ops.torch_tile_ops import TorchTileOps

ROOT = Path(__file__).parents[2]
TORCH_HEADERS = Path(torch.__file__).parent / "include"
FLOAT32, BFLOAT16, FLOAT16, INT64, OTHER = range(5)
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.int64: INT64}
BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT64: 8, OTHER: 8}
PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(-0.5, None, 2.0), LogitTransform(0.7, 20.0, 1.3)]


class View(ctypes.Structure):
    """``TensorView`` of launch.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("size", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
    )


def view(tensor: Tensor, **changes: Any) -> View:
    """A tensor of the CPU, said to be on cuda:0."""
    fields = {
        "data": tensor.data_ptr(),
        "dtype": DTYPES.get(tensor.dtype, OTHER),
        "device": 0,
        "dim": tensor.dim(),
        "size": tuple(tensor.shape[:2]),
        "stride": tuple(tensor.stride()[:2]),
    }
    return View(**(fields | changes))


@dataclass(frozen=True)
class Grid:
    blocks: int
    row_threads: int
    rows: int
    whole: int


class Host:
    """The library; operators raise what the host refuses."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("fold", "grad", "topk", "draw"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.transform_each.restype = None
        self.library.drawn.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_float)

    def tile_op(
        self, name: str, views: Sequence[View | None], vocab_start: int, transform: LogitTransform, order: int = -1
    ) -> Grid:
        """Plan the launch and, with an ``order`` of its threads, run it."""
        return self._call(name, pointers(views), ctypes.c_int64(vocab_start), packed(transform), order=order)

    def draw(self, values: Tensor, index: Tensor, counter: Tensor, seed: int, order: int = 0) -> tuple[Tensor, Tensor]:
        views = pointers([view(values), view(index), view(counter)])
        positive = torch.full((len(values),), -7)
        logit = torch.full((len(values),), torch.nan)
        self._call("draw", views, ctypes.c_int64(seed), pointer(positive), pointer(logit), order=order)
        return positive, logit

    def transformed(self, raw: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """``z`` and the softcap's bend by the scalar functions."""
        raw = raw.contiguous()
        z, bend = torch.empty_like(raw), torch.empty_like(raw)
        count = ctypes.c_int64(raw.numel())
        self.library.transform_each(pointer(raw), count, packed(transform), pointer(z), pointer(bend))
        return z, bend

    def _call(self, name: str, *arguments: Any, order: int) -> Grid:
        grid = (ctypes.c_int64 * 4)()
        refusal = getattr(self.library, name)(*arguments, ctypes.c_int64(order), grid)
        if refusal is not None:
            raise RuntimeError(refusal.decode())
        return Grid(*grid)


def pointer(array: Tensor | np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)


def pointers(views: Sequence[View | None]) -> Any:
    """A C array of pointers, which keeps the views alive; a null one for a tensor that is not given."""
    array = (ctypes.POINTER(View) * len(views))()
    for place, given_view in enumerate(views):
        if given_view is not None:
            array[place] = ctypes.pointer(given_view)
    return array


def packed(transform: LogitTransform) -> Any:
    softcap = float("nan") if transform.softcap is None else transform.softcap
    return (ctypes.c_double * 3)(transform.logit_scale, softcap, transform.temperature)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("cuda_host") / "libcuda_host.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Misaligned vectors are what UBSan is here for; that a vector is read as one is what the kernels are about.
    flags += ["-fsanitize=alignment,bounds,signed-integer-overflow", "-fno-strict-aliasing"]
    source = ROOT / "tests" / "ops" / "cuda_host.cpp"
    command = ["g++", *flags, f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH_HEADERS), str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return Host(path)


@pytest.fixture
def host(library: Host, capfd: pytest.CaptureFixture[str]) -> Iterator[Host]:
    """The library; a test in which the sanitizer speaks fails."""
    yield library
    assert "runtime error" not in capfd.readouterr().err


# ---- scalar arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_and_bend(host: Host, transform: LogitTransform) -> None:
    raw = torch.cat([torch.linspace(-60, 60, 1001), torch.tensor([1e-6, -1e4, 1e4, torch.inf, -torch.inf, torch.nan])])
    z, bend = host.transformed(raw, transform)
    exact = raw.double()
    expected = TorchTileOps(transform, torch.float64)._transformed(exact.unsqueeze(0), keep=True).squeeze(0)
    torch.testing.assert_close(z.double(), expected, rtol=1e-6, atol=1e-38, equal_nan=True)
    expected_bend = torch.ones_like(exact) if transform.softcap is None else transform.bend(exact)
    # Its exponent is rounded, which an exponential multiplies by the exponent itself.
    torch.testing.assert_close(bend.double(), expected_bend, rtol=1e-5, atol=1e-38, equal_nan=True)


@given(
    z=st.lists(st.floats(-100, 100, width=32) | st.just(-np.inf), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_pieces_add_up_to_the_whole(library: Host, z: list[float], cuts: list[int]) -> None:
    values = np.array(z, dtype=np.float32)
    ends = np.array([*sorted(min(cut, len(z)) for cut in cuts), len(z)], dtype=np.int64)
    out = np.empty(3, dtype=np.float32)
    library.library.fold_pieces(
        pointer(values),
        pointer(ends),
        ctypes.c_int64(len(ends)),
        pointer(out),
    )
    exact = values[values > -np.inf].astype(np.float64)
    largest = exact.max() if len(exact) else -np.inf
    weights = np.exp(exact - largest)
    np.testing.assert_array_equal(out[0], np.float32(largest))
    np.testing.assert_allclose(out[1], weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(out[2], (weights * (exact - largest)).sum(), rtol=1e-5, atol=1e-30)


def test_keys_order_logits_then_columns(host: Host) -> None:
    z = np.array([np.nan, np.inf, 3.0, 3.0, 1e-40, 0.0, -0.0, -2.5, -np.inf, -np.inf], dtype=np.float32)
    column = np.array([9, 8, 2, 5, 0, 1, 2**32 - 1, 4, 0, 1], dtype=np.uint32)
    key, z_back, column_back = np.empty(10, np.uint64), np.empty(10, np.float32), np.empty(10, np.uint32)
    arrays = [pointer(array) for array in (z, column, key, z_back, column_back)]
    host.library.key_each(*arrays[:2], ctypes.c_int64(10), *arrays[2:])
    assert (key[:-1] > key[1:]).all()
    np.testing.assert_array_equal(z_back, z)
    np.testing.assert_array_equal(column_back, column)


@given(seed=st.integers(-(2**63), 2**63 - 1), counter=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9))
def test_philox_is_that_of_python(library: Host, seed: int, counter: list[int]) -> None:
    counters = torch.tensor(counter)
    words, draws = torch.empty(len(counter), 4, dtype=torch.int32), torch.empty(len(counter))
    library.library.philox_each(
        ctypes.c_uint64(seed % 2**64), pointer(counters), ctypes.c_int64(len(counter)), pointer(words), pointer(draws)
    )
    assert torch.equal(words.long() & 0xFFFFFFFF, torch.stack(philox_4x32(seed, counters), 1))
    assert torch.equal(draws, uniform(seed, counters))


def test_drawn_candidate_at_the_ends(host: Host) -> None:
    def drawn(logits: list[float], u: float) -> int:
        ordered = torch.tensor(logits)
        return int(host.library.drawn(pointer(ordered), len(logits), u))

    top = 1 - 2.0**-24
    assert drawn([0.0, 0.0], 0.0) == 0
    assert drawn([0.0, 0.0], 0.5) == 1  # u < q_1 does not hold
    assert drawn([0.0] * 3, top) == 2
    assert drawn([0.0, -200.0, -torch.inf], top) == 0
    assert drawn([-5.0, -torch.inf], top) == 0
    assert drawn([-torch.inf, -torch.inf], 0.3) == -1
    assert drawn([torch.nan, 1.0], 0.9) == 0


# ---- kernels, in the emulator ---------------------------------------------------------------------------------------


@dataclass
class EmulatedOps:
    """:class:`fastd2o.ops.tile_ops.TileOps` by the CUDA kernels; ``order`` is that of their threads."""

    host: Host
    transform: LogitTransform
    order: int = 0

    def fold(
        self, logits: Tensor, target: Tensor, vocab_start: int, state: FoldState, weights: Tensor | None = None
    ) -> Tensor:
        rescale = torch.full_like(state.max, torch.nan)
        extra = state.statistics
        columns = [state.max, state.sum, state.target_logit, rescale]
        optional = [weights, *((extra.weighted, extra.argmax, extra.total) if extra else (None,) * 3)]
        views = [view(t) if t is not None else None for t in (logits, target, *columns, *optional)]
        self.host.tile_op("fold", views, vocab_start, self.transform, self.order)
        return rescale

    def grad(
        self, logits: Tensor, target: Tensor, vocab_start: int, lse_others: Tensor, coef: Tensor, out: Tensor
    ) -> None:
        views = [view(t) for t in (out, logits, target, lse_others, coef)]
        self.host.tile_op("grad", views, vocab_start, self.transform, self.order)

    def topk(self, logits: Tensor, target: Tensor, vocab_start: int, state: TopKState) -> None:
        views = [view(t) for t in (logits, target, state.values, state.index)]
        self.host.tile_op("topk", views, vocab_start, self.transform, self.order)


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
        memory = torch.full((self.before + self.tokens * stride + 16,), 12345.0, dtype=dtype)
        tile = memory[self.before :].as_strided((self.tokens, self.columns), (stride, 1))
        tile.copy_(values)
        return tile


LAYOUTS = [
    Layout(5, 40),  # a warp for each row
    Layout(5, 37),  # rows at every alignment
    Layout(3, 512, before=3, between=5),
    Layout(2, 1100),  # several warps for a row
    Layout(2, 1101, before=1),
    Layout(3, 1),
    Layout(1, 16389, before=5),  # more than the registers of a block
]


def logits_like(layout: Layout, seed: int = 0) -> Tensor:
    """Logits a few of which are -inf, the last row's all."""
    generator = torch.Generator().manual_seed(seed)
    values = 4 * torch.randn(layout.tokens, layout.columns, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.1] = -torch.inf
    if layout.tokens > 1:
        values[-1] = -torch.inf
    return values


def targets_like(layout: Layout, vocab_start: int) -> Tensor:
    """In the first column, the last, the middle, outside on either side."""
    inside = torch.tensor([0, layout.columns - 1, layout.columns // 2, -1, layout.columns])
    return (vocab_start + inside[: layout.tokens]).unsqueeze(1)


def clone(state: FoldState, dtype: torch.dtype) -> FoldState:
    """With a column between rows, as a slice of a wider tensor has."""

    def column(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((len(tensor), 3), 7, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        wide[:, 1:2] = tensor
        return wide[:, 1:2]

    extra = state.statistics
    if extra is not None:
        extra = StatisticsState(column(extra.weighted), column(extra.argmax), column(extra.total))
    return FoldState(column(state.max), column(state.sum), column(state.target_logit), extra)


def assert_states_equal(actual: FoldState, expected: FoldState, rtol: float = 1e-5) -> None:
    def close(name: str, one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(
            one.double(), other.double(), rtol=rtol, atol=1e-5, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )

    close("max", actual.max, expected.max)
    close("sum", actual.sum, expected.sum)
    close("target_logit", actual.target_logit, expected.target_logit)
    if actual.statistics and expected.statistics:
        close("weighted", actual.statistics.weighted, expected.statistics.weighted)
        close("total", actual.statistics.total, expected.statistics.total)
        assert torch.equal(actual.statistics.argmax, expected.statistics.argmax)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize(
    ("dtype", "weights_dtype", "statistics"),
    [
        (torch.float32, None, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float32, False),
    ],
    ids=str,
)
def test_fold(
    host: Host,
    layout: Layout,
    transform: LogitTransform,
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None,
    statistics: bool,
) -> None:
    """Two tiles one after the other against torch in float64; weights in place where they have the dtype for it."""
    empty = FoldState.empty(layout.tokens, torch.empty(0), torch.float32, statistics)
    actual, expected = clone(empty, torch.float32), clone(empty, torch.float64)
    ops, reference = EmulatedOps(host, transform), TorchTileOps(transform, torch.float64)
    for vocab_start in (0, layout.columns):
        raw = logits_like(layout, vocab_start).to(dtype)
        target = targets_like(layout, 0)
        logits = layout.tile(raw, dtype)
        weights = None
        if weights_dtype is not None:
            weights = logits if weights_dtype == dtype else layout.tile(raw * torch.nan, weights_dtype)
        rescale = ops.fold(logits, target, vocab_start, actual, weights)
        exact = torch.empty(raw.shape, dtype=torch.float64) if weights is not None else None
        torch.testing.assert_close(
            rescale.double(), reference.fold(raw.double(), target, vocab_start, expected, exact), rtol=1e-5, atol=1e-30
        )
        assert_states_equal(actual, expected)
        if weights is not None and exact is not None:
            rtol = max(torch.finfo(weights.dtype).eps, 1e-5)
            atol = torch.finfo(weights.dtype).smallest_normal
            torch.testing.assert_close(weights.double(), exact, rtol=rtol, atol=atol)
        assert_surroundings_untouched(layout, logits if weights is None else weights)


def assert_surroundings_untouched(layout: Layout, tile: Tensor) -> None:
    memory = torch.tensor([], dtype=tile.dtype).set_(tile.untyped_storage())
    outside = torch.ones(len(memory), dtype=torch.bool)
    outside[layout.before :].as_strided(tile.shape, tile.stride()).fill_(False)
    assert (memory[outside] == torch.tensor(12345.0, dtype=tile.dtype)).all()


def test_fold_sees_nan_and_infinity(host: Host) -> None:
    raw = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    raw[0, 3] = torch.nan
    raw[1, 5] = torch.inf
    raw[2, 7] = torch.nan  # the target, which takes no part
    target = torch.tensor([[1], [1], [7], [1]])
    actual = FoldState.empty(4, raw, torch.float32, True)
    expected = FoldState.empty(4, raw, torch.float64, True)
    EmulatedOps(host, PLAIN).fold(raw.clone(), target, 0, actual)
    TorchTileOps(PLAIN, torch.float64).fold(raw.double(), target, 0, expected)
    torch.testing.assert_close(actual.max.double(), expected.max, equal_nan=True)
    # 70 exponentials, each of a rounded difference, are added in float32.
    torch.testing.assert_close(actual.sum.double(), expected.sum, rtol=1e-6, atol=0.0, equal_nan=True)
    torch.testing.assert_close(actual.target_logit.double(), expected.target_logit, equal_nan=True)


def test_first_of_equals_is_the_argmax(host: Host) -> None:
    raw = torch.zeros(1, 1500)
    raw[0, [1490, 701, 700, 300]] = 2.0  # of other threads, of one thread, and the target
    state = FoldState.empty(1, raw, torch.float32, True)
    assert state.statistics is not None
    ops = EmulatedOps(host, PLAIN)
    for vocab_start in (1500, 3000, 0):
        ops.fold(raw.clone(), torch.tensor([[1800]]), vocab_start, state)
        assert state.statistics.argmax.item() == 1500 + 700  # a later tile does not beat an equal


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("transform", [TRANSFORMS[1], TRANSFORMS[2]], ids=["scaled", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad(
    host: Host, layout: Layout, transform: LogitTransform, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    raw, target = logits_like(layout).to(dtype), targets_like(layout, 9)
    coef = torch.linspace(-2, 3, layout.tokens).unsqueeze(1)
    lse_others = torch.full((layout.tokens, 1), 1.5)
    if layout.tokens > 1:
        lse_others[-1] = -torch.inf
        coef[0], raw[0] = 0.0, torch.nan
    exact = torch.empty(raw.shape, dtype=torch.float64)
    TorchTileOps(transform, torch.float64).grad(raw.double(), target, 9, lse_others.double(), coef.double(), exact)
    if layout.tokens > 1:
        exact[0] = 0.0  # and not NaN, which nobody reads
    logits = layout.tile(raw, dtype)
    out = logits if dtype == out_dtype else replace(layout, before=2).tile(raw * torch.nan, out_dtype)
    EmulatedOps(host, transform).grad(logits, target, 9, lse_others, coef, out)
    rtol = max(torch.finfo(out_dtype).eps, 1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=torch.finfo(out_dtype).smallest_normal)
    assert_surroundings_untouched(layout if dtype == out_dtype else replace(layout, before=2), out)


@pytest.mark.parametrize("layout", [*LAYOUTS[:-1], Layout(1, 9001, before=3)], ids=str)
@pytest.mark.parametrize("k", [1, 5, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[2]], ids=["plain", "capped"])
def test_topk(host: Host, layout: Layout, k: int, dtype: torch.dtype, transform: LogitTransform) -> None:
    """Two tiles; many logits are equal, and of those the smaller columns must stay."""
    state = TopKState.empty(layout.tokens, k, torch.empty(0), torch.float32)
    target = targets_like(layout, 0)
    tiles: list[Tensor] = []
    for vocab_start in (layout.columns, 0):
        raw = logits_like(layout, vocab_start).round().to(dtype)
        logits = layout.tile(raw, dtype)
        EmulatedOps(host, transform, order=vocab_start).topk(logits, target, vocab_start, state)
        assert torch.equal(logits, raw)
        z = host.transformed(raw.float(), transform)[0]
        columns = torch.arange(vocab_start, vocab_start + layout.columns)
        tiles.insert(0, z.masked_fill(columns == target, -torch.inf))
    values, index = torch.cat(tiles, 1).sort(dim=1, descending=True, stable=True)
    width = min(k, values.shape[1])
    expected = torch.full((layout.tokens, k), -torch.inf)
    expected[:, :width] = values[:, :width]
    expected_index = torch.zeros(layout.tokens, k, dtype=torch.int64)
    expected_index[:, :width] = index[:, :width]
    expected_index[expected == -torch.inf] = 0
    by_column = state.index.sort(dim=1).indices
    order = state.values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    assert torch.equal(order.values, expected)
    assert torch.equal(state.index.gather(1, by_column).gather(1, order.indices), expected_index)


def test_topk_sees_nan(host: Host) -> None:
    raw = torch.randn(1, 600)
    raw[0, 77] = torch.nan
    state = TopKState.empty(1, 2, raw, torch.float32)
    EmulatedOps(host, PLAIN).topk(raw, torch.tensor([[-1]]), 0, state)
    assert set(state.index[0].tolist()) == {77, int(raw.nan_to_num(-torch.inf).argmax())}
    assert state.values.isnan().sum() == 1


@pytest.mark.parametrize("k", [1, 5, 40, 64])
def test_draw(host: Host, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    tokens, seed = 203, -12345
    values = torch.randn(tokens, k, generator=generator).mul(2).round()  # many are equal
    values[3, (k + 1) // 2 :] = -torch.inf
    values[4] = -torch.inf
    index = torch.stack([torch.randperm(1000, generator=generator)[:k] for _ in range(tokens)])
    index[4] = 0  # as topk_ leaves what it did not fill
    values[5], index[5] = 1.0, 77  # one candidate, k times
    counter = torch.arange(tokens) * 2**32 + 11
    positive, logit = host.draw(values, index, counter, seed)
    assert positive[4] == -1
    assert logit[4] == -torch.inf
    assert positive[5] == 77
    assert logit[5] == 1.0
    u = uniform(seed, counter).double()
    for token in (token for token in range(tokens) if token not in (4, 5)):
        ranked = sorted(range(k), key=lambda i: (-values[token, i].item(), index[token, i].item()))
        cumulative = values[token, ranked].double().softmax(0).cumsum(0)
        choice = index[token, ranked].tolist().index(positive[token])
        assert logit[token] == values[token, ranked[choice]] > -torch.inf
        assert choice == 0 or cumulative[choice - 1] <= u[token] + 1e-6
        assert u[token] < cumulative[choice] + 1e-6


@pytest.mark.parametrize("tokens_columns", [(3, 700), (2, 90)])
def test_result_does_not_depend_on_the_order_of_threads(host: Host, tokens_columns: tuple[int, int]) -> None:
    """Neither its bits; a kernel that lacks a barrier fails here."""
    raw = torch.randn(tokens_columns)
    results = []
    for order in range(4):
        ops = EmulatedOps(host, TRANSFORMS[2], order)
        state = FoldState.empty(len(raw), raw, torch.float32, True)
        top = TopKState.empty(len(raw), 7, raw, torch.float32)
        target = torch.full((len(raw), 1), 33)
        ops.topk(raw, target, 0, top)
        weights = raw.clone()
        ops.fold(weights, target, 0, state, weights)
        results.append([weights, state.max, state.sum, top.values.sort(1).values])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_offsets_beyond_31_bits(host: Host, tmp_path: Path) -> None:
    """Rows more than 2^31 elements apart, in a file of which only a few pages exist."""
    stride = 2**31 + 8
    memory = np.memmap(tmp_path / "sparse", dtype=np.float16, mode="w+", shape=(stride + 64,))
    tile = torch.from_numpy(memory).as_strided((2, 48), (stride, 1))
    raw = torch.randn(2, 48).half()
    tile.copy_(raw)
    target = torch.tensor([[3], [4]])
    state, expected = (FoldState.empty(2, raw, dtype) for dtype in (torch.float32, torch.float64))
    EmulatedOps(host, PLAIN).fold(tile, target, 0, state, tile)
    exact = raw.double()
    TorchTileOps(PLAIN, torch.float64).fold(exact, target, 0, expected, exact)
    assert_states_equal(state, expected)
    torch.testing.assert_close(tile.double(), exact, rtol=1e-3, atol=1e-6)


# ---- what the host decides ------------------------------------------------------------------------------------------


def tile_view(tokens: int, columns: int, dtype: int, address: int, stride: int, step: int = 1, device: int = 0) -> View:
    return View(address, dtype, device, 2, (tokens, columns), (stride, step))


def column_view(tokens: int, dtype: int = FLOAT32, stride: int = 1, device: int = 0) -> View:
    return tile_view(tokens, 1, dtype, 1 << 20, stride, device=device)


@given(
    tokens=st.integers(0, 2**31 - 1) | st.integers(0, 9000),
    columns=st.integers(0, 2**30) | st.integers(0, 20000),
    dtypes=st.tuples(st.sampled_from([FLOAT32, BFLOAT16, FLOAT16]), st.sampled_from([FLOAT32, BFLOAT16, FLOAT16])),
    elements=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    between=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    row=st.integers(0, 2**31 - 2),
)
def test_grid_covers_every_row_and_vectors_are_aligned(
    library: Host,
    tokens: int,
    columns: int,
    dtypes: tuple[int, int],
    elements: tuple[int, int],
    between: tuple[int, int],
    row: int,
) -> None:
    base, sizes = (1 << 40, 1 << 50), (BYTES[dtypes[0]], BYTES[dtypes[1]])
    address = [base[i] + elements[i] * sizes[i] for i in range(2)]
    stride = [columns + between[i] for i in range(2)]
    logits = tile_view(tokens, columns, dtypes[0], address[0], stride[0])
    out = tile_view(tokens, columns, dtypes[1], address[1], stride[1])
    views = [out, logits, column_view(tokens, INT64), column_view(tokens), column_view(tokens)]
    grid = library.tile_op("grad", views, 0, PLAIN)
    if tokens == 0 or columns == 0:
        assert grid.blocks == 0
        return
    assert (grid.blocks - 1) * grid.rows < tokens <= grid.blocks * grid.rows
    assert 1 <= grid.blocks < 2**31
    assert grid.row_threads % 32 == 0
    assert grid.row_threads * grid.rows <= 1024
    assert grid.rows == 1 or grid.row_threads == 32  # several warps on a row meet at barriers of the whole block
    vector = 16 // sizes[0]
    first = [(address[i] // sizes[i] + min(row, tokens - 1) * stride[i]) % vector for i in range(2)]
    if grid.whole:
        assert first[0] == first[1]  # 16 bytes of logits and their results begin at boundaries together
    elif tokens == 1:
        assert first[0] != first[1]


@given(
    tokens=st.integers(1, 2**31 - 1) | st.integers(1, 5000),
    columns=st.integers(1, 20000),
    dtype=st.sampled_from([FLOAT32, BFLOAT16, FLOAT16]),
    elements=st.integers(0, 40),
    between=st.integers(0, 40),
)
def test_a_row_whose_weights_are_wanted_fits_the_registers_of_its_threads_if_it_can(
    library: Host, tokens: int, columns: int, dtype: int, elements: int, between: int
) -> None:
    logits = tile_view(tokens, columns, dtype, (1 << 40) + elements * BYTES[dtype], columns + between)
    state = [column_view(tokens) for _ in range(4)]
    grid = library.tile_op("fold", [logits, column_view(tokens, INT64), *state, logits, None, None, None], 0, PLAIN)
    assert grid.row_threads * 16 >= min(columns, 16384 - 8)
    assert grid.row_threads <= 32 * max(1, -(-(columns + 7) // (16 * 32)))  # and no thread is without a logit to hold


@given(tokens=st.integers(0, 2**31 - 1) | st.integers(0, 5000), columns=st.integers(1, 200_000))
def test_topk_shares_long_rows_when_they_are_few(library: Host, tokens: int, columns: int) -> None:
    views = [
        tile_view(tokens, columns, FLOAT32, 1 << 40, columns),
        column_view(tokens, INT64),
        tile_view(tokens, 5, FLOAT32, 1 << 20, 5),
        tile_view(tokens, 5, INT64, 1 << 20, 5),
    ]
    grid = library.tile_op("topk", views, 0, PLAIN)
    assert (grid.blocks - 1) * grid.rows < max(tokens, 1)
    assert grid.blocks * grid.rows >= tokens
    warps = grid.row_threads // 32
    assert 1 <= warps <= 8
    assert warps == 1 or (warps * tokens <= 4096 and (warps - 1) * 512 < columns + 3)
    assert grid.rows == (4 if warps == 1 else 1)


def good_fold() -> dict[str, Any]:
    tokens, columns = 4, 10
    names = ["max", "sum", "target_logit", "rescale"]
    return {
        "logits": tile_view(tokens, columns, FLOAT32, 1 << 40, columns),
        "target": column_view(tokens, INT64),
        **{name: column_view(tokens) for name in names},
        "weights": tile_view(tokens, columns, BFLOAT16, 1 << 41, columns),
        "weighted": column_view(tokens),
        "argmax": column_view(tokens, INT64),
        "total": column_view(tokens),
    }


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"logits": tile_view(4, 10, OTHER, 1 << 40, 10)}, 0, 'logits is another dtype.*Fix: backend="torch"'),
    ({"logits": tile_view(4, 10, FLOAT32, 1 << 40, 10, device=-1)}, 0, "logits is not on a CUDA device"),
    ({"logits": tile_view(4, 10, FLOAT32, 1 << 40, 1, step=4)}, 0, r"not contiguous \(stride 4\)"),
    ({"logits": tile_view(4, 10, FLOAT32, (1 << 40) + 1, 10)}, 0, "no multiple of its elements' size"),
    ({"logits": View(1 << 40, FLOAT32, 0, 3)}, 0, "logits has 3 dimensions"),
    ({"target": column_view(4, FLOAT32)}, 0, "target is float32, expected int64"),
    ({"target": column_view(5, INT64)}, 0, r"target has shape \[5, 1\], expected a column \[4, 1\]"),
    ({"sum": column_view(4, FLOAT16)}, 0, "sum is float16, expected float32"),
    ({"max": column_view(4, device=1)}, 0, "max is on cuda:1, but the first tensor is on cuda:0"),
    ({"max": column_view(4, stride=0)}, 0, r"max are one and the same \(stride 0\)"),
    ({"weights": tile_view(4, 9, FLOAT32, 1 << 41, 10)}, 0, r"weights has shape \[4, 9\], expected a tile \[4, 10\]"),
    ({"weights": tile_view(4, 10, FLOAT32, 1 << 41, 5)}, 0, "rows of weights overlap"),
    ({"weights": tile_view(4, 10, BFLOAT16, 1 << 40, 10)}, 0, "weights shares memory with logits"),
    ({"weights": tile_view(4, 10, FLOAT32, 1 << 40, 12)}, 0, "weights shares memory with logits"),
    ({"total": None}, 0, "come together or not at all"),
    ({}, -1, "vocab_start=-1"),
    ({}, 2**32 - 5, r"expected columns in \[0, 2\^32\)"),
]


def test_fold_accepts_what_is_right(host: Host) -> None:
    assert host.tile_op("fold", list(good_fold().values()), 0, PLAIN) == Grid(1, 32, 4, 1)


@pytest.mark.parametrize(("changes", "vocab_start", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_fold_refuses(host: Host, changes: dict[str, Any], vocab_start: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^fold_: .*{message}|^fold_: {message}"):
        host.tile_op("fold", list((good_fold() | changes).values()), vocab_start, PLAIN)


def test_others_refuse(host: Host) -> None:
    logits, target = tile_view(4, 10, FLOAT32, 1 << 40, 10), column_view(4, INT64)
    values, index = tile_view(4, 65, FLOAT32, 1 << 30, 65), tile_view(4, 65, INT64, 1 << 31, 65)
    with pytest.raises(RuntimeError, match=r"topk_: k=65, the kernels take 1 to 64"):
        host.tile_op("topk", [logits, target, values, index], 0, PLAIN)
    values, index = tile_view(4, 5, FLOAT32, 1 << 30, 5), tile_view(4, 5, INT64, 1 << 31, 6)
    with pytest.raises(RuntimeError, match=r"topk_: index is not contiguous"):
        host.tile_op("topk", [logits, target, values, index], 0, PLAIN)
    out = tile_view(4, 10, BFLOAT16, 1 << 41, 0)
    with pytest.raises(RuntimeError, match=r"grad_: the rows of out overlap"):
        host.tile_op("grad", [out, logits, target, column_view(4), column_view(4)], 0, PLAIN)
    with pytest.raises(RuntimeError, match=r"draw: counter is expected as int64 \[2\]"):
        host.draw(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0)


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_fold(host: Host, shape: tuple[int, int]) -> None:
    state = FoldState(torch.tensor([[1.0]] * shape[0]), torch.ones(shape[0], 1), torch.ones(shape[0], 1))
    state.max = state.max.reshape(shape[0], 1)
    before = clone(state, torch.float32)
    rescale = EmulatedOps(host, PLAIN).fold(torch.empty(shape), torch.zeros(shape[0], 1, dtype=torch.int64), 0, state)
    assert_states_equal(state, before)
    assert torch.equal(rescale, torch.ones(shape[0], 1))
