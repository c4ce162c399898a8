"""``fastd2o.attach``: token log-probabilities straight from a Hugging Face causal LM, without logits.

A fused forward is the model's own forward, hooks and all, with one exchange: when the output head's turn comes, it
runs the *head call* on ``(hidden, weight)`` and returns a stand-in for the logits (:mod:`~fastd2o.models.head`),
which carries the result to the end of the forward (:mod:`~fastd2o.models.relay`). What the model does to its logits
after the head was measured beforehand (:mod:`~fastd2o.models.transform`) and is handed to the head call.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fastd2o import ops
from fastd2o.errors import FastD2OError
from fastd2o.models.head import InstanceState, close_heads, is_dtensor, open_heads, projecting, restore
from fastd2o.models.output import FusedCausalLMOutput
from fastd2o.models.relay import Relay
from fastd2o.models.transform import HeadTransform, measure
from fastd2o.ops.backends import check_backend
from fastd2o.ops.checks import check_target

Model = TypeVar("Model", bound=nn.Module)

_ATTACHMENT = "_fastd2o_attachment"
_OWN_FIELDS = [f.name for f in fields(FusedCausalLMOutput) if f.name not in ("loss", "logits", "log_probs", "head")]


@dataclass
class _Attachment(InstanceState):
    """What :func:`attach` leaves on a model. `previous` is the forward that the instance had of its own, if any."""

    previous: Any
    backend: str | None
    transform: HeadTransform | None = None


def attach(model: Model, *, backend: str | None = None) -> Model:
    """Teach a Hugging Face causal LM to return log-probabilities, or anything else made of hidden states and head.

    ::

        out = model(input_ids=..., attention_mask=..., labels=labels, fused=True)
        out.log_probs  # [B, L] float32: log p(labels[b, t] | tokens before t); 0.0 where labels == -100 and at t = 0

        out = model(input_ids=..., attention_mask=..., fused=head_call)
        out.head  # head_call(hidden [B, L, D], weight [V, D], bias=, logit_scale=, softcap=, backend=)

    The call runs inside the head's own forward, so that whatever hook DDP, FSDP2, ZeRO-3, PEFT, Accelerate or
    autocast has there has fired. It takes the keyword arguments of the operators: ``partial(fastd2o.linear_cringe,
    target=target)`` is a head call. The tensors it returns, alone or in (named) tuples, lists and dicts, can be
    differentiated.

    Without ``fused``, the model does what it always did; generation does not change. A fused forward runs with
    ``use_cache=False`` unless told otherwise.

    How the model scales and caps its logits, and that it is causal, is measured on a tiny forward: now, or on the
    first fused call if the model cannot run yet (weights on ``meta``, offloaded or sharded; kernels for another
    device). Attaching again changes nothing but `backend`.

    Args:
        model: a ``transformers`` causal LM, or PEFT, DDP, FSDP, DeepSpeed or ``torch.compile`` around one.
        backend: handed to the operators; None picks the best.

    Returns:
        The same `model`, changed in place; :func:`detach` changes it back.

    Raises:
        TypeError: `model` is not, and does not wrap, a ``transformers`` model.
        ValueError: a `backend` that does not exist, or cannot serve here.
        FastD2OError: a model that cannot be served: no causal language-modelling head, an encoder (one loaded as a
            causal LM too) or encoder-decoder, an adapter or quantisation on the head, tensor parallelism, prompt
            tuning, logits changed other than by scaling and tanh-capping. The message names the fix.
    """
    check_backend(backend)
    causal_lm = _unwrap(model)
    attached: _Attachment | None = causal_lm.__dict__.get(_ATTACHMENT)
    if attached is not None:
        attached.backend = backend
        return model
    _check_model(causal_lm)
    open_heads(causal_lm)
    attachment = _Attachment(previous=causal_lm.__dict__.get("forward"), backend=backend)
    causal_lm.__dict__[_ATTACHMENT] = attachment
    # A bound method on the instance: the class is left alone, and in a deep copy of the model it is bound to the copy.
    causal_lm.__dict__["forward"] = types.MethodType(_forward_for(type(causal_lm)), causal_lm)
    try:
        attachment.transform = _measure_if_able(causal_lm)
    except FastD2OError:
        detach(causal_lm)
        raise
    return model


def detach(model: Model) -> Model:
    """Undo :func:`attach`: the forwards of model and head are again what they were. An unattached model is left alone.

    Args:
        model: as for :func:`attach`.

    Returns:
        The same `model`.

    Raises:
        TypeError: as for :func:`attach`.
        FastD2OError: something else (Accelerate's mixed precision, say) wrapped a forward since. Nothing is changed.
    """
    causal_lm = _unwrap(model)
    attached: _Attachment | None = causal_lm.__dict__.get(_ATTACHMENT)
    if attached is None:
        return model
    if not hasattr(getattr(causal_lm.__dict__.get("forward"), "__func__", None), _ATTACHMENT):
        raise FastD2OError(
            "something wrapped the model's forward after fastd2o.attach, so it cannot be put back. Fix: undo that "
            "first (Accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    close_heads(causal_lm)
    restore(causal_lm, "forward", attached.previous)
    del causal_lm.__dict__[_ATTACHMENT]
    return model


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The ``transformers`` model in whatever is around it."""
    if isinstance(model, nn.DataParallel):
        raise FastD2OError(
            "torch.nn.DataParallel copies the model at every step and cannot carry an attachment. Fix: launch with "
            "torchrun (DistributedDataParallel), or make a single device visible"
        )
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            _check_prompt_learning(inner.active_peft_config)
            inner = inner.get_base_model()
        else:  # torch.compile; DDP, FSDP, DeepSpeed
            inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if inner is None:
            raise TypeError(
                f"model must be a transformers causal LM, or a wrapper around one; got {type(model).__name__}"
            )
    return inner


def _check_prompt_learning(config: Any) -> None:
    if config.is_prompt_learning and config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise FastD2OError(
            f"PEFT's {config.peft_type.value} puts virtual tokens before every sequence, so log-probabilities would "
            "not line up with the labels. Fix: use LoRA or prefix tuning"
        )


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise FastD2OError(f"{name} is an encoder-decoder. Fix: use a decoder-only causal LM")
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise FastD2OError(f"{name} predicts masked tokens, not the next. Fix: load it with AutoModelForCausalLM")
    if (model.tp_size or 1) > 1:
        raise FastD2OError(
            f"{name} is tensor-parallel over {model.tp_size} devices, each of which may see only a part of the "
            "vocabulary. Fix: load it without tp_plan, and shard it with FSDP"
        )


def _measure_if_able(model: PreTrainedModel) -> HeadTransform | None:
    """How `model` forms its logits, or None if it cannot run here and now."""
    for parameter in model.parameters():
        # FSDP2 (DTensor) and ZeRO-3 (ds_id) gather weights over all ranks, which not all may have come here to do.
        if parameter.is_meta or is_dtensor(parameter) or hasattr(parameter, "ds_id"):
            return None
    try:
        return measure(model, functools.partial(_plain_forward, model), model.device)
    except FastD2OError:
        raise
    except Exception:
        # Most likely kernels that want another device than the model is on so far. If not, the first call will tell.
        return None


def _measure_now(model: PreTrainedModel, inputs: list[Any]) -> HeadTransform:
    if torch.compiler.is_compiling():
        raise FastD2OError(
            "how the model scales its logits is not known yet, since it could not run when it was attached, and cannot "
            "be measured while compiling. Fix: make one fused call before torch.compile"
        )
    device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), model.device)
    return measure(model, functools.partial(_plain_forward, model), device)


