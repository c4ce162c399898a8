"""What stops a run, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, TrainerCallback

from fastd2o import DataError, FastD2OError, PreferenceConfig, PreferenceTrainer
from fastd2o.training.policy import disable_dropout
from tests.training.tiny import VOCABULARY, losses, make_model, make_rows


class Break(TrainerCallback):
    """Puts a value into a weight, after a step."""

    def __init__(self, step: int, value: float, *, token: int | None = None) -> None:
        self.step, self.value, self.token = step, value, token

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            weight = kwargs["model"].model.embed_tokens.weight
            with torch.no_grad():
                (weight if self.token is None else weight[self.token]).fill_(self.value)


def test_nan_names_step_and_lines_and_keeps_the_checkpoint(make_trainer, tmp_path):
    """A token that only line 7 has is broken before the third step."""
    rows = make_rows(8)
    rows[6]["prompt"] = "w92"
    for row in rows[:6] + rows[7:]:
        for name in ("prompt", "chosen", "rejected"):
            row[name] = row[name].replace("w92", "w1")
        row["anchors"] = [anchor.replace("w92", "w1") for anchor in row["anchors"]]
    trainer = make_trainer(
        train_dataset=rows,
        per_device_train_batch_size=8,
        callbacks=[Break(2, float("nan"), token=96)],
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(FastD2OError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "the loss is nan in step 3, on dataset lines 7." in message
    assert f"the last checkpoint is '{tmp_path}/out/checkpoint-2'" in message
    assert "Fix:" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_nan_everywhere_names_the_whole_batch(make_trainer):
    trainer = make_trainer(
        callbacks=[Break(1, float("nan"))],
        train_sampling_strategy="sequential",
        objective="simpo",
        per_device_train_batch_size=3,
    )
    with pytest.raises(FastD2OError, match=r"in step 2, on dataset lines 4, 5, 6\..*there is no checkpoint yet"):
        trainer.train()


def test_broken_weights_are_not_saved(make_trainer, tmp_path):
    """An infinite gradient breaks the weights after the last loss that is finite."""

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                kwargs["model"].lm_head.weight.grad.fill_(float("inf"))

    trainer = make_trainer(callbacks=[Overflow()], save_strategy="steps", save_steps=1)
    with pytest.raises(FastD2OError, match=r"no longer finite after step 2.*the last checkpoint is .*checkpoint-1"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]


def test_nan_in_an_evaluation(make_trainer):
    trainer = make_trainer(eval_dataset=make_rows(2))
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FastD2OError, match="in the evaluation after step 0, on dataset lines 1, 2"):
        trainer.evaluate()


def test_bad_rows(make_trainer):
    rows = make_rows(3)
    rows[1]["rejected"] = " "
    with pytest.raises(DataError, match=r"empty completion.*2.*bad_rows"):
        make_trainer(train_dataset=rows)
    assert len(make_trainer(train_dataset=rows, bad_rows="drop").train_dataset) == 2


def test_no_anchor_anywhere(make_trainer):
    with pytest.raises(DataError, match=r"no positive.*fastd2o sample"):
        make_trainer(train_dataset=[{"prompt": "w1", "rejected": " w2"}])


@pytest.mark.parametrize("folder", ["./nowhere", "/no/such/model", "runs/a/b"])
def test_model_that_is_not_there(make_trainer, folder):
    with pytest.raises(FileNotFoundError, match=r"model: there is no folder .*Fix: check the path"):
        make_trainer(model=folder)


def test_folder_that_is_no_model(make_trainer, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastD2OError, match=r"has no config\.json, so it holds no model"):
        make_trainer(model=str(tmp_path / "empty"))


def test_sequences_longer_than_the_context(make_trainer, tmp_path):
    rows = make_rows(4)
    rows[2]["prompt"] = " ".join(["w1"] * 70)
    with pytest.raises(
        DataError, match=r"the model reads at most 64 tokens.*train dataset .*: line 3\. Fix: set max_length to 64"
    ):
        make_trainer(train_dataset=rows)
    with pytest.raises(DataError, match=r"the evaluation dataset has sequences .*: line 3\."):
        make_trainer(eval_dataset=rows)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"the evaluation dataset has sequences .*: line 3\."):
        make_trainer().evaluate(rows)
    make_trainer(train_dataset=rows, max_length=64, truncate_prompt=True).train()


def test_the_reference_may_have_the_shorter_context(make_trainer, tmp_path):
    short = make_model(max_position_embeddings=8)
    with pytest.raises(DataError, match=r"the reference \(the model given as ref_model\) reads at most 8 tokens"):
        make_trainer(ref_model=short)
    assert not (tmp_path / "out").exists()


def test_models_without_a_limit_take_any_length(make_trainer):
    """Mamba has no position embeddings, and no attribute for their number."""
    mamba = MambaForCausalLM(MambaConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1))
    assert not hasattr(mamba.config, "max_position_embeddings")
    rows = make_rows(2)
    rows[0]["prompt"] = " ".join(["w1"] * 200)
    make_trainer(model=mamba, train_dataset=rows, max_steps=1).train()


def test_tokens_that_the_model_does_not_know(make_trainer, tmp_path):
    rows = make_rows(4)
    rows[1]["rejected"] = rows[3]["rejected"] = " w92"  # token 96
    small = make_model(vocab_size=96)
    for row in (rows[0], rows[2]):
        row.update(prompt="w1", chosen=" w2", rejected=" w3", anchors=[" w4"])
    with pytest.raises(
        DataError, match=r"the model has embeddings for 96 tokens, but .* up to 96: .*\(line 2, 4\)\. Fix: use the tok"
    ):
        make_trainer(model=small, train_dataset=rows)
    with pytest.raises(DataError, match=r"the reference \(the model given as ref_model\) has embeddings for 96 tokens"):
        make_trainer(ref_model=small, train_dataset=rows)
    assert not (tmp_path / "out").exists()


def test_a_padding_token_that_the_model_does_not_know_is_not_used(make_trainer):
    """As when it was added to the tokenizer and the model was not resized."""
    trainer = make_trainer()
    tokenizer = trainer.processing_class
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == len(VOCABULARY)
    config = PreferenceConfig(trainer.args.output_dir, use_cpu=True, max_steps=1)
    PreferenceTrainer(make_model(), config, train_dataset=make_rows(), processing_class=tokenizer).train()


def test_a_run_that_wrote_nothing_leaves_no_folder(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Break(0, float("nan"))])
    with pytest.raises(FastD2OError, match="in step 1"):
        trainer.train()
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # one that was there before stays
    with pytest.raises(FastD2OError, match="in step 1"):
        make_trainer(callbacks=[Break(0, float("nan"))]).train()
    assert (tmp_path / "out").exists()


def test_wrong_types(make_trainer, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args is a TrainingArguments, expected a PreferenceConfig"):
        PreferenceTrainer(make_model(), TrainingArguments(str(tmp_path), use_cpu=True))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a int"):
        make_trainer(model=3)
    with pytest.raises(ValueError, match="processing_class is missing"):
        PreferenceTrainer(make_model(), PreferenceConfig(str(tmp_path), use_cpu=True), train_dataset=make_rows())


def test_dropout_is_off(make_trainer):
    """So that the policy equals its reference before the first step."""
    model = make_model(attention_dropout=0.5)
    trainer = make_trainer(model=model, learning_rate=0.0)
    trainer.train()
    assert losses(trainer) == pytest.approx([0.693147] * 3, abs=1e-6)
    with_dropout = make_trainer(
        model=make_model(attention_dropout=0.5), learning_rate=0.0, disable_dropout=False, overwrite=True
    )
    with_dropout.train()
    assert losses(with_dropout) != pytest.approx([0.693147] * 3, abs=1e-3)


def test_every_kind_of_dropout():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout = 0.3
            self.layers = nn.Sequential(nn.Dropout(0.1), nn.Dropout1d(0.2))

    module = Attention()
    disable_dropout(module)
    assert module.attention_dropout == 0.0
    assert [layer.p for layer in module.layers] == [0.0, 0.0]
