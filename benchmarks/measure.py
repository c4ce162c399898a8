"""Measures one case: every contestant's error, time and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from benchmarks.cases import CRINGE_K, Case
from benchmarks.contestants import Contestant
from benchmarks.instruments import peak, timed
from benchmarks.products import Products
from benchmarks.results import FLOOR, Row
from fastd2o.ops import Plan

CHECKED_TOKENS = 256
# An error beyond this, relative, is no rounding: something else was computed.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Short runs are repeated until the bare products have taken this long, but not more often than that.
ENOUGH_SECONDS = 3.0
MOST_ROUNDS = 25


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case: hidden [T, D], weight [V, D], target [T], and the loss's coefficient of each token [T]."""

    case: Case
    hidden: Tensor
    weight: Tensor
    target: Tensor
    coef: Tensor

    @classmethod
    def random(
        cls, case: Case, tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str
    ) -> Inputs:
        """Standard normal hidden states and logits of standard deviation 2; the same ones every time."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, std: float) -> Tensor:
            return torch.empty(rows, hidden_size, dtype=dtype, device=device).normal_(std=std, generator=generator)

        hidden, weight = normal(tokens, 1.0), normal(vocab_size, 2.0 / hidden_size**0.5)
        target = torch.randint(vocab_size, (tokens,), device=device, generator=generator)
        coef = torch.randn(tokens, device=device, generator=generator)
        return cls._with_leaves(case, hidden, weight, target, coef)

    def first(self, tokens: int) -> Inputs:
        """The same for the first tokens."""
        hidden, weight = self.hidden[:tokens].detach().clone(), self.weight.detach()
        return self._with_leaves(self.case, hidden, weight, self.target[:tokens], self.coef[:tokens])

    def double(self) -> Inputs:
        """The same in float64."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        return self._with_leaves(self.case, hidden, weight, self.target, self.coef.double())

    @classmethod
    def _with_leaves(cls, case: Case, hidden: Tensor, weight: Tensor, target: Tensor, coef: Tensor) -> Inputs:
        hidden.requires_grad_("hidden" in case.leaves)
        weight.requires_grad_("weight" in case.leaves)
        return cls(case, hidden, weight, target, coef)

    @property
    def leaves(self) -> list[Tensor]:
        """What needs a gradient."""
        return [getattr(self, name) for name in self.case.leaves]

    def run(self, contestant: Contestant) -> list[Tensor]:
        """The case, once: values [T], gradients, and for Cringe the columns drawn."""
        arguments = (self.hidden, self.weight, self.target)
        drawn: list[Tensor] = []
        with torch.set_grad_enabled(bool(self.leaves)):
            if self.case.name == "cringe":
                assert contestant.cringe is not None
                value, positive = contestant.cringe(*arguments)
                drawn = [positive]
            else:
                value = contestant.logprob(*arguments)
            gradients = torch.autograd.grad((value * self.coef).sum(), self.leaves) if self.leaves else ()
        return [value.detach(), *gradients, *drawn]


def measure(inputs: Inputs, contestants: list[Contestant], rounds: int, patience: float) -> tuple[str, list[Row]]:
    """One case: what the bare products were, and the rows of all contestants that know it.

    First everybody has to be right on a few tokens, then to warm up. Then they take turns (A B C A B C ...), so that a
    machine whose clock drifts slows all of them. A contestant whose warm-up takes longer than ``patience`` seconds has
    had its turn with that.
    """
    case, device = inputs.case, inputs.hidden.device.type
    products = Products.fastest(inputs.hidden.detach(), inputs.weight.detach(), _plan(inputs))
    rows = [Row(case.name, FLOOR)]
    times: dict[str, list[float]] = {FLOOR: []}
    runs: dict[str, Callable[[], object]] = {FLOOR: products}
    for contestant, row in _checked(inputs, contestants):
        rows.append(row)
        if row.error is not None:
            continue
        run = functools.partial(inputs.run, contestant)
        try:
            seconds = timed(run, device)
        except Exception as error:  # out of memory, say; the others go on
            row.error = _in_one_line(error)
            continue
        if seconds > patience:
            times[row.contestant] = [seconds]
        else:
            times[row.contestant], runs[row.contestant] = [], run

    rounds = enough_rounds(timed(products, device), rounds)
    for _ in track(range(rounds), description=f"{case.title}: {rounds} rounds of {len(runs)}"):
        for name, run_once in runs.items():
            times[name].append(timed(run_once, device))

    ours = next((row.contestant for row in rows if row.backend is not None and row.contestant in times), None)
    gradients = sum(leaf.nbytes for leaf in inputs.leaves)
    for row in rows:
        if row.contestant in times:
            row.record(times[row.contestant], times[FLOOR], times[ours] if ours else [])
        if row.contestant in runs and row.contestant != FLOOR:
            row.extra_megabytes = (peak(runs[row.contestant], device) - gradients) / 1e6
    return str(products), rows


