"""What test_triton_compile.py compiles of ``kernels/triton/cringe_backward.py``: every configuration that its launchers
choose."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from fastd2o.kernels import cringe_backward as cringe
from tests.ops.triton_compilations import Compilation

# Of hidden and weight: alike, or a float32 weight under autocast. float16 has the same configurations as bfloat16.
DTYPES = {
    "float32": ("*fp32", "*fp32"),
    "bfloat16": ("*bf16", "*bf16"),
    "bfloat16 of float32": ("*bf16", "*fp32"),
}
HIDDEN_SIZES = (512, 4096)


def compilations(arch: int) -> Iterator[Compilation]:
    """The same for every ``arch``."""
    del arch
    for (name, (hidden, weight)), hidden_size in product(DTYPES.items(), HIDDEN_SIZES):
        dtypes = {"hidden": hidden, "weight": weight, "dweight": weight, "bias": weight, "dbias": weight}
        # With everything that a call may ask for: what is left out needs less.
        config = cringe.hidden_config(hidden_size)
        yield _compilation(
            f"cringe hidden {name} D {hidden_size}",
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
                "CAPPED": True,
                "BIAS": True,
                "POSITIVE": True,
                "HIDDEN": True,
                "EDGES": True,
                "BLOCK_D": config.block_hidden,
            },
            config,
        )
        config = cringe.weight_config(hidden_size)
        yield _compilation(
            f"cringe weight {name} D {hidden_size}",
            cringe.weight_kernel,
            {**dtypes, "edge_column": "*i32", "edge_order": "*i64", "edge_coef": "*fp32"},
            {"WEIGHT": True, "BIAS": True, "EDGES": config.edges, "BLOCK_D": config.block_hidden},
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
