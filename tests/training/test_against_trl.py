"""The same model, batch and loss type in TRL's trainer and in ours: the same loss, gradients and metrics."""

from __future__ import annotations

import pytest
import torch

from fastd2o.training.scoring import Batch
from tests.training.tiny import make_model, make_rows, make_tokenizer

trl = pytest.importorskip("trl")

TYPES = {
    "dpo": "sigmoid",
    **{name: name for name in ("hinge", "ipo", "robust", "apo_zero", "apo_down", "nca_pair", "sppo_hard")},
    **{name: name for name in ("exo_pair", "bco_pair", "discopop")},
}
METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """TRL's trainer on the rows; the loss type is exchanged on it, test by test."""
    from datasets import Dataset

    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(4, anchors=False)]
    # A tokenizer that splits at spaces has no token for the one that TRL puts before EOS; ours appends the id.
    for row in rows:
        row["chosen"] += " </s>"
        row["rejected"] += " </s>"
    config = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        report_to="none",
        label_smoothing=0.0,
    )
    return trl.DPOTrainer(
        make_model(),
        ref_model=make_model(seed=1),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize(
    ("objective", "label_smoothing"),
    [*((objective, None) for objective in TYPES), ("robust", 0.1), ("exo_pair", 0.1)],
)
def test_loss_and_gradients_equal(make_trainer, theirs, objective, label_smoothing):
    smoothing = label_smoothing if label_smoothing is not None else 1e-3 if objective == "exo_pair" else 0.0
    theirs.loss_types, theirs.label_smoothing = [TYPES[objective]], smoothing
    theirs.model.zero_grad()
    their_batch = next(iter(theirs.get_train_dataloader()))
    their_loss = theirs.compute_loss(theirs.model, dict(their_batch))
    their_loss.backward()

    ours = make_trainer(
        objective=objective,
        label_smoothing=label_smoothing,
        ref_model=make_model(seed=1),
        train_dataset=make_rows(4, anchors=False),
        train_sampling_strategy="sequential",
    )
    batch = next(iter(ours.get_train_dataloader()))
    assert_same_tokens(batch, their_batch)
    ours.model.train()
    our_loss = ours.compute_loss(ours.model, batch)
    our_loss.backward()

    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    pairs = [
        (name, ours_p.grad, theirs_p.grad)
        for (name, ours_p), (_, theirs_p) in zip(
            ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
        )
    ]
    largest = max(float(gradient.abs().max()) for _, _, gradient in pairs)
    for name, gradient, expected in pairs:
        assert float((gradient - expected).abs().max()) <= 1e-5 * largest, name


def test_metrics_equal(make_trainer, theirs):
    theirs.loss_types, theirs.label_smoothing = ["sigmoid"], 0.0
    theirs.model.train()
    theirs._metrics["train"].clear()
    theirs.compute_loss(theirs.model, dict(next(iter(theirs.get_train_dataloader()))))
    expected = {name: values[0] for name, values in theirs._metrics["train"].items()}

    ours = make_trainer(
        objective="dpo",
        ref_model=make_model(seed=1),
        train_dataset=make_rows(4, anchors=False),
        eval_dataset=make_rows(4, anchors=False),
    )
    measured = ours.evaluate()
    for name in METRICS:
        assert measured[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def assert_same_tokens(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """TRL has the chosen rows first, then the rejected; ours come group by group."""
    batch = Batch(**ours)
    rows = torch.cat([batch.positive_rows[:, 0], batch.negative_row])
    completion = batch.labels[rows] != -100
    for mine, yours in (
        (batch.input_ids[rows] * batch.attention_mask[rows], theirs["input_ids"] * theirs["attention_mask"]),
        (completion.long(), theirs["completion_mask"]),
    ):
        assert torch.equal(mine, yours)
