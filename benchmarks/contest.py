"""Holds a contest: every contestant's error, memory and time at one case and shape.

1. Errors against float64, on few tokens; from their time, whether it is worth while to go on.
2. Memory, where the case runs once in a process of its own (:mod:`benchmarks.scale`), so that neither a profiler nor
   what it leaves behind is near the clock, and a contestant that is killed for its memory takes nobody along.
3. A warm-up, which compiles and tunes.
4. Rounds, in which all take turns (A B C A B C ...), so that a machine whose clock drifts slows all of them: what
   counts are ratios within a round. Where the inputs would stay in a cache from one run to the next, copies of them
   take turns as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.ops import Plan

from .cases import CRINGE_K, POSITIVES, SEQUENCES, Case, Shape
from .contestants import Contestant, eager_logprob, preferences
from .instruments import Lap, Mark, Run, Weighed, cache_bytes, lap
from .products import Products
from .results import FLOOR, Contest, Row

CHECKED_TOKENS = 256
# An error beyond this, relative, is no rounding: something else was computed.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Patience:
    """How long to measure.

    Attributes:
        rounds: at least so many.
        most_rounds: and not more.
        seconds: short rounds are repeated until the bare products have taken so long.
        each: seconds; a contestant that has taken so long altogether sits out the rounds beyond ``rounds``.
        turn: seconds; a contestant that takes longer has had its turn with the run that was weighed.
        most_seconds: a contestant that would take longer for one run is left out.
    """

    rounds: int = 5
    most_rounds: int = 25
    seconds: float = 3.0
    each: float = 20.0
    turn: float = 60.0
    most_seconds: float = 600.0

    def rounds_of(self, floor_seconds: float) -> int:
        """``rounds``, or more where a round is short and its noise large."""
        return max(self.rounds, min(self.most_rounds, int(self.seconds / floor_seconds)))


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

    def few(self) -> Inputs:
        """The same for few tokens: of a preference loss the first of every sequence."""
        hidden, weight, target = self.hidden.detach(), self.weight.detach(), self.target
        if self.case.operator in POSITIVES:
            length = len(target) // SEQUENCES
            of_each = (torch.arange(len(target), device=target.device) % length) < CHECKED_TOKENS // SEQUENCES
            hidden, target = hidden[of_each], target[of_each]
            loss = _references(self.case, hidden, weight, target)
        else:
            hidden, target = hidden[:CHECKED_TOKENS].clone(), target[:CHECKED_TOKENS]
            loss = self.loss[:CHECKED_TOKENS]
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


@dataclass(frozen=True)
class Setup:
    """Who takes part, and how the contest is held.

    Attributes:
        case: what is computed.
        shape: of what.
        device: "cpu" or "cuda".
        contestants: those that know the case.
        patience: how long.
        weigh: runs a contestant, by its name, once; raises what the contestant raises.
        progress: told after each run how much of the contest is done, in [0, 1].
    """

    case: Case
    shape: Shape
    device: str
    contestants: Sequence[Contestant]
    patience: Patience
    weigh: Callable[[str], Weighed]
    progress: Callable[[float], None] = lambda share: None


def hold(setup: Setup) -> Contest:
    """Hold the contest."""
    inputs = Inputs.random(setup.case, setup.shape, setup.device)
    few = inputs.few()
    oracle = Oracle(few)
    products = Products.fastest(inputs.hidden.detach(), inputs.weight.detach(), _plan(inputs))
    copies = [inputs, *(inputs.copy() for _ in range(_copies(inputs) - 1))]
    taking_turns = itertools.cycle(copies)
    rows = [Row(contestant.name, contestant.backend) for contestant in setup.contestants]
    runs: dict[str, Run] = {FLOOR: _floor(products, copies)}
    laps: dict[str, list[Lap]] = {FLOOR: []}
    for number, (contestant, row) in enumerate(zip(setup.contestants, rows, strict=True)):
        setup.progress(number / len(rows) / 2)
        with row.catching():
            row.check(oracle.errors(contestant), WRONG[inputs.hidden.dtype])
            few_seconds = lap(functools.partial(few.run, contestant), setup.device).both
            _refuse_the_slowest(few_seconds * len(inputs.target) / len(few.target), setup.patience.most_seconds)
            # What was compiled for few tokens need not be what one compiles for many.
            torch.compiler.reset()
            weighed = setup.weigh(row.contestant)
            row.extra_megabytes = (weighed.peak - inputs.gradient_bytes) / 1e6
            if weighed.lap.both > setup.patience.turn:
                laps[row.contestant] = [weighed.lap]
                continue
            laps[row.contestant], runs[row.contestant] = [], functools.partial(_run_next, taking_turns, contestant)
            lap(runs[row.contestant], setup.device)

    rounds = setup.patience.rounds_of(lap(runs[FLOOR], setup.device).both)
    for number in range(rounds):
        setup.progress(0.5 + number / rounds / 2)
        for name, run in runs.items():
            if number < setup.patience.rounds or sum(one.both for one in laps[name]) < setup.patience.each:
                laps[name].append(lap(run, setup.device))

    floor = Row(FLOOR)
    ours = next((row.contestant for row in rows if row.backend is not None and row.contestant in laps), None)
    for row in (floor, *rows):
        if row.contestant in laps:
            row.record(laps[row.contestant], laps[FLOOR], laps[ours] if ours else [])
    setup.progress(1.0)
    return Contest(setup.case.name, setup.shape.fields, str(products), products.flops, [floor, *rows])


def _refuse_the_slowest(seconds: float, most: float) -> None:
    if seconds > most:
        raise TimeoutError(f"left out: a run would take about {seconds:.0f} s")


def _run_next(taking_turns: Iterator[Inputs], contestant: Contestant, mark: Mark) -> object:
    return next(taking_turns).run(contestant, mark)


def _floor(products: Products, copies: list[Inputs]) -> Run:
    taking_turns = itertools.cycle(
        dataclasses.replace(products, hidden_TD=copy.hidden.detach(), weight_VD=copy.weight.detach()) for copy in copies
    )
    return lambda mark: next(taking_turns)()


def _copies(inputs: Inputs) -> int:
    """So many that none is in the cache any more when it has its next turn."""
    size, cache = inputs.hidden.nbytes + inputs.weight.nbytes, cache_bytes(inputs.hidden.device.type)
    return 1 if size > cache else 2 + cache // size


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
        if inputs.case.operator != "cringe":
            self.expected = self.exact.run(Contestant("float64", eager_logprob, preference=preferences(eager_logprob)))

    def errors(self, contestant: Contestant) -> dict[str, float]:
        """Relative root mean square errors of a contestant's values and gradients. For Cringe, of those that follow
        from the candidates it drew, and by how much these fall short of the k-th largest logit."""
        found, expected = self.inputs.run(contestant), self.expected
        errors = {}
        if self.inputs.case.operator == "cringe":
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

        return self.exact.run(Contestant("float64", eager_logprob, cringe))[:-1]

    def _shortfall(self, positive: Tensor) -> float:
        hidden, weight, target = (t.detach() for t in (self.exact.hidden, self.exact.weight, self.exact.target))
        others = (hidden @ weight.T).scatter_(1, target[:, None], -torch.inf)
        smallest, drawn = others.topk(CRINGE_K).values[:, -1], others.gather(1, positive[:, None])[:, 0]
        return _rms_error(torch.minimum(drawn, smallest), smallest)


def _rms_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