def _plain_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of `model` as it was before it was attached."""
    previous = model.__dict__[_ATTACHMENT].previous
    return type(model).forward(model, *args, **kwargs) if previous is None else previous(*args, **kwargs)


def _forward_for(model_class: type[nn.Module]) -> Callable[..., Any]:
    """The forward of attached models of `model_class`, with the signature that ``generate`` and Trainer look at."""

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        fused = kwargs.pop("fused", False)
        if fused is False:
            return _plain_forward(self, *args, **kwargs)
        return _fused_forward(self, fused, *args, **kwargs)

    # Not functools.wraps: Accelerate follows `__wrapped__` to take off its own wrappers, and would take off this one.
    forward.__doc__ = model_class.forward.__doc__
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    setattr(forward, _ATTACHMENT, True)
    return forward


def _fused_forward(model: PreTrainedModel, fused: Any, *args: Any, **kwargs: Any) -> FusedCausalLMOutput:
    labels = kwargs.pop("labels", None)
    _check_arguments(fused, labels, args, kwargs)
    attachment: _Attachment = model.__dict__[_ATTACHMENT]
    heads = open_heads(model)
    transform = attachment.transform
    if transform is None:
        transform = attachment.transform = _measure_now(model, [*args, *kwargs.values()])

    kwargs["return_dict"] = True
    kwargs.setdefault("use_cache", False)  # the sequence is scored, not continued
    head_call = functools.partial(_token_log_probs, labels=labels) if fused is True else fused
    relay = Relay(head_call, transform, attachment.backend)
    with projecting(heads, relay.send):
        output = _plain_forward(model, *args, **kwargs)
    result = relay.receive(output.logits)
    own = {name: getattr(output, name, None) for name in _OWN_FIELDS}
    return FusedCausalLMOutput(**{"log_probs" if fused is True else "head": result}, **own)


def _check_arguments(fused: Any, labels: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if fused is not True and not callable(fused):
        raise TypeError(f"fused must be True, False or a head call, got {fused!r}")
    if fused is True and labels is None:
        raise ValueError(
            "fused=True scores labels, and there are none. Fix: labels=[B, L] token ids, -100 where not to score"
        )
    if fused is not True and labels is not None:
        raise ValueError(
            "labels go with fused=True; a head call brings its own targets. Fix: bind them, as in "
            "fused=functools.partial(fastd2o.linear_logprob, target=...)"
        )
    if len(args) > 1:
        raise TypeError(
            f"a fused forward takes input_ids alone by position, got {len(args)} arguments. Fix: name the others"
        )
    for name in ("logits_to_keep", "num_logits_to_keep"):
        keep = kwargs.get(name)
        if isinstance(keep, torch.Tensor) or keep not in (None, 0):
            raise ValueError(f"{name} cannot go with fused. Fix: leave it out; labels of -100 cost nothing in the head")
    if kwargs.get("return_dict") is False:
        raise ValueError("return_dict=False cannot go with fused, whose output has no order. Fix: leave it out")


def _token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor, **options: Any
) -> torch.Tensor:
    """``[B, L]``: the log-probability of each label, in its own place."""
    labels = labels.to(hidden.device)
    check_target("labels", labels, hidden)
    # The targets move to the hidden states that predict them, not the other way round: that would copy the latter.
    try:
        log_probs = ops.linear_logprob(hidden, weight, ops.shift_labels(labels), **options)
    except ValueError:
        _check_labels(labels, weight.shape[0])  # the caller knows labels, not the targets made of them
        raise
    assert isinstance(log_probs, torch.Tensor)  # and not the tuple that comes with stats
    return F.pad(log_probs[:, :-1], (1, 0))


def _check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    outside = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    outside[:, 0] = False  # nothing precedes the first token: its label does not count
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"labels[{row}, {place}] is {labels[row, place].item()} ({int(outside.sum())} such in all), but the model "
            f"has {vocab_size} tokens. Fix: ids in [0, {vocab_size}), or -100 where not to score"
        )
