"""Which implementation of the tile operations serves a call: one table, one decision."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastd2o.errors import FastD2OWarning
from fastd2o.ops import native
from fastd2o.ops.native_tile_ops import CpuTileOps, CudaTileOps
from fastd2o.ops.tile_ops import LogitTransform, TileOps
from fastd2o.ops.torch_tile_ops import TorchTileOps
from fastd2o.ops.triton_tile_ops import TritonTileOps

BACKENDS = ("torch", "cpu", "triton", "cuda")

_TILE_OPS: dict[str, Callable[[LogitTransform, torch.dtype], TileOps]] = {
    "torch": TorchTileOps,
    "cpu": CpuTileOps,
    "cuda": CudaTileOps,
    "triton": TritonTileOps,
}

# What serves a device when nothing is asked for, best first. The CUDA kernels join when they have been measured on one.
_PREFERRED = {"cpu": ("cpu", "torch")}

# Backends that could not be loaded, with the environment's variables that this depends on.
_in_vain: set[tuple[str | None, ...]] = set()

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    """How large a call is, of which a backend's kernels may not count as far.

    Attributes:
        tokens: T.
        hidden_size: D.
        vocab_size: V.
        k: candidates of :func:`fastd2o.linear_cringe`; None where a call has none.
    """

    tokens: int = 1
    hidden_size: int = 1
    vocab_size: int = 1
    k: int | None = None


def backends() -> dict[str, str | None]:
    """Every backend's name -> None where it works here (its kernels may have to be compiled first), otherwise the
    reason why it does not."""
    return {name: _unavailable(name) for name in BACKENDS}


def check_backend(backend: str | None) -> None:
    """Refuse a backend that is unknown or that this machine cannot have; None, the best that works, always passes.

    Raises:
        ValueError: the message says why, and the fix.
    """
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown. Known: {', '.join(BACKENDS)}, or None for the best that works here"
        )
    _refuse(backend, _unavailable(backend))


def supported(backend: str, device: str, dtype: torch.dtype, sizes: Sizes | None = None) -> str | None:
    """Why this backend cannot serve a call, or None where it can.

    Args:
        device: "cpu" or "cuda", where the call's tensors are.
        dtype: of its matrix products.
        sizes: None for a call of any size that is usual.
    """
    return _misfit(backend, device, dtype) or _unavailable(backend) or _beyond(backend, sizes)


def resolve(backend: str | None, device: str, dtype: torch.dtype, sizes: Sizes | None = None) -> str:
    """The name of the backend that will serve a call, its kernels compiled and loaded.

    Args:
        backend: a name, or None for the best that works.
        device, dtype, sizes: as in :func:`supported`.

    Raises:
        ValueError: for an unknown name, or one that cannot serve: a backend asked for by name is never replaced by
            another.
    """
    if backend is not None:
        _check_serves(backend, device, dtype)
        _refuse(backend, _beyond(backend, sizes))
        return backend
    for name in _PREFERRED.get(device, ()):
        if _serves(name, device, dtype) and _beyond(name, sizes) is None:
            return name
    return "torch"


# Compiling kernels, or finding that they cannot be had, is nothing that a graph should hold. Sizes may be its symbols.
@torch.compiler.assume_constant_result
def _check_serves(backend: str, device: str, dtype: torch.dtype) -> None:
    check_backend(backend)
    _refuse(backend, supported(backend, device, dtype) or _load(backend))


@torch.compiler.assume_constant_result
def _serves(backend: str, device: str, dtype: torch.dtype) -> bool:
    return _misfit(backend, device, dtype) is None and _can_load(backend)


def tile_dtype(dtype: torch.dtype, device: str, backend: str) -> torch.dtype:
    """The dtype a tile's logits arrive in: float32 wherever a 16-bit matrix product can deliver it, which is on CUDA,
    and on the CPU with our own."""
    if dtype in (torch.bfloat16, torch.float16) and (device == "cuda" or backend in ("cpu", "triton")):
        return torch.float32
    return dtype


def fuses(backend: str, algorithm: str) -> bool:
    """Whether the backend has the product and what follows it as one kernel, for a plan's algorithm."""
    return backend == "triton" and algorithm != "unit"


def tile_ops(backend: str, transform: LogitTransform, dtype: torch.dtype) -> TileOps:
    """A fresh TileOps of the backend that :func:`resolve` named."""
    return _TILE_OPS[backend](transform, dtype)


def _misfit(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the backend is not one for such calls; what a build could mend does not count."""
    if backend == "torch":
        return None
    if backend == "triton":
        # Triton is an optional dependency, and takes a while to import.
        return _unavailable(backend) or _triton_misfit(device, dtype)
    if device != backend:
        return f"its kernels run on {backend}, and hidden is on {device}"
    if dtype not in _NATIVE_DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')} arithmetic"
    return None


def _unavailable(backend: str) -> str | None:
    if backend == "torch":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed. Fix: pip install 'fastd2o[triton]'"
        if (broken := _triton_broken()) is not None:
            return broken
        on_cuda, on_cpu = (_triton_misfit(device, torch.float32) for device in ("cuda", "cpu"))
        return on_cuda and on_cpu and on_cuda
    return native.unavailable("cpu" if backend == "cpu" else "cuda")


def _triton_broken() -> str | None:
    """Why the kernels cannot be imported, though there is a Triton. Asked before anything else that imports them."""
    try:
        from fastd2o.kernels import configs, cringe_backward, cringe_forward, logprob, loss, tiles  # noqa: F401
    except Exception as error:  # whatever comes up: an old Triton lacks this or that, a broken one may raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name == "fastd2o.kernels":
            return f"its kernels are not installed ({what}). Fix: pip install -e . in the checkout"
        version = getattr(sys.modules.get("triton"), "__version__", "of an unknown version")
        return f"Triton {version} cannot be used ({what}). Fix: pip install -U 'fastd2o[triton]'"
    return None


def _triton_misfit(device: str, dtype: torch.dtype) -> str | None:
    from fastd2o.kernels import configs

    return configs.unsupported(dtype, device)


def _beyond(backend: str, sizes: Sizes | None) -> str | None:
    """Why a backend that is there cannot serve a call of these sizes."""
    if backend != "triton" or sizes is None:
        return None
    from fastd2o.kernels import configs

    return configs.beyond_limits(sizes)


def _load(backend: str) -> str | None:
    """Have the backend's kernels; the reason where that fails. Triton's are compiled when they are called."""
    if backend in ("torch", "triton"):
        return None
    try:
        native.load("cpu" if backend == "cpu" else "cuda")
    except native.NativeError as error:
        return str(error)
    return None


def _can_load(backend: str) -> bool:
    """Have the backend's kernels. Where that fails one warning says so, unless it was the user's own wish, and it is
    not tried again before something changes that it depends on: looking for compilers takes its time."""
    surroundings = (backend, *map(os.environ.get, native.VARIABLES))
    if surroundings in _in_vain:
        return False
    reason = _load(backend)
    if reason is None:
        return True
    _in_vain.add(surroundings)
    if not native.switched_off():
        warnings.warn(f"{reason}. Until then backend 'torch' serves.", FastD2OWarning, stacklevel=2)
    return False


def _refuse(backend: str, reason: str | None) -> None:
    if reason is not None:
        fix = "; or" if "Fix: " in reason else ". Fix:"
        raise ValueError(
            f"backend={backend!r} cannot serve: {reason}{fix} backend='torch', or None to let the engine choose"
        )
