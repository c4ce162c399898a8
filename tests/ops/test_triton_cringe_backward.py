"""``kernels/triton/cringe_backward.py`` against the engine in float64: in Triton's interpreter, or on the GPU that is
there."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastd2o.ops import engine
from fastd2o.ops.tile_ops import LogitTransform

pytest.importorskip("triton")

from fastd2o.kernels.cringe_backward import CringeConfig, Edges, cringe_backward, hidden_gradient, weight_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = LogitTransform()
SOFTCAP = LogitTransform(0.7, 3.0, 1.3)
# Hidden states and columns become several blocks already when they are short.
SMALL = CringeConfig(block_hidden=16, edges=2, num_warps=1)


@dataclass
class Call:
    """One backward's inputs; columns recur, as they do in a text."""

    coef: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    positive: Tensor
    transform: LogitTransform

    def kernel(self, **options: bool) -> tuple[Tensor | None, ...]:
        return cringe_backward(
            self.coef, self.hidden, self.weight, self.bias, self.target, self.positive, self.transform, **options
        )

    def exact(self, **options: bool) -> tuple[Tensor | None, ...]:
        """By the engine in float64, on the weight as the products see it."""
        weight = self.weight.to(self.hidden.dtype).double()
        head = engine.Head(weight, None if self.bias is None else self.bias.double(), self.transform)
        return engine.cringe_backward(
            self.coef.double(),
            self.hidden.double(),
            head,
            self.target,
            self.positive,
            engine.Tiling(4, 8, torch.float64, "torch"),
            hidden_dtype=torch.float64,
            wait=True,
            **options,
        )


def make_call(
    tokens: int = 23,
    hidden_size: int = 40,
    vocab_size: int = 13,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    *,
    bias: bool = False,
    transform: LogitTransform = PLAIN,
) -> Call:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    target = torch.randint(vocab_size, (tokens,), generator=generator).to(DEVICE)
    step = torch.randint(1, vocab_size, (tokens,), generator=generator).to(DEVICE)
    weight_dtype = weight_dtype or dtype
    return Call(
        coef=normal(tokens),
        hidden=normal(tokens, hidden_size).to(dtype),
        weight=(normal(vocab_size, hidden_size) / hidden_size**0.5).to(weight_dtype),
        bias=normal(vocab_size).to(weight_dtype) if bias else None,
        target=target,
        positive=(target + step) % vocab_size,
        transform=transform,
    )


def all_of(detach_positive: bool = False) -> dict[str, bool]:
    return {"detach_positive": detach_positive, "need_hidden": True, "need_weight": True, "need_bias": True}


