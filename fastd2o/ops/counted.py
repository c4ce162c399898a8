"""The tokens that count: what a call projects of all that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def may_wait(compact: bool, tensor: Tensor) -> bool:
    """Whether a call that would ``compact`` can: a CUDA graph that is being captured cannot hold a wait. Only an
    operator that runs knows; one that is traced does not."""
    return compact and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_targets(target_T: Tensor, vocab_size: int, ignore_index: int) -> int:
    """How many targets count. The host waits for the device.

    Raises:
        ValueError: one lies outside ``[0, V)`` and is not ``ignore_index``; the message names the first.
    """
    outside = _outside(target_T, vocab_size, ignore_index)
    number, wrong = torch.stack([(target_T != ignore_index).sum(), outside.sum()]).tolist()
    if wrong:
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"target holds {int(target_T[position])} at flat position {position} ({wrong} such in all): expected "
            f"ids in [0, {vocab_size}), or ignore_index={ignore_index} for positions to leave out"
        )
    return int(number)


def _outside(target_T: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return (target_T != ignore_index) & ((target_T < 0) | (target_T >= vocab_size))


@dataclass(frozen=True)
class Counted:
    """Which of T tokens count, in one of three forms.

    Attributes:
        rows: ``[C]`` int64, those that do: the others cost nothing, at the price of one wait for the device.
        mask: ``[T]`` bool, True for those that do: the others are computed with zeros in their places, and their
            results dropped, but nothing waits. A CUDA graph can hold that.

    With neither, all count.
    """

    rows: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of_targets(cls, target_T: Tensor, vocab_size: int, ignore_index: int, compact: bool) -> Counted:
        """Those whose target is not ``ignore_index``.

        Raises:
            ValueError: a target outside ``[0, V)`` that is not ``ignore_index``; the message names the first. Without
                ``compact`` on CUDA the device asserts instead, later.
        """
        compact = may_wait(compact, target_T)
        counted = target_T != ignore_index
        if not compact and target_T.is_cuda:
            outside = _outside(target_T, vocab_size, ignore_index)
            torch._assert_async(~outside.any(), "a target lies outside [0, V) and is not ignore_index")
            return cls(mask=counted)
        number = check_targets(target_T, vocab_size, ignore_index)
        if not compact:
            return cls(mask=counted)
        # The number is known by now: no second wait to find them.
        return cls() if number == len(target_T) else cls(rows=torch.nonzero_static(counted, size=number).squeeze(1))

    @classmethod
    def where(cls, counted: Tensor, compact: bool) -> Counted:
        """Those of a mask ``[T]``."""
        if not may_wait(compact, counted):
            return cls(mask=counted)
        rows = counted.nonzero().squeeze(1)
        return cls() if len(rows) == len(counted) else cls(rows=rows)

    def gather(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """The rows of ``tensor [T, ...]`` that count, or all of them with ``fill`` in the others."""
        if self.rows is not None:
            return tensor.index_select(0, self.rows)
        return tensor if self.mask is None else torch.where(self._mask_like(tensor), tensor, fill)

    def scatter(self, values: Tensor, total: int, fill: float = 0) -> Tensor:
        """Results of what :meth:`gather` gave, as a tensor of ``total`` rows with ``fill`` in those that do not
        count."""
        if self.rows is not None:
            out = values.new_full((total, *values.shape[1:]), fill)
            return out.index_copy_(0, self.rows, values)
        return values if self.mask is None else torch.where(self._mask_like(values), values, fill)

    def _mask_like(self, tensor: Tensor) -> Tensor:
        assert self.mask is not None
        return self.mask.view(-1, *(1,) * (tensor.dim() - 1))
