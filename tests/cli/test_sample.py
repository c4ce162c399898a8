"""fastd2o sample: from a model and negatives to a dataset, killed or not; every bad input leaves nothing behind."""

import signal
import time

import pytest

from fastd2o.training.sampling import INSTRUCTIONS, sample_anchors
from tests.cli.conftest import start
from tests.cli.tiny import CHAT_ROWS, TEXT_ROWS, read_jsonl, save_tiny_model, tiny_model, tiny_tokenizer, write_jsonl

FAST = ("--num_anchors", 2, "--max_new_tokens", 8, "--batch_size", 4)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS])
def test_result_is_that_of_the_function(fastd2o, model_dir, tmp_path, rows):
    dataset, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    result = fastd2o("sample", "--model", model_dir, "--dataset", dataset, "--out", out, *FAST)
    assert result.code == 0
    tokenizer = tiny_tokenizer()
    expected = sample_anchors(
        tiny_model(tokenizer), tokenizer, rows, num_anchors=2, max_new_tokens=8, batch_size=4, progress=False
    )
    assert read_jsonl(out) == expected
    assert "12 │ of 12 asked for" in result.out
    assert f"Instruction, for generation only: {INSTRUCTIONS['harmless']}" in result.out
    assert f"Next: fastd2o train --model {model_dir} --dataset {out} --objective d2o" in result.out
    assert [line for line in result.err.splitlines() if line and not line.startswith("Sampling: ")] == []


def test_config_gives_defaults_and_the_command_line_wins(fastd2o, model_dir, text_rows, tmp_path):
    config = tmp_path / "sample.yaml"
    config.write_text(
        f"model: {model_dir}\ndataset: {text_rows}\nnum_anchors: 3\nmax_new_tokens: 8\nseed: 5\noverwrite: true\n"
        "instruction: none\ndevice: null\n"
    )
    out = write_jsonl(tmp_path / "out.jsonl", [])
    result = fastd2o("sample", "--config", config, "--out", out, "--seed", 1)
    assert result.code == 0
    tokenizer = tiny_tokenizer()
    assert read_jsonl(out) == sample_anchors(
        tiny_model(tokenizer),
        tokenizer,
        TEXT_ROWS,
        num_anchors=3,
        max_new_tokens=8,
        seed=1,
        instruction="none",
        progress=False,
    )


def test_a_killed_run_goes_on_to_the_same_samples(fastd2o, model_dir, tmp_path):
    rows = [{**row, "prompt": f"{row['prompt']} {copy}"} for copy in range(4) for row in TEXT_ROWS]
    dataset, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    options = ("--num_anchors", 2, "--max_new_tokens", 16, "--batch_size", 4, "--instruction", "none")
    command = ("sample", "--model", model_dir, "--dataset", dataset, *options)
    partial = tmp_path / "out.jsonl.partial"
    process = start(*command, "--out", out)
    while not partial.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not out.exists()
    assert 1 < len(partial.read_bytes().splitlines()) < len(rows)
    assert fastd2o(*command, "--out", out).code == 0
    assert fastd2o(*command, "--out", tmp_path / "undisturbed.jsonl").code == 0
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert files(tmp_path) == ["out.jsonl", "rows.jsonl", "undisturbed.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.jsonl is empty"),
        ('{"prompt": "a", "rejected": " b"}\n{"prompt": "a", "rej', "bad.jsonl, line 2: broken JSON"),
        ('{"prompt": "a"}\n', "bad.jsonl, line 1: the columns prompt fit no format"),
        ('{"prompt": "a", "rejected": ""}\n', "bad.jsonl, line 1: the negative is empty"),
        ('{"prompt": "a", "completion": " b", "label": true}\n', "bad.jsonl has no row with a negative"),
        (f'{{"prompt": "{"the cat " * 300}", "rejected": " b"}}\n', "bad.jsonl, line 1: the prompt has"),
    ],
)
def test_bad_datasets(fastd2o, model_dir, tmp_path, content, message):
    dataset = tmp_path / "bad.jsonl"
    dataset.write_text(content)
    result = fastd2o("sample", "--model", model_dir, "--dataset", dataset, "--out", tmp_path / "out.jsonl", *FAST)
    assert result.code == 1
    assert message in result.error
    assert "Fix: " in result.error
    assert files(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "nowhere/model"), "--model: there is no folder '{tmp}/nowhere/model'"),
        (("--model", "text.jsonl"), "--model: '{tmp}/text.jsonl' is a file"),
        (("--model", "."), "--model: the folder '{tmp}/.' has no config.json"),
        (("--dataset", "nowhere.jsonl"), "--dataset: there is no file '{tmp}/nowhere.jsonl'"),
        (("--out", "text.jsonl"), "{tmp}/text.jsonl is the dataset, which the result would replace"),
        (("--out", "other.jsonl"), "{tmp}/other.jsonl exists. Fix: choose another file, or --overwrite to replace it"),
        (("--out", "text.jsonl/out.jsonl"), "{tmp}/text.jsonl/out.jsonl cannot be written: "),
        (("--out", "out.txt"), "{tmp}/out.txt does not end in .jsonl"),
    ],
)
def test_bad_paths(fastd2o, model_dir, text_rows, tmp_path, change, message):
    arguments = {"--model": model_dir, "--dataset": text_rows, "--out": tmp_path / "out.jsonl"}
    arguments[change[0]] = f"{tmp_path}/{change[1]}"
    write_jsonl(tmp_path / "other.jsonl", TEXT_ROWS)
    before = files(tmp_path)
    result = fastd2o("sample", *(word for pair in arguments.items() for word in pair), *FAST)
    assert result.code == 1
    assert result.error.startswith(message.format(tmp=tmp_path))
    assert "Fix: " in result.error
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--num_anchors", 0), 2, "num_anchors is 0; expected at least 1"),
        (("--temperature", 0), 2, "temperature is 0.0; expected a number above 0"),
        (("--top_p", 2), 2, "top_p is 2.0"),
        (("--instruction", "harmles"), 2, "instruction is 'harmles', which is no name of an instruction"),
        (("--max_new_tokens", 400), 1, "{tmp}/text.jsonl, line 1: the prompt has"),
    ],
)
def test_bad_options(fastd2o, model_dir, text_rows, tmp_path, options, code, message):
    result = fastd2o(
        "sample", "--model", model_dir, "--dataset", text_rows, "--out", tmp_path / "out.jsonl", *FAST, *options
    )
    assert result.code == code
    assert result.error.startswith(message.format(tmp=tmp_path))
    assert files(tmp_path) == ["text.jsonl"]


