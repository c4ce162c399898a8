"""The door: every public operator checks its input here, once.

Shapes, dtypes, devices and options are checked before anything runs. Whether every target lies in the vocabulary
depends on the data, so the operators ask :class:`fastd2o.ops.counted.Counted` when they run: that also works inside a
compiled graph.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastd2o.ops.backends import fuses
from fastd2o.ops.plan import Plan

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``hidden [..., D]``, ``weight [V, D]`` and ``bias [V]`` agree, are floating point and live on one device."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected float64, float32, bfloat16 or float16")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}: move them to one device")
    if hidden.dim() < 1:
        raise ValueError("hidden is a scalar: expected shape [..., D]")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected [V, D], the weight of an nn.Linear")
    if hidden.shape[-1] != weight.shape[1]:
        hint = ", or is weight transposed?" if hidden.shape[-1] == weight.shape[0] else ""
        raise ValueError(
            f"hidden has {hidden.shape[-1]} features but weight {list(weight.shape)} expects {weight.shape[1]}: "
            f"pass hidden [..., D] and weight [V, D] with the same D{hint}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}: the vocabulary and the hidden size must not be empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}: expected [V] = [{weight.shape[0]}]")


def check_target(name: str, target: Tensor, hidden: Tensor) -> None:
    """``target`` is int64, with one entry for each of ``hidden``'s vectors, on the same device."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {target.dtype}: expected int64. Fix: {name}.long()")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {list(target.shape)} but hidden has {list(hidden.shape)}: expected one {name} for each "
            f"hidden vector, {list(hidden.shape[:-1])}"
        )
    if target.device != hidden.device:
        raise ValueError(f"{name} is on {target.device} but hidden is on {hidden.device}: move them to one device")


def check_transform(logit_scale: float, softcap: float | None, temperature: float) -> None:
    """The scalars of the logit transform are finite numbers, and positive where they must be."""
    check_number("logit_scale", logit_scale)
    check_number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be a positive number")
    if softcap is not None:
        check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap={softcap} must be a positive number, or None for no softcap")


def check_number(name: str, value: float) -> None:
    """``value`` is a finite Python number: a tensor's gradient would be lost on the way."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a number")
    # Not math.isfinite, which breaks a graph whose numbers are symbols.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value} must be a finite number")


def check_integer(name: str, value: int) -> None:
    """``value`` is a Python integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}: expected an integer")


def check_not_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation, which would find a tangent of 0 where there is one."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("fastd2o operators have no forward-mode derivative. Fix: use reverse mode (backward)")


def check_k(k: int, vocab_size: int) -> None:
    """There are k candidates besides the negative token itself."""
    check_integer("k", k)
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if k >= vocab_size:
        raise ValueError(
            f"k={k} candidates cannot exclude the negative token from a vocabulary of {vocab_size}: expected k < V, "
            f"at most {vocab_size - 1}"
        )


def choose_plan(
    plan: Plan | None,
    backend: str | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    cringe: bool = False,
    grouped: bool = False,
    k: int | None = None,
    memory_budget: int | float | None = None,
) -> Plan:
    """The plan that a caller gave, if it fits the call; the engine's own if none was given. A backend that the call
    names goes before the plan's. ``cringe``, ``grouped``, ``k``: as in :meth:`Plan.of`."""
    kind = {"cringe": cringe, "grouped": grouped}
    if plan is None:
        return Plan.of(hidden, weight, bias, **kind, k=k, backend=backend, memory_budget=memory_budget)
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is a {type(plan).__name__}: expected a fastd2o.Plan, as Plan.of(hidden, weight) gives it"
        )
    if memory_budget is not None:
        raise ValueError(
            "plan and memory_budget are both given, and the plan says already what is kept. Fix: leave one out, or "
            "Plan.of(..., memory_budget=...)"
        )
    expected = Plan.of(hidden, weight, bias, **kind, k=k, backend=backend or plan.backend)
    if plan.algorithm == "grouped" and grouped and expected.algorithm != "grouped":
        # The same call without a gradient, or with a frozen head: there are no parts.
        fused = fuses(plan.backend, expected.algorithm) and plan.fused
        plan = replace(plan, algorithm=expected.algorithm, part_tokens=None, kept_bytes=0, fused=fused)
    for name in ("hidden_size", "vocab_size", "dtype", "device"):
        given, wanted = getattr(plan, name), getattr(expected, name)
        if given != wanted:
            raise ValueError(f"plan.{name}={given} but this call has {wanted}. Fix: start from Plan.of(hidden, weight)")
    # A plan for more gradients than are wanted serves, one for fewer does not.
    rank = ["forward", "unit", "recompute"]
    if plan.algorithm not in rank or expected.algorithm not in rank:
        fits = plan.algorithm == expected.algorithm
    else:
        fits = rank.index(plan.algorithm) >= rank.index(expected.algorithm)
    if not fits:
        flags = "".join(f", {name}=True" for name, on in kind.items() if on)
        raise ValueError(
            f"plan.algorithm={plan.algorithm!r} cannot serve this call: expected {expected.algorithm!r}. Fix: "
            f"start from Plan.of(hidden, weight{flags}), or pass plan=None"
        )
    if backend is None or backend == plan.backend:
        return plan
    return replace(plan, backend=backend, fused=plan.fused and fuses(backend, plan.algorithm))
