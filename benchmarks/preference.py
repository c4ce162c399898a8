"""A preference loss from hidden states to gradients: the grouped algorithm, and what it is to be compared with.

    python -m benchmarks.preference                       4096 tokens x 1024 x 128256, bfloat16
    python -m benchmarks.preference --tokens 1024 --vocab 32000 --dtype float32

D2O on groups of one negative and three anchors. Time is a ratio to the 6 T·D·V of bare matrix products that the grouped
algorithm is made of (benchmarks/products.py), and to our own recompute; all take turns, and a ratio is the median of
those within a round. Memory is the most that was alive beyond inputs, results and gradients. What a backward costs is
the time beyond that of the same call without a gradient. Written to benchmarks/results/.

On the CPU it starts itself again with an allocator that keeps its memory: what the C library returns to the system at
the end of a call is cleared by the system, page by page, in the next, which takes as long as 1 T·D·V here. That is true
of every contestant with much memory, and advice for training on CPUs in general (docs/engine.md).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastd2o
from fastd2o import Groups
from fastd2o.ops import Plan
from fastd2o.ops.plan import DEFAULT_BUDGET

from .instruments import Lap, lap, peak
from .products import Products
from .results import FLOOR, FOLDER, Contest, Report, Row, machine, median_ratio

SEQUENCES = 4  # of a group: a negative and three anchors
TOKENS_PER_SEQUENCE = 64
SATURATED_TOL = 1e-6
OURS = "grouped"
RECOMPUTE = "recompute"
FORWARD = "forward only"
HALF = "grouped, half saturated"

# Take no memory by mmap, and never trim the heap: the variables of glibc's malloc.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Inputs:
    """hidden [T, D], weight [V, D], target [T]; the sequence of each token, the groups, references [S] of groups that
    are far from saturated, and of such as half are not."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    sequence_ids: Tensor
    groups: Groups
    ref_logp: Tensor
    half_saturated: Tensor

    @classmethod
    def random(cls, tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str) -> Inputs:
        """Standard normal hidden states and logits of standard deviation 2; the same ones every time."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, std: float) -> Tensor:
            return torch.empty(rows, hidden_size, dtype=dtype, device=device).normal_(std=std, generator=generator)

        hidden, weight = normal(tokens, 1.0), normal(vocab_size, 2.0 / hidden_size**0.5)
        target = torch.randint(vocab_size, (tokens,), device=device, generator=generator)
        ids = torch.arange(tokens, device=device) // TOKENS_PER_SEQUENCE
        sequences = int(ids[-1]) + 1
        group = torch.arange(sequences, device=device) // SEQUENCES
        groups = Groups(group, torch.arange(sequences, device=device) % SEQUENCES != 0)
        with torch.no_grad():
            token_logp = fastd2o.linear_logprob(hidden, weight, target)
        ref_logp = torch.zeros(sequences, device=device).index_add_(0, ids, token_logp)
        # Anchors far more likely than under the reference: sigmoid(-z) is 0 to any digit that counts.
        saturated = ref_logp - 1e4 * (groups.positive & (group % 2 == 0))
        return cls(hidden, weight.requires_grad_(), target, ids, groups, ref_logp, saturated)

    def grouped(self, memory_budget: int | None = None, *, half: bool = False) -> None:
        """``linear_preference_loss``, and its backward where there is one."""
        output = fastd2o.linear_preference_loss(
            self.hidden,
            self.weight,
            self.target,
            self.sequence_ids,
            self.groups,
            objective="d2o",
            ref_logp=self.half_saturated if half else self.ref_logp,
            memory_budget=memory_budget,
            coefficient_tol=SATURATED_TOL if half else 0.0,
        )
        if output.loss.requires_grad:
            torch.autograd.grad(output.loss, self.leaves)

    def general(self, memory_budget: int | None = None) -> None:
        """Log-probabilities, the loss of them, and a backward through both."""
        token_logp = fastd2o.linear_logprob(self.hidden, self.weight, self.target, memory_budget=memory_budget)
        device, tokens, sequences = token_logp.device, len(self.target), len(self.ref_logp)
        loss = fastd2o.losses.grouped_loss(
            token_logp,
            torch.arange(0, tokens + 1, TOKENS_PER_SEQUENCE, device=device),
            torch.arange(0, sequences + 1, SEQUENCES, device=device),
            self.groups.positive,
            objective="d2o",
            ref_logp=self.ref_logp,
        ).loss.mean()
        torch.autograd.grad(loss, self.leaves)

    @property
    def leaves(self) -> list[Tensor]:
        """What needs a gradient."""
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]


def main(argv: list[str] | None = None) -> None:
    """Measure, write, show."""
    arguments = parse(argv)
    keep_memory()
    dtype = getattr(torch, arguments.dtype)
    inputs = Inputs.random(arguments.tokens, arguments.hidden, arguments.vocab, dtype, arguments.device)
    shape = {name: getattr(arguments, name) for name in ("tokens", "hidden", "vocab", "dtype")}
    contest = measure(inputs, shape, arguments)
    report = Report(machine(arguments.device), [contest])
    console = Console(width=None if sys.stdout.isatty() else 140)
    show(console, report.machine, contest)
    path = report.write(arguments.out / f"{arguments.device}-preference.json")
    console.print(f"written to {path}", highlight=False)


def keep_memory() -> None:
    """Start this program again so that glibc keeps what it is given back, unless it does already; elsewhere nothing."""
    if sys.platform == "linux" and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP_MEMORY})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {SEQUENCES * TOKENS_PER_SEQUENCE}")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.tokens % (SEQUENCES * TOKENS_PER_SEQUENCE):
        parser.error(f"--tokens {arguments.tokens} is not a multiple of {SEQUENCES * TOKENS_PER_SEQUENCE}")
    return arguments


def measure(inputs: Inputs, shape: dict[str, Any], arguments: argparse.Namespace) -> Contest:
    """All contestants, taking turns."""
    device = arguments.device
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    plan = Plan.of(inputs.hidden.requires_grad_(), inputs.weight, grouped=True)
    products = Products.fastest(hidden, weight, plan)
    whole = plan.extra_bytes + inputs.target.numel() * weight.shape[0] * weight.itemsize
    runs: dict[str, Callable[[], None]] = {
        FLOOR: products,
        OURS: inputs.grouped,
        "grouped, all at once": lambda: inputs.grouped(whole),
        HALF: lambda: inputs.grouped(half=True),
        RECOMPUTE: inputs.general,
        "stash, half kept": lambda: inputs.general(whole // 2),
        FORWARD: torch.no_grad()(inputs.grouped),
        "frozen head": lambda: _frozen(inputs).grouped(),
    }
    for run in runs.values():
        run()
    laps: dict[str, list[Lap]] = {name: [] for name in runs}
    for _ in track(range(arguments.rounds), description=f"{arguments.rounds} rounds of {len(runs)}"):
        for name, run in runs.items():
            laps[name].append(lap(lambda mark, run=run: run(), device))  # type: ignore[misc]
    rows = []
    for name, run in runs.items():
        row = Row(name)
        row.record(laps[name], laps[FLOOR], laps[RECOMPUTE])
        if name != FLOOR:
            trained = 0 if name == FORWARD else hidden.nbytes + (0 if name == "frozen head" else weight.nbytes)
            row.extra_megabytes = (peak(run, device) - trained) / 1e6
        rows.append(row)
    backwards = {
        name: [total.both - forward.both for total, forward in zip(laps[name], laps[FORWARD], strict=True)]
        for name in (OURS, HALF)
    }
    half = next(row for row in rows if row.contestant == HALF)
    half.errors["backward_over_unsaturated"] = median_ratio(backwards[HALF], backwards[OURS])
    return Contest("preference", shape, str(products), products.flops, rows)


def aims(contest: Contest) -> list[tuple[str, float, float]]:
    """What this project aims at: a figure's name, the figure, and what it is to be at most."""
    rows = {row.contestant: row for row in contest.rows}
    ours = rows[OURS]
    found = [
        ("time over the products", ours.over_products, 1.15),
        ("over recompute", ours.over_fastd2o, 0.80),
        ("MB", ours.extra_megabytes, 1.1 * DEFAULT_BUDGET / 1e6),
        ("backward with half of the groups saturated", rows[HALF].errors["backward_over_unsaturated"], 0.60),
    ]
    return [(name, figure, most) for name, figure, most in found if figure is not None]


