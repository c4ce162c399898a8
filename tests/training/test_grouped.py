"""Gradients formed group by group in the forward are those of the batch as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastd2o.ops.plan import Plan
from fastd2o.training import OBJECTIVES
from fastd2o.training.scoring import Batch
from tests.training.tiny import GradientRecorder, assert_same_gradients, make_model, make_rows, make_trainer

PART_TOKENS = 12


def run(tmp_path: Any, **options: Any) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, float]], Any]:
    """Gradients and logs of two steps in float64, and the trainer."""
    recorder = GradientRecorder()
    general = options.pop("general", False)
    reference = OBJECTIVES[options["objective"].split(",")[0]].reference
    trainer = make_trainer(
        tmp_path,
        model=make_model(dtype=torch.float64),
        callbacks=[recorder],
        optim="sgd",
        overwrite=True,
        max_steps=2,
        train_dataset=make_rows(8),
        **({"ref_model": make_model(seed=1, dtype=torch.float64)} if reference else {}),
        **options,
    )
    if general:
        trainer.mixture.separable = False
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
        for entry in trainer.state.log_history
    ]
    return recorder.steps, logs, trainer


def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Let every grouped plan have parts of a few tokens, of which a part of the vocabulary is kept."""
    made = []

    def cut(self: Plan, budget: int) -> Plan:
        made.append(replace(self, part_tokens=PART_TOKENS, block_vocab=32, kept_bytes=PART_TOKENS * 64 * 8))
        return made[-1]

    monkeypatch.setattr(Plan, "_in_parts", cut)
    return made


@pytest.mark.parametrize("objective", [*OBJECTIVES, "d2o,unlikelihood,cringe"])
def test_parts_of_a_batch_have_its_gradient_and_its_metrics(tmp_path, monkeypatch, objective):
    options = {"objective": objective, **({"beta": 0.1} if objective == "simnpo" else {})}
    whole, whole_logs, _ = run(tmp_path, general=True, **options)
    plans = in_parts(monkeypatch)
    parts, part_logs, trainer = run(tmp_path, **options)
    assert plans
    assert trainer.mixture.separable == (objective != "kto")
    assert_same_gradients(parts, whole)
    for ours, theirs in zip(part_logs, whole_logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_the_scores_of_a_batch_in_parts_are_in_its_order(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, model=make_model(dtype=torch.float64), objective="dpo")
    trainer.model.eval()  # where statistics are always measured
    batch = next(iter(trainer.get_train_dataloader()))
    _, whole = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    in_parts(monkeypatch)
    _, parts = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(parts.logp, whole.logp, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.tokens.statistics.entropy, whole.tokens.statistics.entropy, rtol=0, atol=1e-12)


def test_selecting_groups_keeps_their_roles():
    batch = Batch(
        input_ids=torch.arange(10).view(5, 2),
        attention_mask=torch.ones(5, 2, dtype=torch.int64),
        labels=torch.arange(10).view(5, 2),
        negative_row=torch.tensor([1, -1, 4]),
        positive_rows=torch.tensor([[0, -1], [2, 3], [-1, -1]]),
        line=torch.tensor([7, 8, 9]),
        ref_logp=torch.arange(5.0),
    )
    assert batch.group_of_rows == [0, 0, 1, 1, 2]
    some = batch.select(range(1, 3), torch.tensor([2, 3, 4]))
    assert some.negative_row.tolist() == [-1, 2]
    assert some.positive_rows.tolist() == [[0, 1], [-1, -1]]
    assert some.line.tolist() == [8, 9]
    assert some.ref_logp is not None
    assert some.ref_logp.tolist() == [2.0, 3.0, 4.0]


def test_saturated_groups_are_skipped_and_logged(tmp_path):
    """In the units of a group's own loss, whatever the batch: at a beta of 0.1, D2O's coefficients are below 0.1."""
    everything, _, _ = run(tmp_path, objective="d2o", coefficient_tol=0.0)
    some, logs, _ = run(tmp_path, objective="d2o", coefficient_tol=0.045)
    all_skipped, all_logs, _ = run(tmp_path, objective="d2o", coefficient_tol=0.2)
    head = "lm_head.weight"
    assert 0 < logs[0]["head/skipped"] < 1
    assert 0 < (some[0][head] - everything[0][head]).norm() <= logs[0]["head/skipped_bound"]
    assert all_logs[0]["head/skipped"] == 1
    assert all_skipped[0][head].abs().max() == 0


def test_columns_without_mass_are_left_out_and_logged(tmp_path):
    everything, _, _ = run(tmp_path, objective="dpo")
    some, logs, _ = run(tmp_path, objective="dpo", vocab_mass_tol=0.3)
    assert 0 < logs[0]["head/active_columns"] < 1
    difference = (some[0]["lm_head.weight"] - everything[0]["lm_head.weight"]).norm()
    assert 0 < difference < 0.3 * everything[0]["lm_head.weight"].norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": -1.0}, "memory_budget=-1.0 must not be negative"),
        ({"memory_budget": 1.5}, "neither a whole number of bytes nor a share"),
        ({"coefficient_tol": -0.1}, "coefficient_tol is -0.1, expected a number in"),
        ({"vocab_mass_tol": 1.0}, "vocab_mass_tol is 1.0, expected a number in"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
