"""Every way to a token's log-probability behind one signature: ``(hidden [T, D], weight [V, D], target [T]) -> [T]``.

A contestant is differentiable in hidden, and in weight where that requires a gradient. One that is not installed says
so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastd2o

Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def _fastd2o() -> Contestant:
    return lambda hidden, weight, target: fastd2o.linear_logprob(hidden, weight, target)


def _eager() -> Contestant:
    def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]

    return eager


def _torch_chunked() -> Contestant:
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13

    options = LinearCrossEntropyOptions()
    return lambda hidden, weight, target: (
        -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)
    )


def _trl() -> Contestant:
    from trl.kernels import ChunkedLogProbFunction

    def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # 8192 columns is the chunk that TRL's DPOTrainer passes; no optional outputs.
        result: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]
        return result

    return chunked


CONTESTANTS: dict[str, Callable[[], Contestant]] = {
    "fastd2o": _fastd2o,
    "torch chunked": _torch_chunked,  # F.linear_cross_entropy with LinearCrossEntropyOptions()
    "trl chunked": _trl,  # ChunkedLogProbFunction
    "eager": _eager,  # logits in the inputs' dtype, log-softmax in float32
}


def load() -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants that work here, and for each of the others why it does not."""
    present: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for name, make in CONTESTANTS.items():
        try:
            present[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    return present, absent


def matrix_products(hidden: Tensor, weight: Tensor, columns: int, number: int) -> None:
    """The bare matrix products of an algorithm, tile by tile: ``number`` x 2·T·D·V operations and nothing else."""
    tokens, vocab_size = len(hidden), len(weight)
    grad = torch.ones((tokens, min(columns, vocab_size)), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, vocab_size, columns):
        slab = weight[start : start + columns]
        tile = grad[:, : len(slab)]
        products = (
            lambda: hidden @ slab.T,  # noqa: B023  logits
            lambda: tile @ slab,  # noqa: B023  hidden's gradient
            lambda: tile.T @ hidden,  # noqa: B023  weight's gradient
            lambda: hidden @ slab.T,  # noqa: B023  logits again
        )
        for product in products[:number]:
            product()
