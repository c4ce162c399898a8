"""What a call will do before it does it: algorithm, tile shape, floating-point operations and extra memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastd2o.ops.backends import Sizes, fuses, resolve, tile_dtype
from fastd2o.ops.budget import resolve_budget
from fastd2o.ops.measured import prefers_fused
from fastd2o.ops.torch_tile_ops import band_elements

Algorithm = Literal["forward", "unit", "recompute", "grouped", "cringe"]

# What each algorithm is, and how many multiples of T·D·V its matrix products cost.
_ALGORITHMS: dict[str, tuple[str, int]] = {
    "forward": ("forward only (no gradient)", 2),
    "unit": ("unit gradient (frozen head)", 4),
    "recompute": ("recompute (trained head)", 8),
    "grouped": ("grouped (trained head, losses of groups)", 8),
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
# Bytes at most of what the splits of a fused kernel leave to be merged, unless one split needs more: for every token a
# few sums, in Cringe's pass two sums and up to 64 candidates.
PARTIAL_BYTES = 16 << 20
_SPLIT_BYTES_PER_TOKEN = {"cringe": 8 + 64 * 8}
_SUMS_BYTES_PER_TOKEN = 20
# Bytes that the grouped algorithm may take when nobody says how many.
DEFAULT_BUDGET = 1 << 30
# Parts of fewer tokens than this add to the weight's gradient too often.
_LEAST_PART_TOKENS = 512
# Bytes of gathered rows that are summed at once in Cringe's gradient of the weight.
GATHER_BYTES = 32 << 20


@dataclass(frozen=True)
class Plan:
    """How the engine will walk the ``[tokens, vocabulary]`` plane. Printable; pass one (see :meth:`choose`,
    :func:`dataclasses.replace`) as ``plan=`` to override the engine's own choice.

    Attributes:
        algorithm: ``"forward"``, no gradient: 2 T·D·V. ``"unit"``, head frozen: the gradient of every token's log-odds
            is formed in the forward, 4 T·D·V. ``"recompute"``, head trained: logits are formed again in the backward,
            8 T·D·V less 2 for the share of the vocabulary that is kept. ``"grouped"``, head trained and the loss one of
            groups (:func:`fastd2o.linear_preference_loss`): forward and backward of a part of the groups after the
            other, within the forward, 6 T·D·V where a part's softmax weights can be kept whole. ``"cringe"``:
            :func:`fastd2o.linear_cringe`, 2 T·D·V.
        tokens: T, the most tokens the call can project (those that are ignored are not).
        hidden_size: D.
        vocab_size: V.
        block_tokens: tokens of one tile.
        block_vocab: vocabulary columns of one tile.
        dtype: of the matrix products.
        device: ``"cpu"`` or ``"cuda"``.
        weight_dtype: of the weight, and so of its gradient; None: that of the products. A weight of another dtype than
            theirs is cast slab by slab.
        backend: of the tile operations, see :func:`fastd2o.backends`.
        fused: product and fold, or product and gradient, are one kernel, which only backend ``"triton"`` has, and not
            for ``"unit"``; False: the product is the vendor's, and a tile of logits is in memory in between. The
            engine takes what ``fastd2o/ops/measured.py`` says was faster on such a GPU.
        compact: project only the tokens that count. To know how many those are, the host waits for the device, once a
            forward and once a backward. False: nothing waits, and all tokens are projected. While a CUDA graph is
            captured, which cannot hold a wait, it is taken as False.
        kept_bytes: what the softmax weights may take that are kept between a forward and its backward, in the dtype of
            the products, so that as many logits need not be formed again: of a call, or of a part.
        part_tokens: ``"grouped"``: tokens of one part; None: there is but one. A group is never split, so one that is
            larger makes a part of its own, of which ``kept_bytes`` hold less than all.
    """

    algorithm: Algorithm
    tokens: int
    hidden_size: int
    vocab_size: int
    block_tokens: int
    block_vocab: int
    dtype: torch.dtype
    device: str = "cpu"
    weight_dtype: torch.dtype | None = None
    backend: str = "torch"
    fused: bool = False
    compact: bool = True
    kept_bytes: int = 0
    part_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in _ALGORITHMS:
            raise ValueError(f"plan.algorithm={self.algorithm!r} is unknown: expected one of {', '.join(_ALGORITHMS)}")
        for name in ("block_tokens", "block_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be at least 1")
        if self.kept_bytes < 0:
            raise ValueError(f"plan.kept_bytes={self.kept_bytes} must not be negative")
        if self.kept_bytes > 0 and self.algorithm not in ("recompute", "grouped"):
            raise ValueError(
                f"plan.kept_bytes={self.kept_bytes}, but {self.algorithm!r} has nothing to keep. Fix: kept_bytes=0"
            )
        if self.part_tokens is not None and self.part_tokens < 1:
            raise ValueError(f"plan.part_tokens={self.part_tokens} must be at least 1, or None for one part")
        if self.part_tokens is not None and self.algorithm != "grouped":
            raise ValueError(
                f"plan.part_tokens={self.part_tokens}, but only 'grouped' works in parts, not {self.algorithm!r}. Fix: "
                "part_tokens=None"
            )
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
        grouped: bool = False,
        k: int | None = None,
        backend: str | None = None,
        memory_budget: int | float | None = None,
    ) -> Plan:
        """The engine's own plan of a call on these tensors, under the gradient mode and autocast that are on.

        ``cringe``, ``grouped``: of :func:`fastd2o.linear_cringe`, which has ``k`` candidates,
        :func:`fastd2o.linear_preference_loss`.
        """
        device = hidden.device.type
        dtype = hidden.dtype
        # As autocast does, it leaves float64 alone.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        algorithm: Algorithm = "cringe" if cringe else "forward"
        if torch.is_grad_enabled() and not cringe:
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                algorithm = "grouped" if grouped else "recompute"
            elif hidden.requires_grad:
                algorithm = "unit"
        tokens, hidden_size, vocab_size = hidden.numel() // hidden.shape[-1], hidden.shape[-1], weight.shape[0]
        return cls.choose(
            tokens=tokens,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            algorithm=algorithm,
            dtype=dtype,
            device=device,
            weight_dtype=weight.dtype,
            backend=resolve(backend, device, dtype, Sizes(tokens, hidden_size, vocab_size, k)),
            memory_budget=resolve_budget(memory_budget, hidden.device),
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
        weight_dtype: torch.dtype | None = None,
        backend: str | None = None,
        memory_budget: int | None = None,
    ) -> Plan:
        """The engine's own choice of tile for a call of this shape. A backend that is named is taken at its word: plans
        can be made for another machine.

        ``memory_budget``: bytes beyond inputs, results and gradients that the call may take. ``"recompute"`` keeps
        softmax weights with what is left of it (None: none), ``"grouped"`` also sums of several parts (None: 1 GiB).
        """
        backend = backend or resolve(None, device, dtype, Sizes(tokens, hidden_size, vocab_size))
        block_tokens = max(1, min(tokens, _BLOCK_TOKENS.get(device, _BLOCK_TOKENS["cuda"])))
        budget = _TILE_BYTES.get(device, _TILE_BYTES["cuda"])
        columns = budget // (block_tokens * tile_dtype(dtype, device, backend).itemsize)
        # With few tokens the tile is small however wide it is; what is then to be bounded is the slab of the weight.
        # Where the head trains, so are the sums of its gradient.
        widest = max(dtype.itemsize, 4) if algorithm in ("recompute", "grouped") else dtype.itemsize
        columns = min(columns, budget // (hidden_size * widest) if hidden_size else columns)
        columns = max(columns, _MIN_BLOCK_VOCAB) // 64 * 64
        plan = cls(
            algorithm=algorithm,
            tokens=tokens,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            block_tokens=block_tokens,
            block_vocab=min(columns, vocab_size),
            dtype=dtype,
            device=device,
            weight_dtype=weight_dtype,
            backend=backend,
            fused=fuses(backend, algorithm) and prefers_fused(algorithm, dtype, device),
        )
        if algorithm == "grouped":
            return plan._in_parts(DEFAULT_BUDGET if memory_budget is None else memory_budget)
        if algorithm == "recompute" and memory_budget is not None:
            return plan._keeping(memory_budget)
        return plan

    def _keeping(self, budget: int) -> Plan:
        """With what a budget leaves for kept softmax weights."""
        free = self._room(budget) - self.tokens * self._maxima_bytes
        return replace(self, kept_bytes=min(max(0, free), self.tokens * self._row_bytes))

    def _room(self, budget: int) -> int:
        """What a budget leaves for kept softmax weights, and what they are relative to. They are formed of tiles of
        logits in memory, which a plan that fuses has otherwise none of."""
        return budget - self.extra_bytes - (self._logits_bytes if self.fused else 0)

    def _in_parts(self, budget: int) -> Plan:
        """All tokens at once if the budget lets them; else parts, which have to be summed, if that pays."""
        whole = self._keeping(budget)
        # Every part adds to sums of [V, D]: no less work than to form a quarter of the logits again.
        if 4 * whole.kept_columns >= 3 * self.vocab_size:
            return whole
        # What a part takes besides grows with it up to one tile.
        for largest in (self.tokens, _LEAST_PART_TOKENS):
            parts = replace(self, part_tokens=max(1, min(largest, self.block_tokens)))
            part_tokens = min(largest, parts._room(budget) // (self._row_bytes + self._maxima_bytes))
            if part_tokens >= _LEAST_PART_TOKENS:
                return replace(parts, part_tokens=part_tokens, kept_bytes=part_tokens * self._row_bytes)
        return whole

    @property
    def _row_bytes(self) -> int:
        """Of one token's softmax weights."""
        return self.vocab_size * self.dtype.itemsize

    @property
    def _maxima_bytes(self) -> int:
        """Of what one token's softmax weights are relative to, a number for every slab."""
        sums = torch.float64.itemsize if self.dtype == torch.float64 else torch.float32.itemsize
        return -(-self.vocab_size // self.block_vocab) * sums

    @property
    def cast_weight(self) -> bool:
        """Whether the weight has another dtype than the products."""
        return self.weight_dtype not in (None, self.dtype)

    @property
    def kept_columns(self) -> int:
        """How many columns' softmax weights are kept for the backward, of all V."""
        return kept_columns(self.kept_bytes, self._tokens_at_once, self.vocab_size, self.block_vocab, self.dtype)

    @property
    def flops_factor(self) -> float:
        """Floating-point operations of the matrix products, forward and backward, in multiples of T·D·V."""
        return _ALGORITHMS[self.algorithm][1] - 2 * self.kept_columns / self.vocab_size

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, forward and backward."""
        formed_again = _ALGORITHMS[self.algorithm][1] * self.vocab_size - 2 * self.kept_columns
        return formed_again * self.tokens * self.hidden_size

    @property
    def _tokens_at_once(self) -> int:
        """Of a part, or of the call."""
        return self.tokens if self.part_tokens is None else min(self.part_tokens, self.tokens)

    @property
    def _tile(self) -> tuple[int, int]:
        """Tokens and columns of the largest tile."""
        return min(self.block_tokens, self._tokens_at_once), min(self.block_vocab, self.vocab_size)

    @property
    def _logits_bytes(self) -> int:
        """Of a tile of logits in memory."""
        return math.prod(self._tile) * tile_dtype(self.dtype, self.device, self.backend).itemsize

    @property
    def extra_bytes(self) -> int:
        """An upper estimate of the memory held beyond inputs, result and gradients at the worst moment."""
        part = self._tokens_at_once
        tokens, columns = self._tile
        factor, logit = self.dtype.itemsize, tile_dtype(self.dtype, self.device, self.backend).itemsize
        sums = torch.float64.itemsize if self.dtype == torch.float64 else torch.float32.itemsize
        total = self._working_bytes(tokens, columns)
        if not self.fused or self.kept_columns:
            total += self._logits_bytes
        # Per-token sums; the tokens that count, gathered.
        total += self.tokens * (16 * sums + self.hidden_size * factor)
        if self.cast_weight:
            total += columns * self.hidden_size * factor
        if self.algorithm == "forward":
            return total
        if self.algorithm == "cringe":
            # Two rows of the weight for each of some tokens, and a block of what goes into the weight's gradient.
            return total + 3 * min(GATHER_BYTES, 2 * self.tokens * self.hidden_size * sums)
        if self.fused or logit != factor:
            total += tokens * columns * factor  # the tile's gradient, in the dtype of the products
        elif self.dtype == torch.float16:  # backend torch on the CPU
            total += (tokens * columns + columns * self.hidden_size) * sums  # factors, widened for their product
        # What a product takes that is to be added to a sum; backend cpu's adds where it is.
        products = 0 if self.backend == "cpu" else 1
        total += products * tokens * self.hidden_size * sums  # one slab's share of the gradient of hidden
        if self.algorithm == "unit":
            return total + (self.tokens + 2 * tokens) * self.hidden_size * sums  # what the backward multiplies
        total += self.kept_columns * part * factor + -(-self.kept_columns // self.block_vocab) * part * sums
        weight_dtype = self.weight_dtype or self.dtype
        summed = self.part_tokens is not None or (self.algorithm == "grouped" and weight_dtype == torch.float16)
        if summed and weight_dtype.itemsize < sums:
            total += self.vocab_size * self.hidden_size * sums  # what the parts' gradients of the weight are added to
        # The sum itself, the target's rows of the weight, and a slab's gradient of the weight.
        return total + self.hidden_size * (self.tokens * (2 * sums + factor) + (1 + products) * columns * sums)

    def _working_bytes(self, tokens: int, columns: int) -> int:
        """What the backend holds while it works on one tile."""
        if self.fused:
            return max(PARTIAL_BYTES, self.tokens * _SPLIT_BYTES_PER_TOKEN.get(self.algorithm, _SUMS_BYTES_PER_TOKEN))
        if self.backend == "cpu":
            # csrc/cpu/product.cpp: panels of one factor, or one panel of 64 columns if that is more; for every thread a
            # block of the other factor, 128 x 1024 of 16 bits or 128 x 128 of 32.
            widest = max(self.hidden_size, columns, tokens) + 32
            return max(_PACKED_BYTES, 64 * widest * 4) + _threads() * (128 * 1024 * 2)
        sums = torch.float64.itemsize if self.dtype == torch.float64 else torch.float32.itemsize
        return _BAND_COPIES * min(band_elements(self.device), max(tokens, 1) * columns) * sums

    def __str__(self) -> str:
        what, _ = _ALGORITHMS[self.algorithm]
        if self.part_tokens is not None:
            what += f" in parts of {self.part_tokens} tokens"
        full = self.tokens * self.vocab_size * (2 * torch.float32.itemsize + self.dtype.itemsize)
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{what}, {self.flops_factor:.3g} T·D·V; {self.tokens} tokens x {self.hidden_size} x {self.vocab_size} "
            f"vocabulary in {dtype} on {self.device}, backend {self.backend}; tiles of {self.block_tokens} x "
            f"{self.block_vocab}; "
            f"{self.flops / 1e12:.3g} TFLOP; at most {self.extra_bytes / 1e6:.0f} MB extra "
            f"(full logits: {full / 1e6:.0f} MB)"
        )


# A graph does not hold the number of threads; a plan that is made while it is traced does.
@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def kept_columns(kept_bytes: int, tokens: int, vocab_size: int, block_vocab: int, dtype: torch.dtype) -> int:
    """How many columns' softmax weights of so many tokens fit: whole slabs, or all."""
    columns = kept_bytes // max(1, tokens * dtype.itemsize)
    return vocab_size if columns >= vocab_size else columns // block_vocab * block_vocab