def _checked(inputs: Inputs, contestants: list[Contestant]) -> list[tuple[Contestant, Row]]:
    """The contestants that know the case, each with a row of its errors on the first tokens."""
    if inputs.case.name == "cringe":
        contestants = [contestant for contestant in contestants if contestant.cringe is not None]
    oracle = Oracle(inputs.first(CHECKED_TOKENS))
    rows = []
    for contestant in track(contestants, description=f"{inputs.case.title}: comparing with float64"):
        row = Row(inputs.case.name, contestant.name, contestant.backend)
        rows.append((contestant, row))
        try:
            row.errors = oracle.errors(contestant)
        except Exception as error:  # a peer may fail in any way; the others go on
            row.error = _in_one_line(error)
        bound = WRONG[inputs.hidden.dtype]
        if not all(error <= bound for error in row.errors.values()):  # NaN is wrong as well
            row.error = f"wrong: beyond {bound:g} of float64"
    return rows


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def enough_rounds(floor_seconds: float, least: int) -> int:
    """``least``, or more where a round is short and its noise large."""
    return max(least, min(MOST_ROUNDS, int(ENOUGH_SECONDS / floor_seconds)))


def _plan(inputs: Inputs) -> Plan:
    tokens, hidden_size = inputs.hidden.shape
    return Plan.choose(
        tokens=tokens,
        hidden_size=hidden_size,
        vocab_size=len(inputs.weight),
        algorithm=inputs.case.algorithm,
        dtype=inputs.hidden.dtype,
        device=inputs.hidden.device.type,
    )


class Oracle:
    """The case in float64, on full logits."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.exact = inputs, inputs.double()
        self.expected: list[Tensor] = []
        if inputs.case.name != "cringe":
            self.expected = self.exact.run(Contestant("float64", _exact_logprob))

    def errors(self, contestant: Contestant) -> dict[str, float]:
        """Relative root mean square errors of a contestant's values and gradients. For Cringe, of those that follow
        from the candidates it drew, and by how much these fall short of the k-th largest logit."""
        found, expected = self.inputs.run(contestant), self.expected
        errors = {}
        if self.inputs.case.name == "cringe":
            positive = found.pop()
            expected = self._cringe(positive)
            errors["candidate"] = self._shortfall(positive)
        names = ["value", *(f"{name}_gradient" for name in self.inputs.case.leaves)]
        return {
            **{name: _rms_error(ours, exact) for name, ours, exact in zip(names, found, expected, strict=True)},
            **errors,
        }

    def _cringe(self, positive: Tensor) -> list[Tensor]:
        def cringe(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            difference = ((weight[target] - weight[positive]) * hidden).sum(1)
            return F.softplus(difference), positive

        return self.exact.run(Contestant("float64", _exact_logprob, cringe))[:-1]

    def _shortfall(self, positive: Tensor) -> float:
        hidden, weight, target = (t.detach() for t in (self.exact.hidden, self.exact.weight, self.exact.target))
        others = (hidden @ weight.T).scatter_(1, target[:, None], -torch.inf)
        smallest, drawn = others.topk(CRINGE_K).values[:, -1], others.gather(1, positive[:, None])[:, 0]
        return _rms_error(torch.minimum(drawn, smallest), smallest)


def _exact_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]


def _rms_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
