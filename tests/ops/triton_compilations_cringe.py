"""What test_triton_compile.py compiles of ``kernels/triton/cringe_backward.py``: every configuration that its launchers
choose."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from fastd2o.kernels import cringe_backward as cringe
from tests.ops.triton_compilations import Compilation

# Of hidden and weight: alike, or a float32 weight under autocast.
DTYPES = {
    "float32": ("*fp32", "*fp32"),
    "bfloat16": ("*bf16", "*bf16"),
    "float16": ("*fp16", "*fp16"),
    "bfloat16 of float32": ("*bf16", "*fp32"),
}
HIDDEN_SIZES = (512, 4096)


def compilations(arch: int) -> Iterator[Compilation]:
    """The same for every ``arch``."""
    del arch
    for (name, (hidden, weight)), hidden_size in product(DTYPES.items(), HIDDEN_SIZES):
        dtypes = {"hidden": hidden, "weight": weight, "dweight": weight, "bias": weight, "dbias": weight}
        for capped, bias, positive in ((False, False, True), (True, True, True), (True, False, False)):
            config = cringe.hidden_config(hidden_size)
            yield _compilation(
                f"cringe hidden {name} D {hidden_size}"
                + " capped" * capped
                + " bias" * bias
                + " detached" * (not positive),
                cringe.hidden_kernel,
                {
                    **dtypes,
                    "target": "*i64",
                    "positive": "*i64",
                    "coef": "*fp32",
                    "dhidden": "*fp32",
                    "edge_column": "*i32",
                    "edge_coef": "*fp32",
                    "slope": "fp32",
                    "inner": "fp32",
                },
                {
                    "CAPPED": capped,
                    "BIAS": bias,
                    "POSITIVE": positive,
                    "HIDDEN": True,
                    "EDGES": True,
                    "BLOCK_D": config.block_hidden,
                },
                config,
            )
        for gradients in ((True, False), (True, True), (False, True)):
            config = cringe.weight_config(hidden_size)
            yield _compilation(
                f"cringe weight {name} D {hidden_size}" + " dweight" * gradients[0] + " dbias" * gradients[1],
                cringe.weight_kernel,
                {**dtypes, "edge_column": "*i32", "edge_order": "*i64", "edge_coef": "*fp32"},
                {
                    "WEIGHT": gradients[0],
                    "BIAS": gradients[1],
                    "EDGES": config.edges,
                    "BLOCK_D": config.block_hidden,
                },
                config,
            )


def _compilation(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: cringe.CringeConfig
) -> Compilation:
    """Sizes and strides are int32, rows contiguous and multiples of 16 elements."""
    constants |= {argument: 1 for argument in ("hidden_step", "weight_step") if argument in kernel.arg_names}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    divisible = tuple(
        argument
        for argument, type_ in signature.items()
        if type_.startswith("*") or argument in ("hidden_stride", "weight_stride", "hidden_size")
    )
    return Compilation(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=divisible,
        num_warps=config.num_warps,
        num_stages=3,
    )
