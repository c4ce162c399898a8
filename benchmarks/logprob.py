"""Token log-probabilities and Cringe: time, memory and error of FastD2O, its peers and the bare matrix products.

    python -m benchmarks.logprob                                       one shape; the default is 2048 x 1024 x 128256
    python -m benchmarks.logprob --tokens 64 2048 --dtype float32      several: all combinations
    python -m benchmarks.logprob --suite                               all shapes that have targets on the CPU
    python -m benchmarks.logprob --device cuda                         8192 x 4096 x 128256

Time is a ratio to the matrix products of FastD2O's algorithm for the case (benchmarks/products.py), which take turns
with all contestants: the median of the ratios within a round. Memory is the most that was alive beyond inputs, results
and gradients. Error is the root mean square against float64, relative, on 256 of the tokens. A shape is written to
benchmarks/results/ as soon as it is measured; python -m benchmarks.readme puts what is there into the README.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.contestants import load
from benchmarks.measure import Inputs, measure
from benchmarks.results import FLOOR, FOLDER, Result, Row, verdicts

DEFAULTS: dict[str, dict[str, list[Any]]] = {
    "cpu": {"tokens": [2048], "hidden": [1024], "vocab": [128256], "dtype": ["bfloat16"]},
    "cuda": {"tokens": [8192], "hidden": [4096], "vocab": [128256], "dtype": ["bfloat16"]},
}
SUITES: dict[str, dict[str, list[Any]]] = {
    "cpu": {"tokens": [64, 2048, 16384], "vocab": [32000, 128256], "dtype": ["bfloat16", "float32"]},
    "cuda": {},
}
# On a CPU the peers take minutes for a run with more tokens than this.
PEER_TOKENS = {"cpu": 2048, "cuda": sys.maxsize}


def main(argv: list[str] | None = None) -> None:
    """Measure, write, show."""
    arguments = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    results = []
    for tokens, hidden, vocab, dtype in shapes(arguments):
        shape = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "dtype": dtype}
        result = run(arguments, shape)
        path = result.write(arguments.out)
        results.append(result)
        show(console, result)
        console.print(f"written to {path}\n", highlight=False)
    if len(results) > 1:
        show_all(console, results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.logprob", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--suite", action="store_true", help="all shapes that have targets; the next options narrow it")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--skip", nargs="+", default=[], help="contestants whose name contains one of these words")
    parser.add_argument(
        "--peer-tokens",
        type=int,
        help="peers take part up to so many tokens (default: 2048 on the CPU, no limit on CUDA)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least so many; short ones are repeated more often")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds; a contestant that needs longer to warm up runs but once"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: benchmarks/results)")
    return parser.parse_args(argv)


def shapes(arguments: argparse.Namespace) -> list[tuple[int, int, int, str]]:
    """Tokens, hidden, vocabulary, dtype of every shape that is asked for."""
    chosen = {**DEFAULTS[arguments.device], **(SUITES[arguments.device] if arguments.suite else {})}
    chosen |= {name: values for name in chosen if (values := getattr(arguments, name))}
    return list(itertools.product(chosen["tokens"], chosen["hidden"], chosen["vocab"], chosen["dtype"]))


def run(arguments: argparse.Namespace, shape: dict[str, Any]) -> Result:
    """One shape, all cases."""
    device, dtype = arguments.device, getattr(torch, shape["dtype"])
    contestants, absent = load(device, dtype, arguments.skip)
    most = PEER_TOKENS[device] if arguments.peer_tokens is None else arguments.peer_tokens
    if shape["tokens"] > most:
        absent |= {c.name: f"left out beyond {most} tokens" for c in contestants if c.backend != device}
        contestants = [contestant for contestant in contestants if contestant.backend == device]
    result = Result(machine(device), shape, absent=absent)
    for name in arguments.cases:
        inputs = Inputs.random(CASES[name], shape["tokens"], shape["hidden"], shape["vocab"], dtype, device)
        result.floors[name], rows = measure(inputs, contestants, arguments.rounds, arguments.patience)
        result.rows += rows
    return result


def machine(device: str) -> dict[str, Any]:
    """Where the figures are from."""
    return {
        "kind": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """The processor's model and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


