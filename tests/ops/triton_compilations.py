"""What ``test_triton_compile.py`` compiles ahead of time, for GPUs that are not there: the kernels as their launchers
would have them on each architecture.

Kernels beside those of this file come from modules of their own, each with a function ``compilations(arch)``; see
:func:`providers`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)

# Bytes of shared memory that a block may have. A name that ends in SMALL is of a configuration for GPUs with less.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SMALL = "99 KB"
SMALL_LIMIT = 99 * 1024
# Columns of tensor memory that a multiprocessor has.
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel."""

    name: str
    """Readable and unique, "fold bfloat16 stats"."""

    kernel: Any
    """The ``@triton.jit`` function."""

    signature: dict[str, str]
    """Argument -> "*bf16", "i32", "i64", "fp32", "constexpr", "tensordesc<bf16[128,64]>"."""

    constants: dict[str, Any]
    """Constexpr arguments."""

    divisible: tuple[str, ...]
    """Arguments whose divisibility by 16 is assumed."""

    num_warps: int
    num_stages: int

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether it multiplies 16-bit factors, or float32 in TF32."""
        precision = self.constants.get("PRECISION")
        return precision == "tf32" or (precision is not None and "16" in self.signature["hidden"])


@dataclass(frozen=True)
class Compiled:
    """What came of it; bytes of stack and shared memory, columns of tensor memory, and the tensor core instructions in
    its PTX."""

    name: str
    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    instructions: tuple[str, ...]
    uses_tensor_cores: bool

    @property
    def shared_limit(self) -> int:
        return SMALL_LIMIT if self.name.endswith(SMALL) else SHARED_LIMIT[self.arch]


def providers() -> list[Callable[[int], Iterator[Compilation]]]:
    """Every module's ``compilations``."""
    names = ("tiles", "cringe", "loss")
    modules = [f"tests.ops.triton_compilations_{name}" for name in names]
    return [compilations, *(import_module(name).compilations for name in modules if find_spec(name) is not None)]


