"""The benchmark runs, its arithmetic is right, and the README shows what was recorded. Nothing here asserts a time."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastd2o
from benchmarks import every_kernel, logprob, preference, readme, step
from benchmarks.cases import CASES
from benchmarks.contestants import Contestant, load
from benchmarks.measure import Inputs, enough_rounds, measure
from benchmarks.products import Products
from benchmarks.results import FLOOR, FOLDER, Result, Row, Verdict, median_ratio, verdicts
from fastd2o.ops import Plan

(EAGER,), _ = load("cpu", torch.float32, skip=["fastd2o", "cut", "liger", "trl", "torch"])


def inputs(case: str, tokens: int = 7) -> Inputs:
    return Inputs.random(CASES[case], tokens, hidden_size=8, vocab_size=50, dtype=torch.float32, device="cpu")


@pytest.fixture
def allocator_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a benchmark can see, which would start itself anew otherwise."""
    for name, value in preference.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("allocator_keeps_memory")
def test_a_preference_loss_from_command_line_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preference.main(["--tokens", "512", "--hidden", "16", "--vocab", "200", "--rounds", "1", "--out", str(tmp_path)])
    result = Result.read(tmp_path / "cpu-t512-d16-v200-bfloat16-preference.json")
    rows = {row.contestant: row for row in result.rows}
    assert rows[FLOOR].over_products == rows["recompute"].over_fastd2o == 1.0
    assert "6 T·D·V" in result.floors["preference"]
    assert rows["grouped, half saturated"].errors.keys() == {"backward_over_unsaturated"}
    assert all(row.extra_megabytes is not None for name, row in rows.items() if name != FLOOR)
    assert "backward ≤ 0.60" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        preference.main(["--tokens", "100"])


@pytest.mark.usefixtures("allocator_keeps_memory")
def test_a_step_from_command_line_to_file(tmp_path: Path) -> None:
    """Three ways to a log-probability have one loss."""
    pytest.importorskip("trl")
    small = [
        "--positives",
        "2",
        "--completion",
        "6",
        "--prompt",
        "3",
        "--hidden",
        "64",
        "--layers",
        "1",
        "--vocab",
        "300",
    ]
    step.main([*small, "--rounds", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu-k2-v300.json").read_text())["rows"]
    assert [(row["training"], row["contestant"]) for row in rows] == [
        (training, name) for training in ("full", "LoRA") for name in ("fastd2o", "eager", "trl chunked")
    ]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2) for row in rows)


def test_a_run_from_command_line_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--tokens", "5", "6", "--hidden", "16", "--vocab", "90", "--peer-tokens", "5"]
    logprob.main([*shape, "--skip", "trl", "liger", "cut", "--rounds", "1", "--out", str(tmp_path)])
    small, large = (Result.read(tmp_path / f"cpu-t{tokens}-d16-v90-bfloat16.json") for tokens in (5, 6))
    assert small.shape == {"tokens": 5, "hidden": 16, "vocab": 90, "dtype": "bfloat16"}
    assert set(small.floors) == {row.case for row in small.rows} == set(CASES)
    native = {"fastd2o cpu"} if fastd2o.backends()["cpu"] is None else set()
    assert {row.contestant for row in small.rows} >= native | {FLOOR, "fastd2o torch", "eager"}
    assert {row.contestant for row in large.rows} == native | {FLOOR}
    assert large.absent["eager"] == "left out beyond 5 tokens"
    assert small.absent["trl chunked"] == "skipped"
    for row in small.rows:
        assert row.error is None, row
        assert row.seconds is not None
        assert row.min is not None
        assert row.max is not None
        assert 0 < row.min <= row.seconds <= row.max
        if row.contestant == FLOOR:
            assert (row.over_products, row.extra_megabytes) == (1.0, None)
        else:
            gradients = {f"{name}_gradient" for name in CASES[row.case].leaves}
            assert set(row.errors) - {"candidate"} == {"value"} | gradients
            assert row.extra_megabytes is not None
            assert 0 < row.extra_megabytes < 1
    assert small.write(tmp_path / "again").read_text() == (tmp_path / f"{small.name}.json").read_text()
    printed = capsys.readouterr().out
    assert "time targets" in printed or not native


