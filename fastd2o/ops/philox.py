"""Philox 4x32-10, the counter-based random generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011).

A draw is a pure function of ``(seed, counter)``: it does not depend on chunking, on order, or on what was drawn before,
and another backend that implements the same function draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_4x32(seed: int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words per counter, each an int64 tensor of ``counter``'s shape with values in [0, 2^32).

    Args:
        seed: 64 bits, the key.
        counter: int64 ``[...]``; the low and high words of the 128-bit counter, the upper half being 0.
    """
    key = [seed & _MASK, (seed >> 32) & _MASK]
    word0, word1 = counter & _MASK, (counter >> 32) & _MASK
    word2 = word3 = torch.zeros_like(counter)
    for _ in range(10):
        # int64 multiplication wraps modulo 2^64, which keeps both halves of the product of two 32-bit words.
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        word0, word1, word2, word3 = high1 ^ word1 ^ key[0], low1, high0 ^ word3 ^ key[1], low0
        key = [(word + step) & _MASK for word, step in zip(key, _KEY_STEPS, strict=True)]
    return word0, word1, word2, word3


def uniform(seed: int, counter: Tensor) -> Tensor:
    """One float32 draw from [0, 1) per counter, a multiple of 2^-24: the top 24 bits of Philox' first word."""
    return (philox_4x32(seed, counter)[0] >> 8).to(torch.float32) * 2.0**-24