def compilations(arch: int) -> Iterator[Compilation]:
    """The kernels that multiply, and those that merge their partial results."""
    # Imported here, and not where pytest runs in the interpreter, whose kernels cannot be compiled.
    from fastd2o.kernels.configs import MAX_CANDIDATES, RAGGED, TABLE, ProductConfig
    from fastd2o.kernels.cringe_forward import MERGED_KEYS, cringe_products_kernel, merge_candidates_kernel
    from fastd2o.kernels.logprob import fold_products_kernel, grad_products_kernel, merge_folds_kernel

    types = {
        **dict.fromkeys(("target_logit", "partial", "lse_others", "coef", "values"), "*fp32"),
        **dict.fromkeys(("state_max", "state_sum", "state_weighted", "state_total"), "*fp32"),
        **dict.fromkeys(("target", "partial_keys", "index", "state_argmax"), "*i64"),
        **dict.fromkeys(("inner", "outer"), "fp32"),
        "partial_argmax": "*i32",
    }

    def product(
        name: str,
        kernel: Any,
        dtype: str,
        config: ProductConfig,
        *,
        bias: bool = True,
        softcap: bool = True,
        precision: str = "ieee",
        aligned: bool = True,
        contiguous: bool = True,
        **constants: Any,
    ) -> Compilation:
        """``aligned``: rows begin at multiples of 16 bytes and consist of whole blocks, otherwise nothing is known of
        them; ``contiguous``: their entries lie side by side."""
        tma = arch >= 90 and aligned and (dtype != "fp32" or precision == "tf32")
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        signature.update(bias=f"*{dtype}", out=f"*{dtype}")
        for factor, rows in (("hidden", config.block_tokens), ("weight", config.block_columns)):
            signature[factor] = f"tensordesc<{dtype}[{rows},{config.block_hidden}]>" if tma else f"*{dtype}"
        everything: dict[str, Any] = {
            **({"hidden_inner": 1, "weight_inner": 1} if contiguous else {}),
            **({} if bias else {"bias": None}),
            "BLOCK_T": config.block_tokens,
            "BLOCK_N": config.block_columns,
            "BLOCK_D": config.block_hidden,
            "PARTS": config.parts,
            "EVEN_D": aligned,
            "TMA": tma,
            "PRECISION": precision,
            "CAPPED": softcap,
            "HAS_BIAS": bias,
            **constants,
        }
        pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
        divisible = [*pointers, "hidden_size", "hidden_stride", "weight_stride", "out_stride"] if aligned else []
        return _compilation(name, kernel, signature, everything, divisible, config.num_warps, config.num_stages)

    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "fold": (fold_products_kernel, {"STATISTICS": True}),
        "grad": (grad_products_kernel, {}),
        "cringe": (cringe_products_kernel, {"K": 16}),
        "cringe_wide": (cringe_products_kernel, {"K": MAX_CANDIDATES}),
    }
    for name, (kernel, most) in kernels.items():
        half, full, ragged = TABLE[name][arch][16], TABLE[name][arch][32], RAGGED[name]
        yield product(f"{name} product bfloat16 everything", kernel, "bf16", half, **most)
        yield product(f"{name} product bfloat16 ragged", kernel, "bf16", ragged[16], aligned=False, **most)
        yield product(f"{name} product float32 everything", kernel, "fp32", full, **most)
        yield product(f"{name} product float32 ragged", kernel, "fp32", ragged[32], aligned=False, **most)
        if arch >= 90:
            yield product(f"{name} product float32 tf32", kernel, "fp32", full, precision="tf32", **most)
        if arch == 80:
            half = TABLE[name][86][16]
            yield product(f"{name} product bfloat16 everything {SMALL}", kernel, "bf16", half, **most)

    fold, grad = TABLE["fold"][arch][16], TABLE["grad"][arch][16]
    least: dict[str, Any] = {"STATISTICS": False, "partial_argmax": None}
    yield product("fold product bfloat16", fold_products_kernel, "bf16", fold, bias=False, softcap=False, **least)
    # Where registers are scarcest: some of everything may need more of them than all or nothing.
    some: list[tuple[str, bool, bool, dict[str, Any]]] = [
        (" bias", True, False, least),
        (" softcap", False, True, least),
        (" statistics", False, False, {"STATISTICS": True}),
    ]
    for ending, bias, softcap, rest in some if arch == 90 else ():
        name = f"fold product bfloat16{ending}"
        yield product(name, fold_products_kernel, "bf16", fold, bias=bias, softcap=softcap, **rest)
    yield product("grad product bfloat16", grad_products_kernel, "bf16", grad, bias=False, softcap=False)
    strided: dict[str, Any] = {"aligned": False, "contiguous": False, "STATISTICS": True}
    yield product("fold product float16 strided", fold_products_kernel, "fp16", RAGGED["fold"][16], **strided)
    if arch == 80:
        # Aligned rows that are not whole blocks; where there are descriptors, these read zeros beyond the end.
        yield product(
            "fold product float16 part of a block", fold_products_kernel, "fp16", fold, EVEN_D=False, STATISTICS=True
        )

    for statistics in (False, True):
        signature = {argument: types.get(argument, "i32") for argument in merge_folds_kernel.arg_names}
        constants: dict[str, Any] = {"BLOCK_S": 16, "BLOCK_T": 64, "STATISTICS": statistics}
        if not statistics:
            absent = ("partial_argmax", "state_weighted", "state_argmax", "state_total")
            constants.update(dict.fromkeys(absent))
        name = "merge_folds statistics" if statistics else "merge_folds"
        yield _compilation(name, merge_folds_kernel, signature, constants, (), 4, 3)
    for places in (8, MAX_CANDIDATES):
        signature = {argument: types.get(argument, "i32") for argument in merge_candidates_kernel.arg_names}
        constants = {"K": places, "BLOCK_T": MERGED_KEYS // places}
        yield _compilation(f"merge_candidates {places}", merge_candidates_kernel, signature, constants, (), 4, 3)


def _compilation(
    name: str,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: Iterable[str],
    num_warps: int,
    num_stages: int,
) -> Compilation:
    """Constants take the place of what the signature says."""
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    divisible = tuple(name for name in divisible if signature.get(name, "constexpr") != "constexpr")
    return Compilation(name, kernel, signature, constants, divisible, num_warps, num_stages)


def compile_one(compilation: Compilation, arch: int, folder: Path) -> Compiled:
    """Compile with Triton's own ptxas, and read the result with its cuobjdump."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    source = ASTSource(
        compilation.kernel,
        {name: compilation.signature[name] for name in names},
        {(names.index(name),): value for name, value in compilation.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(binary)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert used is not None, report
    instructions = tuple(name for name in ("wgmma.mma_async", "tcgen05.mma") if name in kernel.asm["ptx"])
    return Compiled(
        compilation.name,
        compilation.kernel.fn.__name__,
        arch,
        registers=int(used[1]),
        stack=int(used[2]) + int(used[3]),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        instructions=instructions,
        uses_tensor_cores=compilation.uses_tensor_cores,
    )


# Every compilation with its architecture. What multiplies takes longest, and comes first: processes end together.
_everything: list[tuple[Compilation, int]] = []


def _compiled(index: int) -> Compiled:
    compilation, arch = _everything[index]
    try:
        with tempfile.TemporaryDirectory() as folder:
            return compile_one(compilation, arch, Path(folder))
    except Exception as error:
        raise RuntimeError(f"{compilation.name} does not compile for sm_{arch}") from error


def main() -> None:
    """``triton_compilations PROCESSES``: compile every kernel, and print a line of JSON for each."""
    _everything.extend((one, arch) for arch in ARCHITECTURES for provider in providers() for one in provider(arch))
    _everything.sort(key=lambda entry: "PRECISION" not in entry[0].constants)
    # Forked, so that kernels need not be sent, nor modules be imported again.
    with ProcessPoolExecutor(int(sys.argv[1]), mp_context=get_context("fork")) as pool:
        for compiled in pool.map(_compiled, range(len(_everything))):
            print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