def assert_close(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Rounded once, to ``dtype``, from sums of float32 products whose largest are about 10."""
    assert actual is not None
    assert expected is not None
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=max(eps, 2e-6), atol=2e-5 if eps < 1e-4 else 1e-4)


SHAPES = [(1, 16, 2), (23, 40, 13), (9, 33, 101), (40, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", [LogitTransform(-0.5, None, 2.0), SOFTCAP], ids=["negative", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("detach_positive", [False, True], ids=["", "detached"])
def test_gradients(shape: tuple[int, int, int], transform: LogitTransform, bias: bool, detach_positive: bool) -> None:
    call = make_call(*shape, bias=bias, transform=transform)
    dhidden, dweight, dbias = call.kernel(**all_of(detach_positive))
    expected = call.exact(**all_of(detach_positive))
    assert_close(dhidden, expected[0], torch.float32)
    assert_close(dweight, expected[1], torch.float32)
    if bias:
        assert_close(dbias, expected[2], torch.float32)
    else:
        assert dbias is None


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_gradients_of_16_bits(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A wider weight is rounded before it is multiplied, and gets its own gradient unrounded."""
    call = make_call(dtype=dtypes[0], weight_dtype=dtypes[1], bias=True, transform=SOFTCAP)
    dhidden, dweight, dbias = call.kernel(**all_of())
    expected = call.exact(**all_of())
    assert_close(dhidden, expected[0], torch.float32)
    assert_close(dweight, expected[1], dtypes[1])
    assert_close(dbias, expected[2], dtypes[1])


@pytest.mark.parametrize("transform", [PLAIN, SOFTCAP], ids=["plain", "softcap"])
def test_many_blocks_and_a_column_of_many_edges(transform: LogitTransform) -> None:
    call = make_call(31, 50, 5, bias=True, transform=transform)
    call.target[:29] = 4
    call.positive[:29] = 0
    expected = call.exact(**all_of())
    dhidden, edges = hidden_gradient(
        call.coef, call.hidden, call.weight, call.bias, call.target, call.positive, transform, config=SMALL
    )
    assert edges is not None
    dweight, dbias = weight_gradient(edges, call.hidden, call.weight, call.bias, config=SMALL)
    assert_close(dhidden, expected[0], torch.float32)
    assert_close(dweight, expected[1], torch.float32)
    assert_close(dbias, expected[2], torch.float32)


@pytest.mark.parametrize("needed", ["need_hidden", "need_weight", "need_bias"])
@pytest.mark.parametrize("transform", [PLAIN, SOFTCAP], ids=["plain", "softcap"])
def test_only_what_is_needed(needed: str, transform: LogitTransform) -> None:
    call = make_call(bias=True, transform=transform)
    names = ("need_hidden", "need_weight", "need_bias")
    options = {name: name == needed for name in names}
    everything = call.kernel(**all_of())
    for name, one, whole in zip(names, call.kernel(detach_positive=False, **options), everything, strict=True):
        if name == needed:
            assert one is not None
            assert whole is not None
            assert torch.equal(one, whole)
        else:
            assert one is None


def test_tokens_that_do_not_count_touch_nothing() -> None:
    """As they come where nothing may wait for the device: coefficient 0, a positive that there is not."""
    call = make_call(12, bias=True, transform=SOFTCAP)
    call.coef[3:7] = 0.0
    call.positive[3:5] = -1
    call.target[5] = 10**9
    call.hidden[3:7] = torch.nan
    dhidden, dweight, dbias = call.kernel(**all_of())
    keep = torch.tensor([0, 1, 2, 7, 8, 9, 10, 11], device=DEVICE)
    rest = Call(
        call.coef[keep], call.hidden[keep], call.weight, call.bias, call.target[keep], call.positive[keep], SOFTCAP
    )
    expected = rest.exact(**all_of())
    assert dhidden is not None
    assert_close(dhidden[keep], expected[0], torch.float32)
    assert torch.equal(dhidden[3:7], torch.zeros_like(dhidden[3:7]))
    assert_close(dweight, expected[1], torch.float32)
    assert_close(dbias, expected[2], torch.float32)


def test_a_positive_that_there_is_not_leaves_the_target() -> None:
    call = make_call(5)
    call.positive[:] = -1
    detached = call.exact(**all_of(detach_positive=True))
    dhidden, dweight, _ = call.kernel(**all_of())
    assert_close(dhidden, detached[0], torch.float32)
    assert_close(dweight, detached[1], torch.float32)


def test_nan_is_seen() -> None:
    call = make_call(6)
    call.coef[2] = torch.nan
    dhidden, dweight, _ = call.kernel(**all_of())
    assert dhidden is not None
    assert dweight is not None
    assert dhidden.isnan().all(1).tolist() == [False, False, True, False, False, False]
    columns = {int(call.target[2]), int(call.positive[2])}
    assert set(dweight.isnan().all(1).nonzero().flatten().tolist()) == columns


def test_any_strides() -> None:
    call = make_call(bias=True, transform=SOFTCAP)
    expected = call.exact(**all_of())
    call.hidden = torch.stack([call.hidden, call.hidden], 2)[:, :, 0]
    call.weight = call.weight.t().contiguous().t()
    call.target, call.positive = torch.stack([call.target, call.positive], 1).unbind(1)
    call.coef, call.bias = (torch.stack([one, one], 1)[:, 0] for one in (call.coef, call.bias) if one is not None)
    for actual, exact in zip(call.kernel(**all_of()), expected, strict=True):
        assert_close(actual, exact, torch.float32)


def test_no_tokens() -> None:
    call = make_call(1, bias=True)
    none = Call(
        call.coef[:0], call.hidden[:0], call.weight, call.bias, call.target[:0], call.positive[:0], call.transform
    )
    dhidden, dweight, dbias = none.kernel(**all_of())
    assert dhidden is not None
    assert dhidden.shape == (0, 40)
    assert dweight is not None
    assert torch.equal(dweight, torch.zeros_like(call.weight))
    assert dbias is not None
    assert torch.equal(dbias, torch.zeros(13, device=DEVICE))


def test_two_runs_give_the_same_bits_in_order_of_the_tokens() -> None:
    call = make_call(bias=True, transform=SOFTCAP)
    first, second = call.kernel(**all_of()), call.kernel(**all_of())
    assert all(
        torch.equal(one, two) for one, two in zip(first, second, strict=True) if one is not None and two is not None
    )
    # 2^24 + 1 - 2^24: what float32 makes of it tells the order in which edges were added.
    edges = Edges(
        torch.tensor([0, 0, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([2.0**24, 1.0, -(2.0**24)], device=DEVICE),
    )
    one_by_one = CringeConfig(block_hidden=16, edges=1, num_warps=1)
    ones = torch.ones(3, 16, device=DEVICE)
    dweight, dbias = weight_gradient(edges, ones, ones[:2], ones[0, :2], config=one_by_one)
    assert dweight is not None
    assert dbias is not None
    assert dweight[0].tolist() == [0.0] * 16
    assert dbias.tolist() == [0.0, 0.0]
