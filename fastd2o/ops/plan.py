"""What a call will do before it does it: algorithm, tile shape, floating-point operations and extra memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastd2o.ops.backends import fuses, resolve, tile_dtype
from fastd2o.ops.torch_tile_ops import band_elements

Algorithm = Literal["forward", "unit", "recompute", "cringe"]

# What each algorithm is, and how many multiples of T·D·V its matrix products cost.
_ALGORITHMS: dict[str, tuple[str, int]] = {
    "forward": ("forward only (no gradient)", 2),
    "unit": ("unit gradient (frozen head)", 4),
    "recompute": ("recompute (trained head)", 8),
    "cringe": ("forward, sparse backward (Cringe)", 2),
}

# Bytes of one tile of logits. CPU: 16 MB keeps tile and slab in a last-level cache and the matrix product at full
# speed. CUDA: a float32 tile that an H100's or H200's 50-60 MB of L2 can hold.
_TILE_BYTES = {"cpu": 16 << 20, "cuda": 48 << 20}
_BLOCK_TOKENS = {"cpu": 2048, "cuda": 4096}
_MIN_BLOCK_VOCAB = 1024
# Temporaries of one band of a tile that may be alive together, see torch_tile_ops.
_BAND_COPIES = 6
# Bytes of the panels that csrc/cpu/product.cpp packs at a time.
_PACKED_BYTES = 4 << 20
# Bytes at most of what the splits of a fused kernel leave to be merged.
_PARTIAL_BYTES = 16 << 20
# Bytes of gathered rows that are summed at once in Cringe's gradient of the weight.
GATHER_BYTES = 32 << 20


@dataclass(frozen=True)
class Plan:
    """How the engine will walk the ``[tokens, vocabulary]`` plane. Printable; pass one (see :meth:`choose`,
    :func:`dataclasses.replace`) as ``plan=`` to override the engine's own choice.

    Attributes:
        algorithm: ``"forward"``, no gradient: 2 T·D·V. ``"unit"``, head frozen: the gradient of every token's log-odds
            is formed in the forward, 4 T·D·V. ``"recompute"``, head trained: logits are formed again in the backward,
            8 T·D·V. ``"cringe"``: :func:`fastd2o.linear_cringe`, 2 T·D·V.
        tokens: T, the most tokens the call can project (those that are ignored are not).
        hidden_size: D.
        vocab_size: V.
        block_tokens: tokens of one tile.
        block_vocab: vocabulary columns of one tile.
        dtype: of the matrix products.
        device: ``"cpu"`` or ``"cuda"``.
        cast_weight: the weight has another dtype and is cast slab by slab.
        backend: of the tile operations, see :func:`fastd2o.backends`.
        fused: product and fold, or product and gradient, are one kernel, which only backend ``"triton"`` has, and not
            for ``"unit"``; False: the product is the vendor's, and a tile of logits is in memory in between.
        compact: project only the tokens that count. To know how many those are, the host waits for the device, once a
            forward and once a backward. False: nothing waits, and all tokens are projected. While a CUDA graph is
            captured, which cannot hold a wait, it is taken as False.
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
    backend: str = "torch"
    fused: bool = False
    compact: bool = True

    def __post_init__(self) -> None:
        if self.algorithm not in _ALGORITHMS:
            raise ValueError(f"plan.algorithm={self.algorithm!r} is unknown: expected one of {', '.join(_ALGORITHMS)}")
        for name in ("block_tokens", "block_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be at least 1")
        if self.fused and not fuses(self.backend, self.algorithm):
            raise ValueError(
                f"plan.fused=True, but backend {self.backend!r} has no fused kernel for {self.algorithm!r}. Fix: "
                "fused=False"
            )

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        cringe: bool = False,
        backend: str | None = None,
    ) -> Plan:
        """The engine's own plan of a call on these tensors, under the gradient mode and autocast that are on."""
        device = hidden.device.type
        dtype = hidden.dtype
        # As autocast does, it leaves float64 alone.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        algorithm: Algorithm = "cringe" if cringe else "forward"
        if torch.is_grad_enabled() and not cringe:
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                algorithm = "recompute"
            elif hidden.requires_grad:
                algorithm = "unit"
        return cls.choose(
            tokens=hidden.numel() // hidden.shape[-1],
            hidden_size=hidden.shape[-1],
            vocab_size=weight.shape[0],
            algorithm=algorithm,
            dtype=dtype,
            device=device,
            cast_weight=weight.dtype != dtype,
            backend=resolve(backend, device, dtype),
        )

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
        backend: str | None = None,
    ) -> Plan:
        """The engine's own choice of tile for a call of this shape. A backend that is named is taken at its word: plans
        can be made for another machine."""
        backend = backend or resolve(None, device, dtype)
        block_tokens = max(1, min(tokens, _BLOCK_TOKENS.get(device, _BLOCK_TOKENS["cuda"])))
        budget = _TILE_BYTES.get(device, _TILE_BYTES["cuda"])
        columns = budget // (block_tokens * tile_dtype(dtype, device, backend).itemsize)
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
            backend=backend,
            fused=fuses(backend, algorithm),
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, forward and backward."""
        return _ALGORITHMS[self.algorithm][1] * self.tokens * self.hidden_size * self.vocab_size

    @property
    def extra_bytes(self) -> int:
        """An upper estimate of the memory held beyond inputs, result and gradients at the worst moment."""
        tokens, columns = min(self.block_tokens, self.tokens), min(self.block_vocab, self.vocab_size)
        factor, logit = self.dtype.itemsize, tile_dtype(self.dtype, self.device, self.backend).itemsize
        sums = torch.float64.itemsize if self.dtype == torch.float64 else torch.float32.itemsize
        total = self._working_bytes(tokens, columns)
        if not self.fused:
            total += tokens * columns * logit
        # Per-token sums; the tokens that count, gathered.
        total += self.tokens * (16 * sums + self.hidden_size * factor)
        if self.cast_weight:
            total += columns * self.hidden_size * factor
        if self.algorithm == "forward":
            return total
        if self.algorithm == "cringe":
            # Two rows of the weight per token, their products, and a block of what goes into the weight's gradient.
            return total + self.tokens * self.hidden_size * (factor + 4 * sums) + 2 * GATHER_BYTES
        if self.fused or logit != factor:
            total += tokens * columns * factor  # the tile's gradient, in the dtype of the products
        elif self.dtype == torch.float16:  # backend torch on the CPU
            total += (tokens * columns + columns * self.hidden_size) * sums  # factors, widened for their product
        total += tokens * self.hidden_size * sums  # one slab's share of the gradient of hidden
        if self.algorithm == "unit":
            return total + (self.tokens + 2 * tokens) * self.hidden_size * sums  # what the backward multiplies
        # The sum itself, the target's rows of the weight, and a slab's gradient of the weight.
        return total + self.hidden_size * (self.tokens * (2 * sums + factor) + 2 * columns * sums)

    def _working_bytes(self, tokens: int, columns: int) -> int:
        """What the backend holds while it works on one tile."""
        if self.fused:
            return _PARTIAL_BYTES
        if self.backend == "cpu":
            # csrc/cpu/product.cpp: panels of one factor, or one panel of 64 columns if that is more; for every thread a
            # block of the other factor, 128 x 1024 of 16 bits or 128 x 128 of 32.
            widest = max(self.hidden_size, columns, tokens) + 32
            return max(_PACKED_BYTES, 64 * widest * 4) + torch.get_num_threads() * (128 * 1024 * 2)
        sums = torch.float64.itemsize if self.dtype == torch.float64 else torch.float32.itemsize
        return _BAND_COPIES * min(band_elements(self.device), max(tokens, 1) * columns) * sums

    def __str__(self) -> str:
        what, factor = _ALGORITHMS[self.algorithm]
        full = self.tokens * self.vocab_size * (2 * torch.float32.itemsize + self.dtype.itemsize)
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{what}, {factor} T·D·V; {self.tokens} tokens x {self.hidden_size} x {self.vocab_size} vocabulary in "
            f"{dtype} on {self.device}, backend {self.backend}; tiles of {self.block_tokens} x {self.block_vocab}; "
            f"{self.flops / 1e12:.3g} TFLOP; at most {self.extra_bytes / 1e6:.0f} MB extra "
            f"(full logits: {full / 1e6:.0f} MB)"
        )
