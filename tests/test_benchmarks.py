"""The benchmark runs, its arithmetic is right, and the README shows what was recorded. Nothing here asserts a time."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import operator
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastd2o
from benchmarks import every_kernel, figures, plots, preference, steps
from benchmarks.cases import CASES, POSITIVES, Shape
from benchmarks.compare import compare
from benchmarks.contest import Inputs, Setup, Trial, hold
from benchmarks.contestants import Contestant, load, peer
from benchmarks.instruments import Lap, cache_bytes
from benchmarks.products import Products
from benchmarks.race import Patience
from benchmarks.results import FLOOR, Contest, Report, Row, TriedError, Verdict, median_ratio, verdicts
from benchmarks.scale import Scale
from benchmarks.steps import STEPS, StepShape
from benchmarks.suites import SUITE_NAMES, SUITES, choose
from benchmarks.trial import Judge
from fastd2o.cli import bench as cli
from fastd2o.cli import main
from fastd2o.ops import Plan

EAGER = peer("eager")

SMALL = Shape(tokens=16, hidden=8, vocab=50, dtype="float32")
QUICK = Patience(rounds=2, most_rounds=3, seconds=0.01)


@pytest.fixture
def allocator_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a benchmark can see, which would start itself anew otherwise."""
    for name, value in preference.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("allocator_keeps_memory")
def test_a_preference_loss_from_command_line_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preference.main(["--tokens", "512", "--hidden", "16", "--vocab", "200", "--rounds", "1", "--out", str(tmp_path)])
    (contest,) = Report.read(tmp_path / "cpu-preference.json").contests
    rows = {row.contestant: row for row in contest.rows}
    assert rows[FLOOR].over_products == rows["recompute"].over_fastd2o == 1.0
    assert "6 T·D·V" in contest.floor
    assert rows["grouped, half saturated"].errors.keys() == {"backward_over_unsaturated"}
    assert all(row.extra_megabytes is not None for name, row in rows.items() if name != FLOOR)
    assert "grouped: backward with half of the groups saturated " in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        preference.main(["--tokens", "100"])


