"""``memory_budget=``: how much memory a call may take to save operations, in bytes or as a share of what is free."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch


def check_budget(memory_budget: int | float | None) -> None:
    """A number of bytes, a share in (0, 1] as a float, or None.

    Raises:
        TypeError, ValueError: anything else; the message names the fix.
    """
    if memory_budget is None:
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, float)):
        raise TypeError(f"memory_budget is a {type(memory_budget).__name__}: expected bytes, or a share in (0, 1]")
    if not 0 <= memory_budget < math.inf:
        raise ValueError(f"memory_budget={memory_budget} must not be negative: expected bytes, or a share in (0, 1]")
    if isinstance(memory_budget, float) and memory_budget > 1 and not memory_budget.is_integer():
        raise ValueError(
            f"memory_budget={memory_budget} is neither a whole number of bytes nor a share in (0, 1]. Fix: 2 * 1024**3 "
            "for 2 GiB, 0.25 for a quarter of the free memory"
        )
    if (isinstance(memory_budget, int) or memory_budget > 1) and 0 < memory_budget < 1024:
        raise ValueError(
            f"memory_budget={memory_budget} is fewer than 1,024 bytes. Fix: a float for a share of the free memory, as "
            "in 1.0; 2 * 1024**3 for 2 GiB"
        )


# How much is free now is nothing that a graph should hold a tracer's answer to.
@torch.compiler.assume_constant_result
def resolve_budget(memory_budget: int | float | None, device: torch.device) -> int | None:
    """Bytes. A float up to 1 is a share of what is free on the device now."""
    check_budget(memory_budget)
    if isinstance(memory_budget, float) and memory_budget <= 1:
        return int(memory_budget * free_bytes(device))
    return None if memory_budget is None else int(memory_budget)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device now; on CUDA with what torch's allocator holds and nobody uses."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
