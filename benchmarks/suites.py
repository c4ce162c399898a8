"""Which contests a run holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .cases import CASES, OF_TOKENS, POSITIVES, TARGET_SHAPES, Shape
from .race import Patience
from .steps import STEPS, StepShape

_LOSSES = tuple(POSITIVES)
_LOGPROB = ("forward", "frozen", "trained")


@dataclass(frozen=True)
class Suite:
    """A named set of contests.

    Attributes:
        contests: cases and shapes, in order.
        steps: training steps, by name, and their shapes.
        patience: how long to measure each.
        peer_tokens: with more tokens than this FastD2O's own kernels are alone; None for no limit.
    """

    contests: Sequence[tuple[str, Shape]]
    steps: Sequence[tuple[str, StepShape]] = ()
    patience: Patience = field(default_factory=Patience)
    peer_tokens: int | None = None


def _all(
    cases: Iterable[str],
    tokens: Iterable[int],
    hidden: Iterable[int],
    vocab: Iterable[int],
    dtypes: Iterable[str],
) -> list[tuple[str, Shape]]:
    shapes = itertools.product(dtypes, vocab, hidden, tokens)
    return [
        (case, Shape(of_tokens, of_hidden, of_vocab, dtype))
        for dtype, of_vocab, of_hidden, of_tokens in shapes
        for case in cases
    ]


_DTYPES = ("bfloat16", "float32")
_SMALL, _LARGE = 32000, 128256

SUITES: dict[str, dict[str, Suite]] = {
    "cpu": {
        "quick": Suite(  # small shapes: two minutes on two cores, with the peers that make bench installs
            _all((*OF_TOKENS, *_LOSSES), [256], [256], [_SMALL], ["bfloat16"]),
            [
                (name, StepShape(completion=64, hidden=128, layers=2, vocab=_SMALL, budget=0))
                for name in ("step-d2o", "step-dpo")
            ],
            Patience(rounds=4, most_rounds=8, seconds=0.2, each=0.6, turn=0.6),
        ),
        "default": Suite(  # a large vocabulary in bfloat16, and training steps: a quarter of an hour on two cores
            _all((*OF_TOKENS, *_LOSSES), [512], [512], [_LARGE], ["bfloat16"]),
            [(name, StepShape(completion=64, hidden=256, layers=2, vocab=_LARGE)) for name in STEPS],
            Patience(rounds=5, most_rounds=15, seconds=2, each=6, turn=2, most_seconds=20),
        ),
        "full": Suite(  # 256 to 16384 tokens, four vocabularies, two dtypes, all peers: hours on two cores
            [
                *_all(("frozen", "trained"), [256, 1024], [256], [_SMALL, _LARGE], _DTYPES),
                *_all(_LOSSES, [1024], [256], [_SMALL, _LARGE], _DTYPES),
                *_all(("forward", "cringe"), [1024], [256], [_SMALL, _LARGE], ["bfloat16"]),
                *_all(("frozen", "trained"), [1024], [256], [64000, 256000], ["bfloat16"]),
                *_all(("frozen", "trained"), [16384], [256], [_SMALL], _DTYPES),
                # The longest last.
                *_all(("frozen", "trained"), [16384], [256], [_LARGE], _DTYPES),
            ],
            [(name, StepShape(completion=64, hidden=256, layers=2, vocab=_LARGE)) for name in STEPS],
            Patience(rounds=4, most_rounds=9, seconds=1, each=5, turn=8, most_seconds=60),
        ),
        "targets": Suite(  # the shapes that this project has targets for: an hour and more
            [(case, shape) for shape in TARGET_SHAPES["cpu"] for case in OF_TOKENS],
            patience=Patience(rounds=5, most_rounds=15, seconds=3, each=40, turn=12, most_seconds=120),
            peer_tokens=2048,
        ),
    },
    "cuda": {
        "quick": Suite(  # one small shape
            _all(tuple(CASES), [2048], [2048], [_SMALL], ["bfloat16"]),
            [(name, StepShape(completion=256, hidden=512, layers=2, vocab=_SMALL, budget=0)) for name in STEPS],
            Patience(rounds=5, seconds=0.5, turn=5),
        ),
        "default": Suite(  # all that has targets there, losses and training steps: a quarter of an hour
            [
                *((case, shape) for shape in TARGET_SHAPES["cuda"] for case in OF_TOKENS),
                *_all(_LOSSES, [8192], [4096], [_LARGE], ["bfloat16"]),
            ],
            [(name, StepShape(completion=512, hidden=2048, layers=4, vocab=_LARGE, budget=4e9)) for name in STEPS],
            Patience(rounds=5, most_rounds=25, seconds=1, turn=10),
        ),
        "full": Suite(  # 1024 to 32768 tokens, vocabularies from 32000 to 256000, two dtypes, all peers
            [
                *_all(_LOGPROB, [1024, 4096, 16384, 32768], [4096], [_SMALL, _LARGE], ["bfloat16", "float16"]),
                *_all(("cringe", *_LOSSES), [8192], [4096], [_SMALL, _LARGE], ["bfloat16"]),
                *_all(_LOGPROB, [8192], [4096], [16000, 64000, 256000], ["bfloat16"]),
            ],
            [
                (name, StepShape(completion=512, hidden=2048, layers=4, vocab=vocab, budget=4e9))
                for vocab in (_SMALL, _LARGE)
                for name in STEPS
            ],
            Patience(rounds=5, most_rounds=25, seconds=1, turn=10),
        ),
        "targets": Suite(  # the shapes that this project has targets for, Cringe at the first alone: two minutes
            [
                (case, shape)
                for shape in TARGET_SHAPES["cuda"]
                for case in (OF_TOKENS if shape == TARGET_SHAPES["cuda"][0] else _LOGPROB)
            ],
            patience=Patience(rounds=5, most_rounds=10, seconds=2, each=2, turn=1, most_seconds=20),
        ),
    },
}
SUITE_NAMES = tuple(SUITES["cpu"])


def choose(
    device: str,
    name: str,
    cases: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    vocab: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Suite:
    """The suite of that name. With cases alone, those of its contests. With shapes, all combinations of them and of the
    cases, or of all cases but steps; what is not given is as in the default suite."""
    suite = SUITES[device][name]
    if not any((tokens, hidden, vocab, dtypes)):
        if not cases:
            return suite
        contests = [(case, shape) for case, shape in suite.contests if case in cases]
        return replace(suite, contests=contests, steps=[(case, shape) for case, shape in suite.steps if case in cases])
    usual = SUITES[device]["default"].contests[0][1]
    steps = dict(SUITES[device]["default"].steps)
    wanted = cases or tuple(CASES)
    contests = _all(
        [case for case in wanted if case in CASES],
        tokens or [usual.tokens],
        hidden or [usual.hidden],
        vocab or [usual.vocab],
        dtypes or [usual.dtype],
    )
    steps_of = [
        (case, replace(steps[case], hidden=of_hidden, vocab=of_vocab, completion=completion))
        for case in wanted
        if case in steps
        for of_vocab in vocab or [steps[case].vocab]
        for of_hidden in hidden or [steps[case].hidden]
        for completion in tokens or [steps[case].completion]
    ]
    return replace(suite, contests=contests, steps=steps_of)
