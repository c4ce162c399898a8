"""Philox 4x32-10 against known answers and a plain-integer implementation."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastd2o.ops.philox import philox_4x32, uniform


def plain_philox(counter: int, seed: int) -> list[int]:
    """The round function of Salmon et al. 2011 on Python integers, which do not overflow."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_known_answer() -> None:
    """The first vector that the authors publish with Random123: counter 0, key 0."""
    words = philox_4x32(0, torch.zeros(1, dtype=torch.int64))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(counter=st.integers(0, 2**63 - 1), seed=st.integers(0, 2**64 - 1))
def test_equals_integer_arithmetic(counter: int, seed: int) -> None:
    signed = seed - 2**64 if seed >= 2**63 else seed
    words = philox_4x32(signed, torch.tensor([counter]))
    assert [int(word) for word in words] == plain_philox(counter, seed)


def test_uniform_is_uniform_and_below_one() -> None:
    draws = uniform(7, torch.arange(100_000))
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 0.005
    assert (draws.histc(10, 0, 1) - 10_000).abs().max() < 500
