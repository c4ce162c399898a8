"""What test_triton_compile.py compiles of ``kernels/triton/tiles.py``: every configuration that its launchers
choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastd2o.kernels import tiles
from tests.ops.triton_compilations import Compilation

# Logits and what is made of them. On CUDA the engine's tiles are float32; 16-bit tiles may come from elsewhere. float16
# has the same configurations as bfloat16.
DTYPES = {
    "float32": ("*fp32", "*fp32"),
    "float32 to bfloat16": ("*fp32", "*bf16"),
    "bfloat16": ("*bf16", "*bf16"),
}
ITEMSIZE = {"*fp32": 4, "*bf16": 2}
# Rows many and few.
TOKENS = {"many rows": 4096, "few rows": 8}
# Without a softcap a kernel needs less of everything.
TRANSFORMS = {" capped": True}


def compilations(arch: int) -> Iterator[Compilation]:
    """The same for every ``arch``."""
    del arch
    yield from _folds()
    yield from _grads()
    yield from _topks()
    for slots in sorted({tiles.drawn_slots(k) for k in range(1, tiles.MAX_CANDIDATES + 1)}):
        config = tiles.draw_config(slots)
        yield _compilation(
            f"draw {slots} slots",
            tiles.draw_kernel,
            {
                "values": "*fp32",
                "index": "*i64",
                "counter": "*i64",
                "seed": "i64",
                "positive": "*i64",
                "positive_logit": "*fp32",
            },
            {"SLOTS": slots, "TOKENS": config.tokens},
            config.num_warps,
        )


def _folds() -> Iterator[Compilation]:
    floats = ("state_max", "state_sum", "target_logit", "rescale", "state_weighted", "state_total")
    for (dtype, (logits, written)), (rows, tokens), (transform, capped) in _product(DTYPES, TOKENS, TRANSFORMS):
        for ending, statistics, weights, resident in (
            ("", False, False, False),
            (" statistics", True, False, False),
            (" weights", False, True, False),
            (" resident weights", False, True, True),
            (" statistics resident weights", True, True, True),
        ):
            if (logits != written and not weights) or (_much_like_others(dtype) and rows == "few rows"):
                continue
            columns = 3072 if resident else 100_000
            config = tiles.fold_config(tokens, columns, ITEMSIZE[logits], ITEMSIZE[written] if weights else None)
            yield _compilation(
                f"fold {dtype} {rows}{transform}{ending}",
                tiles.fold_kernel,
                {
                    **dict.fromkeys(floats, "*fp32"),
                    "logits": logits,
                    "weights": written,
                    "target": "*i64",
                    "state_argmax": "*i64" if statistics else "*fp32",
                },
                {
                    "CAPPED": capped,
                    "STATISTICS": statistics,
                    "WEIGHTS": weights,
                    "RESIDENT": resident,
                    "DEEP": config.deep,
                    "LANES": config.lanes,
                },
                config.num_warps,
            )


def _much_like_others(dtype: str) -> bool:
    """Whether few rows of this dtype differ from many by no more than those of another."""
    return dtype not in ("float32", "float32 to bfloat16")


def _grads() -> Iterator[Compilation]:
    for (dtype, (logits, written)), (transform, capped) in _product(DTYPES, TRANSFORMS):
        config = tiles.grad_config(ITEMSIZE[logits])
        yield _compilation(
            f"grad {dtype}{transform}",
            tiles.grad_kernel,
            {"logits": logits, "out": written, "target": "*i64", "lse_others": "*fp32", "coef": "*fp32"},
            {"CAPPED": capped, "BLOCK": config.deep * config.lanes},
            config.num_warps,
        )


def _topks() -> Iterator[Compilation]:
    slots_of = {f"{slots} slots": slots for slots in (tiles.candidate_slots(k) for k in (5, tiles.MAX_CANDIDATES))}
    for (dtype, (logits, written)), (rows, tokens), (transform, capped), (name, slots) in _product(
        DTYPES, TOKENS, TRANSFORMS, slots_of
    ):
        if logits != written or (_much_like_others(dtype) and rows == "few rows"):
            continue
        config = tiles.topk_config(tokens, ITEMSIZE[logits])
        yield _compilation(
            f"topk {dtype} {rows}{transform} {name}",
            tiles.topk_kernel,
            {"logits": logits, "target": "*i64", "values": "*fp32", "index": "*i64"},
            {"CAPPED": capped, "SLOTS": slots, "BLOCK": config.deep * config.lanes},
            config.num_warps,
        )


def _product(*tables: dict[str, Any]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of the tables' entries."""
    if not tables:
        yield ()
        return
    for entry in tables[0].items():
        for others in _product(*tables[1:]):
            yield entry, *others


def _compilation(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int
) -> Compilation:
    """Sizes and strides are int32; tensors, the distance of the tile's rows and their length multiples of 16 elements,
    as the engine's are."""
    types = {"inner": "fp32", "outer": "fp32"} | types
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    divisible = tuple(
        argument
        for argument, type_ in signature.items()
        if type_.startswith("*") or argument in ("logits_stride", "weights_stride", "out_stride", "columns")
    )
    return Compilation(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=divisible,
        num_warps=num_warps,
        num_stages=3,
    )
