"""What was measured on GPUs and decides for the engine, in one committed table: ``kernels/triton/measured.json``, which
``python -m benchmarks.tune`` writes."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# In the package, or where a checkout has it.
_PACKAGE = Path(__file__).parents[1]
_KERNELS = _PACKAGE / "kernels" if (_PACKAGE / "kernels").exists() else _PACKAGE.parent / "kernels" / "triton"

TABLE = _KERNELS / "measured.json"
"""Compute capability -> where and when it was measured, and milliseconds by dtype, algorithm and way."""

WAYS = ("fused", "tiles")
"""A kernel that multiplies and folds; the vendor's product, and a fold of its tile."""

# An algorithm that is made of another's kernels.
_MADE_OF = {"grouped": "recompute"}


@torch.compiler.assume_constant_result
def prefers_fused(algorithm: str, dtype: torch.dtype, device: str) -> bool:
    """Whether an algorithm was no slower with kernels that fuse the product, on GPUs like the current one. True where
    nobody has measured it: then no tile is in memory."""
    if device != "cuda" or (capability := current_capability()) is None:
        return True
    milliseconds = _read(TABLE).get(capability, {}).get("milliseconds", {})
    of_dtype = milliseconds.get(str(dtype).removeprefix("torch."), {})
    times = of_dtype.get(_MADE_OF.get(algorithm, algorithm))
    return times is None or bool(times["fused"] <= times["tiles"])


def current_capability() -> str | None:
    """Of the current NVIDIA GPU, "9.0"; None where there is none."""
    if torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def record(capability: str, entry: dict[str, Any]) -> None:
    """Put what was measured on a GPU in the place of what was known of its kind, in the table's file."""
    table = {**_read(TABLE), capability: entry}
    aside = TABLE.with_suffix(".part")
    aside.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(TABLE)
    _read.cache_clear()


@lru_cache
def _read(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table
