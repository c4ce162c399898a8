"""Block sizes, warps and pipeline stages of the kernels that multiply, and what these kernels cannot serve.

No GPU has measured this table yet. It was chosen by reasoning, among what compiles without a spill and fits an
architecture's shared memory (``tests/ops/test_triton_compile.py``, ``resources.json``):

- 16 bits: a block of 128 x 256 logits needs the least traffic from L2 for a multiplication, 85 operations a byte; it is
  the largest whose float32 sums fit the registers of 8 warps (sm_90) or tensor memory (sm_100). sm_80, whose tensor
  cores take their factors from registers, gets 128 x 128, and Cringe's pass has half of that, for its candidates are in
  registers too. 64 hidden entries make rows of 128 bytes in shared memory, the widest swizzle there is. As many stages
  as fit.
- 32 bits: without TF32, float32 is multiplied outside the tensor cores, at a fifteenth of their speed; small blocks
  lose nothing there.

``FASTD2O_AUTOTUNE=1`` tries the neighbours of an entry on the device when a kind of call comes for the first time, and
remembers the fastest for the life of the process. Otherwise no call ever measures anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastd2o.ops.backends import Sizes

# What @triton.jit has asked when the kernels beside this module were defined.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

MAX_CANDIDATES = 64
# Columns and tokens are counted in 32 bits; a block's end must be countable as well.
MAX_SIZE = 2**31 - 2**16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ProductConfig:
    """How a kernel cuts ``hidden @ weight.T``: ``block_tokens x block_columns`` logits at a time, summed up
    ``block_hidden`` by ``block_hidden``. ``parts``: into how many parts (1, 2 or 4) a block's columns are cut when its
    logits are worked on, which is what bounds registers where the sums lie in tensor memory."""

    block_tokens: int
    block_columns: int
    block_hidden: int
    num_warps: int
    num_stages: int
    parts: int = 1


# Kernel -> architecture -> bits of a factor -> blocks. Architectures: 80 (A100), 86 (8.6, 8.9 and 12.x: 99 KB of shared
# memory), 90 (H100, H200), 100 (B200, B300); 0 is everything else: the interpreter, where small blocks are quick, and
# GPUs that are not NVIDIA's, which nobody has tested.
_OTHER = ProductConfig(32, 64, 64, 4, 2)
_FLOAT32 = ProductConfig(64, 64, 32, 4, 3)
_FLOAT32_CANDIDATES = ProductConfig(64, 64, 32, 8, 3)
TABLE: dict[str, dict[int, dict[int, ProductConfig]]] = {
    "fold": {
        0: {16: _OTHER, 32: _OTHER},
        80: {16: ProductConfig(128, 128, 64, 8, 4, parts=2), 32: _FLOAT32},
        86: {16: ProductConfig(128, 128, 32, 8, 4, parts=2), 32: _FLOAT32},
        90: {16: ProductConfig(128, 256, 64, 8, 4, parts=4), 32: _FLOAT32},
        100: {16: ProductConfig(128, 256, 64, 8, 4, parts=4), 32: _FLOAT32},
    },
    "grad": {
        0: {16: _OTHER, 32: _OTHER},
        80: {16: ProductConfig(128, 128, 64, 8, 4, parts=2), 32: _FLOAT32},
        86: {16: ProductConfig(128, 128, 32, 8, 4, parts=2), 32: _FLOAT32},
        90: {16: ProductConfig(128, 256, 64, 8, 4, parts=4), 32: _FLOAT32},
        100: {16: ProductConfig(128, 256, 64, 8, 4, parts=4), 32: _FLOAT32},
    },
    # Cringe's pass with up to 16 candidates.
    "cringe": {
        0: {16: _OTHER, 32: _OTHER},
        80: {16: ProductConfig(64, 128, 64, 8, 4), 32: _FLOAT32_CANDIDATES},
        86: {16: ProductConfig(64, 128, 32, 8, 4), 32: _FLOAT32_CANDIDATES},
        90: {16: ProductConfig(128, 128, 64, 8, 4, parts=2), 32: _FLOAT32_CANDIDATES},
        100: {16: ProductConfig(128, 128, 64, 8, 4, parts=2), 32: _FLOAT32_CANDIDATES},
    },
    # And with up to 64.
    "cringe_wide": {
        0: {16: _OTHER, 32: _OTHER},
        80: {16: ProductConfig(64, 128, 64, 8, 4), 32: _FLOAT32_CANDIDATES},
        86: {16: ProductConfig(64, 128, 32, 8, 4), 32: _FLOAT32_CANDIDATES},
        90: {16: ProductConfig(128, 128, 64, 8, 4, parts=2), 32: _FLOAT32_CANDIDATES},
        100: {16: ProductConfig(64, 128, 64, 8, 4), 32: _FLOAT32_CANDIDATES},
    },
}

# Instead of it on NVIDIA's, where rows are ragged: kernel -> bits of a factor -> blocks. Entries come one by one, each
# with an address of its own, and those of 16 bits pass through registers: larger blocks spill.
_RAGGED = ProductConfig(64, 128, 32, 8, 2)
RAGGED: dict[str, dict[int, ProductConfig]] = {
    "fold": {16: _RAGGED, 32: _FLOAT32_CANDIDATES},
    "grad": {16: _RAGGED, 32: ProductConfig(32, 64, 32, 4, 3)},
    "cringe": {16: _RAGGED, 32: _FLOAT32_CANDIDATES},
    "cringe_wide": {16: ProductConfig(64, 64, 32, 8, 2), 32: _FLOAT32_CANDIDATES},
}


def unsupported(dtype: torch.dtype, device_type: str) -> str | None:
    """Why these kernels cannot serve calls, or None where they can.

    Args:
        dtype: of ``hidden`` and ``weight`` in the product.
        device_type: "cuda" or "cpu", where a call's tensors are.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return f"it has no {name} arithmetic"
    if device_type == "cuda":
        if INTERPRETED:
            return "TRITON_INTERPRET is set, under which its kernels run on the CPU only"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if not torch.version.hip and major < 8:
            return f"its kernels need compute capability 8.0 or above, and this GPU has {major}.{minor}"
    elif device_type == "cpu":
        if not INTERPRETED:
            return (
                "its kernels run on cuda, and hidden is on cpu; only Triton's interpreter (TRITON_INTERPRET=1) differs"
            )
        if dtype == torch.bfloat16:
            return "Triton's interpreter cannot multiply bfloat16"
    else:
        return f"its kernels run on cuda, and hidden is on {device_type}"
    return None


