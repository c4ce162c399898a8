"""The checks at the door, where a loss of its own does not already show them."""

from __future__ import annotations

import pytest
import torch

from fastd2o.losses import checks


@pytest.mark.parametrize("value", [True, "0.1", None, torch.tensor(0.1)])
def test_numbers_are_numbers(value: object):
    with pytest.raises(TypeError, match=f"beta is of type {type(value).__name__}, expected a number"):
        checks.positive(beta=value)  # type: ignore[arg-type]


def test_every_named_number_is_checked():
    checks.positive(alpha=1, beta=0.5)
    with pytest.raises(ValueError, match=r"beta is -0\.5"):
        checks.positive(alpha=1, beta=-0.5)


@pytest.mark.parametrize(
    "shapes", [([3], [3]), ([3], [1]), ([3], []), ([2, 3], [2, 1]), ([], []), ([0], [0]), ([2, 3], [1, 3])]
)
def test_shapes_of_one_rank_that_broadcast_pass(shapes: tuple[list[int], list[int]]):
    first, second = map(torch.zeros, shapes)
    checks.same_rank(first=first, second=second)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (([3], [3, 1]), r"differ in their number of dimensions: first \[3\], second \[3, 1\]"),
        (([3], [2]), r"do not broadcast: first \[3\], second \[2\]"),
        (([2, 3], [3, 2]), r"do not broadcast"),
    ],
)
def test_other_shapes_are_refused(shapes: tuple[list[int], list[int]], message: str):
    first, second = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        checks.same_rank(first=first, second=second)


def test_values_are_not_read_from_a_device():
    """Reading a length from an accelerator would wait for everything queued before it."""
    length = torch.zeros(3, dtype=torch.int64, device="meta")
    assert checks.lengths("length", length, like=torch.zeros(3, device="meta")) is length


def test_missing_length_is_named():
    with pytest.raises(ValueError, match="chosen_length is missing"):
        checks.lengths("chosen_length", None, like=torch.zeros(3))


def test_constants_may_be_numbers_or_tensors():
    like = torch.zeros(3)
    assert checks.constant("z0", 0.5, like=like) == 0.5
    z0 = checks.constant("z0", torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), like=like)
    assert isinstance(z0, torch.Tensor)
    assert z0.dtype == torch.float32
    assert not z0.requires_grad
    with pytest.raises(ValueError, match=r"z0 \[1, 3\]"):
        checks.constant("z0", torch.zeros(1, 3), like=like)
