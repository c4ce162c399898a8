"""The output head of a causal LM: finding it, refusing what cannot be served, and the door put into its forward.

The vocabulary projection must happen *inside* the head's own forward: that is where DDP, FSDP2, ZeRO-3, Accelerate's
offloading and autocast have made the weight whole and ready. So the head gets a forward with a door in it. While the
door is shut, the head is the ``nn.Linear`` it always was. While it is open, the head hands ``(hidden, weight, bias)``
to whoever opened it, and returns their tensor in place of the logits.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from fastd2o.errors import FastD2OError

# (hidden [..., D], weight [V, D], bias [V] or None) -> the tensor that the head returns instead of logits.
Projection = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

_DOOR = "_fastd2o_door"
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class InstanceState:
    """What is left on a module by attaching: copied with the module, but never pickled with it.

    Pickle stores a bound method by its name, and so would bring back a model that is attached by half.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceState:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an attached model cannot be pickled. Fix: use save_pretrained, or call fastd2o.detach(model) first"
        )


@dataclass
class _Door(InstanceState):
    """The state of one head: the attribute that its forward sits in, what sat there before (None: nothing), who
    projects now (None: the head itself), and how often it was asked to.
    """

    slot: str
    previous: Any
    projection: Projection | None = None
    calls: int = 0


def _head_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    door: _Door = self.__dict__[_DOOR]
    if door.projection is None:
        return nn.Linear.forward(self, input) if door.previous is None else door.previous(input)
    door.calls += 1
    if is_dtensor(self.weight):
        raise FastD2OError(
            "the weight of the output head is sharded over devices inside its own forward (tensor parallelism): each "
            "device sees only a part of the vocabulary. Fix: leave the head out of the tensor-parallel plan"
        )
    return door.projection(input, self.weight, self.bias)


@contextmanager
def projecting(heads: list[nn.Linear], projection: Projection) -> Iterator[None]:
    """Let `projection` stand in for `heads` during one forward of the model, which must call one of them, once.

    Raises:
        FastD2OError: no head was called, or more than once.
    """
    doors: list[_Door] = [head.__dict__[_DOOR] for head in heads]
    for door in doors:
        door.projection = projection
    try:
        yield
        calls = sum([door.calls for door in doors])
    finally:
        for door in doors:
            door.projection, door.calls = None, 0
    if calls != 1:
        raise FastD2OError(
            f"the model called its output head {calls} times in one forward, where once was expected: its logits are "
            "not simply those of the head. Fix: use the model without fused"
        )


def open_heads(model: nn.Module) -> list[nn.Linear]:
    """The layers that may act as the head of `model`, each with a door: one, or PEFT's original and trained copies.

    Raises:
        FastD2OError: the model has no head, or one that cannot be served; the message says why and what to do.
    """
    heads = _find_heads(model)
    for head in heads:
        if _DOOR not in head.__dict__:
            # Accelerate's hooks (device maps, offloading) replace `forward` by one that fetches the weight and then
            # calls `_old_forward`: the door belongs behind them.
            slot = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
            head.__dict__[_DOOR] = _Door(slot, previous=head.__dict__.get(slot))
            # A bound method, so that in a deep copy of the model it is bound to the copy.
            head.__dict__[slot] = types.MethodType(_head_forward, head)
    return heads


def close_heads(model: nn.Module) -> None:
    """Take every door out of `model` again.

    Raises:
        FastD2OError: something else has replaced a head's forward since; nothing is changed.
    """
    heads = [module for module in model.modules() if _DOOR in module.__dict__]
    for head in heads:
        if getattr(head.__dict__.get(head.__dict__[_DOOR].slot), "__func__", None) is not _head_forward:
            raise FastD2OError(
                "something replaced the forward of the output head after fastd2o.attach, so it cannot be put back. "
                "Fix: undo that first"
            )
    for head in heads:
        door: _Door = head.__dict__.pop(_DOOR)
        restore(head, door.slot, door.previous)


def restore(module: nn.Module, name: str, previous: Any) -> None:
    """Give the instance attribute `name` of `module` its `previous` value, or none of its own."""
    if previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = previous


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is sharded by torch's DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _find_heads(model: nn.Module) -> list[nn.Linear]:
    name = type(model).__name__
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise FastD2OError(
            f"{name} has no language-modelling head. Fix: load the model with AutoModelForCausalLM.from_pretrained"
        )
    peft = sys.modules.get("peft")  # a wrapper of PEFT's can only be here if PEFT has been imported
    if peft is not None and isinstance(head, peft.utils.ModulesToSaveWrapper):
        heads = [head.original_module, *head.modules_to_save.values()]
    else:
        heads = [head]
    for candidate in heads:
        _check_head(name, candidate)
    return heads


def _check_head(name: str, head: nn.Module) -> None:
    kind = type(head).__name__
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):
        raise FastD2OError(
            f"the output head of {name} carries a PEFT adapter ({kind}), which a fused forward would leave out. Fix: "
            "keep the head out of target_modules and trainable_token_indices, or train all of it with modules_to_save"
        )
    weight = getattr(head, "weight", None)
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or not isinstance(weight, torch.Tensor):
        raise FastD2OError(
            f"the output head of {name} is a {kind}; only a plain nn.Linear can be served. Fix: if it was quantised, "
            "load the model with the head left out (bitsandbytes: llm_int8_skip_modules=['lm_head'])"
        )
    if weight.dtype not in _FLOATING or not (type(weight) in (nn.Parameter, torch.Tensor) or is_dtensor(weight)):
        raise FastD2OError(
            f"the weight of the output head of {name} is a {type(weight).__name__} of {weight.dtype}; only a plain "
            "floating-point weight can be served. Fix: load the model with the head left out of the quantisation"
        )
    if "forward" in head.__dict__ and _DOOR not in head.__dict__ and not hasattr(head, "_hf_hook"):
        raise FastD2OError(
            f"the forward of the output head of {name} was replaced by {head.__dict__['forward']!r}, which a fused "
            "forward would leave out. Fix: call fastd2o.attach(model) before replacing it"
        )
