"""``linear_logprob`` and its kin: log-probabilities of given tokens from hidden states and the head's weight.

Three layers: the public functions check their input and choose a plan; two ``torch.library`` operators carry the call
through autograd, ``torch.compile`` and FakeTensor; the engine does the work on the tokens that count.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from fastd2o.ops import engine
from fastd2o.ops.autograd import check_differentiated_once, empty_gradients, pack_gradients, without_autocast
from fastd2o.ops.checks import (
    check_head,
    check_integer,
    check_not_forward_mode,
    check_target,
    check_transform,
    choose_plan,
)
from fastd2o.ops.counted import Counted
from fastd2o.ops.kept import Kept
from fastd2o.ops.plan import Plan
from fastd2o.ops.tile_ops import LogitTransform
from fastd2o.ops.torch_tile_ops import scale_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class HeadOptions(TypedDict, total=False):
    """The keyword options that all operators share; see :func:`linear_logprob`."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    backend: str | None
    plan: Plan | None


class LogprobOptions(HeadOptions, total=False):
    """Those of :func:`linear_logprob` and :func:`linear_logodds`."""

    memory_budget: int | float | None


class LogprobOutput(NamedTuple):
    """Result of :func:`linear_logprob` with ``stats=True``. All have target's shape; all but ``logprob`` carry no
    gradient and are 0 where ignored.

    Attributes:
        logprob: log p(target), nats.
        entropy: of the whole distribution, nats.
        top1: int64, the most likely token.
        mean_logit: mean of the (transformed) logits.
    """

    logprob: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor


class LogoddsOutput(NamedTuple):
    """Result of :func:`linear_logodds` with ``stats=True``; see :class:`LogprobOutput`."""

    logodds: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, stats: Literal[False] = False, **options: Unpack[LogprobOptions]
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, stats: Literal[True], **options: Unpack[LogprobOptions]
) -> LogprobOutput: ...


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, stats: bool, **options: Unpack[LogprobOptions]
) -> Tensor | LogprobOutput: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    plan: Plan | None = None,
    memory_budget: int | float | None = None,
    stats: bool = False,
) -> Tensor | LogprobOutput:
    """Log-probability of every target under ``softmax(softcap(logit_scale * (hidden @ weight.T + bias)) /
    temperature)``.

    The ``[tokens, vocabulary]`` logits are never held: they are formed tile by tile, and only for the tokens that
    count. Without a gradient this costs one pass over the vocabulary; with a frozen head two; with a trained head four,
    logits being formed again in the backward (see :class:`~fastd2o.ops.plan.Plan`).

    Args:
        hidden: ``[..., D]``, float64, float32, bfloat16 or float16. Its dtype, or autocast's where that is on, is the
            dtype of the matrix products.
        weight: ``[V, D]``, of any of these dtypes: another dtype than hidden's is cast slab by slab, never whole.
        target: ``[...]`` int64, each in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]``; -inf takes a column out of the softmax (padding of the vocabulary).
        logit_scale: factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: c of ``c * tanh(logits / c)`` (Gemma 2), or None.
        temperature: divides the logits, last.
        ignore_index: targets with this value are neither projected nor scored.
        backend: "torch" | "cpu" | "triton" | "cuda", or None for the best that works (see :func:`fastd2o.backends`).
        plan: overrides the engine's choice of algorithm and tile.
        memory_budget: with a trained head, memory beyond inputs, results and gradients that the call may take from its
            forward to its backward, to keep softmax weights in: 2 T·D·V operations less where they fit whole, T·V times
            the size of the products' dtype, and a part of that where a part fits. An int: bytes; a float up to 1: a
            share of what is free on the device now; None: nothing is kept. Not together with ``plan``, which says it.
        stats: also return entropy, most likely token and mean logit of every token, from the same pass.

    Returns:
        float32 ``[...]`` (float64 when the products are), 0.0 where ignored; differentiable once in hidden, weight and
        bias. -inf for a target whose logit is -inf. With ``stats``, a :class:`LogprobOutput`.

    Raises:
        TypeError, ValueError: input that does not fit; the message names the argument and the fix.
    """
    result = linear_logodds(
        hidden,
        weight,
        target,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        backend=backend,
        plan=plan,
        memory_budget=memory_budget,
        stats=stats,
    )
    logodds, *others = result if isinstance(result, tuple) else (result,)
    logprob = torch.where(target == ignore_index, 0.0, F.logsigmoid(logodds))
    return LogprobOutput(logprob, *others) if stats else logprob