def test_a_run_from_command_line_to_files(tmp_path: Path) -> None:
    """Figures beside those that were there, a page, pictures, and pytest-benchmark's own JSON with the same times."""
    shape = ["--tokens", "16", "--hidden", "16", "--vocab", "90", "--cases", "trained", "cringe", "dpo", "d2o"]
    earlier = report_of().contests[0]
    Report({"kind": "cpu"}, [earlier]).write(tmp_path / "results.json")
    # In a process of its own, as its limits on memory and pytest's settings are of a process.
    command = [sys.executable, "-m", "fastd2o", "bench", *shape, "--peers", "none", "--out", str(tmp_path), "--append"]
    # pytest-benchmark would take it for a part of a distributed run if it saw the variables of this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(
        [*command, "--only", "not float32"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert found.returncode == 0, found.stderr
    report = Report.read(tmp_path / "results.json")
    before, *contests = report.contests
    assert before.key == earlier.key
    assert [contest.case for contest in contests] == ["trained", "cringe", "dpo", "d2o"]
    seen = json.loads((tmp_path / "pytest-benchmark.json").read_text())["benchmarks"]
    of_theirs = {(each["group"], each["params"]["contestant"]): each["stats"]["data"] for each in seen}
    native = ["fastd2o cpu"] if fastd2o.backends()["cpu"] is None else []
    for contest in contests:
        assert contest.shape == {"tokens": 16, "hidden": 16, "vocab": 90, "dtype": "bfloat16"}
        keeping = [f"{name}, 1 GB" for name in native if contest.case == "trained"]
        assert [row.contestant for row in contest.rows] == [FLOOR, *native, *keeping, "fastd2o torch"]
        for row in contest.rows:
            assert row.error is None, row
            assert row.seconds is not None
            assert row.min is not None
            assert row.max is not None
            assert 0 < row.min <= row.seconds <= row.max
            assert len(row.times) == row.rounds >= 5
            assert row.forward is not None
            assert row.backward is not None
            if row.contestant == FLOOR:
                assert (row.over_products, row.extra_megabytes, row.backward) == (1.0, None, 0.0)
            else:
                gradients = {f"{name}_gradient" for name in CASES[contest.case].leaves}
                assert set(row.errors) - {"candidate", "last_values"} == {"value"} | gradients
                assert min(row.forward, row.backward) > 0
                assert row.extra_megabytes is not None
                assert 0 < row.extra_megabytes < 1
            assert of_theirs[contest.key, row.contestant] == pytest.approx(row.times, rel=1e-4)
    assert len(of_theirs) == sum(len(contest.rows) for contest in contests)
    page = (tmp_path / "results.md").read_text()
    assert "## trained head: 16 tokens, D 16, vocabulary 90, bfloat16" in page
    assert "absent: eager (not asked for)" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"error-against-speed.png", "share-of-the-products.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "liker"], "there is no peer 'liker'"),
        (["--tokens", "0"], "--tokens 0 is below 1. Fix: positive"),
        (["--cases", "forwards"], "invalid choice: 'forwards'"),
        (["--quick", "--full"], "not allowed with argument"),
        (["compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["--gpu", "compare", "a.json", "b.json"], "compare measures nothing, and --gpu"),
        (["--tokens", "100"], "--tokens 100 is not a multiple of 16, the sequences that dpo and d2o share"),
        (["--cases", "cringe", "--vocab", "5"], "--vocab 5 is too small for cringe"),
        (
            ["--cases", "step-dpo", "--hidden", "200"],
            "--hidden 200 is not a multiple of 64, the size of a head of attention in step-dpo. Fix: --hidden 256",
        ),
        (["--cases", "step-dpo", "--dtype", "float32"], "--dtype does not apply to step-dpo"),
        (["--peers", "none", "liger"], "--peers has none and a peer"),
        (["--out", "here", "compare", "a.json", "b.json"], "compare measures nothing, and --out"),
        (["--targets", "--cases", "dpo"], "the suite targets has no dpo"),
        (["--quick", "--only", "nobody"], "no contest has 'nobody' in its name. Fix: "),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_the_command_line_knows_all_cases() -> None:
    assert (*CASES, *STEPS) == cli._CASES


def test_a_training_step_has_the_same_gradient_whoever_computes_log_p(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    shape = StepShape(completion=6, hidden=64, layers=1, vocab=300, prompt=3, budget=6e6)
    scale = Scale("cuda")  # in this process
    contest = steps.measure("step-d2o", shape, "cpu", list(steps.CONTESTANTS), QUICK, scale, lambda share: None)
    assert [row.contestant for row in contest.rows] == ["fastd2o", "eager", "trl chunked"]
    for row in contest.rows:
        assert row.error is None
        assert row.errors["gradient"] < 0.05
        assert row.extra_megabytes is not None
        assert row.extra_megabytes > 0
        assert row.longest is not None
        assert row.longest >= 8
    shorter = replace(shape, budget=4e5)
    assert steps.longest("step-d2o", shorter, "cpu", "eager") < contest.rows[1].longest  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [(16, 50), (16, 16), (7, 16)])
def test_the_floor_does_the_products_of_the_algorithm(case: str, tile: tuple[int, int]) -> None:
    of_case = Inputs.random(CASES[case], SMALL, "cpu")
    hidden, weight = of_case.hidden.detach(), of_case.weight.detach()
    algorithm = CASES[case].algorithm
    plan = Plan.choose(tokens=16, hidden_size=8, vocab_size=50, algorithm=algorithm, dtype=torch.float32, device="cpu")
    products = Products.of(hidden, weight, algorithm, *tile)
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == products.flops == plan.flops
    assert f"{plan.flops / 1e12:.3g} TFLOP" in str(products)


@pytest.mark.parametrize("case", CASES)
def test_fastd2o_does_what_its_case_says(case: str) -> None:
    of_case = Inputs.random(CASES[case], SMALL, "cpu")
    operator = CASES[case].operator
    with torch.set_grad_enabled(bool(of_case.leaves)):
        grouped = operator in POSITIVES
        plan = Plan.of(of_case.hidden, of_case.weight, cringe=operator == "cringe", grouped=grouped)
    assert plan.algorithm == CASES[case].algorithm


def held(of_case: Shape, case: str, contestants: list[Contestant], patience: Patience = QUICK) -> dict[str, Row]:
    """Rows of a contest whose trials are held in this process."""
    by_name = {contestant.name: contestant for contestant in contestants}
    judge = Judge(Inputs.random(CASES[case], of_case, "cpu"))

    def attempt(name: str) -> Trial:
        return judge(by_name[name], patience.most_seconds)

    setup = Setup(CASES[case], of_case, "cpu", contestants, patience, attempt)
    return {row.contestant: row for row in hold(setup).rows}


@pytest.mark.parametrize(("name", "module"), [("quack", "quack"), ("flash-attn", "flash_attn")])
def test_a_peer_for_cuda_says_why_it_is_absent(name: str, module: str) -> None:
    _, absent = load("cpu", torch.float32)
    assert absent[name] == "its kernels run on cuda, not on cpu"
    if importlib.util.find_spec(module) is None:
        _, absent = load("cuda", torch.bfloat16)
        assert absent[name] == "not installed"


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
    found = held(SMALL, "frozen", [*contestants, EAGER])
    assert found["fails"].error == "RuntimeError: no kernel for this device"
    for name, told in (("wrong", "value is off by 0.01"), ("wrong_gradient", "hidden_gradient is off by")):
        error = str(found[name].error)
        assert error.startswith(f"WrongError: {told}"), error
        assert error.endswith(", relative to float64; the bound is 0.001")
    assert "value is off by nan" in str(found["not_a_number"].error)
    assert all(found[name].seconds is None for name in ("wrong", "wrong_gradient", "not_a_number"))
    assert found["eager"].error is None
    assert found["eager"].rounds == found[FLOOR].rounds >= 2


def test_one_that_takes_too_long_runs_but_once_or_not_at_all() -> None:
    calls: list[int] = []

    def slow(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        calls.append(len(hidden))
        return EAGER.logprob(hidden, weight, target)

    shape = replace(SMALL, tokens=300)
    rows = held(shape, "frozen", [Contestant("slow", slow)], replace(QUICK, turn=0.0))
    assert calls == [64, 64, 300, 300, 300]  # compared, judged by that, weighed, warmed up, timed
    slow_row, floor = rows["slow"], rows[FLOOR]
    assert slow_row.rounds == 1
    assert slow_row.seconds is not None
    assert floor.seconds is not None
    assert slow_row.over_products == pytest.approx(slow_row.seconds / floor.seconds, rel=1e-4)
    calls.clear()
    ours = held(shape, "frozen", [Contestant("slow", slow, backend="cpu")], replace(QUICK, turn=0.0))
    assert ours["slow"].rounds == ours[FLOOR].rounds  # whom all are compared with takes its turns
    calls.clear()
    rows = held(shape, "frozen", [Contestant("slow", slow)], replace(QUICK, most_seconds=0.0))
    assert calls == [64, 64]
    assert rows["slow"].error is not None
    assert rows["slow"].error.startswith("left out: a run would take about")
    assert (rows["slow"].outcome, rows[FLOOR].outcome) == ("left out", "")


def test_what_a_call_costs_anyway_is_not_multiplied() -> None:
    calls: list[int] = []

    def slow(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        calls.append(len(hidden))
        time.sleep(0.2)
        return EAGER.logprob(hidden, weight, target)

    shape = replace(SMALL, tokens=64 * 16)
    rows = held(shape, "frozen", [Contestant("slow", slow)], replace(QUICK, most_seconds=2.0))
    assert rows["slow"].error is None
    assert 64 * 2 in calls  # it took more tokens to tell
    assert 64 * 4 not in calls


@pytest.mark.parametrize("fails_at", [4, 5, 6])
def test_one_that_fails_late_is_marked_and_the_others_go_on(fails_at: int) -> None:
    """In its warm-up, in the first round, in the second."""
    calls = itertools.count(1)

    def fails(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if next(calls) >= fails_at:
            raise RuntimeError("out of memory")
        return EAGER.logprob(hidden, weight, target)

    rows = held(SMALL, "frozen", [Contestant("fails", fails, backend="cpu"), EAGER])
    assert rows["fails"].error == "RuntimeError: out of memory"
    assert rows["fails"].seconds is None
    assert rows["eager"].rounds == rows[FLOOR].rounds >= 2


def test_an_index_that_overflows_is_seen_at_full_size() -> None:
    def overflows(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logp = EAGER.logprob(hidden, weight, target)
        return logp if len(hidden) <= 256 else torch.cat([logp[:-8], logp[:8]])

    rows = held(replace(SMALL, tokens=300), "forward", [Contestant("overflows", overflows)])
    assert "WrongError: last_values is off by" in str(rows["overflows"].error)
    assert rows["overflows"].errors["value"] < 1e-5 < rows["overflows"].errors["last_values"]


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_or_hangs_takes_nobody_along() -> None:
    scale = Scale("cpu", most_seconds=30.0)
    try:
        with pytest.raises(ChildProcessError, match="SIGABRT"):
            scale(os.abort)
        with pytest.raises(MemoryError, match="was killed"):
            scale(_killed)
        assert scale(os.getppid) == os.getpid()  # there is another one
        with pytest.raises(TriedError, match="ZeroDivisionError: float"):
            scale(operator.truediv, 1.0, 0.0)
        scale.most_seconds = 0.1
        with pytest.raises(TimeoutError, match="stopped after 0 s"):
            scale(time.sleep, 60)
    finally:
        scale.close()


def test_inputs_that_would_stay_in_a_cache_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody runs on what somebody has just run on, the floor included."""
    seen: list[int] = []
    products = Products.__call__

    def spies(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        seen.append(weight.data_ptr())
        return EAGER.logprob(hidden, weight, target)

    def spied(self: Products) -> None:
        seen.append(self.weight_VD.data_ptr())
        products(self)

    monkeypatch.setattr(Products, "__call__", spied)
    shape = replace(SMALL, vocab=4096, hidden=128)
    held(shape, "forward", [Contestant("spies", spies)])
    size = 4 * (shape.tokens + shape.vocab) * shape.hidden
    copies = cache_bytes("cpu") // size + 2 if size <= cache_bytes("cpu") else 1
    in_rounds = seen[-6:]  # three rounds of two
    assert copies >= 2
    assert len(set(in_rounds)) == min(copies, 6)
    assert all(one != other for one, other in itertools.pairwise(in_rounds))


def test_cringe_with_a_candidate_that_is_none_is_wrong() -> None:
    def smallest(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        positive = logits.argmin(1)
        negative_logit, positive_logit = (logits.gather(1, column[:, None])[:, 0] for column in (target, positive))
        return torch.nn.functional.softplus(negative_logit - positive_logit), positive

    rows = held(SMALL, "cringe", [Contestant("smallest", EAGER.logprob, smallest), EAGER])
    assert {name: row.error is None for name, row in rows.items()} == {FLOOR: True, "smallest": False, "eager": True}
    assert rows["smallest"].errors["value"] < 1e-5 < rows["smallest"].errors["candidate"]


def test_every_kernel_is_called() -> None:
    if fastd2o.backends()["cpu"] is not None:
        pytest.skip("no native kernels here")
    every_kernel.main(["--backend", "cpu"])


def test_suites() -> None:
    """Each is made of cases and steps that there are, and has no contest twice."""
    for of_device in SUITES.values():
        assert tuple(of_device) == SUITE_NAMES
        for suite in of_device.values():
            names = [(name, str(shape)) for name, shape in suite.contests]
            names += [(name, str(shape)) for name, shape in suite.steps]
            assert len(set(names)) == len(names)
            assert {name for name, *_ in names} <= {*CASES, *STEPS}
    full = SUITES["cpu"]["full"].contests
    for vocab, dtype, case in itertools.product((32000, 128256), ("bfloat16", "float32"), ("frozen", "trained")):
        tokens = {shape.tokens for name, shape in full if (name, shape.vocab, shape.dtype) == (case, vocab, dtype)}
        assert {256, 16384} <= tokens


def test_a_shape_of_ones_own() -> None:
    chosen = choose("cpu", "quick", cases=["frozen", "step-dpo"], tokens=[3, 4], vocab=[50])
    assert chosen.patience == SUITES["cpu"]["quick"].patience
    assert [(name, shape.tokens, shape.vocab, shape.dtype) for name, shape in chosen.contests] == [
        ("frozen", tokens, 50, "bfloat16") for tokens in (3, 4)
    ]
    assert [(name, shape.completion, shape.vocab) for name, shape in chosen.steps] == [
        ("step-dpo", completion, 50) for completion in (3, 4)
    ]
    assert choose("cpu", "quick") is SUITES["cpu"]["quick"]
    of_cases = choose("cpu", "quick", cases=["frozen", "step-dpo"])
    assert of_cases.contests == [each for each in SUITES["cpu"]["quick"].contests if each[0] == "frozen"]
    assert [name for name, _ in of_cases.steps] == ["step-dpo"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    row = Row("eager")
    laps = [Lap(1.0, 2.0), Lap(4.0, 4.0), Lap(20.0, 30.0)]
    row.record(
        laps, floor=[Lap(one, 0.0) for one in (1.0, 4.0, 10.0)], ours=[Lap(one, 0.0) for one in (3.0, 4.0, 100.0)]
    )
    assert (row.rounds, row.seconds, row.min, row.max) == (3, 8.0, 3.0, 50.0)
    assert (row.forward, row.backward) == (4.0, 4.0)
    assert row.over_products == 3.0  # the median of 3, 2 and 5
    assert row.spread == pytest.approx((5.0 - 2.0) / 2 / 3.0)
    assert row.over_fastd2o == 1.0  # of 1, 2 and 0.5
    row.record([Lap(5.0, 7.0)], floor=[Lap(one, 0.0) for one in (1.0, 4.0, 10.0)], ours=[])
    assert (row.rounds, row.over_products, row.spread) == (1, 3.0, None)
    assert median_ratio([2.0, 2.0], [1.0, 2.0]) == 1.5


def test_short_rounds_are_repeated() -> None:
    patience = Patience(rounds=3, most_rounds=25, seconds=3.0)
    assert patience.rounds_of(0.5) == 6
    assert patience.rounds_of(20.0) == 3
    assert patience.rounds_of(1e-5) == 25


def test_growth_is_drawn_with_its_exponents(tmp_path: Path) -> None:
    """Time in proportion to T and to V^2."""
    report = Report({"kind": "cpu"})
    shapes = [(256, 500), (1024, 500), (4096, 500), (256, 1000), (256, 2000)]
    for tokens, vocab in shapes:
        shape = {"tokens": tokens, "hidden": 16, "vocab": vocab, "dtype": "bfloat16"}
        row = Row("fastd2o cpu", "cpu", rounds=3, seconds=1e-9 * tokens * vocab**2, extra_megabytes=float(tokens))
        report.add(Contest("trained", shape, "", 1e6 * tokens, [row]))
    found = {path.name for path in plots.draw(report, tmp_path)}
    assert found == {f"{what}-over-{axis}" for what in ("time", "memory") for axis in ("tokens", "vocabulary")}
    # Text is text in the SVG's comments.
    assert "fastd2o cpu: 1.00" in (tmp_path / "time-over-tokens.svg").read_text()
    assert "fastd2o cpu: 2.00" in (tmp_path / "time-over-vocabulary.svg").read_text()


def test_the_exponent_of_a_power() -> None:
    assert plots.exponent([1, 10, 100], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert plots.exponent([2, 4, 8], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    row = Row("eager", rounds=2, times=[1.0, 2.0], seconds=1.5, errors={"value": 1.23456e-7}, spread=0.01)
    report = Report(
        {"kind": "cpu"}, [Contest("forward", SMALL.fields, "torch.mm", 7.0, [row])], {"liger": "not installed"}
    )
    path = report.write(tmp_path / "deep" / "results.json")
    assert Report.read(path) == report
    assert list(path.parent.iterdir()) == [path]
    again = Contest("forward", SMALL.fields, "torch.mm", 7.0, [Row("liger")])
    report.add(again)
    assert report.contests == [again]


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"schema": 1, "rows": []}'])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json (is no report|has schema 1)"):
        Report.read(path)


# --- comparisons ------------------------------------------------------------------------------------------------------


def report_of(slowdown: float = 1.0, seed: int = 0, noise: float = 0.02, megabytes: float = 20.0) -> Report:
    """Fifteen rounds with a clock that drifts, noise of a few per cent and sometimes a run that is disturbed."""
    draw = random.Random(seed)
    rounds = [1.0 + 0.3 * draw.random() for _ in range(15)]

    def laps(seconds: float) -> list[Lap]:
        disturbed = [1.5 if draw.random() < 0.05 else 1.0 for _ in rounds]
        return [
            Lap(seconds * clock * each * draw.gauss(1.0, noise), 0.0)
            for clock, each in zip(rounds, disturbed, strict=True)
        ]

    floor = laps(1.0)
    rows = [Row(FLOOR), Row("fastd2o cpu", "cpu", extra_megabytes=megabytes), Row("eager")]
    for row, each in zip(rows, (floor, laps(1.05 * slowdown), laps(3.0)), strict=True):
        row.record(each, floor, [])
    return Report({"kind": "cpu"}, [Contest("frozen", SMALL.fields, "torch.mm", 7.0, rows)])


def judgements(before: Report, after: Report, threshold: float = 0.1) -> dict[str, str]:
    return {change.contestant: change.judgement for change in compare(before, after, threshold)}


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_no_regression_and_a_fifth_is(seed: int) -> None:
    before = report_of(seed=seed)
    assert judgements(before, report_of(seed=seed + 100)) == {"fastd2o cpu": "same", "eager": "same"}
    assert judgements(before, report_of(1.2, seed=seed + 200)) == {"fastd2o cpu": "slower", "eager": "same"}
    assert judgements(report_of(1.5, seed=seed), report_of(seed=seed + 300))["fastd2o cpu"] == "faster"


def test_what_torch_does_is_told_and_is_no_regression() -> None:
    before, after = report_of(), report_of(1.5)
    for report in (before, after):
        report.contests[0].rows[1].backend = "torch"
    (change, _) = compare(before, after)
    assert (change.judgement, change.ours) == ("slower", False)


def test_memory_and_failures_are_compared_too() -> None:
    assert judgements(report_of(), report_of(megabytes=23.0))["fastd2o cpu"] == "more memory"
    assert judgements(report_of(), report_of(megabytes=21.0))["fastd2o cpu"] == "same"
    assert judgements(report_of(1.5), report_of(megabytes=90.0))["fastd2o cpu"] == "more memory"  # though it is faster
    failed = report_of()
    failed.contests[0].rows[1].error = "RuntimeError: gone"
    assert judgements(report_of(), failed)["fastd2o cpu"] == "now fails"
    del failed.contests[0].rows[1]
    assert judgements(report_of(), failed)["fastd2o cpu"] == "gone"


def test_accuracy_and_longest_completions_are_compared_too() -> None:
    def changed(seed: int, **fields: object) -> Report:
        report = report_of(seed=seed)
        row = report.contests[0].row("fastd2o cpu")
        assert row is not None
        for name, value in fields.items():
            setattr(row, name, value)
        return report

    def judged(before: dict[str, object], after: dict[str, object]) -> str:
        return judgements(changed(1, **before), changed(2, **after))["fastd2o cpu"]

    assert judged({"errors": {"value": 1e-4}}, {"errors": {"value": 1.9e-4}}) == "same"
    assert judged({"errors": {"value": 1e-4}}, {"errors": {"value": 2.1e-4}}) == "less accurate"
    assert judged({"errors": {"value": 1e-8}}, {"errors": {"value": 9e-7}}) == "same"
    assert judged({"longest": 800}, {"longest": 720}) == "same"
    assert judged({"longest": 800}, {"longest": 640}) == "shorter completions"


def test_what_ran_once_is_not_judged() -> None:
    once = report_of(2.0)
    for row in once.contests[0].rows:
        row.times = row.times[:1]
    assert judgements(report_of(), once) == {"fastd2o cpu": "not judged", "eager": "not judged"}


@pytest.mark.parametrize(("slowdown", "judgement"), [(1.0, "same"), (1.15, "same"), (2.0, "slower"), (0.5, "faster")])
def test_few_rounds_tell_large_changes(slowdown: float, judgement: str) -> None:
    few = report_of(slowdown, noise=0.0)
    for row in few.contests[0].rows:
        row.times = row.times[:2]
    assert judgements(report_of(noise=0.0), few)["fastd2o cpu"] == judgement


def test_a_step_is_compared_with_the_same_yardstick() -> None:
    """Without bare products eager code is one; where it is missing in one of them, seconds are compared."""
    before, after = report_of(noise=0.0), report_of(noise=0.0)
    for report in (before, after):
        del report.contests[0].rows[0]
    assert judgements(before, after) == {"fastd2o cpu": "same", "eager": "same"}
    del after.contests[0].rows[1]
    assert judgements(before, after) == {"fastd2o cpu": "same", "eager": "gone"}


def test_reports_with_nothing_in_common_are_refused() -> None:
    other = report_of()
    other.contests[0].case = "forward"
    with pytest.raises(ValueError, match="no contest in common"):
        compare(report_of(), other)
    with pytest.raises(ValueError, match="expected a number above 0"):
        compare(report_of(), report_of(), threshold=0.0)


def test_compare_exits_1_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = report_of().write(tmp_path / "a.json"), report_of(1.3, seed=1).write(tmp_path / "b.json")
    assert main(["bench", "compare", str(before), str(after)]) == 1
    printed = capsys.readouterr().out
    assert "slower" in printed
    assert (
        "2 figures compared: 1 the same within noise and 10%; 0 not judged, for want of rounds; 1 of FastD2O's worse"
        in (" ".join(printed.split()))
    )
    assert main(["bench", "compare", str(before), str(after), "--threshold", "0.5"]) == 0
    assert main(["bench", "compare", str(after), str(before)]) == 0  # faster


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "row", "kind", "expected"),
    [
        ("forward", Row("fastd2o cpu", "cpu", over_products=1.10, extra_megabytes=64.0), "cpu", [True, True]),
        ("forward", Row("fastd2o cpu", "cpu", over_products=1.11, extra_megabytes=64.1), "cpu", [False, False]),
        ("frozen", Row("fastd2o cpu", "cpu", over_products=1.10, extra_megabytes=150.0), "cpu", [True, True]),
        ("trained", Row("fastd2o cpu", "cpu", over_products=1.11, extra_megabytes=150.0), "cpu", [False, True]),
        ("cringe", Row("fastd2o cpu", "cpu", over_products=1.15, extra_megabytes=65.0), "cpu", [True, False]),
        ("cringe", Row("fastd2o cpu", "cpu", error="RuntimeError: gone"), "cpu", [False]),
        ("forward", Row("fastd2o torch", "torch", over_products=9.0), "cpu", []),
        ("forward", Row("fastd2o cuda", "cuda", over_products=1.11, extra_megabytes=256.0), "cuda", [True, True]),
        ("forward", Row("fastd2o cuda", "cuda", over_products=1.12, extra_megabytes=257.0), "cuda", [False, False]),
        ("trained", Row("fastd2o cuda", "cuda", over_products=1.13, extra_megabytes=0.0), "cuda", [True, True]),
        ("trained", Row("fastd2o cuda", "cuda", over_products=1.14, extra_megabytes=0.0), "cuda", [False, True]),
        ("trained", Row("trl chunked", over_fastd2o=5.0), "cpu", [True]),
        ("trained", Row("liger", over_fastd2o=4.9), "cpu", [False]),
        ("frozen", Row("torch chunked", over_fastd2o=4.9), "cpu", [False]),
        ("frozen", Row("cut-cross-entropy", over_fastd2o=1.01), "cpu", [True]),
        ("frozen", Row("cut-cross-entropy", over_fastd2o=0.99), "cpu", [False]),
        ("frozen", Row("cut-cross-entropy", error="ImportError"), "cpu", []),
        ("frozen", Row("trl chunked", over_fastd2o=1.0), "cuda", []),
        ("frozen", Row("eager", over_fastd2o=0.5), "cpu", []),
        ("frozen", Row(FLOOR, over_products=1.0), "cpu", []),
    ],
)
def test_targets(case: str, row: Row, kind: str, expected: list[bool]) -> None:
    shape = SUITES[kind]["targets"].contests[0][1]
    assert [verdict.met for verdict in verdicts(Contest(case, shape.fields, "", 0, [row]), row, kind)] == expected
    assert verdicts(Contest(case, SMALL.fields, "", 0, [row]), row, kind) == []  # a shape without targets


def test_a_verdict_says_what_was_wanted() -> None:
    row = Row("fastd2o cpu", "cpu", over_products=1.2, extra_megabytes=1.0)
    contest = Contest("cringe", SUITES["cpu"]["targets"].contests[0][1].fields, "", 0, [row])
    assert verdicts(contest, row, "cpu") == [Verdict("time", "≤ 1.15", False), Verdict("memory", "≤ 64 MB", True)]


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_pages_show_what_was_recorded(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- figures:" in text
    assert text == figures.updated(text), "python -m benchmarks.figures writes it"


def test_only_what_is_between_the_marks_is_written() -> None:
    text = "before\n<!-- figures:machine -->\nstale\n<!-- end of figures -->\nafter"
    written = figures.updated(text)
    assert written.startswith("before\n<!-- figures:machine -->\n\nAMD EPYC")
    assert written.endswith("<!-- end of figures -->\nafter")
    assert "stale" not in written


def test_figures_in_tables() -> None:
    cell = figures._cell
    assert cell(Row(FLOOR, seconds=1.234, over_products=1.0)) == "1.2 s"
    assert cell(Row("fastd2o cpu", "cpu", rounds=3, over_products=1.049, extra_megabytes=25.6)) == "**1.05** · 26 MB"
    assert cell(Row("fastd2o cpu", "cpu", error="RuntimeError")) == "failed"
    assert cell(Row("eager", rounds=1, over_products=12.3, extra_megabytes=3148.0)) == "12* · 3,148 MB"
    assert cell(None) == ""
