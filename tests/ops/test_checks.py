"""Bad input is refused at the door, in words that name the argument, what it was and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastd2o

HIDDEN = torch.randn(3, 8)
WEIGHT = torch.randn(11, 8)
TARGET = torch.tensor([0, 10, -100])

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "transposed weight": ({"weight": WEIGHT.T}, ValueError, r"hidden has 8 features but weight \[8, 11\] expects 11"),
    "weight of three dimensions": ({"weight": WEIGHT[None]}, ValueError, r"shape \[1, 11, 8\]: expected \[V, D\]"),
    "empty vocabulary": ({"weight": WEIGHT[:0]}, ValueError, "must not be empty"),
    "integer hidden": ({"hidden": HIDDEN.long()}, TypeError, "hidden has dtype torch.int64: expected float64"),
    "hidden is a list": ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "scalar hidden": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden is a scalar"),
    "short bias": ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \[8\]: expected \[V\] = \[11\]"),
    "float targets": ({"target": TARGET.float()}, TypeError, r"target has dtype torch.float32.*Fix: target.long\(\)"),
    "int32 targets": ({"target": TARGET.int()}, TypeError, "expected int64"),
    "too few targets": ({"target": TARGET[:2]}, ValueError, r"target has shape \[2\] but hidden has \[3, 8\].*\[3\]"),
    "target equal to V": ({"target": torch.tensor([0, 11, 1])}, ValueError, r"holds 11 at flat position 1.*\[0, 11\)"),
    "negative target": ({"target": torch.tensor([0, 1, -1])}, ValueError, "holds -1 at flat position 2"),
    "other device": ({"target": TARGET.to("meta")}, ValueError, "target is on meta but hidden is on cpu"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta but hidden is on cpu"),
    "softcap of zero": ({"softcap": 0.0}, ValueError, "softcap=0.0 must be a positive number, or None"),
    "infinite scale": ({"logit_scale": float("inf")}, ValueError, "logit_scale=inf must be a finite number"),
    "a scale to be learnt": ({"logit_scale": torch.ones(())}, TypeError, "logit_scale is a Tensor: expected a number"),
    "no index to ignore": ({"ignore_index": None}, TypeError, "ignore_index is a NoneType: expected an integer"),
    "plan of another kind": ({"plan": 3}, TypeError, "plan is a int: expected a fastd2o.Plan"),
    "no temperature": ({"temperature": 0.0}, ValueError, "temperature=0.0 must be a positive number"),
    "unknown backend": ({"backend": "tpu"}, ValueError, "backend='tpu' is unknown. Known: torch, cpu, triton, cuda"),
    "backend that is not there": ({"backend": "cuda"}, ValueError, r"'cuda' cannot serve: .* backend='torch'"),
}  # fmt: skip


@pytest.mark.parametrize("operator", [fastd2o.linear_logprob, fastd2o.linear_logodds, fastd2o.linear_cringe])
@pytest.mark.parametrize("what", BAD)
def test_refused(what: str, operator: Any) -> None:
    change, error, message = BAD[what]
    arguments: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    with pytest.raises(error, match=message):
        operator(**arguments)


def test_another_ignore_index_makes_minus_100_a_bad_target() -> None:
    with pytest.raises(ValueError, match="holds -100 at flat position 2"):
        fastd2o.linear_logprob(HIDDEN, WEIGHT, TARGET, ignore_index=-1)
    out = fastd2o.linear_logprob(HIDDEN, WEIGHT, torch.tensor([0, 10, -1]), ignore_index=-1)
    assert out[2] == 0.0


def test_forward_mode_is_refused() -> None:
    def call(hidden: torch.Tensor) -> torch.Tensor:
        return fastd2o.linear_logprob(hidden, WEIGHT, TARGET)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (HIDDEN,), (HIDDEN,))


@pytest.mark.parametrize(("k", "message"), [(0, "k=0 must be at least 1"), (11, "k=11 candidates cannot exclude")])
def test_candidates_must_fit_the_vocabulary(k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastd2o.linear_cringe(HIDDEN, WEIGHT, TARGET, k=k)


def test_a_seed_has_64_bits() -> None:
    with pytest.raises(TypeError, match="seed is a float: expected an integer"):
        fastd2o.linear_cringe(HIDDEN, WEIGHT, TARGET, seed=1.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit into 64 bits"):
        fastd2o.linear_cringe(HIDDEN, WEIGHT, TARGET, seed=2**64)


def test_sequence_logprob_checks_its_own_arguments() -> None:
    with pytest.raises(ValueError, match=r"hidden has shape \[3, 8\]: expected \[B, L, D\]"):
        fastd2o.sequence_logprob(HIDDEN, WEIGHT, TARGET)
    with pytest.raises(ValueError, match="reduction='max' is unknown"):
        fastd2o.sequence_logprob(HIDDEN[None], WEIGHT, TARGET[None], reduction="max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stats are per token"):
        fastd2o.sequence_logprob(HIDDEN[None], WEIGHT, TARGET[None], stats=True)
    with pytest.raises(ValueError, match=r"labels has shape \[1, 2\]"):
        fastd2o.sequence_logprob(HIDDEN[None], WEIGHT, TARGET[None, :2])


class TestPlan:
    def plan(self, **changes: Any) -> fastd2o.Plan:
        arguments: dict[str, Any] = {"tokens": 3, "hidden_size": 8, "vocab_size": 11, "dtype": torch.float32}
        arguments.update(changes)
        return fastd2o.Plan.choose(**arguments)

    def test_a_plan_that_cannot_give_the_gradients_is_refused(self) -> None:
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        for algorithm in ("forward", "unit", "cringe"):
            with pytest.raises(ValueError, match=rf"algorithm='{algorithm}' cannot .*expected 'recompute'"):
                fastd2o.linear_logprob(hidden, weight, TARGET, plan=self.plan(algorithm=algorithm))
        with pytest.raises(ValueError, match="expected 'unit'"):
            fastd2o.linear_logprob(hidden, WEIGHT, TARGET, plan=self.plan(algorithm="forward"))
        with pytest.raises(ValueError, match="expected 'cringe'"):
            fastd2o.linear_cringe(hidden, WEIGHT, TARGET, plan=self.plan(algorithm="forward"))

    @pytest.mark.parametrize(
        "change", [{"dtype": torch.bfloat16}, {"hidden_size": 9}, {"vocab_size": 12}, {"device": "cuda"}]
    )
    def test_a_plan_of_another_call_is_refused(self, change: dict[str, Any]) -> None:
        (name,) = change
        with pytest.raises(ValueError, match=rf"plan\.{name}=.* but this call has"):
            fastd2o.linear_logprob(HIDDEN, WEIGHT, TARGET, plan=self.plan(algorithm="forward", **change))

    def test_the_engines_own_plan_can_be_had(self) -> None:
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        assert fastd2o.Plan.of(hidden, weight).algorithm == "recompute"
        assert fastd2o.Plan.of(hidden, WEIGHT).algorithm == "unit"
        assert fastd2o.Plan.of(HIDDEN, WEIGHT).algorithm == "forward"
        assert fastd2o.Plan.of(HIDDEN, WEIGHT, WEIGHT[:, 0].clone().requires_grad_()).algorithm == "recompute"
        with torch.no_grad():
            assert fastd2o.Plan.of(hidden, weight).algorithm == "forward"
        with torch.autocast("cpu", torch.bfloat16):
            plan = fastd2o.Plan.of(hidden, weight, cringe=True)
        assert (plan.algorithm, plan.dtype, plan.cast_weight) == ("cringe", torch.bfloat16, True)

    def test_nonsense_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"plan\.algorithm='magic' is unknown"):
            self.plan(algorithm="magic")
        with pytest.raises(ValueError, match="block_vocab=0 must be at least 1"):
            fastd2o.Plan("forward", 3, 8, 11, 1, 0, torch.float32)

    def test_it_says_what_it_will_do(self) -> None:
        plan = fastd2o.Plan.choose(tokens=2048, hidden_size=1024, vocab_size=128256, algorithm="unit")
        assert plan.flops == 4 * 2048 * 1024 * 128256
        text = str(plan)
        for fact in ("frozen head", "2048 tokens", "128256", "bfloat16", "1.08 TFLOP", f"{plan.block_vocab}"):
            assert fact in text, fact
