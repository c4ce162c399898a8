"""``fastd2o doctor``: what this machine can do, and for what it cannot, why and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

HELP = "show versions, devices, which backends, kernels and extras work here, and why the others do not"

_EPILOG = """\
examples:
  fastd2o doctor
  fastd2o doctor --json > machine.json
"""
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "safetensors", "numpy", "triton")
_GIB = 2**30


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o doctor``."""
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the report; a backend or an extra that does not work here is a finding, not a failure."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    try:
        _print_tables(report)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print(json.dumps(report, indent=2))
    return 0


def examine() -> dict[str, Any]:
    """The report as JSON-ready values: ``versions``, ``machine``, ``devices``, ``backends``, ``native``,
    ``extras``."""
    import fastd2o

    return {
        "versions": {
            "fastd2o": fastd2o.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": _machine(),
        "devices": _devices(),
        "backends": fastd2o.backends(),
        "native": _native(),
        "extras": _extras(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "platform": platform.platform(),
        "executable": sys.executable,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": memory and round(memory / _GIB, 1),
    }


def _devices() -> list[dict[str, Any]]:
    """One entry per accelerator; the CPU is always there and described under ``machine``."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    if accelerator.type != "cuda":
        return [{"device": accelerator.type, "name": accelerator.type}]
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / _GIB, 1),
                "cuda": torch.version.cuda,
            }
        )
    return devices


def _native() -> dict[str, Any]:
    """What compiles the native kernels, where they are kept, and where each library is or why it cannot be had."""
    from fastd2o.ops import native

    if sys.platform != "linux":
        return {"kernels": f"no: {native.unsupported('cpu')}"}

    def tool(path: str | None) -> str | None:
        return path and f"{path}: {native.version_of(path)}"

    def library(kind: native.Kind) -> str:
        path = native.built(kind)
        reason = native.unavailable(kind)
        if reason is not None:
            return f"no: {reason}"
        return "not built yet; fastd2o build, or first use, builds it" if path is None else f"built: {path}"

    return {
        "compiler": tool(native.compiler()),
        "ninja": tool(native.ninja()),
        "nvcc": tool(native.nvcc()),
        "cache": " or else ".join(map(str, native.cache_folders())),
        **{f"{kind} kernels": library(kind) for kind in native.KINDS},
    }


def _extras() -> dict[str, str | None]:
    """Extra -> ``None`` if everything it asks for is installed, else what is missing and how to install it."""
    try:
        from packaging.requirements import Requirement

        names = metadata.metadata("fastd2o").get_all("Provides-Extra") or []
        requirements = [Requirement(line) for line in metadata.requires("fastd2o") or []]
    except ModuleNotFoundError as error:
        # PackageNotFoundError is one of these too: fastd2o itself is then only on the path.
        return {"all": f"cannot tell: the package {error.name!r} is not installed. Fix: pip install 'fastd2o[train]'"}
    found: dict[str, str | None] = {}
    for extra in names:
        problems = []
        for requirement in requirements:
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                continue  # needed by every installation, not by this extra
            if requirement.name == "fastd2o" or not requirement.marker.evaluate({"extra": extra}):
                continue
            installed = _version(requirement.name)
            if installed is None:
                problems.append(f"{requirement.name} is not installed")
            elif not requirement.specifier.contains(installed, prereleases=True):
                problems.append(f"{requirement.name} is {installed}, needed {requirement.specifier}")
        found[extra] = f"{'; '.join(problems)}. Fix: pip install 'fastd2o[{extra}]'" if problems else None
    return found


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def table(title: str, rows: dict[str, Any]) -> None:
        grid = Table(title=title, title_justify="left", show_header=False, min_width=60)
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(name, Text(str(value)))  # not a str: [train] would be taken for markup
        console.print(grid)

    def status(reasons: dict[str, str | None]) -> dict[str, str]:
        return {name: "works" if reason is None else f"no: {reason}" for name, reason in reasons.items()}

    table("Versions", {name: version or "not installed" for name, version in report["versions"].items()})
    table("Machine", {name.replace("_", " "): "unknown" if v is None else v for name, v in report["machine"].items()})
    accelerators = {
        device["device"]: ", ".join(f"{key} {value}" for key, value in device.items() if key != "device")
        for device in report["devices"]
    }
    table("Accelerators", accelerators or {"none": "everything runs on the CPU"})
    table("Backends of the fused operators", status(report["backends"]))
    table("Native kernels", {name: value or "not found" for name, value in report["native"].items()})
    table("Extras", status(report["extras"]))
