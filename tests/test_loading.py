"""Models and tokenizers that can be loaded, and what is said of those that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, LlamaModel, PreTrainedModel, T5Config, T5Model

from fastd2o import FastD2OError
from fastd2o.loading import load_model, load_tokenizer
from tests.training.tiny import make_model, make_tokenizer


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options):
    return load_model(str(folder), dtype="float32", **options)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_models_load(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    loaded = load(saved(model, tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_its_head_is_refused(tmp_path, kind):
    """Transformers would give it a random one."""
    folder = saved(kind(make_model().config), tmp_path)
    with pytest.raises(FastD2OError, match=r"--ref_model: .*: lm_head\.weight is missing\. .*Fix: give the folder of"):
        load(folder, flag="--ref_model")


def test_a_model_without_a_layer_is_refused(tmp_path):
    file = saved(make_model(), tmp_path) / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if ".layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(FastD2OError, match=r"model\.layers\.1\.input_layernorm\.weight, .* and 6 more are missing"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    config = saved(make_model(), tmp_path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 120}))
    with pytest.raises(FastD2OError, match=r"lm_head\.weight, model\.embed_tokens\.weight are of another shape"):
        load(tmp_path)


def test_an_architecture_that_is_no_causal_lm(tmp_path):
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(FastD2OError, match=r"its architecture is not a causal LM\. Fix: give a decoder-only model"):
        load(saved(T5Model(t5), tmp_path))


def test_a_file_that_is_cut_short(tmp_path):
    file = saved(make_model(), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FastD2OError, match=r"a \.safetensors file in it is cut short or damaged\. Fix: copy or"):
        load(tmp_path)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    with pytest.raises(FastD2OError, match=r"a \.bin file in it is damaged, or holds more than weights\. Fix: copy or"):
        load(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    saved(make_model(), tmp_path)
    with pytest.raises(FastD2OError, match=r"it holds no tokenizer that can be read\. Fix: save the tokenizer beside"):
        load_tokenizer(str(tmp_path))
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("w1").input_ids == [5]


@pytest.mark.parametrize("name", ["foo", "flash_attention_2"])
def test_attention_that_is_not_there_blames_its_own_flag(tmp_path, name):
    if name == "flash_attention_2" and torch.cuda.is_available():
        pytest.skip("it may be installed where there is a GPU")
    with pytest.raises(FastD2OError, match=r"^--attn_implementation: .*Fix: give one that this model has"):
        load(saved(make_model(), tmp_path), attn_implementation=name)


def test_a_folder_named_after_attention_proves_nothing(tmp_path):
    saved(make_model(), tmp_path / "flash_attn")
    (tmp_path / "flash_attn" / "config.json").write_text("{")
    with pytest.raises(FastD2OError, match=r"^--model: no model could be loaded"):
        load(tmp_path / "flash_attn")


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_device_that_is_not_there(tmp_path, device):
    with pytest.raises(FastD2OError, match=rf"^--device: '{device}' cannot be used here: .*Fix: cpu, or"):
        load(saved(make_model(), tmp_path), device=device)
    assert load(tmp_path, device="cpu").device.type == "cpu"
