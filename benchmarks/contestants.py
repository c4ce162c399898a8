"""Every way to a token's log-probability behind one signature: ``(hidden [T, D], weight [V, D], target [T]) -> [T]``.

A contestant is differentiable in hidden, and in weight where that requires a gradient. Some also know Cringe, DPO or
D2O; of the last no other library has a fused form, so it meets eager code alone, as Cringe does. One that is not
installed, or does not run here, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastd2o
from fastd2o.ops.backends import supported

from .cases import BETA, CRINGE_K, POSITIVES, Case

Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]
Cringe = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Preference = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# The memory_budget of FastD2O's second entry, in bytes.
_KEPT = 1_000_000_000


@dataclass(frozen=True)
class Contestant:
    """
    Attributes:
        name: in results and tables.
        logprob: hidden, weight, target -> log-probabilities [T].
        cringe: hidden, weight, negative tokens -> the loss [T] of Cringe and the columns drawn as positives [T].
        preference: objective -> a function of hidden [S, L, D], weight, target [S, L] and references [S], the loss.
            The last of the sequences are the negatives, one for each group; sequence s belongs to group s modulo their
            number.
        backend: of FastD2O; None for a peer.
        keeps: whether it takes more memory to save operations, which only a trained head's log-probabilities have to
            save.
    """

    name: str
    logprob: Logprob
    cringe: Cringe | None = None
    preference: Mapping[str, Preference] = field(default_factory=dict)
    backend: str | None = None
    keeps: bool = False

    def knows(self, case: Case) -> bool:
        """Whether it can take part."""
        if case.operator == "logprob":
            return "weight" in case.leaves or not self.keeps
        return self.cringe is not None if case.operator == "cringe" else case.operator in self.preference


def load(
    device: str, dtype: torch.dtype, peers: Collection[str] | None = None
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that work here, and for each of the others why it does not; of peers only these, or None for
    all."""
    present: list[Contestant] = []
    absent: dict[str, str] = {}
    reasons = fastd2o.backends()
    # The device's own kernels first: what all others are compared with.
    for backend in sorted(reasons, key=lambda backend: backend != device):
        name, of_another_device = f"fastd2o {backend}", backend in {"cpu", "cuda"} - {device}
        reason = reasons[backend] or supported(backend, device, dtype)
        if reason is None:
            present.append(_fastd2o(name, backend))
            if backend == device:
                present.append(_fastd2o_keeping(f"{name}, {_KEPT / 1e9:g} GB", backend))
        elif not of_another_device:
            absent[name] = reason
    for name, make in _PEERS.items():
        if make is _eager_float32 and dtype == torch.float32:
            continue  # the same as eager
        if peers is not None and name not in peers:
            absent[name] = "not asked for"
            continue
        if name in _CUDA_PEERS and device != "cuda":
            absent[name] = f"its kernels run on cuda, not on {device}"
            continue
        try:
            present.append(make(name))
        except ModuleNotFoundError:
            absent[name] = "not installed"
        except Exception as error:  # of another version, say; the others are there
            absent[name] = f"{type(error).__name__}: {error}"
    return present, absent


def peer_names() -> list[str]:
    """Of all others, installed or not."""
    return list(_PEERS)


def peer(name: str) -> Contestant:
    """One of the others, by its name.

    Raises:
        ImportError: it is not installed.
    """
    return _PEERS[name](name)


def groups_of(sequences: int, positives: int) -> fastd2o.Groups:
    """The groups of a preference loss, each with a negative and so many positives."""
    number = sequences // (positives + 1)
    order = torch.arange(sequences)
    return fastd2o.Groups(order % number, order < sequences - number, number)


def _fastd2o(name: str, backend: str) -> Contestant:
    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fastd2o.linear_logprob(hidden, weight, target, backend=backend)

    def cringe(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = fastd2o.linear_cringe(hidden, weight, target, k=CRINGE_K, backend=backend)
        return output.loss, output.positive

    def preference(objective: str, hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor) -> Tensor:
        sequences = len(target)
        sequence_ids = torch.arange(sequences, device=target.device)[:, None].expand_as(target)
        groups = groups_of(sequences, POSITIVES[objective])
        on_device = fastd2o.Groups(groups.group.to(target.device), groups.positive.to(target.device), groups.number)
        name = "sigmoid" if objective == "dpo" else objective  # as TRL calls its type of loss
        return fastd2o.linear_preference_loss(
            hidden, weight, target, sequence_ids, on_device, objective=name, ref_logp=ref_logp, backend=backend
        ).loss

    return Contestant(name, logprob, cringe, {name: partial(preference, name) for name in POSITIVES}, backend)


def _fastd2o_keeping(name: str, backend: str) -> Contestant:
    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fastd2o.linear_logprob(hidden, weight, target, backend=backend, memory_budget=_KEPT)

    return Contestant(name, logprob, backend=backend, keeps=True)


def preferences(logprob: Logprob) -> dict[str, Preference]:
    """DPO and D2O in plain torch, of one's log-probabilities. Formulas: docs/losses.md."""

    def sums(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return logprob(hidden.flatten(0, 1), weight, target.flatten()).view_as(target).sum(1)

    def dpo(hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor) -> Tensor:
        chosen, rejected = (sums(hidden, weight, target) - ref_logp).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def d2o(hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor) -> Tensor:
        reward = BETA * (sums(hidden, weight, target) - ref_logp)
        anchors, negative = reward.view(POSITIVES["d2o"] + 1, -1).split([POSITIVES["d2o"], 1])
        return -F.logsigmoid(anchors.mean(0) - negative[0]).mean()

    return {"dpo": dpo, "d2o": d2o}


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
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as ScaledCrossEntropy

    fused_dpo = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = -ScaledCrossEntropy.apply(hidden, weight, target)
        return result

    def dpo(hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor) -> Tensor:
        # It computes its references itself or has none, and here they are 0.
        loss: Tensor = fused_dpo(weight, hidden, target)[0]
        return loss

    return Contestant(name, logprob, preference={"dpo": dpo})


def _trl(name: str) -> Contestant:
    from trl.kernels import ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # As many columns at a time as its trainers pass; no optional outputs.
        result: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, ())[0]
        return result

    # That is what its trainer does for DPO, too.
    return Contestant(name, logprob, preference={"dpo": preferences(logprob)["dpo"]})


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


def eager_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits in the inputs' dtype, the rest in float32 or better."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def _eager(name: str) -> Contestant:
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

    return Contestant(name, eager_logprob, cringe, preferences(eager_logprob))


def _eager_float32(name: str) -> Contestant:
    """All of it in float32, whatever the inputs are."""

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return eager_logprob(hidden.float(), weight.float(), target)

    return Contestant(name, logprob, preference=preferences(logprob))


# In the order of tables.
_PEERS: dict[str, Callable[[str], Contestant]] = {
    "cut-cross-entropy": _cut_cross_entropy,
    "liger": _liger,  # LigerFusedLinearScaledCrossEntropyFunction
    "trl chunked": _trl,  # ChunkedLogProbFunction
    "quack": _quack,  # linear_cross_entropy_func
    "flash-attn": _flash_attn,  # cross_entropy_loss on eager logits
    "torch chunked": _torch_chunked,  # F.linear_cross_entropy with LinearCrossEntropyOptions()
    "eager": _eager,
    "eager float32": _eager_float32,
}
# Those of them that need a CUDA device.
_CUDA_PEERS = ("quack", "flash-attn")
