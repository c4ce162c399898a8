"""Everything that needs a CUDA device, phase after phase, each within its time: what ``make gpu`` runs.

    python tests/gpu/run.py [PHASE ...]

fastd2o need not be installed: ``site/sitecustomize.py`` puts the checkout together. What a phase says goes to gpu.log
in $OUT (default: runs/bench-gpu); beside it, as they come, lie the benchmark's results and the table by which the
engine chooses. A phase that fails or takes too long leaves the others be. No more than the standard library is imported
here, so that what is missing is said at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(__file__).resolve().parent / "site"
WORK = ROOT / "runs" / "bench-gpu"  # of the benchmark, which also draws pictures there

_TESTS = (
    "tests/gpu",
    "tests/ops/test_triton_tiles.py",
    "tests/ops/test_triton_products.py",
    "tests/ops/test_triton_cringe_backward.py",
)
_TESTS_WITH_HYPOTHESIS = "tests/losses/test_triton_loss.py"
_MOST_WORKERS = 12

COMPILER = "a C++ compiler"
# How many of a phase's last lines are shown.
_SHOWN, _SHOWN_OF_FAILURE = 3, 25
# Seconds in which a phase that is interrupted may say how far it came.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        name: on the command line and in what is said.
        arguments: of Python.
        seconds: its share; what earlier phases left of theirs comes on top.
        packages, programs: what it cannot do without.
        prefers: packages that it can do without, and does less.
        checks: compute-sanitizer's tool that watches it, and what the kernels watched have in their name.
        results: files that it writes.
        environment: beside what there is.
        after: the phase without whose success this one is left out.
        is_question: whether it only finds out what there is, and may fail.
    """

    name: str
    arguments: Sequence[str]
    seconds: int
    packages: Sequence[str] = ()
    programs: Sequence[str] = ()
    prefers: Sequence[str] = ()
    checks: tuple[str, str] | None = None
    results: Sequence[Path] = ()
    environment: dict[str, str] = field(default_factory=dict)
    after: str | None = None
    is_question: bool = False

    @property
    def lacks(self) -> list[str]:
        """What it needs and is not here."""
        return [
            *(name for name in self.packages if not installed(name)),
            *(name for name in self.programs if program(name) is None),
        ]

    @property
    def command(self) -> list[str]:
        """What is started."""
        python = [sys.executable, *self.arguments]
        if self.checks is None:
            return python
        tool, kernels = self.checks
        options = ["--tool", tool, "--error-exitcode", "1", "--kernel-name", f"kns={kernels}"]
        return [program("compute-sanitizer") or "compute-sanitizer", *options, *python]


def phases() -> list[Phase]:
    """The most important first. Eight minutes in all."""
    every_kernel = ("-m", "benchmarks.every_kernel", "--backend")
    one_kernel = 'import torch; torch.ones(8, device="cuda").sum().item()'
    # Within a block that torch keeps no access would be out of bounds.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bench = ("-m", "fastd2o", "bench", "--gpu", "--targets", "--out", str(WORK))
    bench_needs = ("torch", "pytest", "pytest_benchmark", "rich", "numpy", "matplotlib")
    bench_results = (WORK / "results.json", WORK / "results.md")
    table = ROOT / "kernels" / "triton" / "measured.json"

    def watched(name: str, backend: str, tool: str, kernels: str, seconds: int) -> Phase:
        arguments = (*every_kernel, backend)
        return Phase(name, arguments, seconds, checks=(tool, kernels), environment=uncached, after="sanitizer")

    return [
        Phase("kernels", (*every_kernel, "cuda"), 100, ("torch", "setuptools"), ("ninja", COMPILER, "nvcc")),
        Phase(
            "tests",
            _pytest(),
            130,
            ("torch", "pytest"),
            prefers=("hypothesis", "xdist"),
            environment={"OMP_NUM_THREADS": "2"},
        ),
        Phase("benchmark", bench, 110, bench_needs, results=bench_results),
        Phase("tune", ("-m", "benchmarks.tune"), 40, ("torch", "triton"), results=(table,)),
        Phase(
            "sanitizer",
            ("-c", one_kernel),
            15,
            programs=("compute-sanitizer",),
            checks=("memcheck", "_kernel"),
            is_question=True,
        ),
        watched("memcheck", "cuda", "memcheck", "fastd2o", 35),
        watched("racecheck", "cuda", "racecheck", "fastd2o", 30),
        watched("memcheck-triton", "triton", "memcheck", "_kernel", 20),
    ]


