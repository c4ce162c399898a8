"""fastd2o train: from a dataset to a saved model, with every way of setting options."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.conftest import start
from tests.cli.tiny import CHAT_ROWS, TEXT_ROWS, save_tiny_model, write_jsonl

PAIRS = [{**row, "chosen": " that is a kind thing to say"} for row in TEXT_ROWS]
FAST = ("--per_device_train_batch_size", 2, "--learning_rate", "1e-3", "--logging_steps", 1, "--use_cpu", "--seed", 3)


@pytest.fixture
def pairs(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def losses(out):
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def options_of(out):
    return torch.load(out / "training_args.bin", weights_only=False)


def test_sample_then_train_d2o(fastd2o, model_dir, chat_rows, out, tmp_path):
    anchors = tmp_path / "anchors.jsonl"
    sampling = ("--num_anchors", 3, "--max_new_tokens", 8)
    assert fastd2o("sample", "--model", model_dir, "--dataset", chat_rows, "--out", anchors, *sampling).code == 0
    result = fastd2o(
        *("train", "--model", model_dir, "--dataset", anchors, "--objective", "d2o", "--output_dir", out),
        *("--num_train_epochs", 4, *FAST),
    )
    assert result.code == 0
    assert f"{anchors}: 6 rows, 6 kept" in result.out
    assert "step 12/12 | loss " in result.out
    assert f"The model is in {out}\nNext: fastd2o sample --model {out}" in result.out
    history = losses(out / "checkpoint-12")
    assert history[0] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1] < 0.6
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(trained.lm_head.weight, AutoModelForCausalLM.from_pretrained(model_dir).lm_head.weight)
    assert (
        fastd2o("sample", "--model", out, "--dataset", chat_rows, "--out", tmp_path / "after.jsonl", *sampling).code
        == 0
    )


@pytest.mark.parametrize("objective", ["dpo", "pairwise_cringe", "npo"])
def test_other_objectives(fastd2o, model_dir, pairs, out, objective):
    result = fastd2o(
        *("train", "--model", model_dir, "--dataset", pairs, "--objective", objective, "--output_dir", out),
        *("--num_train_epochs", 3, *FAST),
    )
    assert result.code == 0
    history = losses(out / "checkpoint-9")
    assert sum(history[-3:]) < sum(history[:3])


def test_a_good_run_is_quiet(fastd2o, model_dir, pairs, out):
    result = fastd2o(
        *("train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", "--output_dir", out),
        *("--max_steps", 2, *FAST, "--disable_tqdm"),
    )
    assert (result.code, result.err) == (0, "")
    assert "logps/rejected" in result.out


def test_config_gives_defaults_and_the_command_line_wins(fastd2o, model_dir, pairs, out, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model_dir}\ndataset: {pairs}\noutput_dir: {out}\nobjective: [dpo, npo]\nobjective_weights: [1, 0.5]\n"
        "beta: 0.2\nlearning_rate: 1e-4\nuse_cpu: true\nmax_steps: 1\nlogging_first_step: yes\nwarmup_steps: null\n"
        "lr_scheduler_kwargs: {}\nsave_strategy: no\nliger_kernel_config: {rope: false}\n"
    )
    assert fastd2o("train", "--config", config, "--beta", 0.3, "--logging_first_step", "false").code == 0
    options = options_of(out)
    assert (options.beta, options.learning_rate, options.max_steps) == (0.3, 1e-4, 1)
    assert (options.objective, options.objective_weights) == (["dpo", "npo"], [1.0, 0.5])
    assert options.use_cpu is True
    assert options.save_strategy == "no"
    assert options.liger_kernel_config == {"rope": False}
    assert options.logging_first_step is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' (did you mean learning_rate?)"),
        ("config: other.yaml", "unknown key 'config'"),
        ("- a", "holds a list; write one 'option: value' per line"),
        ("a: [", "is not valid YAML"),
        ("beta: much", "run.yaml: beta: invalid float value: 'much'"),
        ("max_steps: [1]", "run.yaml: max_steps: found the list [1], expected one value"),
        ("objective: []", "run.yaml: objective: found an empty list"),
        ("optim_args: {a: 1}", "run.yaml: optim_args: found the mapping {'a': 1}, expected a value"),
        ("eval_strategy: sometimes", "run.yaml: eval_strategy: invalid choice: 'sometimes'"),
        ("no_disable_dropout: 3", "run.yaml: no_disable_dropout: found 3, expected true or false"),
    ],
)
def test_bad_config(fastd2o, model_dir, pairs, out, tmp_path, content, message):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    result = fastd2o(
        "train", "--config", config, "--model", model_dir, "--dataset", pairs, "--output_dir", out, "--objective", "dpo"
    )
    assert result.code == 2
    assert message in result.error
    assert not out.exists()


def test_config_that_is_not_there(fastd2o):
    result = fastd2o("train", "--config", "nowhere.yaml")
    assert (result.code, result.error) == (2, "--config: there is no file 'nowhere.yaml'")


def test_resume_ends_like_a_run_that_was_never_stopped(fastd2o, model_dir, pairs, out):
    saving = ("--max_steps", 4, "--save_steps", 2)
    command = ("train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", *FAST, *saving)
    assert fastd2o(*command, "--output_dir", out).code == 0
    stopped = out.parent / "stopped"
    stopped.mkdir()
    shutil.copytree(out / "checkpoint-2", stopped / "checkpoint-2")
    assert fastd2o(*command, "--output_dir", stopped, "--resume_from_checkpoint").code == 0
    assert losses(stopped / "checkpoint-4") == losses(out / "checkpoint-4")
    expected, weights = load_file(out / "model.safetensors"), load_file(stopped / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    result = fastd2o(*command, "--output_dir", out.parent / "other", "--resume_from_checkpoint", out / "nowhere")
    assert result.code == 1
    assert "is not a checkpoint" in result.error


@pytest.mark.parametrize(
    ("save_steps", "message"),
    [
        (1, "interrupted; the same command with --resume_from_checkpoint goes on from {out}/checkpoint-"),
        (10**6, "interrupted before the first checkpoint (see --save_steps), so the run begins anew"),
    ],
)
def test_interrupted(model_dir, pairs, out, save_steps, message):
    process = start(
        *("train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", "--output_dir", out, *FAST),
        *("--max_steps", 10**6, "--save_steps", save_steps, "--save_total_limit", 2, "--disable_tqdm"),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith(f"fastd2o: error: {message.format(out=out)}")
    assert len(errors.splitlines()) == 1


def test_another_run_is_only_replaced_when_asked(fastd2o, model_dir, pairs, out):
    def train(*options):
        command = ("train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", "--output_dir", out)
        return fastd2o(*command, *FAST, "--max_steps", 1, *options)

    assert train().code == 0
    before = (out / "model.safetensors").read_bytes()
    result = train("--learning_rate", "1e-2")
    assert result.code == 1
    assert "holds another run" in result.error
    assert (out / "model.safetensors").read_bytes() == before
    assert train("--learning_rate", "1e-2", "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() != before


def test_peft_saves_an_adapter_that_sample_loads(fastd2o, model_dir, pairs, out, tmp_path):
    result = fastd2o(
        *("train", "--model", model_dir, "--dataset", pairs, "--objective", "npo", "--output_dir", out, *FAST),
        *("--max_steps", 2, "--use_peft", "--lora_r", 4, "--lora_alpha", 8),
    )
    assert result.code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    adapted = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not (out / "model.safetensors").exists()
    sampled = fastd2o(
        *("sample", "--model", out, "--dataset", pairs, "--out", tmp_path / "after.jsonl"),
        *("--num_anchors", 1, "--max_new_tokens", 4),
    )
    assert sampled.code == 0


def test_references_and_evaluation(fastd2o, model_dir, out, tmp_path):
    rows = [{**row, "anchors": [row["chosen"], row["chosen"]]} for row in CHAT_ROWS]
    dataset = write_jsonl(tmp_path / "anchors.jsonl", rows)
    other = save_tiny_model(tmp_path / "other")
    result = fastd2o(
        *("train", "--model", model_dir, "--dataset", dataset, "--eval_dataset", dataset, "--output_dir", out, *FAST),
        *("--ref_model", other, "--harmful_ref_model", other, "--max_steps", 2, "--eval_strategy", "steps"),
        *("--eval_steps", 1, "--attn_implementation", "eager", "--dtype", "float32"),
    )
    assert result.code == 0
    assert "evaluation, step 2/2 | loss " in result.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--objective", "d20"), 2, "d20"),
        (("--beta", "-1"), 2, "beta is -1.0"),
        (("--alpha", "0.1"), 2, "alpha is set, but the objective dpo does not read it"),
        (("--objective_weights", "1", "2"), 2, "objective_weights is [1.0, 2.0]"),
        (("--ref_cache_dir", "x"), 2, "Fix: --precompute_ref_log_probs as well"),
        (("--overwrite", "--resume_from_checkpoint"), 2, "overwrite and resume_from_checkpoint contradict each other"),
        (("--lora_r", "4"), 2, "--lora_r is set, but no adapter is trained. Fix: add --use_peft"),
        (("--use_peft", "--lora_dropout", "0.1"), 2, "--lora_dropout is set, but all dropout is off"),
        (("--model", "nowhere/model"), 1, "--model: there is no folder"),
        (("--ref_model", "/nowhere"), 1, "--ref_model: there is no folder '/nowhere'"),
        (("--harmful_ref_model", "/nowhere"), 1, "--harmful_ref_model: there is no folder '/nowhere'"),
        (("--dataset", "/nowhere.jsonl"), 1, "--dataset: there is no file '/nowhere.jsonl'"),
        (("--eval_dataset", "/nowhere.jsonl"), 1, "--eval_dataset: there is no file '/nowhere.jsonl'"),
        (("--max_length", "4"), 1, "6 of 6 rows cannot be used: prompt leaves no room within --max_length 4"),
        (("--max_length", "4"), 1, "or set --truncate_prompt to cut prompts on the left; or set --bad_rows drop"),
        (("--resume_from_checkpoint",), 1, "there is no checkpoint to resume from"),
    ],
)
def test_bad_options(fastd2o, model_dir, pairs, out, options, code, message):
    command = ("train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", "--output_dir", out, *FAST)
    result = fastd2o(*command, *options)
    assert result.code == code
    assert message in result.error
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.jsonl is empty"),
        ('{"prompt": "a", "rejected": " b"}\n{"prompt": "a", "rej', "bad.jsonl, line 2: broken JSON"),
        ('{"prompt": "a"}\n', "bad.jsonl, line 1: the columns prompt fit no format"),
        ('{"prompt": "a", "chosen": "", "rejected": " b"}\n', "empty completion: 1 (line 1)"),
        ('{"prompt": "a", "rejected": " b", "anchors": []}\n', "bad.jsonl"),
    ],
)
def test_bad_datasets(fastd2o, model_dir, out, tmp_path, content, message):
    dataset = tmp_path / "bad.jsonl"
    dataset.write_text(content)
    result = fastd2o("train", "--model", model_dir, "--dataset", dataset, "--output_dir", out, *FAST)
    assert result.code == 1
    assert message in result.error
    assert "Fix: " in result.error
    assert not out.exists()


def test_output_dir_that_is_a_file(fastd2o, model_dir, pairs):
    result = fastd2o("train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", "--output_dir", pairs)
    assert result.code == 1
    assert "is a file" in result.error


@pytest.mark.slow
def test_torchrun(model_dir, pairs, out):
    arguments = ["train", "--model", model_dir, "--dataset", pairs, "--objective", "dpo", "--output_dir", out, *FAST]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastd2o"]
    result = subprocess.run(
        [*launcher, *map(str, arguments), "--max_steps", "2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"The model is in {out}") == 1
    assert len(losses(out / "checkpoint-2")) == 2
