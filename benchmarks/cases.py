"""What is measured: things to do with a head, and the time and memory that this project wants to do them in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastd2o.ops.plan import Algorithm

CRINGE_K = 5  # candidates of Cringe
SEQUENCES = 16  # of a preference loss, whatever their length
POSITIVES = {"dpo": 1, "d2o": 3}  # of a group, beside its negative
BETA = 0.1  # of DPO and D2O, and D2O's alpha

Operator = Literal["logprob", "cringe", "dpo", "d2o"]


@dataclass(frozen=True)
class Target:
    """At most this many times the bare matrix products, and this much memory beyond inputs, results and gradients."""

    over_products: float
    megabytes: float


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: in results and on the command line.
        title: in a table's head.
        operator: what is computed.
        algorithm: what FastD2O does, and so which matrix products every contestant is compared with.
        leaves: what needs a gradient, among "hidden" and "weight".
        targets: by device.
    """

    name: str
    title: str
    operator: Operator
    algorithm: Algorithm
    leaves: tuple[str, ...]
    targets: dict[str, Target]


@dataclass(frozen=True)
class Shape:
    """hidden [tokens, hidden], weight [vocab, hidden], both of a dtype that goes by its name in torch."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str

    def __str__(self) -> str:
        return f"t{self.tokens}-d{self.hidden}-v{self.vocab}-{self.dtype}"

    @property
    def fields(self) -> dict[str, Any]:
        """As results keep it."""
        return asdict(self)


_BOTH = ("hidden", "weight")

# On CUDA the targets are shares of the matrix products' rate: 0.90 forward, 0.88 with gradients.
CASES = {
    case.name: case
    for case in (
        Case(
            "forward",
            "forward only",
            "logprob",
            "forward",
            (),
            {"cpu": Target(1.10, 64), "cuda": Target(1 / 0.90, 256)},
        ),
        Case(
            "frozen",
            "frozen head",
            "logprob",
            "unit",
            ("hidden",),
            {"cpu": Target(1.10, 150), "cuda": Target(1 / 0.88, 256)},
        ),
        Case(
            "trained",
            "trained head",
            "logprob",
            "recompute",
            _BOTH,
            {"cpu": Target(1.10, 150), "cuda": Target(1 / 0.88, 256)},
        ),
        Case("cringe", f"Cringe, k = {CRINGE_K}", "cringe", "cringe", ("hidden",), {"cpu": Target(1.15, 64)}),
        Case("dpo", "DPO, trained head", "dpo", "grouped", _BOTH, {}),
        Case("d2o", f"D2O, K = {POSITIVES['d2o']}, trained head", "d2o", "grouped", _BOTH, {}),
    )
}

# Those of the first use, which have targets.
OF_TOKENS = tuple(case.name for case in CASES.values() if case.targets)

# At these, and no others, targets are held.
TARGET_SHAPES = {
    "cpu": [
        Shape(tokens, 1024, vocab, dtype)
        for dtype in ("bfloat16", "float32")
        for vocab in (32000, 128256)
        for tokens in (64, 2048, 16384)
    ],
    "cuda": [
        Shape(8192, 4096, 128256, "bfloat16"),
        Shape(8192, 4096, 151936, "bfloat16"),
        Shape(2048, 2048, 128256, "bfloat16"),
    ],
}

# How many times a peer's time FastD2O's must go into it, for log-probabilities.
TIMES_FASTER = {
    "cpu": {"trl chunked": 5.0, "liger": 5.0, "torch chunked": 5.0, "cut-cross-entropy": 1.0},
    "cuda": {},
}