@overload
def linear_logodds(
    hidden: Tensor, weight: Tensor, target: Tensor, *, stats: Literal[False] = False, **options: Unpack[LogprobOptions]
) -> Tensor: ...


@overload
def linear_logodds(
    hidden: Tensor, weight: Tensor, target: Tensor, *, stats: Literal[True], **options: Unpack[LogprobOptions]
) -> LogoddsOutput: ...


@overload
def linear_logodds(
    hidden: Tensor, weight: Tensor, target: Tensor, *, stats: bool, **options: Unpack[LogprobOptions]
) -> Tensor | LogoddsOutput: ...


def linear_logodds(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    plan: Plan | None = None,
    memory_budget: int | float | None = None,
    stats: bool = False,
) -> Tensor | LogoddsOutput:
    """Log-odds of every target, ``m = log p - log(1 - p) = z_y - logsumexp_{v != y} z_v``; arguments as
    :func:`linear_logprob`.

    ``F.logsigmoid(m)`` is ``log p`` and ``F.logsigmoid(-m)`` is ``log(1 - p)``, both exact where the other rounds to 0:
    what unlikelihood and odds-ratio losses need.

    Returns:
        float32 ``[...]`` (float64 when the products are), 0.0 where ignored; with ``stats``, a :class:`LogoddsOutput`.
    """
    check_head(hidden, weight, bias)
    check_target("target", target, hidden)
    check_transform(logit_scale, softcap, temperature)
    check_integer("ignore_index", ignore_index)
    check_not_forward_mode(hidden, weight, bias)
    chosen = choose_plan(plan, backend, hidden, weight, bias, memory_budget=memory_budget)
    logodds, _, _, entropy, top1, mean_logit, _, _ = torch.ops.fastd2o.logodds(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        chosen.algorithm,
        chosen.block_tokens,
        chosen.block_vocab,
        chosen.dtype,
        chosen.backend,
        chosen.fused,
        chosen.kept_bytes,
        chosen.compact,
        # A size that only a run knows would break a compiled graph.
        chosen.compact and not torch.compiler.is_compiling(),
        stats,
    )
    outputs = [x.view(target.shape) for x in ((logodds, entropy, top1, mean_logit) if stats else (logodds,))]
    return LogoddsOutput(*outputs) if stats else outputs[0]


def sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    shift: bool = True,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Log-probability of every sequence: the sum, or the mean, over its tokens that count.

    Args:
        hidden: ``[B, L, D]``.
        weight: ``[V, D]``.
        labels: ``[B, L]`` int64 in the Hugging Face convention: unshifted, ``ignore_index`` where masked.
        reduction: "sum", or "mean" over the tokens that count.
        shift: the hidden state at t predicts ``labels[:, t + 1]``; False when labels are already aligned with hidden.
        ignore_index: as in :func:`linear_logprob`.
        **options: ``bias, logit_scale, softcap, temperature, backend, plan, memory_budget`` of :func:`linear_logprob`.

    Returns:
        float32 ``[B]`` (float64 when the products are). A sequence with no token that counts gets 0.0: whether an empty
        sequence makes sense is for the caller to decide.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is unknown: expected 'sum' or 'mean'")
    if options.get("stats"):
        raise TypeError("stats are per token: call linear_logprob for them")
    check_head(hidden, weight, options.get("bias"))
    if hidden.dim() != 3:
        raise ValueError(f"hidden has shape {list(hidden.shape)}: expected [B, L, D]")
    check_target("labels", labels, hidden)
    target = shift_labels(labels, ignore_index) if shift else labels
    total = linear_logprob(hidden, weight, target, ignore_index=ignore_index, **options).sum(1)
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum(1).clamp_min(1)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels ``[B, L]`` in the Hugging Face convention -> targets ``[B, L]``: what each position is to predict."""
    target = torch.full_like(labels, ignore_index)
    target[:, :-1] = labels[:, 1:]
    return target


@torch.library.custom_op("fastd2o::logodds", mutates_args=())
def _logodds_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    algorithm: str,
    block_tokens: int,
    block_vocab: int,
    dtype: torch.dtype,
    backend: str,
    fused: bool,
    kept_bytes: int,
    compact: bool,
    compact_unit: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-odds, logsumexp of the others, unit gradient, entropy, top-1, mean logit, and the two tensors of
    :class:`~fastd2o.ops.kept.Kept`; what was not asked for is empty. What is kept is of the tokens that count alone,
    if ``compact``; so is the unit gradient, as large as hidden in float32, if ``compact_unit``."""
    head = engine.Head(weight, bias, LogitTransform(logit_scale, softcap, temperature))
    tiling = engine.Tiling(block_tokens, block_vocab, dtype, backend, fused, kept_bytes)
    counted = Counted.of_targets(target, weight.shape[0], ignore_index, compact)
    with without_autocast(hidden.device):
        result = engine.logodds_forward(
            counted.gather(hidden).to(dtype),
            head,
            counted.gather(target),
            tiling,
            unit=algorithm == "unit",
            statistics=stats,
            keep=algorithm == "recompute",
        )

    def scattered(values: Tensor | None) -> Tensor:
        return hidden.new_empty(0, dtype=tiling.sum_dtype) if values is None else counted.scatter(values, len(target))

    unit = result.unit_TD
    if unit is None or counted.rows is None or not compact_unit:
        unit = scattered(unit)
    entropy, top1, mean_logit = result.statistics or (None, None, None)
    return (
        scattered(result.logodds),
        scattered(result.lse_others),
        unit,
        scattered(entropy),
        hidden.new_empty(0, dtype=torch.int64) if top1 is None else scattered(top1),
        scattered(mean_logit),
        hidden.new_empty(0, dtype=dtype) if result.kept is None else result.kept.weights,
        hidden.new_empty(0, dtype=tiling.sum_dtype) if result.kept is None else result.kept.max_ST1,
    )


@_logodds_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, algorithm, _, _, dtype, _, _, kept_bytes, _, compact_unit, stats = options
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def column(wanted: bool = True, kind: torch.dtype = sums) -> Tensor:
        return hidden.new_empty(target.shape if wanted else (0,), dtype=kind)

    # How many tokens count only a run knows.
    size = torch.library.get_ctx().new_dynamic_size
    unit, kept, kept_max = (hidden.new_empty(0, dtype=kind) for kind in (sums, dtype, sums))
    if algorithm == "unit":
        tokens: int | torch.SymInt = hidden.shape[0]
        if compact_unit:
            # Without symbolic shapes: as if all of them did.
            with contextlib.suppress(DynamicOutputShapeException):
                tokens = size()
        unit = unit.new_empty(tokens, hidden.shape[1])
    elif kept_bytes and algorithm == "recompute":
        kept, kept_max = kept.new_empty(size()), kept_max.new_empty(size(), size(), 1)
    return column(), column(), unit, column(stats), column(stats, torch.int64), column(stats), kept, kept_max


