"""What ``kernels/triton/loss.py`` is compiled for: a kernel for each objective, and the switches that change it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastd2o.kernels import loss
from fastd2o.losses.fused import CRINGE_OBJECTIVES, OPTIONS
from tests.ops.triton_compilations import Compilation

SWITCHES: list[tuple[str, dict[str, float]]] = [
    *((objective, {}) for objective in OPTIONS),
    ("d2o", {"length_normalize": True, "allow_no_anchor": True}),
    ("pairwise_cringe", {"length_normalize": True, "detach_gate": True}),
]


def compilations(arch: int) -> Iterator[Compilation]:
    """The same for every ``arch``."""
    del arch
    for objective, switches in SWITCHES:
        with_cringe = objective in CRINGE_OBJECTIVES
        unread = "ref_logp" if with_cringe else "token_cringe"
        signature: dict[str, Any] = {
            "token_logp": "*fp32",
            "token_cringe": "*fp32",
            "sequence_start": "*i64",
            "group_start": "*i64",
            "positive": "*u1",
            "ref_logp": "*fp32",
            "loss": "*fp32",
            "sequence_logp": "*fp32",
            "logp_coef": "*fp32",
            "cringe_coef": "*fp32",
            "tokens": "i32",
            "sequences": "i32",
            "groups": "i32",
            "numbers": loss.Numbers(*("fp32" for _ in loss.Numbers._fields)),
        }
        divisible = tuple(name for name, kind in signature.items() if str(kind).startswith("*") and name != unread)
        constants = {unread: None, **loss.constants(objective, switches, loss.Config())}
        yield Compilation(
            name=" ".join(["loss", objective, *switches]),
            kernel=loss.loss_kernel,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constants=constants,
            divisible=divisible,
            num_warps=loss.NUM_WARPS,
            num_stages=3,
        )
