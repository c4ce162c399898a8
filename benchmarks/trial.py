"""Tries a contestant before anything is timed: is it right, is it worth while, and what does it allocate?"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import CASES, CRINGE_K, Shape
from .contest import WRONG, Inputs, Trial
from .contestants import Contestant, eager_logprob, load, preferences
from .instruments import lap, peak
from .results import within

# At full size the last tokens are compared as well: an index that has overflowed is wrong there.
_LAST_TOKENS = 64


def of_contestant(case: str, shape: Shape, device: str, contestant: str, most_seconds: float) -> Trial:
    """Of a contestant of :func:`benchmarks.contestants.load`."""
    return _judge(case, shape, device)(_chosen(device, shape.dtype, contestant), most_seconds)


class Judge:
    """Tries contestants at one case and shape."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.few = inputs, inputs.few()
        self.oracle = Oracle(self.few)

    def __call__(self, contestant: Contestant, most_seconds: float) -> Trial:
        """Errors; and memory, unless they are beyond bounds or a run would take more than so many seconds."""
        inputs, device = self.inputs, self.inputs.hidden.device.type
        errors = self.oracle.errors(contestant)
        seconds = self._seconds(contestant, most_seconds)
        if not within(errors, WRONG[inputs.hidden.dtype]) or seconds > most_seconds:
            return Trial(errors, seconds)
        # What was compiled for few tokens need not be what one compiles for many.
        torch.compiler.reset()
        found: list[Tensor] = []
        bytes_at_peak = peak(lambda: found.extend(inputs.run(contestant)), device)
        if inputs.case.operator == "logprob":
            errors["last_values"] = rms_error(found[0][-_LAST_TOKENS:], self._last_values())
        return Trial(errors, seconds, bytes_at_peak)

    def _seconds(self, contestant: Contestant, most_seconds: float) -> float:
        """Of a run at full size, about: no more than in proportion to its tokens. While that is too much, twice as many
        are tried, and what a call costs anyway is told from what each token costs; some cut many tokens up more
        coarsely than few. What takes more than a quarter of that time is not tried with more."""
        device = self.inputs.hidden.device.type
        tokens, some = len(self.inputs.target), len(self.few.target)
        measured = lap(functools.partial(self.few.run, contestant), device).both
        seconds = measured * tokens / some
        while seconds > most_seconds and some < tokens and 4 * measured <= most_seconds:
            before, fewer = measured, some
            some = min(2 * some, tokens)
            run = functools.partial(self.inputs.few(some).run, contestant)
            lap(run, device)  # may compile for this many
            measured = lap(run, device).both
            seconds = measured + max(0.0, measured - before) / (some - fewer) * (tokens - some)
        return seconds

    def _last_values(self) -> Tensor:
        hidden, target = self.inputs.hidden.detach()[-_LAST_TOKENS:], self.inputs.target[-_LAST_TOKENS:]
        return eager_logprob(hidden.double(), self.oracle.exact.weight.detach(), target)


# One contest after the other, and one contestant after the other within each.
@functools.lru_cache(maxsize=1)
def _judge(case: str, shape: Shape, device: str) -> Judge:
    return Judge(Inputs.random(CASES[case], shape, device))


@functools.lru_cache
def _chosen(device: str, dtype: str, contestant: str) -> Contestant:
    present, _ = load(device, getattr(torch, dtype), [contestant])
    return next(one for one in present if one.name == contestant)


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
            **{name: rms_error(ours, exact) for name, ours, exact in zip(names, found, expected, strict=True)},
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
        return rms_error(torch.minimum(drawn, smallest), smallest)


def rms_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