@torch.library.custom_op("fastd2o::logodds_backward", mutates_args=())
def _logodds_backward_op(
    coef: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse_others: Tensor,
    kept: Tensor,
    kept_max: Tensor,
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for ``coef = dL/dm``; those not needed are empty."""
    # A coefficient of exactly 0 has no gradient to form, whether the token is ignored or the loss is flat there.
    counted = Counted.where(coef != 0, compact)
    head = engine.Head(weight, bias, LogitTransform(logit_scale, softcap, temperature))
    into = engine.HeadGradients.of_one_sweep(head, need_weight=need_weight, need_bias=need_bias)
    with without_autocast(hidden.device):
        result = engine.logodds_backward(
            counted.gather(coef),
            counted.gather(hidden).to(dtype),
            head,
            counted.gather(target),
            counted.gather(lse_others, fill=torch.inf),
            engine.Tiling(block_tokens, block_vocab, dtype, backend, fused),
            need_hidden=need_hidden,
            into=into,
            kept=_kept_for(counted, kept, kept_max, block_vocab, target, ignore_index),
        )
    return pack_gradients((result.hidden_TD, into.weight_VD, into.bias_V), hidden, counted)


def _kept_for(
    counted: Counted, weights: Tensor, max_ST1: Tensor, block_vocab: int, target: Tensor, ignore_index: int
) -> Kept | None:
    """What a forward kept, for the tokens of its backward."""
    if weights.numel() == 0:
        return None
    tokens = max_ST1.shape[1]
    kept = Kept(weights, max_ST1, weights.numel() // tokens, block_vocab)
    if tokens == len(target):
        return kept.of(counted.rows)
    # The forward left out the ignored tokens: a token's place is the number of those that count before it.
    place = (target != ignore_index).cumsum(0) - 1
    return kept.of(counted.gather(place))


@_logodds_backward_op.register_fake
def _(coef: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, options[-3:])


@torch.library.custom_op("fastd2o::unit_backward", mutates_args=())
def _unit_backward_op(coef: Tensor, unit: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """``coef * unit`` in hidden's dtype, rounded once, without a product in the dtype of ``unit``. That is of all
    tokens, or of those that are ``counted``; its length tells how many, so that nobody waits to count them."""
    tokens = Counted()
    if len(unit) != len(coef):
        tokens = Counted(rows=torch.nonzero_static(counted, size=len(unit)).squeeze(1))
    dhidden = unit.new_empty(unit.shape, dtype=dtype)
    scale_rows(unit, tokens.gather(coef).unsqueeze(1), dhidden)
    return tokens.scatter(dhidden, len(coef))


@_unit_backward_op.register_fake
def _(coef: Tensor, unit: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    return unit.new_empty((coef.shape[0], unit.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *scalars, ignore_index, algorithm = inputs[:-9]
    _, lse_others, unit, *_, kept, kept_max = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.algorithm, ctx.ignore_index, ctx.hidden_dtype = algorithm, ignore_index, hidden.dtype
    block_tokens, block_vocab, dtype, backend, fused, _, compact, _, _ = inputs[-9:]
    ctx.options = (*scalars, ignore_index, block_tokens, block_vocab, dtype, backend, fused, compact)
    # With a frozen head the unit gradient replaces hidden: neither it nor the weight is needed again.
    if algorithm == "unit":
        ctx.save_for_backward(target, unit)
    else:
        ctx.save_for_backward(target, hidden, weight, bias, lse_others, kept, kept_max)


def _backward(ctx: Any, grad_logodds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_differentiated_once()
    no_gradient = (None,) * 14
    if grad_logodds is None:
        return (None, None, None, None, *no_gradient)
    target, *saved = ctx.saved_tensors
    # What an ignored token's 0.0 is multiplied with downstream must not matter, not even if that is NaN.
    counted = target != ctx.ignore_index
    coef = torch.where(counted, grad_logodds, 0.0)
    if ctx.algorithm == "unit":
        (unit,) = saved
        return (torch.ops.fastd2o.unit_backward(coef, unit, counted, ctx.hidden_dtype), None, None, None, *no_gradient)
    hidden, weight, bias, *of_forward = saved
    need = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastd2o.logodds_backward(coef, hidden, weight, bias, target, *of_forward, *ctx.options, *need)
    return (*(g if n else None for g, n in zip(gradients, need, strict=True)), None, *no_gradient)


_logodds_op.register_autograd(_backward, setup_context=_setup_context)
