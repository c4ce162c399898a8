"""Adapters: they alone train, the base model is the reference, and what is saved is an adapter."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastd2o import FastD2OError, FastD2OWarning
from tests.training.tiny import assert_same_gradients, gradients, losses, make_model, make_rows, make_trainer


def lora(**options) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return LoraConfig(**settings)


def test_only_the_adapter_trains(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora())
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_reference_is_the_base_model(tmp_path):
    """The same as with the base model given as reference; and nothing is copied for it."""
    switched_off = make_trainer(tmp_path / "a", peft_config=lora())
    switched_off.train()
    assert switched_off.references.helpful is not None
    assert switched_off.references.helpful.model is switched_off.model
    given = make_trainer(tmp_path / "b", peft_config=lora(), ref_model=make_model())
    given.train()
    assert losses(switched_off) == pytest.approx(losses(given), rel=1e-6)
    assert losses(switched_off)[0] == pytest.approx(0.693147, abs=1e-6)


def test_precomputed_reference_is_shared_by_adapters(tmp_path):
    cache = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    online = make_trainer(tmp_path / "a", peft_config=lora())
    online.train()
    for rank in (4, 2):
        stored = make_trainer(tmp_path / f"rank{rank}", peft_config=lora(r=rank), **cache)
        assert len(list((tmp_path / "cache").iterdir())) == 1
        if rank == 4:
            stored.train()
            assert losses(stored) == pytest.approx(losses(online), rel=1e-5)


def test_saved_adapter_loads(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", peft_config=lora(), model=str(tmp_path / "base"))
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    ids = torch.tensor([[1, 5, 9, 20]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_adapter_resumes_to_the_same_bits(tmp_path):
    options = {"peft_config": lora(), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    options = {"peft_config": lora(), "max_steps": 1}
    with_it = gradients(tmp_path / "a", gradient_checkpointing=True, **options)
    assert_same_gradients(with_it, gradients(tmp_path / "b", **options))


def test_adapter_that_has_learnt_already(tmp_path):
    adapted = get_peft_model(make_model(), lora(init_lora_weights=False))
    with pytest.warns(FastD2OWarning, match="the reference is the base model, without that adapter"):
        make_trainer(tmp_path, model=adapted)
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(tmp_path, model=adapted, peft_config=lora())


def test_refused(tmp_path):
    with pytest.raises(FastD2OError, match=r"output head .* adapter .*Fix"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"lora_dropout is 0.1.*Fix: disable_dropout=False"):
        make_trainer(tmp_path, peft_config=lora(lora_dropout=0.1))
    with pytest.raises(TypeError, match="peft_config is a dict"):
        make_trainer(tmp_path, peft_config={"r": 4}, train_dataset=make_rows())