def test_messages_speak_of_options(fastd2o, model_dir, tmp_path):
    dataset = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "the cat " * 300, "rejected": " b"}])
    result = fastd2o("sample", "--model", model_dir, "--dataset", dataset, "--out", tmp_path / "out.jsonl", *FAST)
    assert "with --max_new_tokens 8 that is more than" in result.error
    assert result.error.endswith("or set --bad_rows drop to leave such rows out")


def test_conversation_without_a_chat_template(fastd2o, chat_rows, tmp_path):
    model = save_tiny_model(tmp_path / "model", chat_template=None)
    result = fastd2o("sample", "--model", model, "--dataset", chat_rows, "--out", tmp_path / "out.jsonl", *FAST)
    assert result.code == 1
    assert "the tokenizer has no chat template. Fix: " in result.error


def test_model_without_a_tokenizer(fastd2o, text_rows, tmp_path):
    tiny_model(tiny_tokenizer()).save_pretrained(tmp_path / "model")
    result = fastd2o(
        "sample", "--model", tmp_path / "model", "--dataset", text_rows, "--out", tmp_path / "out.jsonl", *FAST
    )
    assert result.code == 1
    assert result.error.startswith(f"--model: no tokenizer could be loaded from '{tmp_path}/model'")


def test_name_that_is_nowhere(fastd2o, text_rows, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = fastd2o(
        "sample", "--model", "no-such-model", "--dataset", text_rows, "--out", tmp_path / "out.jsonl", *FAST
    )
    assert result.code == 1
    assert result.error.startswith(
        "--model: there is no folder 'no-such-model', and the Hub gave no model of that name"
    )


def test_another_run_is_not_gone_on_with(fastd2o, model_dir, text_rows, tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text('{"fastd2o_sampling": 2, "seed": 7}\n')
    command = ("sample", "--model", model_dir, "--dataset", text_rows, "--out", out, *FAST)
    result = fastd2o(*command)
    assert result.code == 1
    assert "out.jsonl.partial is the beginning of another run: " in result.error
    assert "seed 7 instead of 0" in result.error
    assert fastd2o(*command, "--overwrite").code == 0
    assert files(tmp_path) == ["out.jsonl", "text.jsonl"]


def test_torchrun_is_refused(fastd2o, model_dir, text_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = fastd2o("sample", "--model", model_dir, "--dataset", text_rows, "--out", tmp_path / "out.jsonl", *FAST)
    assert result.code == 1
    assert result.error.startswith("sample runs as one process")
