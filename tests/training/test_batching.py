"""A step is what it is, however it is cut into micro-batches, padded or ordered."""

from __future__ import annotations

import pytest
import torch

from fastd2o.data import Needs, PreferenceCollator, PreferenceDataset, build_dataset
from fastd2o.training import OBJECTIVES
from fastd2o.training.scoring import Batch
from tests.training.tiny import assert_same_gradients, gradients, make_model, make_rows, make_tokenizer

# The reference point of KTO is a mean over the micro-batch: documented, and tested below.
EXACT = [name for name in OBJECTIVES if name != "kto"]
QUICK = ["d2o", "dpo", "unlikelihood", "cringe", "pairwise_cringe", "npo", "orpo", "nat"]


def with_reference(objective: str, dtype: torch.dtype = torch.float64) -> dict[str, object]:
    return {"ref_model": make_model(seed=1, dtype=dtype)} if OBJECTIVES[objective].reference else {}


@pytest.mark.parametrize("objective", QUICK)
def test_accumulation_equals_one_large_batch(tmp_path, objective):
    """Ten groups of one to four positives: two full windows, and a last one of two."""
    options = {"objective": objective, "train_dataset": make_rows(10), "max_steps": -1, "num_train_epochs": 1}
    large = gradients(tmp_path / "a", per_device_train_batch_size=4, **options, **with_reference(objective))
    small = gradients(
        tmp_path / "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
        **with_reference(objective),
    )
    assert len(large) == 3
    assert_same_gradients(small, large)


def test_accumulation_in_float32(tmp_path):
    options = {"train_dataset": make_rows(8), "max_steps": 1}
    runs = [
        gradients(
            tmp_path / str(size),
            model=make_model(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **options,
            **with_reference("d2o", torch.float32),
        )
        for size in (8, 2)
    ]
    for name, gradient in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], gradient, rtol=0, atol=1e-6)


def test_accumulation_of_a_mixture(tmp_path):
    """Parts with different units keep their own denominators."""
    options = {"objective": ["d2o", "unlikelihood", "cringe"], "objective_weights": [1, 2, 0.5], "max_steps": 2}
    large = gradients(tmp_path / "a", per_device_train_batch_size=6, **options, **with_reference("d2o"))
    small = gradients(
        tmp_path / "b",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **options,
        **with_reference("d2o"),
    )
    assert_same_gradients(small, large)


def test_unpaired_rows_accumulate(tmp_path):
    """{prompt, completion, label}: a micro-batch may hold negatives alone, or positives alone."""
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected"], "label": index % 3 == 0}
        for index, row in enumerate(make_rows(9))
    ]
    for objective in ("unlikelihood", "cringe", "nat"):
        options = {"objective": objective, "train_dataset": rows, "max_steps": 1}
        large = gradients(tmp_path / "a", per_device_train_batch_size=9, **options)
        small = gradients(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=9, **options)
        assert_same_gradients(small, large)


def evaluate(trainer, *, batch_size, order=None, pad_to=None):
    """The loss of the evaluation dataset, cut and ordered as told, and the log-probabilities of each group."""
    dataset = trainer.eval_dataset
    order = list(range(len(dataset))) if order is None else order
    collate = PreferenceCollator(trainer.data_collator.pad_token_id, pad_to_multiple_of=pad_to)
    counts = Batch(**collate(list(dataset.groups))).counts()
    loss = 0.0
    logps: dict[int, list[float]] = {}
    trainer.model.eval()
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        inputs = collate([dataset[index] for index in indices])
        with torch.no_grad():
            part, scores = trainer.compute_loss(trainer.model, inputs, True, num_items_in_batch=counts)
        loss += part.item()
        rows = iter(scores.logp.tolist())
        logps |= {index: [next(rows) for _ in dataset[index].sequences] for index in indices}
    return loss, [logps[index] for index in range(len(dataset))]


@pytest.mark.parametrize("objective", EXACT)
def test_padding_order_and_batch_size_change_nothing(make_trainer, objective):
    trainer = make_trainer(objective=objective, eval_dataset=make_rows(7), **with_reference(objective, torch.float32))
    loss, logps = evaluate(trainer, batch_size=7)
    for variant in (
        {"batch_size": 7, "pad_to": 40},
        {"batch_size": 7, "order": [3, 0, 6, 2, 5, 1, 4]},
        {"batch_size": 1},
        {"batch_size": 3, "order": [6, 5, 4, 3, 2, 1, 0]},
    ):
        other_loss, other_logps = evaluate(trainer, **variant)
        assert other_loss == pytest.approx(loss, rel=1e-6), variant
        for ours, theirs in zip(other_logps, logps, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6), variant


def test_dataset_given_tokenised(make_trainer):
    """A PreferenceDataset is taken as it is, and checked for what the objective needs."""
    rows = [{"prompt": "w1 w2", "rejected": " w3"}, *make_rows(3)]
    dataset = build_dataset(rows, make_tokenizer(), needs=Needs.NEGATIVE)
    assert isinstance(dataset, PreferenceDataset)
    make_trainer(objective="npo", train_dataset=dataset, max_steps=1).train()
    with pytest.raises(ValueError, match=r"no positive on line 1.*Fix: build_dataset"):
        make_trainer(objective="dpo", train_dataset=dataset)


def test_batches_of_like_length(make_trainer):
    trainer = make_trainer(train_dataset=make_rows(32), train_sampling_strategy="group_by_length", max_steps=2)
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    assert sorted(order) == list(range(32))
    assert list(sampler) != order  # the next epoch
    sampler.set_epoch(0)
    assert list(sampler) == order
    trainer.train()