def beyond_limits(sizes: Sizes) -> str | None:
    """Why these kernels cannot serve a call of these sizes, or None where they can."""
    named = (
        (sizes.tokens, "tokens"),
        (sizes.hidden_size, "hidden entries"),
        (sizes.vocab_size, "columns of the vocabulary"),
    )
    for size, what in named:
        if size > MAX_SIZE:
            return f"its kernels count up to {MAX_SIZE} {what}, and the call has {size}"
    if sizes.k is not None and sizes.k > MAX_CANDIDATES:
        return f"it keeps at most {MAX_CANDIDATES} candidates, and k={sizes.k}"
    return None


@lru_cache
def architecture(device: torch.device) -> int:
    """The table's column for a device."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return 80
    return {9: 90, 10: 100, 11: 100}.get(major, 86)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, one on each. The interpreter runs one after the other; it has few, so that small
    shapes already make several rounds."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def precision(dtype: torch.dtype) -> str:
    """How factors are multiplied: float32 in TF32 where PyTorch does so. Elsewhere than on NVIDIA's GPUs, most of which
    have no TF32, Triton would not take the word."""
    # PyTorch's older flag, allow_tf32, raises where the newer one was set.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 and not torch.version.hip else "ieee"


def has_tma(device: torch.device, dtype: torch.dtype, precision: str) -> bool:
    """Whether blocks come by tensor descriptors. Tensor cores read them from shared memory as they are; what is
    multiplied outside, float32 without TF32, goes through registers, and spills there when it comes that way."""
    return architecture(device) in (90, 100) and (dtype != torch.float32 or precision == "tf32")


def fits_tma(factor: Tensor) -> bool:
    """Whether a tensor descriptor can be had of a factor."""
    rows_aligned = factor.stride(0) * factor.element_size() % 16 == 0
    return (
        factor.stride(1) == 1 and factor.stride(0) >= factor.shape[1] and rows_aligned and factor.data_ptr() % 16 == 0
    )


def is_ragged(factor: Tensor, tma: bool) -> bool:
    """Whether a factor's entries come one by one: pointers serve it, and Triton, which asks whether numbers are
    multiples of 16, learns nothing of how its rows are aligned.

    Args:
        tma: whether descriptors serve what fits them, see :func:`has_tma`.
    """
    if tma:
        return not fits_tma(factor)
    return factor.stride(1) != 1 or any(n % 16 for n in (factor.stride(0), factor.shape[1], factor.data_ptr()))


def table_entry(kernel: str, arch: int, dtype: torch.dtype, ragged: bool = False) -> ProductConfig:
    """What the table says."""
    entries = RAGGED[kernel] if ragged and arch != 0 else TABLE[kernel][arch]
    return entries[8 * dtype.itemsize]


def neighbours(config: ProductConfig) -> list[ProductConfig]:
    """What may be faster than an entry on a device at hand: one thing changed at a time. Those that need too much of
    something are found out when they are tried."""
    changes: list[dict[str, Any]] = [
        {"num_stages": config.num_stages - 1},
        {"num_stages": config.num_stages + 1},
        {"num_warps": config.num_warps // 2},
        {"block_columns": config.block_columns // 2},
        {"block_columns": config.block_columns // 2, "num_warps": config.num_warps // 2},
        {"block_columns": config.block_columns * 2},
        {"block_tokens": config.block_tokens * 2, "block_columns": config.block_columns // 2},
        {"block_hidden": config.block_hidden * 2, "num_stages": max(2, config.num_stages // 2)},
        {"parts": 3 - config.parts if config.parts < 3 else 2},
    ]
    tried = [replace(config, **change) for change in changes]
    return [one for one in tried if one.num_stages >= 2 and one.num_warps >= 4 and one.block_columns // one.parts >= 16]


_tuned: dict[tuple[Any, ...], ProductConfig] = {}


def choose(
    kernel: str, hidden_TD: Tensor, weight_ND: Tensor, variant: tuple[Any, ...], trial: Callable[[ProductConfig], None]
) -> ProductConfig:
    """The table's entry for a call or, under FASTD2O_AUTOTUNE=1, what measured best among it and its neighbours.

    Args:
        variant: what else makes calls differ in speed.
        trial: makes the call with one configuration, on results that nobody needs.
    """
    device = hidden_TD.device
    how = precision(hidden_TD.dtype)
    tma = has_tma(device, hidden_TD.dtype, how)
    ragged = is_ragged(hidden_TD, tma) or is_ragged(weight_ND, tma)
    entry = table_entry(kernel, architecture(device), hidden_TD.dtype, ragged)
    if device.type != "cuda" or os.environ.get("FASTD2O_AUTOTUNE") != "1":
        return entry
    tokens, hidden_size = hidden_TD.shape
    key = (kernel, device, hidden_TD.dtype, how, ragged, tokens.bit_length(), len(weight_ND), hidden_size, *variant)
    if key not in _tuned:
        with torch.cuda.device_of(hidden_TD):  # do_bench times the current device
            if torch.cuda.is_current_stream_capturing():  # which waits for nothing, so nothing can be measured
                return entry
            times = {one: _milliseconds(one, trial) for one in (entry, *neighbours(entry))}
        _tuned[key] = min(times, key=lambda one: times[one])
    return _tuned[key]


def _milliseconds(config: ProductConfig, trial: Callable[[ProductConfig], None]) -> float:
    """Infinite for a configuration that does not compile or does not fit."""
    try:
        trial(config)
        time: float = triton.testing.do_bench(lambda: trial(config), warmup=5, rep=40, return_mode="median")
    except Exception:  # whatever Triton raises: each of its releases has errors of its own
        return float("inf")
    return time