def test_a_part_of_the_cases_has_a_file_of_its_own(tmp_path: Path) -> None:
    options = "--tokens 3 --hidden 8 --vocab 40 --cases cringe --skip fastd2o trl --out"
    logprob.main([*options.split(), str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-t3-d8-v40-bfloat16-cringe.json"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [(7, 50), (7, 16), (4, 16)])
def test_the_floor_does_the_products_of_the_algorithm(case: str, tile: tuple[int, int]) -> None:
    of_case = inputs(case)
    hidden, weight = of_case.hidden.detach(), of_case.weight.detach()
    algorithm = CASES[case].algorithm
    plan = Plan.choose(tokens=7, hidden_size=8, vocab_size=50, algorithm=algorithm, dtype=torch.float32, device="cpu")
    products = Products.of(hidden, weight, algorithm, *tile)
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == plan.flops
    assert f"{plan.flops / 1e12:.3g} TFLOP" in str(products)


@pytest.mark.parametrize("case", CASES)
def test_fastd2o_does_what_its_case_says(case: str) -> None:
    of_case = inputs(case)
    with torch.set_grad_enabled(bool(of_case.leaves)):
        plan = Plan.of(of_case.hidden, of_case.weight, cringe=case == "cringe")
    assert plan.algorithm == CASES[case].algorithm


@pytest.mark.parametrize(("name", "module"), [("quack", "quack"), ("flash-attn", "flash_attn")])
def test_a_peer_for_cuda_says_why_it_is_absent(name: str, module: str) -> None:
    others = ["fastd2o", "cut", "liger", "trl", "torch"]
    _, absent = load("cpu", torch.float32, others)
    assert absent[name] == "its kernels run on cuda, not on cpu"
    if importlib.util.find_spec(module) is None:
        _, absent = load("cuda", torch.bfloat16, others)
        assert absent[name] == f"No module named '{module}'"


def test_one_that_fails_or_is_wrong_is_marked_and_the_others_go_on() -> None:
    def fails(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this device")

    def wrong(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return EAGER.logprob(hidden, weight, target) * 1.01

    def wrong_gradient(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return EAGER.logprob(hidden.detach() * 2 - hidden, weight, target)

    def not_a_number(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return EAGER.logprob(hidden, weight, target) * math.nan

    contestants = [Contestant(f.__name__, f) for f in (fails, wrong, wrong_gradient, not_a_number)]
    _, rows = measure(inputs("frozen"), [*contestants, EAGER], rounds=2, patience=math.inf)
    found = {row.contestant: row for row in rows}
    assert found["fails"].error == "RuntimeError: no kernel for this device"
    for name in ("wrong", "wrong_gradient", "not_a_number"):
        assert found[name].error == "wrong: beyond 0.001 of float64", name
        assert found[name].seconds is None
    assert found["eager"].error is None
    assert found["eager"].rounds == found[FLOOR].rounds >= 2


def test_one_that_takes_too_long_runs_but_once() -> None:
    calls: list[int] = []

    def slow(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        calls.append(len(hidden))
        return EAGER.logprob(hidden, weight, target)

    _, (floor, row) = measure(inputs("frozen", tokens=300), [Contestant("slow", slow)], rounds=2, patience=0.0)
    assert calls == [256, 300]  # compared with float64, timed
    assert (row.rounds, row.extra_megabytes) == (1, None)
    assert row.seconds is not None
    assert floor.seconds is not None
    assert row.over_products == pytest.approx(row.seconds / floor.seconds)


def test_cringe_with_a_candidate_that_is_none_is_wrong() -> None:
    def smallest(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        positive = logits.argmin(1)
        negative_logit, positive_logit = (logits.gather(1, column[:, None])[:, 0] for column in (target, positive))
        return torch.nn.functional.softplus(negative_logit - positive_logit), positive

    _, rows = measure(inputs("cringe"), [Contestant("smallest", EAGER.logprob, smallest), EAGER], 1, patience=math.inf)
    assert {row.contestant: row.error is None for row in rows} == {FLOOR: True, "smallest": False, "eager": True}
    assert rows[1].errors["value"] < 1e-5 < rows[1].errors["candidate"]


def test_every_kernel_is_called() -> None:
    if fastd2o.backends()["cpu"] is not None:
        pytest.skip("no native kernels here")
    every_kernel.main(["--device", "cpu"])


def test_shapes() -> None:
    assert logprob.shapes(logprob.parse([])) == [(2048, 1024, 128256, "bfloat16")]
    assert logprob.shapes(logprob.parse(["--device", "cuda"])) == [(8192, 4096, 128256, "bfloat16")]
    suite = logprob.shapes(logprob.parse(["--suite"]))
    assert len(set(suite)) == 12
    assert {tokens for tokens, *_ in suite} == {64, 2048, 16384}
    narrowed = logprob.shapes(logprob.parse(["--suite", "--tokens", "64", "--dtype", "float32"]))
    assert narrowed == [(64, 1024, 32000, "float32"), (64, 1024, 128256, "float32")]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    row = Row("forward", "eager")
    row.record([3.0, 8.0, 50.0], floor=[1.0, 4.0, 10.0], ours=[3.0, 4.0, 100.0])
    assert (row.rounds, row.seconds, row.min, row.max) == (3, 8.0, 3.0, 50.0)
    assert row.over_products == 3.0  # the median of 3, 2 and 5
    assert row.over_fastd2o == 1.0  # of 1, 2 and 0.5
    row.record([12.0], floor=[1.0, 4.0, 10.0], ours=[])
    assert (row.rounds, row.over_products, row.over_fastd2o) == (1, 3.0, None)
    assert median_ratio([2.0, 2.0], [1.0, 2.0]) == 1.5


def test_short_rounds_are_repeated() -> None:
    assert enough_rounds(0.5, least=3) == 6
    assert enough_rounds(20.0, least=3) == 3
    assert enough_rounds(1e-5, least=3) == 25


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (Row("forward", "fastd2o cpu", "cpu", over_products=1.10, extra_megabytes=64.0), "cpu", [True, True]),
        (Row("forward", "fastd2o cpu", "cpu", over_products=1.11, extra_megabytes=64.1), "cpu", [False, False]),
        (Row("frozen", "fastd2o cpu", "cpu", over_products=1.10, extra_megabytes=150.0), "cpu", [True, True]),
        (Row("trained", "fastd2o cpu", "cpu", over_products=1.11, extra_megabytes=150.0), "cpu", [False, True]),
        (Row("cringe", "fastd2o cpu", "cpu", over_products=1.15, extra_megabytes=65.0), "cpu", [True, False]),
        (Row("cringe", "fastd2o cpu", "cpu", error="RuntimeError: gone"), "cpu", [False]),
        (Row("forward", "fastd2o torch", "torch", over_products=9.0), "cpu", []),
        (Row("forward", "fastd2o cuda", "cuda", over_products=1.11, extra_megabytes=256.0), "cuda", [True, True]),
        (Row("forward", "fastd2o cuda", "cuda", over_products=1.12, extra_megabytes=257.0), "cuda", [False, False]),
        (Row("trained", "fastd2o cuda", "cuda", over_products=1.13, extra_megabytes=0.0), "cuda", [True, True]),
        (Row("trained", "fastd2o cuda", "cuda", over_products=1.14, extra_megabytes=0.0), "cuda", [False, True]),
        (Row("trained", "trl chunked", over_fastd2o=5.0), "cpu", [True]),
        (Row("trained", "liger", over_fastd2o=4.9), "cpu", [False]),
        (Row("frozen", "torch chunked", over_fastd2o=4.9), "cpu", [False]),
        (Row("frozen", "cut-cross-entropy", over_fastd2o=1.01), "cpu", [True]),
        (Row("frozen", "cut-cross-entropy", over_fastd2o=0.99), "cpu", [False]),
        (Row("frozen", "cut-cross-entropy", error="ImportError"), "cpu", []),
        (Row("frozen", "trl chunked", over_fastd2o=1.0), "cuda", []),
        (Row("frozen", "eager", over_fastd2o=0.5), "cpu", []),
        (Row("frozen", FLOOR, over_products=1.0), "cpu", []),
    ],
)
def test_targets(row: Row, kind: str, expected: list[bool]) -> None:
    assert [verdict.met for verdict in verdicts(row, kind)] == expected


def test_a_verdict_says_what_was_wanted() -> None:
    row = Row("cringe", "fastd2o cpu", "cpu", over_products=1.2, extra_megabytes=1.0)
    assert verdicts(row, "cpu") == [Verdict("time", "≤ 1.15", False), Verdict("memory", "≤ 64 MB", True)]


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_shows_what_was_recorded() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.updated(text, readme.results(FOLDER)), "python -m benchmarks.readme writes it"


def test_tables() -> None:
    result = Result(
        machine={"kind": "cpu", "device": "A CPU", "threads": 2, "torch": "2.13", "date": "2026-01-01"},
        shape={"tokens": 2048, "hidden": 1024, "vocab": 128256, "dtype": "bfloat16"},
        rows=[
            *(Row(case, FLOOR, seconds=1.234, over_products=1.0) for case in CASES),
            Row("forward", "fastd2o cpu", "cpu", over_products=1.049, extra_megabytes=25.6),
            Row("frozen", "fastd2o cpu", "cpu", error="RuntimeError"),
            Row("forward", "eager", over_products=12.3, extra_megabytes=3148.0),
        ],
    )
    text = readme.updated(f"before\n{readme.BEGIN} stale {readme.END}\nafter", [result])
    assert text.startswith(f"before\n{readme.BEGIN}\n\nA CPU, 2 threads, torch 2.13, 2026-01-01: 2048 tokens")
    assert text.endswith(f"|\n\n{readme.END}\nafter")
    assert "stale" not in text
    assert "| matrix products alone | 1.2 s | 1.2 s | 1.2 s | 1.2 s |" in text
    assert "| **FastD2O**, `cpu` | **1.05** · 26 MB | failed |  |  |" in text
    assert "| eager: logits, then log-softmax in float32 | 12 · 3,148 MB |  |  |  |" in text
    assert "| bfloat16 | 128256 | 2048 | 1.05 · 26 MB | failed |  |  |" in text
    result.shape["tokens"] = 64  # not the shape for which all contestants are shown
    assert "eager" not in readme.tables([result])
