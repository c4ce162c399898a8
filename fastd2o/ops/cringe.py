"""``linear_cringe``: the CRINGE loss of negative tokens straight from hidden states and the head's weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.ops import engine
from fastd2o.ops.autograd import check_differentiated_once, empty_gradients, pack_gradients, without_autocast
from fastd2o.ops.checks import (
    check_head,
    check_integer,
    check_k,
    check_not_forward_mode,
    check_target,
    check_transform,
    choose_plan,
)
from fastd2o.ops.counted import Counted, may_wait
from fastd2o.ops.plan import Plan
from fastd2o.ops.tile_ops import LogitTransform


class CringeOutput(NamedTuple):
    """Result of :func:`linear_cringe`; all have target's shape.

    Attributes:
        loss: ``softplus(s⁻ - s⁺)`` per token, differentiable; 0.0 where ignored or where no alternative is finite.
        positive: int64, the drawn positive token; -1 where ignored or where there was none to draw.
        logprob: log p(negative token), nats, without a gradient: :func:`fastd2o.linear_logprob` gives it with one.
    """

    loss: Tensor
    positive: Tensor
    logprob: Tensor


def linear_cringe(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    k: int = 5,
    detach_positive: bool = False,
    seed: int | None = None,
    counter: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    plan: Plan | None = None,
) -> CringeOutput:
    """Contrast every negative token with one of the k most likely alternatives (Adolphs et al., ACL 2023, arXiv
    2211.05826, Eq. 1-5):

        candidates = the k largest logits of the token's position, the negative token itself left out
        positive   ~ softmax over the candidates' logits, one draw per token
        loss_t     = -log[ exp(s⁺) / (exp(s⁺) + exp(s⁻)) ] = softplus(s⁻ - s⁺)

    Only two logits per token carry a gradient, so the backward touches two rows of the weight per token: one pass over
    the vocabulary in all, 2 T·D·V operations.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]``.
        target: ``[...]`` int64, the negative tokens, or ``ignore_index``.
        k: candidates, ``1 <= k < V``.
        detach_positive: take no gradient through s⁺.
        seed: of the draws, 64 bits. A token's draw is Philox at this seed and the token's counter, so it does not
            depend on chunking or backend. None takes a fresh seed from torch's default generator; refused while a CUDA
            graph is captured, whose replays would repeat it.
        counter: ``[...]`` int64, the counter of every token; default: its flat position in ``target``. Give
            counters that belong to the data, and how a batch is put together cannot change a draw.
        bias, logit_scale, softcap, temperature, ignore_index, backend, plan: as in :func:`fastd2o.linear_logprob`.

    Returns:
        :class:`CringeOutput`; float32, or float64 when the products are.

    Raises:
        TypeError, ValueError: input that does not fit; the message names the argument and the fix.
    """
    check_head(hidden, weight, bias)
    check_target("target", target, hidden)
    check_transform(logit_scale, softcap, temperature)
    check_k(k, weight.shape[0])
    if counter is None:
        counter = torch.arange(target.numel(), device=target.device).view(target.shape)
    check_target("counter", counter, hidden)
    check_integer("ignore_index", ignore_index)
    check_not_forward_mode(hidden, weight, bias)
    chosen = choose_plan(plan, backend, hidden, weight, bias, cringe=True, k=k)
    # On the CPU whatever the device, so that reading it there waits for nothing.
    if seed is None:
        if not torch.compiler.is_compiling() and hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "seed=None while a CUDA graph is captured: every replay would draw the same. Fix: pass seed=, and "
                "change what is in counter= between replays"
            )
        seed_tensor = torch.randint(2**63 - 1, (), device="cpu")
    else:
        seed_tensor = torch.tensor(_as_int64(seed), device="cpu")
    loss, _, _, logodds, positive = torch.ops.fastd2o.cringe(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        seed_tensor,
        counter.reshape(-1),
        k,
        detach_positive,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        chosen.block_tokens,
        chosen.block_vocab,
        chosen.dtype,
        chosen.backend,
        chosen.fused,
        chosen.compact,
    )
    logprob = torch.where(target == ignore_index, 0.0, F.logsigmoid(logodds.view(target.shape)))
    return CringeOutput(loss.view(target.shape), positive.view(target.shape), logprob)


def _as_int64(seed: int) -> int:
    check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} does not fit into 64 bits")
    return seed - 2**64 if seed >= 2**63 else seed


@torch.library.custom_op("fastd2o::cringe", mutates_args=())
def _cringe_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    seed: Tensor,
    counter: Tensor,
    k: int,
    detach_positive: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    block_tokens: int,
    block_vocab: int,
    dtype: torch.dtype,
    backend: str,
    fused: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, both logits, log-odds of the negative, positive column."""
    head = engine.Head(weight, bias, LogitTransform(logit_scale, softcap, temperature))
    tiling = engine.Tiling(block_tokens, block_vocab, dtype, backend, fused)
    counted, total = Counted.of_targets(target, weight.shape[0], ignore_index, compact), len(target)
    with without_autocast(hidden.device):
        result = engine.cringe_forward(
            counted.gather(hidden).to(dtype),
            head,
            counted.gather(target),
            int(seed),
            counted.gather(counter),
            k,
            tiling,
        )
    loss = torch.where(result.positive < 0, 0.0, F.softplus(result.negative_logit - result.positive_logit))
    return (
        counted.scatter(loss, total),
        counted.scatter(result.negative_logit, total),
        counted.scatter(result.positive_logit, total),
        counted.scatter(result.logodds, total),
        counted.scatter(result.positive, total, fill=-1),
    )


@_cringe_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, dtype, _, _, _ = options
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return *(hidden.new_empty(target.shape, dtype=sums) for _ in range(4)), target.new_empty(target.shape)


@torch.library.custom_op("fastd2o::cringe_backward", mutates_args=())
def _cringe_backward_op(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    positive: Tensor,
    negative_logit: Tensor,
    positive_logit: Tensor,
    detach_positive: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    block_tokens: int,
    block_vocab: int,
    dtype: torch.dtype,
    backend: str,
    fused: bool,
    compact: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those not needed are empty."""
    # A token without a positive has coefficient 0 and none to point at.
    counted = Counted.where((positive >= 0) & (grad_loss != 0), compact)
    coef = counted.gather(grad_loss) * counted.gather(negative_logit - positive_logit).sigmoid()
    with without_autocast(hidden.device):
        gradients = engine.cringe_backward(
            coef,
            counted.gather(hidden).to(dtype),
            engine.Head(weight, bias, LogitTransform(logit_scale, softcap, temperature)),
            counted.gather(target),
            counted.gather(positive),
            engine.Tiling(block_tokens, block_vocab, dtype, backend, fused),
            hidden_dtype=hidden.dtype,
            detach_positive=detach_positive,
            wait=may_wait(compact, hidden),
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    return pack_gradients(gradients, hidden, counted)


@_cringe_backward_op.register_fake
def _(grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, options[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, _, _, _, detach_positive, *scalars, _ignore_index = inputs[:-6]
    _, negative_logit, positive_logit, _, positive = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = (detach_positive, *scalars, *inputs[-6:])
    ctx.save_for_backward(hidden, weight, bias, target, positive, negative_logit, positive_logit)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_differentiated_once()
    no_gradient = (None,) * 15
    if grad_loss is None:
        return (None, None, None, *no_gradient)
    need = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastd2o.cringe_backward(grad_loss, *ctx.saved_tensors, *ctx.options, *need)
    return (*(g if n else None for g, n in zip(gradients, need, strict=True)), *no_gradient)


_cringe_op.register_autograd(_backward, setup_context=_setup_context)
