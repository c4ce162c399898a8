"""The floor: the matrix products of an algorithm, by the vendor's library, and nothing else.

A floor has to be fair in both directions.

Not too high: every product is one ``torch.mm`` in the dtype of the case into memory that is there already, nothing is
accumulated over tiles, and of several tile shapes the fastest counts: the plan's own, and all tokens by 2048 and by
8192 columns.

Not too low: a gradient product multiplies the tile of logits that was just written, as an algorithm would, so the data
is random (a GPU multiplies zeros and ones faster), and as much of it is in cache as would be. The weight's gradient
``[V, D]`` is a fresh tensor in every run, as in any backward, because writing to new memory is part of that product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastd2o.ops.pages import in_huge_pages
from fastd2o.ops.plan import Algorithm, Plan

from .instruments import timed

# Algorithm -> its sweeps over the vocabulary, each with the products that it does on every tile.
_SWEEPS: dict[Algorithm, tuple[tuple[str, ...], ...]] = {
    "forward": (("logits",),),
    "unit": (("logits", "dhidden"),),
    "recompute": (("logits",), ("logits", "dhidden", "dweight")),
    "grouped": (("logits", "dhidden", "dweight"),),
    "cringe": (("logits",),),
}

_COLUMNS = (2048, 8192)
# Of the vocabulary, for choosing the tile: enough for four of the widest.
_TRIAL_COLUMNS = 32768
_TRIAL_SECONDS = 0.5


@dataclass(frozen=True)
class Products:
    """The products of one algorithm; a call does them all, ``hidden_TD`` [T, D] with ``weight_VD`` [V, D]."""

    hidden_TD: Tensor
    weight_VD: Tensor
    algorithm: Algorithm
    block_tokens: int
    block_vocab: int
    memory: Tensor
    dhidden_TD: Tensor

    @classmethod
    def of(
        cls, hidden_TD: Tensor, weight_VD: Tensor, algorithm: Algorithm, block_tokens: int, block_vocab: int
    ) -> Products:
        """With memory for one tile and for hidden's gradient."""
        memory = hidden_TD.new_empty(block_tokens * block_vocab)
        return cls(hidden_TD, weight_VD, algorithm, block_tokens, block_vocab, memory, torch.empty_like(hidden_TD))

    @classmethod
    def fastest(cls, hidden_TD: Tensor, weight_VD: Tensor, plan: Plan) -> Products:
        """With the tile shape that was fastest on a part of the vocabulary."""
        widths = (min(columns, len(weight_VD)) for columns in _COLUMNS)
        tiles = dict.fromkeys([(plan.block_tokens, plan.block_vocab), *((len(hidden_TD), width) for width in widths)])
        part_VD = weight_VD[:_TRIAL_COLUMNS]
        trials = {tile: _best_time(cls.of(hidden_TD, part_VD, plan.algorithm, *tile)) for tile in tiles}
        return cls.of(hidden_TD, weight_VD, plan.algorithm, *min(trials, key=trials.__getitem__))

    def __call__(self) -> None:
        """Do them."""
        for sweep in _SWEEPS[self.algorithm]:
            dweight_VD = in_huge_pages(torch.empty_like(self.weight_VD)) if "dweight" in sweep else None
            for columns in _blocks(len(self.weight_VD), self.block_vocab):
                slab_ND = self.weight_VD[columns]
                for rows in _blocks(len(self.hidden_TD), self.block_tokens):
                    block_TD = self.hidden_TD[rows]
                    tile_TN = self.memory[: len(block_TD) * len(slab_ND)].view(len(block_TD), len(slab_ND))
                    torch.mm(block_TD, slab_ND.t(), out=tile_TN)
                    if "dhidden" in sweep:
                        torch.mm(tile_TN, slab_ND, out=self.dhidden_TD[rows])
                    if dweight_VD is not None:
                        torch.mm(tile_TN.t(), block_TD, out=dweight_VD[columns])

    @property
    def flops(self) -> int:
        """Of all products."""
        return self._multiples * self.hidden_TD.numel() * len(self.weight_VD)

    @property
    def _multiples(self) -> int:
        """Of T·D·V."""
        return 2 * sum(map(len, _SWEEPS[self.algorithm]))

    def __str__(self) -> str:
        dtype = str(self.hidden_TD.dtype).removeprefix("torch.")
        work = f"{self._multiples} T·D·V = {self.flops / 1e12:.3g} TFLOP"
        return f"torch.mm in {dtype}, {work}, tiles of {self.block_tokens} x {self.block_vocab}"


def _blocks(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _best_time(products: Products) -> float:
    times: list[float] = []
    while len(times) < 2 or sum(times) < _TRIAL_SECONDS:  # the first finds its memory new
        times.append(timed(products, products.hidden_TD.device.type))
    return min(times)
