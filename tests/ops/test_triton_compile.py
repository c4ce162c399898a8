"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 as its launchers would have it, without a spill or a stack
frame, and needs no more registers or shared memory than ``kernels/triton/resources.json`` records. No GPU is needed.

Where a kernel changes on purpose, write the table anew and commit it: ``python -m tests.ops.test_triton_compile``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import fastd2o.kernels  # noqa: E402
from fastd2o.kernels.configs import TABLE as TABLE_OF_BLOCKS  # noqa: E402
from tests.ops.triton_compilations import (  # noqa: E402
    ARCHITECTURES,
    SHARED_LIMIT,
    SMALL,
    SMALL_LIMIT,
    TENSOR_MEMORY,
    Compiled,
)

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "triton" / "resources.json"
PROCESSES = 2


def compile_kernels() -> list[Compiled]:
    """All of them, in processes of their own: in this one, kernels may be interpreted."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "tests.ops.triton_compilations", str(PROCESSES)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        # Triton prints the whole module where one of its passes fails; the end tells which kernel it was.
        raise RuntimeError(f"a kernel does not compile:\n...{result.stderr[-4000:]}")
    found = []
    for line in result.stdout.splitlines():
        fields = json.loads(line)
        found.append(Compiled(**{**fields, "instructions": tuple(fields["instructions"])}))
    return sorted(found, key=lambda one: (one.name, one.arch))


@pytest.fixture(scope="module")
def kernels() -> list[Compiled]:
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this Triton comes without ptxas")
    return compile_kernels()


@pytest.fixture
def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def complaints(kernels: list[Compiled]) -> list[str]:
    """What is wrong with them on any architecture: a stack frame (which is where spills go), too much shared or tensor
    memory, no tensor core instruction."""
    wanted = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
    found = []
    for one in kernels:
        if one.stack != 0:
            found.append(f"{one.name} on sm_{one.arch} has a stack frame of {one.stack} bytes")
        if one.shared > one.shared_limit:
            found.append(f"{one.name} on sm_{one.arch} needs {one.shared} bytes of shared memory")
        if one.tensor_memory > TENSOR_MEMORY:
            found.append(f"{one.name} on sm_{one.arch} needs {one.tensor_memory} columns of tensor memory")
        if one.uses_tensor_cores and one.arch in wanted and wanted[one.arch] not in one.instructions:
            found.append(f"{one.name} on sm_{one.arch} does without {wanted[one.arch]}")
    return found


def over_budget(kernels: list[Compiled], table: dict[str, Any]) -> list[str]:
    """Kernels that use more than the table allows."""
    return [
        f"{one.name} on sm_{one.arch} uses {one.registers} registers and {one.shared} bytes; recorded: {recorded}"
        for one in kernels
        if (recorded := table["kernels"][one.name][f"sm_{one.arch}"])
        and (one.registers > recorded["registers"] or one.shared > recorded["shared"])
    ]


@pytest.mark.slow
def test_no_kernel_spills_and_every_product_uses_tensor_cores(kernels: list[Compiled]) -> None:
    assert {one.arch for one in kernels} == set(ARCHITECTURES)
    assert len({(one.name, one.arch) for one in kernels}) == len(kernels), "two compilations have the same name"
    assert sum(one.uses_tensor_cores for one in kernels) > 20
    assert complaints(kernels) == []


@pytest.mark.slow
def test_every_kernel_is_compiled_in_every_configuration_of_the_table(kernels: list[Compiled]) -> None:
    modules = [import_module(f"fastd2o.kernels.{one.name}") for one in iter_modules(fastd2o.kernels.__path__)]
    launched = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    for arch in ARCHITECTURES:
        assert {one.kernel for one in kernels if one.arch == arch} == launched
    compiled = {(one.name, one.arch) for one in kernels}
    for kernel, by_arch in TABLE_OF_BLOCKS.items():
        for bits, dtype in ((16, "bfloat16"), (32, "float32")):
            name = f"{kernel} product {dtype} everything"
            assert {(name, arch) for arch in ARCHITECTURES} <= compiled
            assert {(f"{kernel} product {dtype} ragged", arch) for arch in ARCHITECTURES} <= compiled
            # GPUs with less shared memory have configurations of their own where sm_80's do not fit.
            assert by_arch[86][bits] == by_arch[80][bits] or (f"{name} {SMALL}", 80) in compiled


@pytest.mark.slow
def test_resources_are_those_recorded(kernels: list[Compiled], table: dict[str, Any]) -> None:
    recorded = {(name, arch) for name, by_arch in table["kernels"].items() for arch in by_arch}
    assert {(one.name, f"sm_{one.arch}") for one in kernels} == recorded, (
        "a kernel came or went. Fix: python -m tests.ops.test_triton_compile"
    )
    if triton.__version__ != table["triton"]:
        pytest.skip(f"Triton {triton.__version__} compiles its own way; the table is of Triton {table['triton']}")
    assert over_budget(kernels, table) == []


def test_what_is_wrong_is_found() -> None:
    def compiled(**changes: Any) -> Compiled:
        fields: dict[str, Any] = {"registers": 40, "stack": 0, "shared": 1024, "tensor_memory": 0}
        fields.update(name="f", kernel="f", arch=90, instructions=("wgmma.mma_async",), uses_tensor_cores=True)
        return Compiled(**{**fields, **changes})

    assert complaints([compiled(), compiled(arch=80, instructions=()), compiled(name=f"f {SMALL}")]) == []
    assert len(complaints([compiled(stack=8)])) == 1
    assert len(complaints([compiled(shared=SHARED_LIMIT[90] + 1)])) == 1
    assert len(complaints([compiled(name=f"f {SMALL}", shared=SMALL_LIMIT + 1)])) == 1
    assert len(complaints([compiled(tensor_memory=TENSOR_MEMORY + 1)])) == 1
    assert len(complaints([compiled(instructions=("tcgen05.mma",))])) == 1
    assert len(complaints([compiled(arch=100)])) == 1
    budget = {"kernels": {"f": {"sm_90": {"registers": 40, "shared": 1024}}}}
    assert over_budget([compiled()], budget) == []
    assert len(over_budget([compiled(registers=41)], budget)) == 1
    assert len(over_budget([compiled(shared=1025)], budget)) == 1


def main() -> None:
    """Write the table."""
    start = time.monotonic()
    kernels = compile_kernels()
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for one in kernels:
        rows.setdefault(one.name, {})[f"sm_{one.arch}"] = {"registers": one.registers, "shared": one.shared}
    # A line for each kernel, so that a change reads as one.
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    print(TABLE.read_text())
    print("\n".join(complaints(kernels)))
    print(f"{len(kernels)} kernels in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
