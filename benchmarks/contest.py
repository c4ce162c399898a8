"""Holds a contest: every contestant's error, memory and time at one case and shape.

1. A trial (:mod:`benchmarks.trial`) in a process of its own: errors against float64, and memory. A contestant that
   crashes there, or is killed for its memory, takes nobody along, and no profiler is ever near the clock.
2. A race (:mod:`benchmarks.race`) with the bare products. Where the inputs would stay in a cache from one run to the
   next, copies of them take turns as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastd2o.ops import Plan

from .cases import POSITIVES, SEQUENCES, Case, Shape
from .contestants import Contestant, eager_logprob
from .instruments import Mark, Run, cache_bytes
from .products import Products
from .race import Patience, race
from .results import FLOOR, LEFT_OUT, Contest, LeftOutError, Row

CHECKED_TOKENS = 64
# An error beyond this, relative, is no rounding: something else was computed.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case: hidden [T, D], weight [V, D], target [T], and what makes a loss of what is computed: of
    log-probabilities and Cringe each token's coefficient [T]; of a preference loss, for which T tokens are
    :data:`SEQUENCES` sequences of the same length, the references [S]."""

    case: Case
    hidden: Tensor
    weight: Tensor
    target: Tensor
    loss: Tensor

    @classmethod
    def random(cls, case: Case, shape: Shape, device: str) -> Inputs:
        """Standard normal hidden states and logits of standard deviation 2; the same ones every time."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def normal(rows: int, std: float) -> Tensor:
            return torch.empty(rows, shape.hidden, dtype=dtype, device=device).normal_(std=std, generator=generator)

        hidden, weight = normal(shape.tokens, 1.0), normal(shape.vocab, 2.0 / shape.hidden**0.5)
        target = torch.randint(shape.vocab, (shape.tokens,), device=device, generator=generator)
        loss = torch.randn(shape.tokens, device=device, generator=generator)
        if case.operator in POSITIVES:
            loss = _references(case, hidden, weight, target)
        return cls._with_leaves(case, hidden, weight, target, loss)

    def few(self, tokens: int = CHECKED_TOKENS) -> Inputs:
        """The same for so many tokens: of a preference loss the first of every sequence."""
        hidden, weight, target = self.hidden.detach(), self.weight.detach(), self.target
        if self.case.operator in POSITIVES:
            length = len(target) // SEQUENCES
            of_each = (torch.arange(len(target), device=target.device) % length) < tokens // SEQUENCES
            hidden, target = hidden[of_each], target[of_each]
            loss = _references(self.case, hidden, weight, target)
        else:
            hidden, target = hidden[:tokens].clone(), target[:tokens]
            loss = self.loss[:tokens]
        return self._with_leaves(self.case, hidden, weight, target, loss)

    def double(self) -> Inputs:
        """The same in float64."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        return self._with_leaves(self.case, hidden, weight, self.target, self.loss.double())

    def copy(self) -> Inputs:
        """The same in memory of its own."""
        hidden, weight = self.hidden.detach().clone(), self.weight.detach().clone()
        return self._with_leaves(self.case, hidden, weight, self.target.clone(), self.loss.clone())

    @classmethod
    def _with_leaves(cls, case: Case, hidden: Tensor, weight: Tensor, target: Tensor, loss: Tensor) -> Inputs:
        hidden.requires_grad_("hidden" in case.leaves)
        weight.requires_grad_("weight" in case.leaves)
        return cls(case, hidden, weight, target, loss)

    @property
    def leaves(self) -> list[Tensor]:
        """What needs a gradient."""
        return [getattr(self, name) for name in self.case.leaves]

    @property
    def gradient_bytes(self) -> int:
        """Of the results that a contestant cannot do without."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def run(self, contestant: Contestant, mark: Mark = lambda: None) -> list[Tensor]:
        """The case, once: values, gradients, and for Cringe the columns drawn. The mark is called between forward and
        backward."""
        drawn: list[Tensor] = []
        with torch.set_grad_enabled(bool(self.leaves)):
            if self.case.operator in POSITIVES:
                hidden, target = self.hidden.unflatten(0, (SEQUENCES, -1)), self.target.view(SEQUENCES, -1)
                value = contestant.preference[self.case.operator](hidden, self.weight, target, self.loss)
                loss = value
            else:
                way: Callable[..., object] | None = contestant.logprob
                if self.case.operator == "cringe":
                    way = contestant.cringe
                assert way is not None
                found = way(self.hidden, self.weight, self.target)
                value, *drawn = found if isinstance(found, tuple) else (found,)
                loss = (value * self.loss).sum()
            if not self.leaves:
                return [value, *drawn]
            mark()
            gradients = torch.autograd.grad(loss, self.leaves)
        return [value.detach(), *gradients, *drawn]


def _references(case: Case, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """[S] what the policy itself gives the sequences, for D2O, so that no group is saturated; 0 for DPO, whose peers
    cannot all be given references."""
    references = torch.zeros(SEQUENCES, device=hidden.device)
    if case.operator == "dpo":
        return references
    with torch.no_grad():
        blocks = zip(hidden.split(CHECKED_TOKENS), target.split(CHECKED_TOKENS), strict=True)
        logp = torch.cat([eager_logprob(block, weight, of_block) for block, of_block in blocks])
    return logp.view(SEQUENCES, -1).sum(1)


class Trial(NamedTuple):
    """What came of trying a contestant.

    Attributes:
        errors: relative root mean squares against float64, by what is compared.
        seconds: that a run at full size would take about, by the time for few tokens.
        peak: bytes alive beyond the inputs, at most, in a run at full size; None where it was not worth while, because
            an error or the time was beyond bounds.
    """

    errors: dict[str, float]
    seconds: float = 0.0
    peak: int | None = None


@dataclass(frozen=True)
class Setup:
    """Who takes part, and how the contest is held.

    Attributes:
        case: what is computed.
        shape: of what.
        device: "cpu" or "cuda".
        contestants: those that know the case.
        patience: how long.
        attempt: tries a contestant, by its name, before anything is timed; raises what the contestant raises.
        progress: told after each run how much of the contest is done, in [0, 1].
    """

    case: Case
    shape: Shape
    device: str
    contestants: Sequence[Contestant]
    patience: Patience
    attempt: Callable[[str], Trial]
    progress: Callable[[float], None] = lambda share: None


def hold(setup: Setup) -> Contest:
    """Hold the contest."""
    inputs = Inputs.random(setup.case, setup.shape, setup.device)
    products = Products.fastest(inputs.hidden.detach(), inputs.weight.detach(), _plan(inputs))
    rows = [Row(contestant.name, contestant.backend) for contestant in setup.contestants]
    for number, row in enumerate(rows):
        setup.progress(number / len(rows) / 3)
        with row.catching():
            trial = setup.attempt(row.contestant)
            row.check(trial.errors, WRONG[inputs.hidden.dtype])
            if trial.peak is None:
                raise LeftOutError(f"{LEFT_OUT}: a run would take about {trial.seconds:.0f} s")
            row.extra_megabytes = (trial.peak - inputs.gradient_bytes) / 1e6

    rows.insert(0, Row(FLOOR))
    turns = _Turns(inputs, products)
    runs: dict[str, Run] = {one.name: functools.partial(turns.run, one) for one in setup.contestants}
    runs[FLOOR] = turns.products
    ours = f"fastd2o {setup.device}"
    race(rows, runs, ours, setup.patience, setup.device, lambda share: setup.progress((1 + 2 * share) / 3))
    return Contest(setup.case.name, setup.shape.fields, str(products), products.flops, rows)


class _Turns:
    """Copies of the inputs that take turns, whoever runs on them."""

    def __init__(self, inputs: Inputs, products: Products) -> None:
        copies = [inputs, *(inputs.copy() for _ in range(_copies(inputs) - 1))]
        self._next = itertools.cycle(
            (one, dataclasses.replace(products, hidden_TD=one.hidden.detach(), weight_VD=one.weight.detach()))
            for one in copies
        )

    def run(self, contestant: Contestant, mark: Mark) -> None:
        """A contestant, once."""
        inputs, _ = next(self._next)
        inputs.run(contestant, mark)

    def products(self, mark: Mark) -> None:
        """The bare products, once."""
        _, products = next(self._next)
        products()


def _copies(inputs: Inputs) -> int:
    """So many that none is in the cache any more when it has its next turn; of the smallest, which no machine would
    let go of, no more than 32."""
    size, cache = inputs.hidden.nbytes + inputs.weight.nbytes, cache_bytes(inputs.hidden.device.type)
    return 1 if size > cache else min(32, 2 + cache // size)


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
