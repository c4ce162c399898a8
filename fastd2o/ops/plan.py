"""What a call will do before it does it: algorithm, tile shape, floating-point operations and extra memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Algorithm = Literal["forward", "unit", "recompute"]

# Bytes of one tile of logits. CPU: 16 MB keeps tile and slab in a last-level cache and the matrix product at full speed
# (slabs of 2048 columns measured half as fast, slabs over 8192 no faster). CUDA: a float32 tile that an H100's or
# H200's 50-60 MB L2 can hold.
_TILE_BYTES = {"cpu": 16 << 20, "cuda": 48 << 20}
_BLOCK_TOKENS = {"cpu": 2048, "cuda": 4096}
_MIN_BLOCK_VOCAB = 4096
_SCRATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Plan:
    """How the engine will walk the ``[tokens, vocabulary]`` plane. Printable; pass one (see :meth:`choose`,
    :func:`dataclasses.replace`) as ``plan=`` to override the engine's own choice.

    Attributes:
        algorithm: ``"forward"``, no gradient: 2 T·D·V. ``"unit"``, head frozen: the gradient of every token's log-odds
            is formed in the forward, 4 T·D·V. ``"recompute"``, head trained: logits are formed again in the backward, 8
            T·D·V.
        tokens: T, the most tokens the call can project (those that are ignored are not).
        hidden_size: D.
        vocab_size: V.
        block_tokens: tokens of one tile.
        block_vocab: vocabulary columns of one tile.
        dtype: of the matrix products.
        device: ``"cpu"`` or ``"cuda"``.
        cast_weight: the weight has another dtype and is cast slab by slab.
    """

    algorithm: Algorithm
    tokens: int
    hidden_size: int
    vocab_size: int
    block_tokens: int
    block_vocab: int
    dtype: torch.dtype
    device: str = "cpu"
    cast_weight: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in ("forward", "unit", "recompute"):
            raise ValueError(f"plan.algorithm={self.algorithm!r} is unknown: expected 'forward', 'unit' or 'recompute'")
        for name in ("block_tokens", "block_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be at least 1")

    @classmethod
    def choose(
        cls,
        *,
        tokens: int,
        hidden_size: int,
        vocab_size: int,
        algorithm: Algorithm = "recompute",
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        cast_weight: bool = False,
    ) -> Plan:
        """The engine's own choice of tile for a call of this shape."""
        block_tokens = max(1, min(tokens, _BLOCK_TOKENS.get(device, _BLOCK_TOKENS["cuda"])))
        budget = _TILE_BYTES.get(device, _TILE_BYTES["cuda"])
        columns = budget // (block_tokens * tile_dtype(dtype, device).itemsize)
        # With few tokens the tile is small however wide it is; what is then to be bounded is the slab of the weight.
        columns = min(columns, budget // (hidden_size * dtype.itemsize) if hidden_size else columns)
        columns = max(columns, _MIN_BLOCK_VOCAB) // 64 * 64
        return cls(
            algorithm=algorithm,
            tokens=tokens,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            block_tokens=block_tokens,
            block_vocab=min(columns, vocab_size),
            dtype=dtype,
            device=device,
            cast_weight=cast_weight,
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, forward and backward."""
        factor = {"forward": 2, "unit": 4, "recompute": 8}[self.algorithm]
        return factor * self.tokens * self.hidden_size * self.vocab_size

    @property
    def extra_bytes(self) -> int:
        """An upper estimate of the memory held beyond inputs, result and gradients at the worst moment."""
        tokens, columns = min(self.block_tokens, self.tokens), min(self.block_vocab, self.vocab_size)
        sums = torch.float64.itemsize if self.dtype == torch.float64 else torch.float32.itemsize
        logits = tile_dtype(self.dtype, self.device).itemsize
        total = tokens * columns * logits + _SCRATCH_BYTES + 16 * self.tokens * sums
        total += self.tokens * self.hidden_size * self.dtype.itemsize  # the tokens that count, gathered
        if self.cast_weight:
            total += columns * self.hidden_size * self.dtype.itemsize
        if self.algorithm != "forward":
            if logits != self.dtype.itemsize:
                total += tokens * columns * self.dtype.itemsize  # the tile's gradient, in the dtype of the products
            elif self.dtype == torch.float16:
                total += (tokens * columns + columns * self.hidden_size) * sums  # factors, widened for their product
            # Sums over slabs and one slab's share of them.
            rows = tokens if self.algorithm == "unit" else self.tokens
            total += (rows + tokens) * self.hidden_size * sums
            if self.algorithm == "unit":
                total += self.tokens * self.hidden_size * sums  # the unit gradient, kept for the backward
            else:
                total += 2 * columns * self.hidden_size * sums  # a slab's weight gradient
        return total

    def __str__(self) -> str:
        what = {
            "forward": "forward only (no gradient), 2 T·D·V",
            "unit": "unit gradient (frozen head), 4 T·D·V",
            "recompute": "recompute (trained head), 8 T·D·V",
        }[self.algorithm]
        full = self.tokens * self.vocab_size * (2 * torch.float32.itemsize + self.dtype.itemsize)
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{what}; {self.tokens} tokens x {self.hidden_size} x {self.vocab_size} vocabulary in {dtype} on "
            f"{self.device}; tiles of {self.block_tokens} x {self.block_vocab}; {self.flops / 1e12:.3g} TFLOP; "
            f"at most {self.extra_bytes / 1e6:.0f} MB extra (full logits: {full / 1e6:.0f} MB)"
        )


def tile_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype a tile's logits arrive in: float32 wherever the vendor's 16-bit matrix product can deliver it
    (CUDA)."""
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return dtype
