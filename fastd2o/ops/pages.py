"""Memory that is new to the process, quickly.

Linux hands out large allocations as pages of 4 KB, each cleared when it is first written to: 0.3 to 1 s for a gigabyte,
as measured, where writing it takes 0.04 s. Pages of 2 MB, which most systems give to those who ask, take 0.08 s.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_PAGE = 2 << 20
_LEAST_BYTES = 4 * _PAGE
_MADV_HUGEPAGE = 14  # <asm-generic/mman-common.h>


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a tensor that nobody has written to yet; advice, where the system knows it."""
    if tensor.device.type == "cpu" and tensor.nbytes >= _LEAST_BYTES and (madvise := _madvise()) is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
