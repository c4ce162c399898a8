"""What is measured: four things to do with a head, and the time and memory that this project wants to do them in."""

from __future__ import annotations

from dataclasses import dataclass

from fastd2o.ops.plan import Algorithm

CRINGE_K = 5  # candidates of the case "cringe"


@dataclass(frozen=True)
class Target:
    """At most this many times the bare matrix products, and this much memory beyond inputs, results and gradients."""

    over_products: float
    megabytes: float


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: in results and tables.
        title: in a table's head.
        algorithm: what FastD2O does, and so which matrix products every contestant is compared with.
        leaves: what needs a gradient, among "hidden" and "weight".
        targets: by device.
    """

    name: str
    title: str
    algorithm: Algorithm
    leaves: tuple[str, ...]
    targets: dict[str, Target]


# On CUDA the targets are shares of the matrix products' rate: 0.90 forward, 0.88 with gradients.
CASES = {
    case.name: case
    for case in (
        Case("forward", "forward only", "forward", (), {"cpu": Target(1.10, 64), "cuda": Target(1 / 0.90, 256)}),
        Case("frozen", "frozen head", "unit", ("hidden",), {"cpu": Target(1.10, 150), "cuda": Target(1 / 0.88, 256)}),
        Case(
            "trained",
            "trained head",
            "recompute",
            ("hidden", "weight"),
            {"cpu": Target(1.10, 150), "cuda": Target(1 / 0.88, 256)},
        ),
        Case("cringe", f"Cringe, k = {CRINGE_K}", "cringe", ("hidden",), {"cpu": Target(1.15, 64)}),
    )
}

# How many times a peer's time FastD2O's must go into it, for log-probabilities.
TIMES_FASTER = {
    "cpu": {"trl chunked": 5.0, "liger": 5.0, "torch chunked": 5.0, "cut-cross-entropy": 1.0},
    "cuda": {},
}
