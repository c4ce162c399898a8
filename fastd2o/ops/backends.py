"""Which implementation of the tile operations serves a call: one table, one decision."""

from __future__ import annotations

import torch

from fastd2o.ops.tile_ops import LogitTransform, TileOps
from fastd2o.ops.torch_tile_ops import TorchTileOps

BACKENDS = ("torch", "cpu", "triton", "cuda")

_NOT_BUILT = "its kernels are not part of this version of FastD2O"


def backends() -> dict[str, str | None]:
    """Every backend's name -> None where it works here, otherwise the reason why it does not."""
    return {name: None if name == "torch" else _NOT_BUILT for name in BACKENDS}


def resolve(backend: str | None) -> str:
    """The name of the backend that will serve a call.

    Args:
        backend: a name, or None for the best that works.

    Raises:
        ValueError: for an unknown name, or one that cannot serve: a backend asked for by name is never replaced by
            another.
    """
    if backend is None:
        return "torch"
    available = backends()
    if backend not in available:
        raise ValueError(
            f"backend={backend!r} is unknown. Known: {', '.join(BACKENDS)}, or None for the best that works here"
        )
    reason = available[backend]
    if reason is not None:
        raise ValueError(
            f"backend={backend!r} cannot serve: {reason}. Fix: backend='torch', or None to let the engine choose"
        )
    return backend


def tile_ops(backend: str, transform: LogitTransform, dtype: torch.dtype) -> TileOps:
    """A fresh TileOps of the backend that :func:`resolve` named."""
    implementations = {"torch": TorchTileOps}
    return implementations[backend](transform, dtype)
