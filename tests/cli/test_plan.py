"""fastd2o plan: a step's memory and operations, from nothing but a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastd2o.cli import main
from tests.cli.tiny import tiny_model, tiny_tokenizer

BATCH = ("--groups", 2, "--prompt_length", 16, "--completion_length", 16)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A folder with a configuration alone."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_model(tiny_tokenizer()).config.save_pretrained(folder)
    return folder


def test_json(fastd2o, config):
    result = fastd2o("plan", "--model", config, *BATCH, "--positives", 3, "--json", "--gpu", "h100")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    parameters = sum(p.numel() for p in tiny_model(tiny_tokenizer()).parameters())
    assert report["model"]["parameters"] == report["model"]["trained"] == parameters
    assert report["batch"] == {"objective": "d2o", "groups": 2, "sequences": 8, "length": 32, "counted": 8 * 16}
    assert [way["name"] for way in report["head"]["ways"] if way["chosen"]] == ["grouped", "forward only"]
    assert list(report["memory"]["moments"]) == ["reference", "forward", "backward", "optimizer"]
    peak = sum(report["memory"]["moments"][report["memory"]["fullest"]].values())
    assert report["memory"]["peak"] == report["gpu"]["peak"] == peak
    assert report["gpu"]["fits"]
    assert report["gpu"]["bytes"] == 80 << 30
    assert report["alternatives"] == []


def test_tables(fastd2o, config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = fastd2o("plan", "--model", config / "config.json", *BATCH, "--lora", 4, "--bf16", "--objective", "dpo")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "llama: 39,712 parameters, 3,712 train; hidden size 32, vocabulary 320"
    assert lines[1] == "dpo: 2 groups, 4 sequences of 32 tokens, of which 64 count"
    (unit,) = (line for line in lines if "│ → │ unit" in line)
    assert "│     4 │" in unit
    for name in ("grouped, half skipped", "recompute", "stash", "eager", "TRL", "Liger"):
        assert any(line.startswith(f"│   │ {name}") for line in lines), name
    assert "so no group can be skipped there" in " ".join(result.out.split())
    assert any("→ " in line and "optimizer" in line for line in lines)


def test_what_would_fit(fastd2o, config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = fastd2o("plan", "--model", config, *BATCH, "--gpu_memory", 1)
    assert result.code == 0
    assert "GPU with 1 GiB: does not fit. The step needs 1." in result.out
    assert "Nothing that was tried fits; what comes nearest (options of fastd2o train)" in result.out
    assert "--use_peft --dtype bfloat16 --gradient_checkpointing" in result.out


def test_nothing_is_allocated(config, monkeypatch, capsys):
    """A model of 7 billion parameters, in the memory of a test."""
    (config / "large").mkdir()
    settings = json.loads((config / "config.json").read_text())
    settings |= {"hidden_size": 40960, "intermediate_size": 40960, "num_attention_heads": 2, "head_dim": 64}
    (config / "large" / "config.json").write_text(json.dumps(settings))
    assert main(["plan", "--model", str(config / "large"), "--json", *map(str, BATCH)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["parameters"] > 7e9
    assert report["memory"]["moments"]["optimizer"]["weights"] > 28e9


def test_no_network_is_asked(fastd2o, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "model_info", pytest.fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", pytest.fail)
    result = fastd2o("plan", "--model", "meta-llama/Llama-3.1-8B")
    assert result.code == 1
    assert result.error == (
        "--model: there is no 'meta-llama/Llama-3.1-8B'. Fix: give the folder of a model or its config.json; nothing "
        "is downloaded for a plan"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not a valid JSON file"),
        ("[]", "is no configuration that can be planned with"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "no-such-model"}', "model type `no-such-model`"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}', "it needs code that comes with the model"),
        ('{"model_type": "t5"}', "no causal LM can be made from the configuration of t5"),
    ],
)
def test_a_configuration_that_cannot_be_planned_with(fastd2o, tmp_path, content, reason):
    (tmp_path / "config.json").write_text(content)
    result = fastd2o("plan", "--model", tmp_path)
    assert result.code == 1
    assert reason in result.error
    assert "Fix: " in result.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "--gpu 'h1000' is unknown, expected one of: rtx3090, rtx4090"),
        (["--gpu", "h100", "--gpu_memory", "80"], "--gpu and --gpu_memory both say how large the GPU is. Fix: "),
        (["--gpu", "h100", "--device", "cpu"], "--gpu and --gpu_memory are of a GPU, and --device is cpu. Fix: "),
        (["--gpu_memory", "-1"], "--gpu_memory is -1.0, expected GiB above 0"),
        (["--objective", "dpoo"], "objective 'dpoo' is unknown"),
        (["--groups", "0"], "groups is 0, expected at least 1"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--lora", "0"], "lora_rank is 0"),
    ],
)
def test_usage_errors(fastd2o, config, arguments, message):
    result = fastd2o("plan", "--model", config, *arguments)
    assert result.code == 2
    assert result.error.startswith(message)


def test_sequences_longer_than_the_model_reads(fastd2o, config):
    result = fastd2o("plan", "--model", config, "--prompt_length", 200, "--completion_length", 200)
    assert result.code == 1
    assert result.error.startswith("prompt_length + completion_length is 400, but the model reads at most 256 tokens")