def _pytest() -> list[str]:
    """The GPU's own tests, and those of the Triton kernels, which run there where they can. Most of their time goes
    into compiling, one kernel on one core."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *_TESTS]
    if installed("hypothesis"):
        arguments.append(_TESTS_WITH_HYPOTHESIS)
    if installed("xdist"):
        arguments += ["-n", str(min(_MOST_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    return arguments


def installed(package: str) -> bool:
    """Whether it could be imported."""
    return importlib.util.find_spec(package) is not None


def program(name: str) -> str | None:
    """On the PATH, beside Python, or in CUDA's toolkit. The compiler may be one of several."""
    if name == COMPILER:
        return next(filter(None, map(program, filter(None, (os.environ.get("CXX"), "c++", "g++")))), None)
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), str(toolkit)]
    return shutil.which(name, path=os.pathsep.join(folders))


def main(argv: Sequence[str] | None = None) -> int:
    """Run them, or those that are named; 1 if any failed."""
    of_all = phases()
    parser = argparse.ArgumentParser(prog="tests/gpu/run.py", description="What needs a CUDA device.")
    names = [phase.name for phase in of_all]
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"of: {', '.join(names)} (default: all)")
    wanted = parser.parse_args(argv).phases
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"there is no phase {unknown[0]!r}; the phases are: {', '.join(names)}")
    wanted += [phase.after for phase in of_all if phase.name in wanted and phase.after]
    # Whoever ends this process ends the phase with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [phase for phase in of_all if not wanted or phase.name in wanted]
    return run_all(chosen, Path(os.environ.get("OUT") or WORK).absolute())


def run_all(chosen: Sequence[Phase], out: Path) -> int:
    """One after the other; logs and results go to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for phase in chosen:
        if phase.lacks:
            _say(f"{phase.name} will be left out, for want of {', '.join(phase.lacks)}")
        for name in phase.prefers:
            if not installed(name):
                _say(f"{phase.name} will do less, for want of {name}")
    began = time.monotonic()
    ends = 0.0
    outcomes: dict[str, str] = {}
    with (out / "gpu.log").open("w+b") as log:
        for phase in chosen:
            ends += phase.seconds
            if phase.lacks:
                outcomes[phase.name] = "failed"
            elif phase.after is not None and outcomes.get(phase.after) != "ok":
                _say(f"{phase.name}: left out, as {phase.after} failed")
                outcomes[phase.name] = "left out"
            else:
                outcomes[phase.name] = _run(phase, began + ends - time.monotonic(), log)
                _keep(phase, out)
    failed = [
        phase.name for phase in chosen if outcomes[phase.name] in ("failed", "too slow") and not phase.is_question
    ]
    verdict = f"failed: {', '.join(failed)}" if failed else "ok"
    _say(f"{time.monotonic() - began:.0f} s in all; {verdict}; what came of it is in {out}")
    return 1 if failed else 0


def _run(phase: Phase, seconds: float, log: IO[bytes]) -> str:
    """ "ok", "failed" or "too slow"."""
    log.write(f"\n=== {phase.name}: {' '.join(phase.command)}\n".encode())
    log.flush()
    start, began = log.tell(), time.monotonic()
    _say(f"{phase.name}: at most {seconds:.0f} s")
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        phase.command,
        cwd=ROOT,
        env={**environment, **phase.environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        outcome = "failed" if process.wait(seconds) else "ok"
    except subprocess.TimeoutExpired:
        outcome = "too slow"
    finally:
        _end(process)
    took = f"{phase.name}: {outcome} after {time.monotonic() - began:.0f} s"
    log.seek(start)
    lines = deque(log, _SHOWN if outcome == "ok" else _SHOWN_OF_FAILURE)
    for line in lines:
        print(f"  {line.decode(errors='replace').rstrip()[:200]}", flush=True)
    log.seek(0, os.SEEK_END)
    log.write(f"=== {took}\n".encode())
    log.flush()
    _say(took)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it started; interrupted first, so that a pytest tells what has failed so far."""
    running = process.poll() is None
    for number in (signal.SIGINT, signal.SIGKILL) if running else (signal.SIGKILL,):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)


def _keep(phase: Phase, out: Path) -> None:
    """Copy what a phase has written, not what was there before it."""
    for path in phase.results:
        if path.parent.resolve() != out.resolve() and path.exists() and path.stat().st_mtime >= _STARTED:
            shutil.copy2(path, out / path.name)


def _say(text: str) -> None:
    print(f"gpu: {text}", flush=True)


_STARTED = time.time()

if __name__ == "__main__":
    sys.exit(main())
