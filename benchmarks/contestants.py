"""Every way to a token's log-probability behind one signature: ``(hidden [T, D], weight [V, D], target [T]) -> [T]``.

A contestant is differentiable in hidden, and in weight where that requires a gradient. Some also know Cringe. One that
is not installed, or does not run here, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastd2o
from benchmarks.cases import CRINGE_K
from fastd2o.ops.backends import supported

Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]
Cringe = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Contestant:
    """
    Attributes:
        name: in results and tables.
        logprob: hidden, weight, target -> log-probabilities [T].
        cringe: hidden, weight, negative tokens -> the loss [T] of Cringe and the columns drawn as positives [T].
        backend: of FastD2O; None for a peer.
    """

    name: str
    logprob: Logprob
    cringe: Cringe | None = None
    backend: str | None = None


def load(device: str, dtype: torch.dtype, skip: Sequence[str] = ()) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that work here, and for each of the others why it does not. ``skip``: not even to be imported
    are those whose name contains one of these words."""
    present: list[Contestant] = []
    absent: dict[str, str] = {}

    def skipped(name: str) -> bool:
        return any(word in name for word in skip)

    reasons = fastd2o.backends()
    # The device's own kernels first: what all others are compared with.
    for backend in sorted(reasons, key=lambda backend: backend != device):
        name, of_another_device = f"fastd2o {backend}", backend in {"cpu", "cuda"} - {device}
        reason = "skipped" if skipped(name) else reasons[backend] or supported(backend, device, dtype)
        if reason is None:
            present.append(_fastd2o(name, backend))
        elif not of_another_device:
            absent[name] = reason
    for name, make in _PEERS.items():
        if skipped(name):
            absent[name] = "skipped"
        elif name in _CUDA_PEERS and device != "cuda":
            absent[name] = f"its kernels run on cuda, not on {device}"
        else:
            try:
                present.append(make(name))
            except ImportError as error:
                absent[name] = str(error)
    return present, absent


def _fastd2o(name: str, backend: str) -> Contestant:
    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fastd2o.linear_logprob(hidden, weight, target, backend=backend)

    def cringe(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = fastd2o.linear_cringe(hidden, weight, target, k=CRINGE_K, backend=backend)
        return output.loss, output.positive

    return Contestant(name, logprob, cringe, backend)


def _cut_cross_entropy(name: str) -> Contestant:
    from cut_cross_entropy import linear_cross_entropy

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # Its kernels are Triton's, for CUDA; elsewhere it has logits, and torch.compile to fuse what follows.
        implementation = "cce" if hidden.is_cuda else "torch_compile"
        result: Tensor = -linear_cross_entropy(hidden, weight, target, reduction="none", impl=implementation)
        return result

    return Contestant(name, logprob)


def _liger(name: str) -> Contestant:
    # Of Liger's losses the one that gives log-probabilities token by token, and that runs without a GPU.
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as ScaledCrossEntropy

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = -ScaledCrossEntropy.apply(hidden, weight, target)
        return result

    return Contestant(name, logprob)


def _trl(name: str) -> Contestant:
    from trl.kernels import ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # 8192 columns is the chunk that TRL's DPOTrainer passes; no optional outputs.
        result: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]
        return result

    return Contestant(name, logprob)


def _quack(name: str) -> Contestant:
    # Its pipeline in chunks gives the sum over tokens, or their mean; token by token it has full logits.
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = -linear_cross_entropy_func(
            hidden, weight, None, target, reduction="none", inplace_backward=True
        )
        return result

    return Contestant(name, logprob)


def _flash_attn(name: str) -> Contestant:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # The gradient is written over the logits, which nobody else reads.
        losses: Tensor = cross_entropy_loss(hidden @ weight.T, target, inplace_backward=True)[0]
        return -losses

    return Contestant(name, logprob)


def _torch_chunked(name: str) -> Contestant:
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13

    options = LinearCrossEntropyOptions()

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return Contestant(name, logprob)


def _eager(name: str) -> Contestant:
    """Logits in the inputs' dtype, the rest in float32."""

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]

    def cringe(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = (hidden @ weight.T).float()
        top, column = logits.topk(CRINGE_K + 1)
        # The negative token goes, or else the last.
        is_negative = column == target[:, None]
        last = torch.full_like(target, CRINGE_K)
        dropped = torch.where(is_negative.any(1), is_negative.int().argmax(1), last)
        drawn = top.detach().scatter(1, dropped[:, None], -torch.inf).softmax(-1).multinomial(1)
        loss = F.softplus(logits.gather(1, target[:, None]) - top.gather(1, drawn))
        return loss[:, 0], column.gather(1, drawn)[:, 0]

    return Contestant(name, logprob, cringe)


# In the order of tables.
_PEERS: dict[str, Callable[[str], Contestant]] = {
    "cut-cross-entropy": _cut_cross_entropy,
    "liger": _liger,  # LigerFusedLinearScaledCrossEntropyFunction
    "trl chunked": _trl,  # ChunkedLogProbFunction
    "quack": _quack,  # linear_cross_entropy_func
    "flash-attn": _flash_attn,  # cross_entropy_loss on eager logits
    "torch chunked": _torch_chunked,  # F.linear_cross_entropy with LinearCrossEntropyOptions()
    "eager": _eager,
}
# Those of them that need a CUDA device.
_CUDA_PEERS = ("quack", "flash-attn")
