"""fastd2o rounds: from a configuration to models and a report; every bad input is one line."""

import json
import re

import pytest

CONFIG = """\
model: {model}
dataset: {dataset}
output_dir: {out}
rounds: 1
num_samples: 3
builder: pairs
scorer:
  patterns: [e, a, th]
sampling:
  max_new_tokens: 6
train:
  objective: dpo
  learning_rate: 1e-3
  max_steps: 2
  use_cpu: true
  save_strategy: "no"
  disable_tqdm: true
"""


@pytest.fixture
def config(model_dir, text_rows, tmp_path):
    path = tmp_path / "rounds.yaml"
    path.write_text(CONFIG.format(model=model_dir, dataset=text_rows, out=tmp_path / "out"), encoding="utf-8")
    return path


def test_a_run_says_what_it_does_and_where_the_model_is(fastd2o, config, tmp_path):
    result = fastd2o("rounds", "--config", config)
    assert result.code == 0, result.err
    assert "round 1: train" in result.out
    assert re.search(r"^step 2/2 \| loss 0\.\d+ \| .*rewards/margins", result.out + result.err, re.MULTILINE)
    pairs = json.loads((tmp_path / "out" / "round-1" / "build.json").read_text(encoding="utf-8"))["pairs"]
    assert re.search(rf"│ +1 │ .*{pairs} pairs │", result.out)
    assert re.search(r"│ +last │", result.out)
    assert f"The model is in {tmp_path}/out/round-1/model" in result.out
    assert (tmp_path / "out" / "round-1" / "model" / "model.safetensors").is_file()
    assert f"The report: {tmp_path}/out/report.html" in result.out
    state = json.loads((tmp_path / "out" / "state.json").read_text(encoding="utf-8"))
    assert state["config"]["train"]["learning_rate"] == 1e-3  # a number, although YAML 1.1 has no such number

    again = fastd2o("rounds", "--config", config)
    assert again.code == 0
    assert "round 1: " not in again.out

    another = fastd2o("rounds", "--config", config, "--num_samples", 4)
    assert another.code == 1
    assert "is of another run: num_samples was 3, now is 4. Fix: give what that run was given" in another.error
    scorer = '{"function": "tests.training.scorers:raises"}'
    failed = fastd2o("rounds", "--config", config, "--scorer", scorer, "--output_dir", tmp_path / "failed")
    assert failed.code == 1
    assert "the scorer failed on the prompt of" in failed.error
    assert "line 3: RuntimeError: no credit left. Every finished sample and score is kept." in failed.error


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--num_samples", 1), 2, "num_samples is 1, but a pair is made of two completions of a prompt. Fix: "),
        (("--builder", "best"), 2, "builder is 'best', expected one of: pairs, anchors, labels"),
        (("--scorer", "{}"), 2, "scorer gives nothing; expected exactly one of"),
        (("--scorer", "patterns"), 2, "argument --scorer: invalid loads value: 'patterns'"),
        (("--train", '{"objectve": "dpo"}'), 2, "train: unknown option 'objectve' (did you mean objective?)"),
        (("--limits", '{"max_kl": 0}'), 2, "limits: max_kl is 0; expected a number above 0"),
        (("--rounds", 0), 2, "rounds is 0; expected at least 1"),
        (("--dataset", "nowhere.jsonl"), 1, "--dataset: there is no file 'nowhere.jsonl'"),
        (("--base_dataset", "nowhere.jsonl"), 1, "--base_dataset: there is no file 'nowhere.jsonl'"),
        (("--model", "./nowhere"), 1, "--model: there is no folder './nowhere'"),
        (("--rouns", 2), 2, "unrecognized argument '--rouns' (did you mean --rounds?)"),
    ],
)
def test_bad_options_leave_nothing(fastd2o, config, tmp_path, options, code, message):
    result = fastd2o("rounds", "--config", config, *options)
    assert result.code == code
    assert result.error.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_missing_option_is_named(fastd2o, config, tmp_path):
    config.write_text(CONFIG.replace("builder: pairs\n", "").format(model="m", dataset="d", out=tmp_path / "out"))
    result = fastd2o("rounds", "--config", config)
    assert result.code == 2
    assert "--builder" in result.error