# --- tables -----------------------------------------------------------------------------------------------------------


def show(console: Console, result: Result) -> None:
    """One shape: a table of all contestants."""
    shape = result.shape
    console.print(
        f"{shape['tokens']} tokens x {shape['hidden']} x {shape['vocab']} vocabulary, {shape['dtype']}; "
        + ", ".join(f"{name} {value}" for name, value in result.machine.items() if name != "kind"),
        highlight=False,
    )
    table = Table()
    for column in ("case", "contestant"):
        table.add_column(column)
    for column in ("seconds", "/ products", "/ fastd2o", "MB", "error", "of dX", "of dW"):
        table.add_column(column, justify="right")
    table.add_column("target")
    for case, rows in itertools.groupby(result.rows, key=lambda row: row.case):
        table.add_section()
        for row in rows:
            table.add_row(case, row.contestant, *_figures(row), _judgement(row, result.kind))
            case = ""
    console.print(table)
    for name, floor in result.floors.items():
        console.print(f"{FLOOR}, {name}: {floor}", highlight=False)
    for row in result.rows:
        if row.error is not None:
            console.print(f"{row.case}, {row.contestant}: {row.error}", highlight=False, markup=False)
    for name, reason in result.absent.items():
        console.print(f"absent: {name} ({reason})", highlight=False, markup=False)


def _figures(row: Row) -> list[str]:
    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    seconds = "failed" if row.error is not None else figure(row.seconds, ".4g")
    return [
        seconds + ("*" if row.rounds == 1 else ""),
        figure(row.over_products, ".3f"),
        figure(row.over_fastd2o, ".2f"),
        figure(row.extra_megabytes, ",.1f"),
        *(figure(row.errors.get(name), ".1e") for name in ("value", "hidden_gradient", "weight_gradient")),
    ]


def _judgement(row: Row, kind: str) -> str:
    return "  ".join(
        f"{verdict.text} [green]met[/]" if verdict.met else f"{verdict.text} [red]missed[/]"
        for verdict in verdicts(row, kind)
    )


def show_all(console: Console, results: list[Result]) -> None:
    """Several shapes: FastD2O's own kernels, ratio to the bare products and memory, and the targets that are missed."""
    cases = [case for case in CASES if any(row.case == case for result in results for row in result.rows)]
    table = Table(title="FastD2O over the bare products, and MB; ! where a target is missed")
    for column in ("dtype", "vocabulary", "tokens"):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_column(CASES[case].title, justify="right")
    counts: dict[str, list[bool]] = {}
    for result in results:
        cells = []
        for case in cases:
            row = result.row(case, f"fastd2o {result.kind}")
            cells.append("" if row is None else _cell(row, result.kind))
        table.add_row(*(str(result.shape[name]) for name in ("dtype", "vocab", "tokens")), *cells)
        for row in result.rows:
            for verdict in verdicts(row, result.kind):
                counts.setdefault(verdict.quantity, []).append(verdict.met)
    console.print(table)
    for quantity, met in counts.items():
        console.print(f"{quantity} targets: {sum(met)} of {len(met)} met", highlight=False)


def _cell(row: Row, kind: str) -> str:
    if row.over_products is None:
        return "failed"
    missed = {verdict.quantity for verdict in verdicts(row, kind) if not verdict.met}
    time = f"{row.over_products:.2f}{'!' if 'time' in missed else ''}"
    if row.extra_megabytes is None:
        return time
    return f"{time}  {row.extra_megabytes:.0f} MB{'!' if 'memory' in missed else ''}"


if __name__ == "__main__":
    main()
