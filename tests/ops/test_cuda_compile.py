"""Every ``csrc/cuda/*.cu`` compiles for sm_80, sm_90a and sm_100a without a warning, a spill or a stack frame, and
needs no more registers or shared memory than ``csrc/cuda/resources.json`` records.

Where a kernel changes on purpose, write the table anew and commit it: ``python -m tests.ops.test_cuda_compile``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastd2o.ops.native import ARCHS, CSRC, NVCC_FLAGS

TABLE = CSRC / "cuda" / "resources.json"
TORCH_HEADERS = Path(torch.__file__).parent / "include"

_FLAGS = [
    *("-c", *NVCC_FLAGS),
    # Headers of the system, torch's among them, may warn; ours may not.
    *("-I", str(CSRC), "-isystem", str(TORCH_HEADERS)),
    *("-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC"),
    *(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS),
]


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel on one architecture; bytes of stack, spills and shared memory."""

    registers: int
    shared: int
    stack: int = 0
    spills: int = 0


def parse(log: str) -> dict[tuple[str, str], Resources]:
    """``(mangled kernel, architecture)`` -> resources, from the report of ``ptxas -v``."""
    found: dict[tuple[str, str], Resources] = {}
    key: tuple[str, str] | None = None
    stack = spills = 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            key = (entry[1], entry[2])
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            assert key is not None, f"ptxas reports registers of no kernel: {line}"
            shared = re.search(r"(\d+) bytes smem", line)
            found[key] = Resources(int(used[1]), int(shared[1]) if shared else 0, stack, spills)
            key = None
    return found


def readable(mangled: set[str]) -> dict[str, str]:
    """Mangled kernel -> what the table calls it: ``fold_kernel<float, true>``."""
    names = sorted(mangled)
    output = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
    return {
        name: re.sub(r"\w+::", "", text.removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0])
        for name, text in zip(names, output, strict=True)
    }


def compile_kernels(folder: Path) -> dict[str, dict[str, Resources]]:
    """Kernel -> architecture -> resources, of all files."""

    def report(source: Path) -> str:
        # One file after the other would leave a core idle; nvcc's own --threads would mix up the reports.
        command = ["nvcc", *_FLAGS, str(source), "-o", str(folder / f"{source.stem}.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{result.stdout}{result.stderr}")
        return result.stdout + result.stderr

    with ThreadPoolExecutor(2) as pool:
        found = [kernel for log in pool.map(report, sorted(CSRC.glob("cuda/*.cu"))) for kernel in parse(log).items()]
    names = readable({mangled for (mangled, _), _ in found})
    table: dict[str, dict[str, Resources]] = {name: {} for name in sorted(names.values())}
    for (mangled, architecture), resources in found:
        table[names[mangled]][architecture] = resources
    return table


def nvcc_release() -> str:
    """Like ``13.0``."""
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", version)
    assert release is not None, version
    return release[1]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Resources]]:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, which is not on the PATH")
    return compile_kernels(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


@pytest.mark.slow
def test_no_kernel_spills_or_has_a_stack_frame(kernels: dict[str, dict[str, Resources]]) -> None:
    assert kernels
    for name, by_architecture in kernels.items():
        assert set(by_architecture) == set(ARCHS), name
        for architecture, resources in by_architecture.items():
            assert (resources.stack, resources.spills) == (0, 0), f"{name} on {architecture}: {resources}"


@pytest.mark.slow
def test_resources_are_those_recorded(kernels: dict[str, dict[str, Resources]], table: dict[str, Any]) -> None:
    assert set(kernels) == set(table["kernels"]), "a kernel came or went. Fix: python -m tests.ops.test_cuda_compile"
    if nvcc_release() != table["nvcc"]:
        pytest.skip(f"nvcc {nvcc_release()} allocates registers its own way; the table is of nvcc {table['nvcc']}")
    assert over_budget(kernels, table) == []


def over_budget(kernels: dict[str, dict[str, Resources]], table: dict[str, Any]) -> list[str]:
    """Kernels that use more than the table allows."""
    return [
        f"{name} on {architecture} uses {used.registers} registers and {used.shared} bytes; recorded: {recorded}"
        for name, by_architecture in kernels.items()
        for architecture, used in by_architecture.items()
        if (recorded := table["kernels"][name][architecture])
        and (used.registers > recorded["registers"] or used.shared > recorded["shared"])
    ]


def test_a_report_is_read_and_judged() -> None:
    log = """
    ptxas info    : Compiling entry function '_Z1fIfEvv' for 'sm_80'
    ptxas info    : Function properties for _Z1fIfEvv
        8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ptxas info    : Used 40 registers, used 1 barriers, 640 bytes smem, 400 bytes cmem[0]
    ptxas info    : Compiling entry function '_Z1fIfEvv' for 'sm_90a'
    ptxas info    : Function properties for _Z1fIfEvv
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 32 registers
    """
    found = parse(log)
    assert found == {("_Z1fIfEvv", "sm_80"): Resources(40, 640, 8, 16), ("_Z1fIfEvv", "sm_90a"): Resources(32, 0)}
    kernels = {"f<float>": {architecture: used for (_, architecture), used in found.items()}}
    recorded = {"kernels": {"f<float>": {arch: {"registers": 39, "shared": 640} for arch in ("sm_80", "sm_90a")}}}
    assert len(over_budget(kernels, recorded)) == 1


def main() -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_kernels(Path(folder))
    columns = ("registers", "shared")
    rows = {
        name: {arch: {key: asdict(by_arch[arch])[key] for key in columns} for arch in sorted(by_arch)}
        for name, by_arch in kernels.items()
    }
    # A line for each kernel, so that a change reads as one.
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{\n  "nvcc": {json.dumps(nvcc_release())},\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
