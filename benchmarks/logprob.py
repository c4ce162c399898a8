"""Time, memory and error of token log-probabilities, forward and backward, ours beside the peers that are installed.

    python -m benchmarks.logprob [--device cuda] [--tokens 2048] [--hidden 1024] [--vocab 128256] [--dtype bfloat16]

Contestants take turns (A B C A B C ...) so that a machine whose clock drifts slows all of them; what is quoted is the
median of each one's times and the median of the ratios within a round. Memory is the most that was alive beyond inputs
and gradients: on the CPU from the allocator's records, on CUDA from its own peak counter. Error is the root mean square
against float64, relative, on 256 of the tokens. Results are written to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.contestants import Contestant, load, matrix_products
from fastd2o.memory import measure_memory
from fastd2o.ops import Plan

RESULTS = Path(__file__).parent / "results"
CHECKED_TOKENS = 256


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--skip", nargs="*", default=[], help="contestants whose name contains one of these words")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/<device>-<shape>.json)")
    arguments = parser.parse_args()

    contestants, absent = load()
    contestants = {n: c for n, c in contestants.items() if not any(word in n for word in arguments.skip)}
    console = Console(width=None if sys.stdout.isatty() else 130)
    rows = []
    for head in arguments.heads:
        rows += measure(arguments, contestants, head == "trained")
    result = {"machine": machine(arguments.device), "shape": shape(arguments), "absent": absent, "rows": rows}
    name = f"{arguments.device}-t{arguments.tokens}-d{arguments.hidden}-v{arguments.vocab}-{arguments.dtype}.json"
    out = arguments.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(console, result)
    console.print(f"written to {out}")


def measure(
    arguments: argparse.Namespace, contestants: dict[str, Contestant], trained: bool
) -> list[dict[str, object]]:
    """One head, all contestants."""
    generator = torch.Generator(arguments.device).manual_seed(0)
    dtype = getattr(torch, arguments.dtype)

    def normal(rows: int, std: float) -> Tensor:
        tensor = torch.empty(rows, arguments.hidden, dtype=dtype, device=arguments.device)
        return tensor.normal_(std=std, generator=generator)

    hidden = normal(arguments.tokens, 1.0).requires_grad_()
    weight = normal(arguments.vocab, 2.0 / arguments.hidden**0.5).requires_grad_(trained)
    target = torch.randint(arguments.vocab, (arguments.tokens,), device=arguments.device, generator=generator)
    coef = torch.randn(arguments.tokens, device=arguments.device, generator=generator)
    leaves = [hidden, weight] if trained else [hidden]

    def step(logprob: Contestant) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad((logprob(hidden, weight, target) * coef).sum(), leaves)

    algorithm = Plan.choose(
        tokens=arguments.tokens,
        hidden_size=arguments.hidden,
        vocab_size=arguments.vocab,
        algorithm="recompute" if trained else "unit",
        dtype=dtype,
        device=arguments.device,
    )
    runs: dict[str, Callable[[], object]] = {name: step(contestant) for name, contestant in contestants.items()}
    products = 4 if trained else 2
    floor = f"products alone, {2 * products} T·D·V"
    runs[floor] = lambda: matrix_products(hidden.detach(), weight.detach(), algorithm.block_vocab, products)

    head = "trained" if trained else "frozen"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in track(range(arguments.rounds), description=f"{head} head, {len(runs)} contestants"):
        for name, run in runs.items():
            times[name].append(timed(run, arguments.device))
    gradients = sum(leaf.nbytes for leaf in leaves)
    rows: list[dict[str, object]] = []
    for name in runs:
        row: dict[str, object] = {
            "head": head,
            "contestant": name,
            "seconds": statistics.median(times[name]),
            "spread": [min(times[name]), max(times[name])],
            "over_products": statistics.median(map(float.__truediv__, times[name], times[floor])),
            "over_fastd2o": statistics.median(map(float.__truediv__, times[name], times["fastd2o"])),
        }
        if name in contestants:
            row["extra_megabytes"] = (peak(runs[name], arguments.device) - gradients) / 1e6
            row["errors"] = errors(contestants[name], hidden, weight, target, coef, trained)
        rows.append(row)
    return rows


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes alive beyond those alive before."""
    if device == "cpu":
        return measure_memory(run, warm_up=False).peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def errors(
    logprob: Contestant, hidden: Tensor, weight: Tensor, target: Tensor, coef: Tensor, trained: bool
) -> dict[str, float]:
    """Relative root mean square error of values and gradients against float64, on the first tokens."""
    tokens = slice(0, CHECKED_TOKENS)

    def evaluate(h: Tensor, w: Tensor, function: Contestant) -> list[Tensor]:
        inputs = [h.requires_grad_(), w.requires_grad_(trained)][: 1 + trained]
        value = function(h, w, target[tokens])
        return [value.detach(), *torch.autograd.grad((value * coef[tokens].to(value.dtype)).sum(), inputs)]

    def exact(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return (h @ w.T).log_softmax(-1).gather(1, y[:, None])[:, 0]

    ours = evaluate(hidden[tokens].detach().clone(), weight.detach().clone(), logprob)
    theirs = evaluate(hidden[tokens].detach().double(), weight.detach().double(), exact)
    names = ["value", "hidden_gradient", "weight_gradient"]
    return {
        name: ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()
        for name, a, b in zip(names, ours, theirs, strict=False)
    }


def machine(device: str) -> dict[str, object]:
    """Where the figures are from."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": name,
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


def shape(arguments: argparse.Namespace) -> dict[str, object]:
    """The case."""
    return {name: getattr(arguments, name) for name in ("tokens", "hidden", "vocab", "dtype", "rounds")}


def show(console: Console, result: dict[str, object]) -> None:
    """The result as a table."""
    for part in ("machine", "shape"):
        facts = result[part]
        assert isinstance(facts, dict)
        console.print(part + ": " + ", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    table = Table()
    for column in ("head", "contestant"):
        table.add_column(column)
    for column in ("seconds", "/ products", "/ fastd2o", "MB", "error", "of dX", "of dW"):
        table.add_column(column, justify="right")
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        error = row.get("errors", {})
        extra = row.get("extra_megabytes")
        table.add_row(
            row["head"],
            row["contestant"],
            f"{row['seconds']:.3f}",
            f"{row['over_products']:.2f}",
            f"{row['over_fastd2o']:.2f}",
            "" if extra is None else f"{extra:,.0f}",
            *(f"{error[n]:.1e}" if n in error else "" for n in ("value", "hidden_gradient", "weight_gradient")),
        )
    console.print(table)
    absent = result["absent"]
    assert isinstance(absent, dict)
    for name, reason in absent.items():
        console.print(f"absent: {name} ({reason})")


if __name__ == "__main__":
    main()
