"""Where reference log-probabilities come from, and that all sources agree."""

from __future__ import annotations

import pytest
import torch

from fastd2o import FastD2OError, FastD2OWarning
from fastd2o.training.references import Reference
from fastd2o.training.scoring import Batch
from tests.training.tiny import losses, make_model, make_rows
from tests.training.tiny import make_trainer as build


def cache_files(tmp_path):
    return sorted((tmp_path / "cache").glob("*.safetensors"))


def trained(tmp_path, **options):
    trainer = build(tmp_path / "out", overwrite=True, max_steps=4, **options)
    trainer.train()
    return trainer


def precomputed(tmp_path, **options):
    return trained(tmp_path, precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture
def count_scored(monkeypatch):
    """How many batches a reference scored while precomputing."""
    calls = []
    scored = Reference.__call__

    def counting(self, batch):
        calls.append(len(batch.input_ids))
        return scored(self, batch)

    monkeypatch.setattr(Reference, "__call__", counting)
    return calls


def test_copy_is_the_policy_before_training(tmp_path):
    trainer = trained(tmp_path)
    before = make_model().state_dict()
    for name, tensor in trainer.references.helpful.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)


def test_reference_is_out_of_reach_of_the_optimiser(tmp_path):
    reference = make_model(seed=1)
    trained(tmp_path, ref_model=reference)
    for name, tensor in make_model(seed=1).state_dict().items():
        assert torch.equal(reference.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_given_model_matters(tmp_path):
    assert losses(trained(tmp_path, ref_model=make_model(seed=1)))[0] != pytest.approx(0.693147, abs=1e-3)


def test_path_of_a_model(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "ref")
    by_path = trained(tmp_path, ref_model=str(tmp_path / "ref"))
    assert losses(by_path) == losses(trained(tmp_path, ref_model=make_model(seed=1)))


@pytest.mark.parametrize("objective", ["d2o", "dpo", "npo", "kto"])
def test_precomputed_equals_online(tmp_path, objective):
    online = trained(tmp_path, objective=objective)
    stored = precomputed(tmp_path, objective=objective)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-6, abs=1e-6)
    assert stored.references.helpful is None


def test_precomputed_harmful_reference(tmp_path):
    def models():
        return {"ref_model": make_model(seed=1), "harmful_ref_model": make_model(seed=2)}

    assert losses(precomputed(tmp_path, **models())) == pytest.approx(losses(trained(tmp_path, **models())), rel=1e-5)
    assert len(cache_files(tmp_path)) == 2


def test_cache_is_used_again_and_follows_data_and_weights(tmp_path, count_scored):
    first = losses(precomputed(tmp_path))
    assert count_scored
    count_scored.clear()
    assert losses(precomputed(tmp_path)) == first
    assert count_scored == []
    precomputed(tmp_path, train_dataset=make_rows(seed=5))
    assert count_scored
    count_scored.clear()
    precomputed(tmp_path, model=make_model(seed=3))
    assert count_scored
    assert len(cache_files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["cut", "noise", "nan", "short"])
def test_damaged_cache_is_computed_again(tmp_path, count_scored, damage):
    from safetensors.torch import load_file, save_file

    first = losses(precomputed(tmp_path))
    (path,) = cache_files(tmp_path)
    content, logps = path.read_bytes(), load_file(path)["logp"].clone()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "noise":
        path.write_bytes(b"\xff" * len(content))
    elif damage == "nan":
        logps[0] = float("nan")
        save_file({"logp": logps}, path)
    else:
        save_file({"logp": logps[1:]}, path)
    count_scored.clear()
    with pytest.warns(FastD2OWarning, match=r"cached reference log-probabilities .* cannot be used"):
        again = precomputed(tmp_path)
    assert count_scored
    assert losses(again) == first
    assert path.read_bytes() == content


def test_columns_need_no_model(tmp_path):
    """Every row brings its own: nothing is copied, nothing computed, and the losses are the same."""
    rows = make_rows(anchors=False)
    reference = build(tmp_path / "ref", objective="dpo", train_dataset=rows, model=make_model(seed=1))
    inputs = reference.data_collator(list(reference.train_dataset.groups))
    assert reference.references.helpful is not None
    logps = reference.references.helpful(Batch(**inputs)).tolist()
    for index, row in enumerate(rows):
        row["ref_rejected_logps"], row["ref_chosen_logps"] = logps[2 * index : 2 * index + 2]
    with_columns = trained(tmp_path, objective="dpo", train_dataset=rows)
    assert with_columns.references.helpful is None
    assert with_columns.references.description == "columns of the dataset"
    plain = make_rows(anchors=False)
    online = trained(tmp_path, objective="dpo", train_dataset=plain, ref_model=make_model(seed=1))
    assert losses(with_columns) == pytest.approx(losses(online), rel=1e-6)
    with pytest.raises(ValueError, match=r"ref_model is given.*already.*Fix"):
        build(tmp_path / "x", objective="dpo", train_dataset=rows, ref_model=make_model())


def test_columns_on_some_rows_are_not_mixed_in(tmp_path):
    rows = make_rows(anchors=False)
    rows[0] |= {"ref_rejected_logps": -1.0, "ref_chosen_logps": -1.0}
    with pytest.warns(FastD2OWarning, match="2 of 24 sequences have a ref_logp"):
        some = trained(tmp_path, objective="dpo", train_dataset=rows)
    assert losses(some) == losses(trained(tmp_path, objective="dpo", train_dataset=make_rows(anchors=False)))


def test_objectives_without_a_reference_make_none(tmp_path):
    trainer = build(tmp_path, objective=["simpo", "orpo"])
    assert (trainer.references.helpful, trainer.references.harmful) == (None, None)
    assert trainer.references.description == "none"


def test_dataset_that_comes_too_late_for_precomputing(tmp_path):
    trainer = precomputed(tmp_path)
    with pytest.raises(FastD2OError, match=r"no reference model is left.*Fix: give this dataset"):
        trainer.evaluate(make_rows(3, seed=9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "simpo", "ref_model": "model"}, "ref_model is given, but the objective simpo"),
        ({"objective": "dpo", "harmful_ref_model": "model"}, "harmful_ref_model is given, but the objective dpo"),
        ({"objective": "orpo", "precompute_ref_log_probs": True}, "has no reference"),
    ],
)
def test_reference_that_nothing_would_use(tmp_path, options, message):
    options = {name: make_model(seed=1) if value == "model" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)


def test_the_policy_is_no_reference(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        build(tmp_path, model=model, ref_model=model)
