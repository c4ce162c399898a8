"""Evaluation: exact over ragged batches, under TRL's names, without a trace on training."""

from __future__ import annotations

import pytest

from tests.training.tiny import losses, make_model, make_rows

TRL_NAMES = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
}
D2O_NAMES = {"d2o/anchor_term", "d2o/negative_term", "d2o/saturated", "d2o/valid_k"}


def test_same_metrics_in_training_and_evaluation(make_trainer):
    trainer = make_trainer(eval_dataset=make_rows(5, seed=1), eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.train()
    trained = next(entry for entry in trainer.state.log_history if "loss" in entry)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trained.keys() >= TRL_NAMES | D2O_NAMES
    assert evaluated.keys() >= {f"eval_{name}" for name in TRL_NAMES | D2O_NAMES}


@pytest.mark.parametrize("objective", ["d2o", "cringe", "unlikelihood", "orpo"])
def test_loss_is_exact_with_a_ragged_last_batch(make_trainer, tmp_path, objective):
    """Seven groups of one to four positives: batches of 3, 3 and 1 weigh what their units weigh."""
    rows = make_rows(7)
    metrics = [
        make_trainer(
            objective=objective, eval_dataset=rows, per_device_eval_batch_size=size, output_dir=tmp_path / str(size)
        ).evaluate()
        for size in (7, 3, 1)
    ]
    for name, value in metrics[0].items():
        if "runtime" not in name and "per_second" not in name and "preparation" not in name:
            for other in metrics[1:]:
                assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_evaluating_leaves_training_as_it_was(make_trainer, tmp_path):
    options = {"objective": ["d2o", "cringe"], "max_steps": 4}
    without = make_trainer(**options)
    without.train()
    evaluating = make_trainer(
        **options, eval_dataset=make_rows(5), eval_strategy="steps", eval_steps=1, output_dir=tmp_path / "b"
    )
    evaluating.train()
    assert losses(evaluating) == losses(without)


def test_evaluations_are_comparable(make_trainer):
    """Cringe draws its candidates the same way each time."""
    trainer = make_trainer(objective="cringe", eval_dataset=make_rows(5))
    first = trainer.evaluate()["eval_loss"]
    trainer.state.global_step = 7
    assert trainer.evaluate()["eval_loss"] == first


def test_several_evaluation_datasets_by_name(make_trainer):
    trainer = make_trainer(eval_dataset={"easy": make_rows(3, seed=1), "hard": make_rows(4, seed=2)})
    metrics = trainer.evaluate()
    assert {"eval_easy_loss", "eval_hard_loss", "eval_hard_rewards/margins"} <= metrics.keys()
    assert metrics["eval_easy_loss"] == trainer.evaluate(make_rows(3, seed=1))["eval_loss"]
    assert set(trainer.reports) >= {"train", "easy", "hard"}


def test_best_checkpoint_by_a_metric_of_ours(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_dataset=make_rows(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        learning_rate=0.1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=True,
        save_total_limit=1,
    )
    trainer.train()
    margins = {e["step"]: e["eval_rewards/margins"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(margins, key=margins.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margins[best], rel=1e-6)


def test_logged_metrics_are_those_of_the_window(make_trainer, tmp_path):
    """Two steps in one window: the mean over both, each group counting the same."""
    options = {"train_sampling_strategy": "sequential", "ref_model": make_model(seed=1), "learning_rate": 0.0}
    single = make_trainer(**options, max_steps=2, logging_steps=1)
    single.train()
    double = make_trainer(**{**options, "ref_model": make_model(seed=1)}, max_steps=2, logging_steps=2, overwrite=True)
    double.train()
    first, second = (entry for entry in single.state.log_history if "loss" in entry)
    both = next(entry for entry in double.state.log_history if "loss" in entry)
    for name in ("loss", "rewards/margins", "d2o/valid_k", "logps/rejected"):
        assert both[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6)


def test_nothing_to_evaluate(make_trainer):
    with pytest.raises(ValueError, match="no dataset to evaluate on"):
        make_trainer().evaluate()