def _frozen(inputs: Inputs) -> Inputs:
    fields = {**vars(inputs), "weight": inputs.weight.detach()}
    return Inputs(**fields)


def show(console: Console, machine: dict[str, Any], contest: Contest) -> None:
    """A table of all contestants."""
    shape = contest.shape
    console.print(
        f"{shape['tokens']} tokens x {shape['hidden']} x {shape['vocab']} vocabulary, {shape['dtype']}; D2O, groups of "
        f"{SEQUENCES} x {TOKENS_PER_SEQUENCE} tokens; budget {DEFAULT_BUDGET / 1e6:.0f} MB; "
        + ", ".join(f"{name} {value}" for name, value in machine.items() if name != "kind"),
        highlight=False,
    )
    table = Table("contestant", "seconds", "/ products", "/ recompute", "MB")
    for row in contest.rows:
        memory = "" if row.extra_megabytes is None else f"{row.extra_megabytes:,.0f}"
        ratios = [f"{value:.3f}" for value in (row.over_products, row.over_fastd2o) if value is not None]
        table.add_row(row.contestant, f"{row.seconds:.3g}", *ratios, memory)
    console.print(table)
    for name, figure, most in aims(contest):
        verdict = "met" if figure <= most else "missed"
        console.print(f"{OURS}: {name} {figure:,.3g}, aim {most:,.3g} at most: {verdict}", highlight=False)
    console.print(f"{FLOOR}: {contest.floor}", highlight=False)


if __name__ == "__main__":
    main()
